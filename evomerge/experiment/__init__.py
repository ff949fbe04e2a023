"""Experiment files: read, checked to the last key, and resolved."""

from evomerge.experiment.entries import ExperimentFile, schema
from evomerge.experiment.reading import read_file
from evomerge.experiment.resolving import Experiment, load, resolve

__all__ = ["Experiment", "ExperimentFile", "load", "read_file", "resolve", "schema"]
