"""mergekit's YAML: read into recipes, and written for the recipes that it can express."""

from evomerge.models.mergekit.reading import is_mergekit, read
from evomerge.models.mergekit.writing import expressible, to_mergekit

__all__ = ["expressible", "is_mergekit", "read", "to_mergekit"]
