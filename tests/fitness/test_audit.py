"""The unbiased audit against enumeration and simulated repetitions."""

import numpy as np
import pytest
from scipy.stats import t as student

from evomerge.errors import ExperimentError
from evomerge.fitness.audit import Aipw
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Mean


def drawn(rows: int, items: int, seed: int) -> np.ndarray:
    """Return responses [M, N] with one strong common factor."""
    rng = np.random.default_rng(seed)
    chance = 1 / (1 + np.exp(-2.0 * rng.normal(size=(rows, 1)) + rng.normal(0.0, 2.0, items)))
    return (rng.random((rows, items)) < chance).astype(float)


def repeated(settings: Aipw | Mean, known: Responses, truth: np.ndarray, asked: int, seeds: int) -> np.ndarray:
    """Return value minus truth, and error, for each of so many random subsets [seeds, 2]."""
    found = []
    for seed in range(seeds):
        fit = settings.fit(known, seed)
        items = fit.choose(asked).items
        value, error = fit.estimate(items, truth[None, list(items)])
        found.append((value[0, 0] - truth.mean(), error[0, 0]))
    return np.array(found)


def test_it_is_unbiased_even_where_the_rows_mislead() -> None:
    """Rows that are all weak, a candidate that is strong: no bias over 500 subsets, and an error that is true."""
    values = drawn(60, 200, 0)
    weak = values[np.argsort(values.mean(axis=1))[:30]]
    strong = 1.0 - values[np.argmin(values.mean(axis=1))]
    away = repeated(Aipw(), Responses.of(weak), strong, asked=20, seeds=500)
    assert abs(away[:, 0].mean()) < 3.0 * away[:, 0].std() / np.sqrt(500)
    assert (away[:, 1] ** 2).mean() / away[:, 0].var() == pytest.approx(1.2, abs=0.3)


def test_its_error_is_that_of_a_part_of_a_finite_population() -> None:
    """With nine tenths of the items asked, the claimed error is the one that 150 subsets have."""
    values = drawn(61, 100, 4)
    away = repeated(Aipw(), Responses.of(values[:60]), values[60], asked=90, seeds=150)
    assert (away[:, 1] ** 2).mean() / (away[:, 0] ** 2).mean() == pytest.approx(1.1, abs=0.4)


def test_good_predictions_make_it_nearer_than_the_mean() -> None:
    """With rows like the candidate, its error is below nine tenths of the mean's at the same items."""
    values = drawn(101, 200, 1)
    truth = values[np.argsort(values.mean(axis=1))[50]]
    known = Responses.of(np.delete(values, np.argsort(values.mean(axis=1))[50], axis=0))
    ours, theirs = (repeated(settings, known, truth, 30, 150) for settings in (Aipw(), Mean()))
    assert np.sqrt((ours[:, 0] ** 2).mean()) < 0.9 * np.sqrt((theirs[:, 0] ** 2).mean())


def test_without_rows_it_is_the_mean() -> None:
    """Constant predictions are corrected to the mean of what was asked, up to the halves added by the prior."""
    known = Responses.of(np.zeros((0, 50)))
    truth = drawn(1, 50, 2)[0]
    items = Aipw().fit(known, 0).choose(25).items
    value = Aipw().fit(known, 0).estimate(items, truth[None, list(items)]).value_CK[0, 0]
    assert value == pytest.approx(truth[list(items)].mean(), abs=1e-9)


def test_intervals_cover() -> None:
    """90 % intervals of 300 subsets hold the truth 85 to 97 times in 100 (Student's law: errors come from 15 items)."""
    values = drawn(61, 150, 3)
    known, truth = Responses.of(values[:60]), values[60]
    inside = []
    for seed in range(300):
        fit = Aipw().fit(known, seed)
        items = fit.choose(15).items
        value_CK, error_CK = fit.estimate(items, truth[None, list(items)])
        inside.append(abs(truth.mean() - value_CK[0, 0]) <= student(df=14).ppf(0.95) * error_CK[0, 0])
    assert 0.85 < np.mean(inside) < 0.97


@pytest.mark.parametrize("settings", [{"folds": 1}, {"shrinkage": 0.0}, {"shrinkage": 1.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    """With what was given."""
    with pytest.raises(ExperimentError, match="aipw: folds must be"):
        Aipw(**settings)
