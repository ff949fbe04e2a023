"""The drivers by name, as an experiment file gives them; some are made of others."""

import typing
from collections.abc import Mapping
from types import MappingProxyType

from evomerge.drivers.cma import Cma
from evomerge.drivers.contract import Settings
from evomerge.drivers.gp import Gp
from evomerge.drivers.greedy import Greedy
from evomerge.drivers.grid import Grid
from evomerge.drivers.m2n2 import M2n2
from evomerge.drivers.map_elites import MapElites
from evomerge.drivers.nsga2 import Nsga2
from evomerge.drivers.nsga3 import Nsga3
from evomerge.drivers.portfolio import Portfolio
from evomerge.drivers.random import Random
from evomerge.drivers.screened import Screened
from evomerge.drivers.sobol import Sobol
from evomerge.drivers.tpe import Tpe
from evomerge.errors import ExperimentError, nearest
from evomerge.value import Plain, parse, plain

#: The class of settings of each name.
DRIVERS: Mapping[str, type[Settings]] = MappingProxyType(
    {
        "nsga2": Nsga2,
        "nsga3": Nsga3,
        "cma": Cma,
        "tpe": Tpe,
        "gp": Gp,
        "random": Random,
        "sobol": Sobol,
        "grid": Grid,
        "greedy": Greedy,
        "map_elites": MapElites,
        "m2n2": M2n2,
        "portfolio": Portfolio,
        "screened": Screened,
    }
)


def default_driver(stacked: bool) -> Settings:
    """Return the driver of an experiment that names none: what docs/search.md found best.

    It was the same for few axes, for many, and for options with conditions.

    Args:
        stacked: whether candidates are stacks of layers, which were not compared; there it is that of their benchmark.
    """
    if stacked:
        return Nsga2(population=32)
    return Screened(driver=Portfolio(drivers=(M2n2(), MapElites(), Nsga2(crossover_eta=5.0))))


def read_driver(data: Plain, place: str) -> Settings:
    """Return the settings of a driver of their plain form: its name, or a mapping with the key `name` and settings.

    A setting that is a driver itself, or a list of drivers, is read likewise.

    Example::

        read_driver({"name": "nsga2", "population": 20}, "experiment.driver")

    Args:
        data: as read from JSON or YAML.
        place: file and key path, named in errors.

    Raises:
        ExperimentError: if the name is unknown or missing, or a setting is refused.
    """
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping):
        raise ExperimentError(f"{place}: give the name of a driver, or a mapping with the key name, got {data!r}")
    name = data.get("name")
    if name is None:
        raise ExperimentError(f"{place}.name: missing; known: {', '.join(DRIVERS)}")
    if name not in DRIVERS:
        raise ExperimentError(f"{place}.name: unknown driver {name!r}; {nearest(str(name), DRIVERS)}")
    kind = DRIVERS[name]
    inner = nested(kind)
    given = {key: _read(item, f"{place}.{key}", inner.get(key)) for key, item in data.items() if key != "name"}
    return parse(kind, given, place, ExperimentError)


def plain_driver(settings: Settings) -> Plain:
    """Return the plain form of a driver's settings, which `read_driver` reads back."""
    own = type(settings)
    # One that is not among them has no name to be read back by; it still decides what a run is.
    name = next((name for name, kind in DRIVERS.items() if own is kind), own.__name__)
    inner = nested(own)
    given: dict[str, Plain] = plain(settings)
    for key, several in inner.items():
        inside = getattr(settings, key)
        given[key] = [plain_driver(one) for one in inside] if several else plain_driver(inside)
    return {"name": name, **given}


def nested(kind: type[Settings]) -> dict[str, bool]:
    """Return which settings of a driver are drivers themselves; true: a list of them."""
    hints = typing.get_type_hints(kind)
    several = tuple[Settings, ...]
    return {name: hint == several for name, hint in hints.items() if hint in (Settings, several)}


def _read(data: Plain, place: str, several: bool | None) -> Plain:
    """Return a setting as it is, or the drivers that it gives."""
    if several is None:
        return data
    if not several:
        return read_driver(data, place)
    if not isinstance(data, list | tuple):
        raise ExperimentError(f"{place}: expected a list of drivers, got {data!r}")
    return tuple(read_driver(one, f"{place}[{i}]") for i, one in enumerate(data))
