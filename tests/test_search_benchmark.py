"""The benchmark for search quality: its measures against published values, its stand-ins against real evaluations."""

import math
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from evomerge import pareto
from evomerge.drivers import DRIVERS, read_driver
from evomerge.genome import check_genome, from_unit

BENCHMARKS = Path(__file__).parents[1] / "experiments/benchmarks"
SPACES = ("ps", "layers", "mixed")


class Parts(NamedTuple):
    """The modules of the benchmark, which lie beside their script and not in the package."""

    courses: ModuleType
    ranking: ModuleType
    search: ModuleType
    surrogate: ModuleType


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Return the benchmark's modules, imported as its script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import courses
    import ranking
    import search
    import surrogate

    return Parts(courses=courses, ranking=ranking, search=search, surrogate=surrogate)


def test_the_volume_of_cells_is_the_hypervolume(parts: Parts) -> None:
    """Counting cells and summing exclusive boxes (WFG) are two ways to one number, which only grows."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 101, (60, 3)) / 100
    volume, before = parts.ranking.Volume(100), 0.0
    for count, row in enumerate(scores, start=1):
        now = volume.add((-row).tolist())
        assert now >= before
        assert now == pytest.approx(pareto.hypervolume(-scores[:count], (0.0, 0.0, 0.0)), abs=1e-12)
        before = now


def test_scores_that_are_no_shares_of_the_items_are_refused(parts: Parts) -> None:
    """Cells hold hundredths, so anything else would be counted wrong."""
    with pytest.raises(ValueError, match="shares of 100 items"):
        parts.ranking.Volume(100).add((-0.5, -0.123, -1.0))


@pytest.mark.parametrize(
    ("contenders", "level", "value"),
    [
        (2, 0.05, 1.960), (3, 0.05, 2.343), (4, 0.05, 2.569), (5, 0.05, 2.728), (6, 0.05, 2.850),
        (8, 0.05, 3.031), (10, 0.05, 3.164), (2, 0.10, 1.645), (4, 0.10, 2.291), (10, 0.10, 2.920),
    ],
)  # fmt: skip
def test_critical_values_are_those_of_the_table(parts: Parts, contenders: int, level: float, value: float) -> None:
    """Demsar 2006, table 5(a): critical values of the two-tailed Nemenyi test."""
    blocks = 14
    found = parts.ranking.critical_difference(contenders, blocks, level)
    assert found / math.sqrt(contenders * (contenders + 1) / (6 * blocks)) == pytest.approx(value, abs=1.5e-3)


def test_groups_are_those_of_the_papers_example(parts: Parts) -> None:
    """Demsar 2006, section 3.2.2: four classifiers on 14 sets of data differ by 1.25 at 5 %, by 1.12 at 10 %."""
    means = [1.964, 2.000, 2.893, 3.143]
    assert parts.ranking.critical_difference(4, 14, 0.05) == pytest.approx(1.25, abs=0.005)
    assert parts.ranking.cliques(means, parts.ranking.critical_difference(4, 14, 0.05)) == [(0, 3)]
    # There the first two beat the last, and nothing is said of the third.
    assert parts.ranking.cliques(means, parts.ranking.critical_difference(4, 14, 0.10)) == [(0, 2), (2, 3)]


def test_ranks_begin_at_the_greatest_and_are_shared(parts: Parts) -> None:
    """Two blocks by hand: 1, 2.5, 2.5 and 3, 1, 2."""
    found = parts.ranking.ranks(np.array([[0.9, 0.5, 0.5], [0.1, 0.3, 0.2]]))
    assert found.tolist() == [2.0, 1.75, 2.25]


def test_a_curve_is_read_between_its_gains(parts: Parts) -> None:
    """A run that gained after 2, 5 and 9 evaluations, read by hand."""
    curve = [(2, 0.1), (5, 0.4), (9, 0.5)]
    assert parts.ranking.to_target(curve, 0.4) == 5
    assert parts.ranking.to_target(curve, 0.41) == 9
    assert parts.ranking.to_target(curve, 0.6) is None
    assert [parts.ranking.at(curve, n) for n in (1, 2, 4, 5, 100)] == [0.0, 0.1, 0.1, 0.4, 0.5]
    assert parts.ranking.sampled(curve, [1, 2, 4, 5, 100]).tolist() == [0.0, 0.1, 0.1, 0.4, 0.5]


def test_quartiles_count_runs_that_never_arrived(parts: Parts) -> None:
    """Of five runs the second, third and fourth; two that never arrived are the last."""
    assert parts.ranking.quartiles([30, None, 10, None, 20]) == (20, 30, math.inf)


@pytest.mark.parametrize("space", SPACES)
def test_a_stand_in_foretells_evaluations_that_it_never_saw(parts: Parts, space: str) -> None:
    """Real evaluations, of a search and of the best that searches found, are the oracle; what is stated comes out."""
    there = parts.surrogate.Surrogate(space)
    found = parts.surrogate.quality(there)
    assert set(found) == {"courses", "fronts"}
    for word, tasks in found.items():
        for task, figures in tasks.items():
            stated = there.quality[word][task]
            assert figures == pytest.approx(stated, abs=2e-3)
            assert figures["error"] < 0.05
            assert abs(figures["bias"]) < 0.03
            assert figures["rank"] > 0.85


@pytest.mark.parametrize("space", SPACES)
def test_every_stored_genome_decodes(parts: Parts, space: str, tmp_path: Path) -> None:
    """The axes of a stand-in are those of the space that an experiment makes, and what was evaluated lies in it."""
    axes = parts.surrogate.experiment_of(space, tmp_path).space.axes
    there = parts.surrogate.Surrogate(space)
    assert there.axes == axes
    part, points, bits = parts.surrogate.evaluations(space)
    assert len(part) == len(points) == len(bits) > 5000
    for point in points:
        check_genome(axes, from_unit(axes, point), space)


@pytest.mark.parametrize("space", SPACES)
def test_responses_and_losses_say_the_same(parts: Parts, space: str) -> None:
    """A score is the mean of its items' responses, alone as among many."""
    there = parts.surrogate.Surrogate(space)
    rng = np.random.default_rng(1)
    genomes = [from_unit(there.axes, rng.random(len(there.axes))) for _ in range(20)]
    for genome, (losses, responses) in zip(genomes, there.answers(genomes), strict=True):
        assert losses == there.losses(genome)
        assert [-np.mean(list(own.values())) for own in responses.values()] == pytest.approx(losses)


