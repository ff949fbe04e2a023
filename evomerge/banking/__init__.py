"""Makes item banks: reads responses in any of the forms that people have them in, and fits them."""

from evomerge.banking.making import Made, make_bank, shown
from evomerge.banking.reading import read_responses

__all__ = ["Made", "make_bank", "read_responses", "shown"]
