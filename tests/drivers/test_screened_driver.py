"""Screening: the contract, choices against the truth and against plain volumes, the model against another library's."""

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import Cma, Detail, Nsga2, Problem, Random, Screened, read_driver
from evomerge.drivers.forecast import Forecast, features
from evomerge.drivers.screened import promising
from evomerge.errors import ExperimentError
from evomerge.genome import from_unit
from tests.drivers.contract import CUBE, MIXED, TINY, Batches, DriverContract, FrontContract, Steady, asks, run


class TestScreened(Batches, FrontContract):
    """Screened NSGA-II keeps the contract."""

    settings = Screened(driver=Nsga2(population=14), factor=4)


class TestScreenedSteady(Steady, FrontContract):
    """Screened NSGA-II in steady state keeps the contract."""

    settings = Screened(driver=Nsga2(population=14), factor=4, steady=True)


class TestScreenedRandom(Batches, DriverContract):
    """Screened random search keeps the contract of drivers."""

    settings = Screened(driver=Random(batch=8), factor=4)


class TestScreenedCma(Batches, DriverContract):
    """Screened CMA-ES keeps the contract of drivers."""

    settings = Screened(driver=Cma(), factor=4)


def linear(genome):
    """One loss, a weighted sum of six coordinates."""
    return (float(np.dot(genome, (3.0, -2.0, 1.0, 0.5, -1.0, 2.0))),)


class Recorder:
    """Stands in for a strategy: draws at random, and remembers what it was asked and given back."""

    def __init__(self, strategy):
        self._strategy = strategy
        self.proposed, self.dropped = [], []

    def propose(self, step, factor=1):
        """Return and remember genomes."""
        self.proposed = self._strategy.propose(step, factor)
        return list(self.proposed)

    def drop(self, genomes):
        """Remember what comes back."""
        self.dropped = list(genomes)

    def __getattr__(self, name):
        return getattr(self._strategy, name)


def recorded(settings, axes=CUBE, objectives=1, known=60, function=linear):
    """A driver that knows random genomes, and its recorder."""
    rng = np.random.default_rng(0)
    genomes = [from_unit(axes, rng.random(len(axes))) for _ in range(known)]
    scored = tuple((genome, function(genome)) for genome in genomes)
    driver = settings.start(Problem(axes=axes, objectives=objectives, seed=1, known=scored))
    driver.strategy._strategy = recorder = Recorder(driver.strategy._strategy)
    return driver, recorder


def test_on_a_line_the_model_picks_what_the_truth_would():
    """Of 40 random genomes the ten are asked that a linear function is least for; the others come back."""
    driver, recorder = recorded(Screened(driver=Random(batch=10), factor=4, open=0.0))
    asked = [driver.ask() for _ in range(10)]
    best = sorted(recorder.proposed, key=linear)

    assert len(recorder.proposed) == 40
    assert len(set(asked) & set(best[:10])) >= 9
    assert set(asked) <= set(best[:12])
    assert set(recorder.dropped) == set(recorder.proposed) - set(asked)
    assert driver.ask() is None


def test_some_are_asked_as_they_come():
    """A quarter of a generation are the first that were proposed; in steady state, every fourth genome."""
    driver, recorder = recorded(Screened(driver=Random(batch=12), factor=3))
    asked = [driver.ask() for _ in range(12)]
    assert len(recorder.proposed) == 36
    assert asked[:3] == recorder.proposed[:3]
    assert asked[3:] != recorder.proposed[3:12]

    driver, recorder = recorded(Screened(driver=Random(batch=12), factor=3, steady=True))
    sizes = []
    for _ in range(8):
        driver.ask()
        sizes.append(len(recorder.proposed))
    assert sizes == [3, 3, 3, 1] * 2


def test_nothing_is_screened_before_enough_is_known():
    """Up to `startup` scored candidates the driver's own genomes are asked; failures do not count."""
    plain, screened = Random(batch=5), Screened(driver=Random(batch=5), startup=10)
    one, two = (s.start(Problem(axes=CUBE, objectives=1, seed=4)) for s in (plain, screened))
    events = run(one, linear, 30, fails=lambda i: i == 0)
    found = asks(run(two, linear, 30, fails=lambda i: i == 0))

    assert found[:15] == asks(events)[:15]  # after ten, nine are scored
    assert found[15:20] != asks(events)[15:20]


def test_a_factor_of_one_changes_nothing():
    """With nothing to choose from, the run is that of the driver alone."""
    alone, screened = Nsga2(population=8), Screened(driver=Nsga2(population=8), factor=1)
    runs = [asks(run(s.start(Problem(axes=CUBE, objectives=1, seed=4)), linear, 60)) for s in (alone, screened)]

    assert runs[0] == runs[1]