def test_a_course_is_kept_and_repeats(parts: Parts, tmp_path: Path) -> None:
    """One search, run twice and read once, is one course; its end is the hypervolume of its front."""
    contender = parts.courses.Contender("nsga2", {"name": "nsga2", "population": 10})
    first = parts.courses.run(contender, "ps", 3, 80)
    again, kept = (next(iter(parts.courses.courses([contender], ["ps"], [3], tmp_path, 1, 80))) for _ in range(2))
    assert first.error is None
    assert first.done == 80
    for other in (again, kept):
        assert (other.curve, other.front, other.done) == (first.curve, first.front, first.done)
    assert kept.seconds == again.seconds
    losses = -np.array(first.front) / 100
    assert first.curve[-1][1] == pytest.approx(pareto.hypervolume(losses, (0.0, 0.0, 0.0)), abs=1e-12)
    assert [volume for _, volume in first.curve] == sorted({volume for _, volume in first.curve})


def test_a_driver_that_fails_has_a_reason_in_place_of_a_course(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison goes on without it."""
    monkeypatch.setattr(DRIVERS["random"], "start", lambda self, problem: 1 / 0)
    course = parts.courses.run(parts.courses.Contender("random", {"name": "random"}), "ps", 0, 50)
    assert course.error is not None
    assert "division" in course.error
    assert course.done == len(parts.surrogate.Surrogate("ps").baselines)


def test_every_contender_is_a_driver(parts: Parts) -> None:
    """Each is read as an experiment would, and each driver is compared."""
    there = [contender for contender in parts.search.CONTENDERS if contender.driver["name"] in DRIVERS]
    for contender in there:
        read_driver(dict(contender.driver), contender.name)
    assert {contender.driver["name"] for contender in there} == set(DRIVERS)
    assert len(there) >= 8


def test_claims_compare_medians(parts: Parts) -> None:
    """A default at 100 evaluations against random search at 250 and a rival that never arrived, by hand."""
    rows = {
        "nsga2": {"budget": 600, "to": {"0.95": [90, 100, 120]}},
        "random": {"budget": 1000, "to": {"0.95": [240, 250, None]}},
        "cma-published": {"budget": 1000, "to": {"0.95": [900, None, None]}},
        "nsga2-published": {"budget": 1000, "to": {"0.95": [90, 100, 110]}},
    }
    found = {own["rival"]: own for own in parts.search._claims({"ps": {"default": "nsga2", "contenders": rows}})}
    assert (found["random"]["ratio"], found["random"]["holds"]) == (0.4, True)
    assert (found["cma-published"]["ratio"], found["cma-published"]["holds"]) == (0.1, True)
    assert (found["nsga2-published"]["ratio"], found["nsga2-published"]["holds"]) == (1.0, False)
