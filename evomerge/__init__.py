"""Search for the best merges of language models: genomes, recipes, candidates, fronts.

The public names, each imported from its module when it is first used, so that none is waited for in vain::

    experiment = evomerge.load(Path("experiments/quickstart.yaml"))
    with evomerge.prepare(experiment, folder) as ledger, evomerge.open_pool(experiment) as pool:
        evomerge.Search(experiment, ledger, pool).run()
    run = evomerge.open_run(folder)
    events = evomerge.read_ledger(folder / "ledger.jsonl")
    evomerge.export_models(experiment, run, events, run.models(), folder / "pareto")
"""

import importlib
from typing import Any

__version__ = "0.5.0"

#: Module and name of everything public.
_PUBLIC = {
    "DRIVERS": ("drivers", "DRIVERS"),
    "EvomergeError": ("errors", "EvomergeError"),
    "Experiment": ("experiment", "Experiment"),
    "METHODS": ("stages", "METHODS"),
    "Recipe": ("recipe", "Recipe"),
    "Run": ("run", "Run"),
    "Search": ("search", "Search"),
    "export_models": ("export", "export_models"),
    "load": ("experiment", "load"),
    "merge": ("operators", "merge"),
    "open_pool": ("search", "open_pool"),
    "open_run": ("run", "open_run"),
    "prepare": ("search", "prepare"),
    "read_ledger": ("ledger", "read"),
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    module, found = _PUBLIC[name]
    return getattr(importlib.import_module(f"evomerge.{module}"), found)
