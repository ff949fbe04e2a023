"""Estimators: closed forms, coverage on simulated populations, and real responses where they are at hand."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom

from evomerge.fitness.bank import ItemBank, fit_bank
from evomerge.fitness.estimators import Estimator, Mean, PIrt

BANK = ItemBank(
    slope=(1.0, 1.5, 0.5, 2.0), difficulty=(0.0, 1.0, -1.0, 0.5), anchors=(0, 3), weights=(0.5, 0.5), spread=1.0
)


class Contract:
    """What every estimator keeps."""

    estimator: Estimator

    def test_order_of_items_does_not_matter(self) -> None:
        """Items are a set."""
        forth = self.estimator.score([0, 1, 3], [1.0, 0.0, 0.5])
        back = self.estimator.score([3, 1, 0], [0.5, 0.0, 1.0])
        assert forth.value == pytest.approx(back.value)
        assert forth.error == pytest.approx(back.error)
        assert forth.items == 3

    @pytest.mark.parametrize("response", [0.0, 0.3, 1.0])
    def test_no_score_is_certain_or_outside_the_unit_interval(self, response: float) -> None:
        """All right and all wrong have errors too."""
        for items in ([2], [0, 1, 2, 3]):
            found = self.estimator.score(items, [response] * len(items))
            assert 0.0 <= found.value <= 1.0
            assert 0.02 < found.error < 0.7

    @pytest.mark.parametrize(
        ("items", "responses", "message"),
        [
            ([], [], "one response per item"),
            ([0, 1], [1.0], "2 items, 1 responses"),
            ([1, 1], [1.0, 0.0], "distinct"),
            ([4], [1.0], "split of 4 items"),
            ([-1], [1.0], "split of 4 items"),
            ([0], [1.2], "responses must lie"),
            ([0], [float("nan")], "responses must lie"),
        ],
    )
    def test_nonsense_is_refused(self, items: list[int], responses: list[float], message: str) -> None:
        """With a line that says what was wrong."""
        with pytest.raises(ValueError, match=message):
            self.estimator.score(items, responses)


class TestMean(Contract):
    """The plain mean."""

    estimator = Mean(4)

    def test_value_and_error_have_their_closed_forms(self) -> None:
        """12 of 16: middle 14 / 20, squared error .7 * .3 / 16 + .05^2."""
        found = Mean().score(range(16), [1.0] * 12 + [0.0] * 4)
        assert found.value == 0.75
        assert found.error == pytest.approx(np.sqrt(0.7 * 0.3 / 16 + 0.05**2))

    def test_fractional_responses_use_their_own_variance(self) -> None:
        """Sixteen halves leave only the doubt of the four added answers: squared error 4 * .25 / (20 * 16)."""
        assert Mean().score(range(16), [0.5] * 16).error == pytest.approx(np.sqrt(1 / 320))

    def test_error_becomes_the_usual_one_with_many_items(self) -> None:
        """The added answers fade: sqrt(p (1 - p) / n)."""
        found = Mean().score(range(10_000), [1.0] * 2_000 + [0.0] * 8_000)
        assert found.error == pytest.approx(np.sqrt(0.2 * 0.8 / 10_000), rel=1e-3)

    @pytest.mark.parametrize("n", [20, 40, 200])
    def test_intervals_cover_the_truth_about_95_times_in_100(self, n: int) -> None:
        """By the exact binomial law, at every probability on a fine grid from .01 to .99."""
        intervals = np.array([Mean().score(range(n), [1.0] * k + [0.0] * (n - k)).interval for k in range(n + 1)])
        for p in np.linspace(0.01, 0.99, 99):
            inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
            assert binom.pmf(np.arange(n + 1), n, p)[inside].sum() > 0.92


class TestPIrt(Contract):
    """p-IRT."""

    estimator = PIrt(BANK)

    def test_given_all_items_it_is_the_mean(self) -> None:
        """Nothing is left to predict."""
        responses = [1.0, 0.0, 0.25, 1.0]
        assert PIrt(BANK).score(range(4), responses) == Mean().score(range(4), responses)

    def test_error_combines_calibrated_forecast_and_sampling_of_the_items(self) -> None:
        """Doubling the spread quadruples that part of the squared error which is not sampling."""
        wide = PIrt(ItemBank.from_plain(BANK.to_plain() | {"spread": 2.0}))
        narrow, wider = (pirt.score([0, 3], [1.0, 0.0]) for pirt in (PIrt(BANK), wide))
        assert narrow.value == wider.value
        middle = (4 * narrow.value + 2) / 8
        sampling = middle * (1 - middle) / 4 + (narrow.value - middle) ** 2
        assert wider.error**2 - sampling == pytest.approx(4.0 * (narrow.error**2 - sampling))
        assert narrow.error**2 > sampling

    def test_hard_items_right_are_worth_more_than_easy_ones(self) -> None:
        """What distinguishes it from a mean of the same responses."""
        hard, easy = PIrt(BANK).score([1, 2], [1.0, 0.0]), PIrt(BANK).score([1, 2], [0.0, 1.0])
        assert hard.value > easy.value


def population(seed: int, rows: int, count: int, skills: int) -> tuple[np.ndarray, np.ndarray]:
    """Return responses [M, N] to items drawn from a population, and each row's expected response on that population."""
    rng = np.random.default_rng(seed)
    ability = 0.8 * rng.normal(size=(rows, 1)) + 0.5 * rng.normal(size=(rows, skills))

    def chances(number: int) -> np.ndarray:
        skill = rng.integers(skills, size=number)
        logit = ability[:, skill] * rng.uniform(2.0, 4.0, number) - rng.normal(0.5, 4.0, number)
        return np.asarray(expit(logit))

    chance = chances(count)
    return (rng.random(chance.shape) < chance).astype(float), chances(20_000).mean(axis=1)


