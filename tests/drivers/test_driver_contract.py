"""What every driver must keep, whatever library it hides: one contract, inherited per driver and manner."""

import json
import os
import subprocess
import sys

import pytest

from evomerge.drivers import DRIVERS, Cma, Nsga2, Problem, Random, Tpe
from evomerge.errors import ExperimentError, RecipeError
from tests.drivers.contract import (
    CUBE,
    MIXED,
    TINY,
    Batches,
    DriverContract,
    FrontContract,
    LearningContract,
    Steady,
    asks,
    mixed,
    problem,
    run,
)


class TestNsga2(Batches, FrontContract):
    """NSGA-II keeps the contract."""

    settings = Nsga2(population=14)


class TestNsga2FewOffspring(Batches, DriverContract):
    """NSGA-II with fewer offspring than population keeps the contract."""

    settings = Nsga2(population=5, offspring=5, mutation_rate=0.4)


class TestTpe(Batches, FrontContract):
    """TPE keeps the contract."""

    settings = Tpe()
    budget = 140


class TestCma(Batches, FrontContract):
    """CMA-ES keeps the contract."""

    settings = Cma()


class TestCmaSteady(Steady, FrontContract):
    """CMA-ES in steady state keeps the contract, but that it learns from a population at a time."""

    settings = Cma(steady=True)
    learns = False


class TestCmaSum(Batches, LearningContract):
    """CMA-ES on the weighted sum keeps the contract."""

    settings = Cma(scalarise="sum", damping=0.5)


class TestNsga2Steady(Steady, FrontContract):
    """NSGA-II in steady state keeps the contract."""

    settings = Nsga2(population=14, steady=True)


class TestTpeSteady(Steady, FrontContract):
    """TPE in steady state keeps the contract."""

    settings = Tpe(steady=True)
    budget = 140


class TestRandomSteady(Steady, DriverContract):
    """Random search in steady state keeps the contract."""

    settings = Random(batch=6, steady=True)
    learns = False


class TestRandom(Batches, DriverContract):
    """Random search keeps the contract."""

    settings = Random(batch=6)


SCRIPT = """
import json, sys
import evomerge.drivers as drivers
loaded = {"pymoo", "optuna", "cma", "ribs", "torch", "ray"} & set(sys.modules)
assert not loaded, loaded
sys.path.insert(0, sys.argv[1])
from contract import MIXED, asks, mixed, run
found = {}
for name, kind in drivers.DRIVERS.items():
    driver = kind().start(drivers.Problem(axes=MIXED, objectives=2, seed=4))
    found[name] = asks(run(driver, mixed, 60))
print(json.dumps(found))
"""


def test_another_process_gives_the_same_run(request):
    """Another process with another hash seed proposes the same; importing drivers loads no optimiser."""
    here = str(request.path.parent)
    root = str(request.config.rootpath)
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": root}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, here], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""

    for name, found in json.loads(out.stdout).items():
        assert [tuple(genome) for genome in found] == asks(run(DRIVERS[name]().start(problem(MIXED, 2, 4)), mixed, 60))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nsga2(population=1), "'population' must be at least 2, got 1"),
        (lambda: Nsga2(offspring=0), "'offspring' must be at least 1, got 0"),
        (lambda: Nsga2(mutation_rate=-0.1), "'mutation_rate' must be at least 0"),
        (lambda: Cma(population=2), "'population' must be at least 4, got 2"),
        (lambda: Cma(sigma=0.0), "'sigma' must be at least"),
        (lambda: Tpe(batch=0), "'batch' must be at least 1, got 0"),
        (lambda: Random(batch=0), "'batch' must be at least 1, got 0"),
        (lambda: Problem(axes=(), objectives=1, seed=0), "no axes"),
        (lambda: Problem(axes=CUBE, objectives=0, seed=0), "needs an objective"),
        (lambda: Problem(axes=CUBE, objectives=2, seed=0, weights=(1.0,)), "weights must be 2"),
        (lambda: Problem(axes=CUBE, objectives=2, seed=0, weights=(0.0, 0.0)), "not all 0"),
    ],
)
def test_settings_out_of_range(make, message):
    """Settings and problems that cannot be used name the setting, its bound and the value."""
    with pytest.raises(ExperimentError, match=message):
        make()


def test_known_candidates_must_fit():
    """A known genome outside the axes, or losses that are not finite, are refused with their place."""
    with pytest.raises(RecipeError, match="known candidate 0: gene"):
        Problem(axes=TINY, objectives=1, seed=0, known=((("z", 1), (0.0,)),))
    with pytest.raises(ValueError, match="known candidate 0: expected 1 finite"):
        Problem(axes=TINY, objectives=1, seed=0, known=((("a", 1), (float("inf"),)),))


def test_a_start_must_fit():
    """A genome to begin with that lies outside the axes is refused, and what is wrong with it is said."""
    for start, message in (
        (("z", 1), "^start: gene 'z' is not within the axis"),
        (("a", 9), "^start: gene 9 is not within the axis"),
        (("a",), "^start: the genome has 1 genes, the search space has 2 axes"),
    ):
        with pytest.raises(RecipeError, match=message):
            Problem(axes=TINY, objectives=1, seed=0, start=start)
    assert Problem(axes=TINY, objectives=1, seed=0, start=("c", 3)).start == ("c", 3)
