"""Drivers propose genomes and learn from their losses; each file hides one library.

`DRIVERS` maps the names used in experiments to settings, and `read_driver` reads them; `settings.start(problem)` gives
a driver.
"""

from evomerge.drivers.cma import Cma
from evomerge.drivers.contract import NOTHING, Detail, Driver, Problem, Settings
from evomerge.drivers.gp import Gp
from evomerge.drivers.greedy import Greedy
from evomerge.drivers.grid import Grid
from evomerge.drivers.m2n2 import M2n2
from evomerge.drivers.map_elites import MapElites
from evomerge.drivers.nsga2 import Nsga2
from evomerge.drivers.nsga3 import Nsga3
from evomerge.drivers.portfolio import Portfolio
from evomerge.drivers.random import Random
from evomerge.drivers.registry import DRIVERS, default_driver, nested, plain_driver, read_driver
from evomerge.drivers.screened import Screened
from evomerge.drivers.serving import Generational, Result, SteadyState, Strategy, serve, strategy_of
from evomerge.drivers.sobol import Sobol
from evomerge.drivers.tpe import Tpe

__all__ = [
    "DRIVERS",
    "NOTHING",
    "Cma",
    "Detail",
    "Driver",
    "Generational",
    "Gp",
    "Greedy",
    "Grid",
    "M2n2",
    "MapElites",
    "Nsga2",
    "Nsga3",
    "Portfolio",
    "Problem",
    "Random",
    "Result",
    "Screened",
    "Settings",
    "Sobol",
    "SteadyState",
    "Strategy",
    "Tpe",
    "default_driver",
    "nested",
    "plain_driver",
    "read_driver",
    "serve",
    "strategy_of",
]
