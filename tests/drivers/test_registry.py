"""Drivers by name: reading their plain form, drivers made of drivers, and what an experiment makes of them."""

from dataclasses import replace

import pytest

from evomerge.drivers import DRIVERS, Cma, Nsga2, Portfolio, Random, Settings, nested, plain_driver, read_driver
from evomerge.errors import ExperimentError
from evomerge.experiment import schema
from tests.toy import toy

NESTED = {
    "name": "portfolio",
    "drivers": [{"name": "nsga2", "population": 20}, "cma", {"name": "portfolio", "drivers": [{"name": "random"}]}],
    "floor": 0.3,
}
READ = Portfolio(drivers=(Nsga2(population=20), Cma(), Portfolio(drivers=(Random(),))), floor=0.3)


def test_a_driver_is_read_by_name():
    """A name alone is that driver at its defaults; a mapping gives settings."""
    assert read_driver("tpe", "here") == DRIVERS["tpe"]()
    assert read_driver({"name": "nsga2", "population": 8, "steady": True}, "here") == Nsga2(population=8, steady=True)


def test_drivers_within_drivers_are_read():
    """However deep they lie; each is the settings value that the constructor would have made."""
    assert read_driver(NESTED, "here") == READ


@pytest.mark.parametrize("name", sorted(DRIVERS))
def test_the_plain_form_is_read_back(name):
    """Every driver's settings come back from their plain form, which names those within too."""
    settings = DRIVERS[name]()

    assert isinstance(settings, Settings)
    assert read_driver(plain_driver(settings), "here") == settings
    assert plain_driver(settings)["name"] == name


def test_the_plain_form_names_what_is_within():
    """Two portfolios whose drivers have equal settings and other names are not the same."""
    plain = plain_driver(READ)

    assert [one["name"] for one in plain["drivers"]] == ["nsga2", "cma", "portfolio"]
    assert read_driver(plain, "here") == READ
    assert nested(Portfolio) == {"drivers": True}
    assert nested(Nsga2) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "^here.name: missing; known: nsga2, "),
        ({"name": "nsga"}, "^here.name: unknown driver 'nsga'; did you mean 'nsga"),
        (7, "^here: give the name of a driver, or a mapping"),
        ({"name": "nsga2", "populaton": 3}, "^here.populaton: unknown key; did you mean 'population'"),
        ({"name": "nsga2", "population": 1}, "^here: driver setting 'population' must be at least 2"),
        ({"name": "portfolio", "drivers": "nsga2"}, "^here.drivers: expected a list of drivers, got 'nsga2'"),
        ({"name": "portfolio", "drivers": [{"name": "cma"}, "no"]}, r"^here.drivers\[1\].name: unknown driver 'no'"),
        ({"name": "portfolio", "drivers": [{"name": "cma", "sigma": "x"}]}, r"^here.drivers\[0\].sigma: expected"),
        ({"name": "portfolio", "drivers": []}, "^here: a portfolio needs drivers"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(data, message):
    """The key path leads to the driver within, and names the way out."""
    with pytest.raises(ExperimentError, match=message):
        read_driver(data, "here")


def test_drivers_within_count_for_the_identity():
    """A run with another driver within, of the same settings, is another experiment."""
    experiment = toy("nsga2")
    one, two, three = (
        replace(experiment, driver=Portfolio(drivers=(kind(), Nsga2()))).identity
        for kind in (DRIVERS["random"], DRIVERS["sobol"], DRIVERS["random"])
    )

    assert DRIVERS["random"]().__dict__ == DRIVERS["sobol"]().__dict__
    assert one == three != two


def test_the_schema_lets_drivers_hold_drivers():
    """Where a driver is made of others the schema refers to itself, and gives those it has by default."""
    options = {form["properties"]["name"]["const"]: form for form in schema()["properties"]["driver"]["oneOf"]}
    own = options["portfolio"]["properties"]["drivers"]

    assert own["items"] == {"$ref": "#/properties/driver"}
    assert own["default"] == plain_driver(Portfolio())["drivers"]
    assert options["portfolio"]["required"] == ["name"]
    assert "drivers" not in options["nsga2"]["properties"]
