"""The item bank: its file, its fit, its calibration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from evomerge.errors import ExperimentError
from evomerge.fitness.anchors import select
from evomerge.fitness.bank import ItemBank, fit_bank
from evomerge.fitness.irt import Forecast, fit


def responses_of(abilities: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Return 0/1 responses [M, N] to items that each need one of the columns of abilities [M, D]."""
    rng = np.random.default_rng(seed)
    skill = rng.integers(abilities.shape[1], size=count)
    logit = abilities[:, skill] * rng.uniform(0.8, 2.0, count) - rng.normal(0.0, 1.5, count)
    return (rng.random(logit.shape) < expit(logit)).astype(float)


@pytest.fixture(scope="module")
def warmup() -> np.ndarray:
    """Thirty rows of one ability on 150 items."""
    return responses_of(np.random.default_rng(0).normal(size=(30, 1)), seed=1, count=150)


@pytest.fixture(scope="module")
def bank(warmup: np.ndarray) -> ItemBank:
    """A bank of 20 anchors."""
    return fit_bank(warmup, anchors=20, seed=3)


def test_a_bank_comes_back_from_json_and_file_bit_for_bit(bank: ItemBank, tmp_path: Path) -> None:
    """All floats survive, nothing else is left in the folder, and saving again replaces."""
    assert ItemBank.from_plain(json.loads(json.dumps(bank.to_plain()))) == bank
    path = tmp_path / "bank.json"
    for _ in range(2):
        bank.save(path)
        assert ItemBank.load(path) == bank
    assert [file.name for file in tmp_path.iterdir()] == ["bank.json"]


def test_a_bank_knows_its_items(bank: ItemBank, warmup: np.ndarray) -> None:
    """Totals, anchors and weights are those asked for; the same seed gives the same bank."""
    assert bank.total == 150
    assert bank.rows == 30
    assert len(bank.anchors) == len(bank.weights) == 20
    assert bank.spread >= 1.0
    assert fit_bank(warmup, anchors=20, seed=3) == bank
    easiest, hardest = np.argsort(-warmup.mean(axis=0))[[0, -1]]
    assert bank.difficulty[easiest] < bank.difficulty[hardest]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": []}, "do not match"),
        ({"difficulty": [0.0]}, "3 slopes and 1 difficulties"),
        ({"anchors": [1, 0]}, "sorted, distinct"),
        ({"anchors": [0, 0]}, "sorted, distinct"),
        ({"anchors": [0, 3]}, "in 0 to 2"),
        ({"anchors": [], "weights": []}, "at least one anchor"),
        ({"weights": [1.0]}, "a weight for each"),
        ({"spread": "wide"}, "spread: expected float"),
        ({"anchor": [0]}, "did you mean 'anchors'"),
    ],
)
def test_a_broken_bank_is_one_clear_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Whatever is wrong with the numbers or keys of a bank file."""
    good = {"slope": [1.0, 1.0, 1.0], "difficulty": [0.0, 0.1, 0.2], "anchors": [0, 2], "weights": [0.5, 0.5]}
    assert ItemBank.from_plain(good).total == 3
    path = tmp_path / "bank.json"
    path.write_text(json.dumps(good | change))
    with pytest.raises(ExperimentError, match=message) as caught:
        ItemBank.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_torn_file_is_named(tmp_path: Path) -> None:
    """Both say which file."""
    torn = tmp_path / "torn.json"
    torn.write_text('{"slope": [1.0')
    for path in (torn, tmp_path / "none.json"):
        with pytest.raises(ExperimentError, match=path.name):
            ItemBank.load(path)


def test_too_short_a_warm_up_says_the_way_out() -> None:
    """Rows that were asked nothing do not count."""
    responses = np.vstack([np.eye(3), np.full((4, 3), np.nan)])
    with pytest.raises(ExperimentError, match=r"got 3; make the warm-up longer, or use the estimator mean"):
        fit_bank(responses, anchors=2, seed=0)


def test_missing_responses_are_allowed(warmup: np.ndarray) -> None:
    """Also an item that nobody, and one that a single row, was asked."""
    responses = np.where(np.random.default_rng(2).random(warmup.shape) < 0.2, np.nan, warmup)[:9]
    responses[:, 0] = np.nan
    responses[1:, 1] = np.nan
    bank = fit_bank(responses, anchors=10, seed=0)
    assert np.isfinite([*bank.slope, *bank.difficulty, bank.spread]).all()


def test_asking_all_items_needs_no_calibration(warmup: np.ndarray) -> None:
    """Then nothing is predicted."""
    bank = fit_bank(warmup, anchors=150, seed=0)
    assert bank.anchors == tuple(range(150))
    assert bank.spread == 1.0


@pytest.mark.parametrize("skills", [1, 4])
def test_the_spread_makes_errors_right_on_candidates_not_seen(skills: int) -> None:
    """Where one ability is not the truth raw errors are too small; times the spread they match the real ones."""
    raw, calibrated, spreads = [], [], []
    for seed in range(4):
        abilities = np.random.default_rng(seed).normal(0.0, 1.5, size=(130, skills))
        responses = responses_of(abilities, seed=10 + seed, count=200)
        bank = fit_bank(responses[:30], anchors=30, seed=0)
        forecast, seen = Forecast(bank.parameters), np.array(bank.anchors)
        for row in responses[30:]:
            found, variance = forecast(seen, row[seen])
            raw.append((row.mean() - found) / np.sqrt(variance))
            calibrated.append(raw[-1] / bank.spread)
        spreads.append(bank.spread)
    assert 0.7 < np.sqrt(np.mean(np.square(calibrated))) < 1.2
    if skills > 1:
        assert np.sqrt(np.mean(np.square(raw))) > 1.2
        assert np.mean(spreads) > 1.1


def test_the_spread_is_taken_on_rows_that_neither_items_nor_anchors_have_seen() -> None:
    """It equals the root mean square z-score written out: five strided folds, items and anchors made without them."""
    responses = responses_of(np.random.default_rng(7).normal(0.0, 3.0, size=(23, 4)), seed=8, count=90)
    squares = []
    for row in range(23):
        others = responses[[other for other in range(23) if other % 5 != row % 5]]
        items = fit(others)
        seen = np.array(select("irt", others, items, 12, 6).items)
        found, variance = Forecast(items)(seen, responses[row, seen])
        squares.append((responses[row].mean() - found) ** 2 / variance)
    expected = np.sqrt(np.mean(squares))
    assert expected > 1.0, "or the floor of 1 would hide the rest"
    assert fit_bank(responses, anchors=12, seed=6, selection="irt").spread == pytest.approx(expected)
