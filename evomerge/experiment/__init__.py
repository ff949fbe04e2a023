"""Experiments: YAML files, checked to the last key, and resolved into values that a search can use."""

from evomerge.experiment.entries import ExperimentFile, schema
from evomerge.experiment.reading import read_file
from evomerge.experiment.resolving import Experiment, load, resolve
from evomerge.experiment.staging import Stages, read_stages

__all__ = ["Experiment", "ExperimentFile", "Stages", "load", "read_file", "read_stages", "resolve", "schema"]
