"""Search spaces: pure and total maps from genomes to recipes."""