@pytest.mark.parametrize("skills", [1, 3])
def test_p_irt_covers_the_truth_and_is_nearer_to_it_than_the_mean(skills: int) -> None:
    """Over four tasks of 300 items, 32 warm-up rows and 40 anchors, for candidates not in the warm-up.

    Items differ more in difficulty than chance blurs a response, as those of real tasks do; otherwise no choice of
    items can help.
    """
    inside, ours, theirs = [], [], []
    for seed in range(4):
        responses, truth = population(seed, rows=82, count=300, skills=skills)
        bank = fit_bank(responses[:32], anchors=40, seed=seed)
        drawn = np.random.default_rng(seed).choice(300, 40, replace=False)
        for row, target in zip(responses[32:], truth[32:], strict=True):
            found = PIrt(bank).score(bank.anchors, row[list(bank.anchors)])
            inside.append(found.interval[0] <= target <= found.interval[1])
            ours.append(abs(found.value - target))
            theirs.append(abs(Mean().score(drawn.tolist(), row[drawn]).value - target))
    assert 0.85 <= np.mean(inside) <= 0.99
    assert np.mean(ours) < 0.9 * np.mean(theirs)


REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "irt" / "tinylm_merges.npz"


@pytest.mark.skipif(not REAL.exists(), reason="the responses of real merges are not at hand; they do not ship")
def test_p_irt_beats_the_mean_of_random_items_on_real_merges() -> None:
    """From 32 rows and 40 of 500 items: nearer to the mean of all items, calibrated, and not biased on later ones."""
    with np.load(REAL) as file:
        responses = np.unpackbits(file["bits"], axis=1)[:, : int(file["n_items"])].astype(float)
        tasks = file["bench"]
    theirs, bias, inside = [], [], []
    rng = np.random.default_rng(0)
    for task in np.unique(tasks):
        own = responses[:, tasks == task]
        bank = fit_bank(own[np.r_[0:5, 5 + rng.choice(317, 27, replace=False)]], anchors=40, seed=0)
        drawn, pirt, anchors = rng.choice(500, 40, replace=False), PIrt(bank), list(bank.anchors)
        for row in own[322::16]:  # the candidates of an evolution strategy, which leave the warm-up behind
            found = pirt.score(anchors, row[anchors])
            bias.append(found.value - row.mean())
            inside.append(found.interval[0] <= row.mean() <= found.interval[1])
            theirs.append(abs(row[drawn].mean() - row.mean()))

    assert np.mean(np.abs(bias)) < np.mean(theirs)
    assert abs(np.mean(bias)) < 0.015
    assert np.mean(inside) > 0.9
