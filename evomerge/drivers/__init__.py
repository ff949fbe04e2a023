"""Drivers propose genomes and learn from their losses; each file hides one library.

`DRIVERS` maps the names used in experiments to settings; `settings.start(problem)` gives a driver.
"""

from evomerge.drivers.cma import Cma
from evomerge.drivers.contract import Driver, Problem, Settings
from evomerge.drivers.generational import Generational, Strategy
from evomerge.drivers.nsga2 import Nsga2
from evomerge.drivers.random import Random
from evomerge.drivers.tpe import Tpe

#: The drivers by the name that experiments use.
DRIVERS: dict[str, type[Nsga2] | type[Cma] | type[Tpe] | type[Random]] = {
    "nsga2": Nsga2,
    "cma": Cma,
    "tpe": Tpe,
    "random": Random,
}

__all__ = [
    "DRIVERS",
    "Cma",
    "Driver",
    "Generational",
    "Nsga2",
    "Problem",
    "Random",
    "Settings",
    "Strategy",
    "Tpe",
]