def test_choices_add_the_greatest_volume():
    """The choice is the plain greedy one: each time, who adds most to the volume of front and chosen together."""
    rng = np.random.default_rng(3)
    known, foretold = rng.random((40, 3)), rng.random((25, 3)) * 0.3
    chosen = promising(foretold, known, (1.2, 1.2, 1.2), 6)

    alone = [pareto.hypervolume(np.concatenate([known, one[None]]), (1.2, 1.2, 1.2)) for one in foretold]
    assert chosen != np.argsort(alone)[::-1][:6].tolist()
    have, left = known, set(range(25))
    for i in chosen:
        volumes = {j: pareto.hypervolume(np.concatenate([have, foretold[[j]]]), (1.2, 1.2, 1.2)) for j in left}
        assert volumes[i] == pytest.approx(max(volumes.values()))
        have = np.concatenate([have, foretold[[i]]])
        left.remove(i)


def test_who_adds_nothing_is_ranked_by_how_far_it_lies_behind():
    """Behind a front of two, the nearest comes first, in widths of what is known; who lies before it, before all."""
    known = np.array([[0.0, 10.0], [1.0, 0.0]])
    foretold = np.array([[1.5, 12.0], [1.05, 5.0], [1.2, 1.0], [0.5, 5.0]])

    # The first is 0.2 behind the one and 0.5 behind the other, the second 0.05 and the third 0.1 behind the other.
    assert promising(foretold, known, None, 4) == [3, 1, 2, 0]


def test_the_model_is_the_conditional_mean():
    """The forecast equals that of scikit-learn's Gaussian process with the kernel that was found likeliest."""
    process = pytest.importorskip("sklearn.gaussian_process")
    rng = np.random.default_rng(0)
    genomes = [from_unit(CUBE, rng.random(6)) for _ in range(50)]
    losses = np.array([(np.sin(4 * g[0]) + g[1], g[2] ** 2 + 0.1 * rng.standard_normal()) for g in genomes])
    fresh = [from_unit(CUBE, rng.random(6)) for _ in range(20)]
    found = Forecast(CUBE, genomes, losses)
    x, z = features(CUBE, genomes), features(CUBE, fresh)

    for k in range(2):
        y = losses[:, k] - losses[:, k].mean()
        best, value = None, -np.inf
        for length in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
            for noise in (1e-3, 1e-2, 1e-1):
                kernel = process.kernels.Matern(length * found._unit, nu=2.5)
                variance = y @ np.linalg.solve(kernel(x) + noise * np.eye(50), y) / 50
                scaled = process.kernels.ConstantKernel(variance, "fixed") * kernel
                model = process.GaussianProcessRegressor(scaled, alpha=noise * variance, optimizer=None).fit(x, y)
                if model.log_marginal_likelihood_value_ > value:
                    best, value = model, model.log_marginal_likelihood_value_
        assert found.losses(fresh)[:, k] == pytest.approx(best.predict(z) + losses[:, k].mean(), abs=1e-6)


def test_genes_that_do_not_count_are_alike():
    """Genomes that differ in a gene without effect are one point, and two options are as far apart as any other two."""
    one = (0.5, 0.1, 3, "slerp", 0.2)
    points = features(MIXED, [one, (*one[:4], 0.9), (*one[:3], "linear", 0.2), (*one[:3], "ties", 0.5)])

    assert (points[0] == points[1]).all()
    assert np.linalg.norm(points[0] - points[2]) == pytest.approx(1)
    # "ties" makes the density count: 0.5 lies 4/9 up its axis, a density that does not count at 1/2
    assert np.linalg.norm(points[0] - points[3]) == pytest.approx(np.hypot(1, 1 / 2 - 4 / 9))


def test_equal_genomes_and_losses_are_foretold():
    """Where nothing differs, the forecast is what is known."""
    genomes = [("a", 1), ("a", 1), ("a", 1)]

    assert Forecast(TINY, genomes, np.array([[2.0], [2.0], [2.0]])).losses([("b", 0)]).tolist() == [[2.0]]


def test_revised_losses_count():
    """After the losses of all were told again with another sign, the choice is the opposite."""
    settings = Screened(driver=Random(batch=30), factor=4, open=0.0, startup=25)
    driver = settings.start(Problem(axes=CUBE, objectives=1, seed=2))
    genomes = [driver.ask() for _ in range(30)]
    for index, genome in enumerate(genomes):
        driver.tell(index, genome, linear(genome), Detail())
    for index, genome in enumerate(genomes):
        driver.revise(index, (-linear(genome)[0],))
    asked = [driver.ask() for _ in range(30)]

    assert np.mean([linear(genome) for genome in asked]) > np.mean([linear(genome) for genome in genomes]) + 1


def test_settings_are_read_and_refused():
    """The inner driver is read from its plain form, and settings out of range are named."""
    found = read_driver({"name": "screened", "driver": {"name": "random", "batch": 3}, "factor": 2}, "driver")
    assert found == Screened(driver=Random(batch=3), factor=2)
    assert (found.generation(5), Screened().libraries) == (3, ("pymoo",))
    for make, message in (
        (lambda: Screened(factor=0), "'factor' must be at least 1, got 0"),
        (lambda: Screened(open=1.5), "'open' must be at most 1, got 1.5"),
        (lambda: Screened(startup=1), "'startup' must be at least 2, got 1"),
    ):
        with pytest.raises(ExperimentError, match=message):
            make()
