"""Stages of plain arithmetic by themselves, and the named methods made of them, against closed forms."""

import dataclasses
import math
from collections.abc import Generator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods import canonical, parse_line
from evomerge.operators import STAGES, elementwise, facts, merge
from evomerge.operators.line import functions
from evomerge.operators.state import Site, State

SPARSIFIERS = ("trim", "drop", "magprune", "band")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(X: Tensor, w: list[float] | None = None, seed: int = 0, **more: Any) -> State:
    """Return the state of a line, with sources named a, b, c … and as many weights."""
    names = tuple("abcdefgh"[: len(X)])
    statistics: Mapping[str, list[Tensor]] = more.pop("statistics", {})
    site = Site(
        tensor="w", names=names, seed=seed, layer=more.pop("layer", None), depth=more.pop("depth", 1),
        statistic=lambda kind, source: statistics[kind][names.index(source or "a")] if kind in statistics else None,
    )  # fmt: skip
    weights = torch.tensor([1.0] * len(X) if w is None else w, dtype=torch.float64)
    return State(X=X, w=weights, site=site, **more)


def run(text: str, s: State, **values: Any) -> Any:
    """Run one stage given as text; the tensor is all that its questions are about."""
    line = {"origin": f"{text} | sum", "combine": f"zero | {text}"}
    kind = STAGES[text.partition("(")[0]].kind
    step = next(step for step in parse_line(line.get(kind, f"zero | {text} | sum" if kind != "shape" else
                f"zero | sum | {text}"), STAGES, "test") if step.stage.name == text.partition("(")[0])  # fmt: skip
    found = functions()[step.stage.name](s, **{**step.values, **values})
    if not isinstance(found, Generator):
        return found
    reply: Tensor | None = None
    while True:
        try:
            reply = facts.answer(found.send(reply))
        except StopIteration as end:
            return end.value


def merged(method: str, base: Tensor, sources: list[Tensor], weights: list[float] | None = None, **parameters: Any) -> Tensor:  # fmt: skip # noqa: E501  # one line reads better
    """Merge models of one tensor."""
    models = [{"w": source} for source in sources]
    return merge(method, models, base={"w": base}, weights=weights, parameters=parameters)["w"]


# --- trim


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-6, 6), min_size=1, max_size=40), density=st.floats(0.0, 1.0))
def test_trim_keeps_what_reaches_the_magnitude_of_its_rank(values: list[int], density: float) -> None:
    """The threshold is entry max(1, int(d n)) of a sort in plain Python; what equals it stays."""
    count = len(values) if density == 1 else 0 if density == 0 else max(1, int(density * len(values)))
    threshold = sorted((abs(v) for v in values), reverse=True)[count - 1] if count else math.inf
    expected = [v if abs(v) >= threshold else 0 for v in values]

    assert run("trim", state(torch.tensor([values], dtype=torch.float32)), density=density)[0].tolist() == expected


def test_trim_takes_each_source_by_itself_and_its_scope() -> None:
    """Densities differ by source; the threshold is of the tensor or of each row."""
    X = torch.stack([torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.tensor([[1.0, -2.0], [3.0, -4.0]])])
    density = {"a": 0.5, "b": 0.25}

    assert run("trim", state(X), density=density).tolist() == [[[9, 8], [0, 0]], [[0, 0], [0, -4]]]
    assert run("trim(0.5, scope=row)", state(X)).tolist() == [[[9, 0], [0, 2]], [[0, -2], [0, -4]]]


@pytest.mark.parametrize(
    ("count", "kept"),
    [("floor", {0.0: 0, 0.1: 1, 0.3: 3, 0.97: 9, 1.0: 10}), ("above", {0.0: 0, 0.1: 2, 0.3: 4, 0.97: 10, 1.0: 10}),
     ("below", {0.0: 0, 0.1: 2, 0.3: 4, 0.97: 10, 1.0: 10, 0.8: 9})],
)  # fmt: skip
def test_rules_of_counting(count: str, kept: Mapping[float, int]) -> None:
    """Of ten different magnitudes each rule keeps so many; 10 (1 - 0.8) is two, though not in binary fractions."""
    X = torch.tensor([[3.0, -1, 4, 10, -5, 9, 2, -6, 8, 7]])
    for density, expected in kept.items():
        assert int((run(f"trim(count={count})", state(X), density=density) != 0).sum()) == expected


@pytest.mark.parametrize("edit", ["trim", "band", "drop", "magprune"])
@pytest.mark.parametrize(("rule", "power"), [("l1", 1), ("l2", 2)])
def test_rescale_restores_a_norm(edit: str, rule: str, power: int) -> None:
    """What is left is stretched to the L1 or L2 norm that was there before, of the tensor or of each row."""
    X = randn(3, 7, 9)
    for scope, dims in (("tensor", (1, 2)), ("row", (2,))):
        if scope == "row" and edit in ("drop", "magprune"):
            continue
        more = {"scope": scope} if edit in ("trim", "band") else {}
        found = run(f"{edit}(0.5, rescale={rule})", state(X), **more)
        torch.testing.assert_close((found.abs() ** power).sum(dim=dims), (X.abs() ** power).sum(dim=dims))
        assert not torch.equal(found, X)


@pytest.mark.parametrize("edit", SPARSIFIERS)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (5, 1), (3, 0), (7, 3), (2, 3, 4)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_any_density_is_valid_on_any_tensor(edit: str, shape: tuple[int, ...], density: float) -> None:
    """Density 0 and 1, and tensors smaller than 1/density, give finite numbers; density 0 the base."""
    base = randn(*shape, seed=9)
    sources = [base + randn(*shape, seed=i) for i in range(2)]
    for rescale in STAGES[edit].parameters["rescale"].options:
        for tail in ("sum", "elect | mean"):
            found = merged(f"base | {edit}(rescale={rescale}) | {tail}", base, sources, density=density)
            assert found.shape == shape
            assert torch.isfinite(found).all()
            if density == 0:
                assert torch.equal(found, base)


# --- random masks


def test_drop_with_1_p_is_unbiased() -> None:
    """The mean over many seeds is the tensor that was thinned, within five standard errors."""
    x, p, trials = randn(1, 12), 0.3, 2000
    thinned = torch.stack([run("drop", state(x, seed=seed), density=p)[0] for seed in range(trials)])

    assert ((thinned.mean(dim=0) - x[0]).abs() < 5 * x[0].abs() * math.sqrt((1 - p) / p / trials)).all()


@pytest.mark.parametrize("rescale", ["1/p", "none"])
def test_survivors_of_drop_are_divided_by_the_kept_share(rescale: str) -> None:
    """A task vector of ones becomes 0 and 1/p, or with no rescale 0 and 1."""
    found = merged("dare_linear", torch.zeros(200), [torch.ones(200)], density=0.25, rescale=rescale)

    assert set(found.tolist()) == {0.0, 4.0 if rescale == "1/p" else 1.0}


@pytest.mark.parametrize("edit", ["drop", "magprune"])
def test_given_masks_and_probabilities_take_the_place_of_draws(edit: str) -> None:
    """Statistics say what is kept, and for magprune what it is divided by."""
    X, mask = randn(2, 3, 4), randn(2, 3, 4, seed=1) > 0
    likely = randn(2, 3, 4, seed=2).sigmoid()
    found = run(edit, state(X, statistics={"mask": list(mask), "keep_prob": list(likely)}), density=0.5)

    torch.testing.assert_close(found, X * mask / (likely if edit == "magprune" else 0.5))


def rising(row: list[float], density: float, epsilon: float) -> list[float]:
    """Return DELLA's probabilities of one row from their definition."""
    order = sorted(range(len(row)), key=lambda i: abs(row[i]))
    step = 2 * epsilon / max(1, len(row) - 1)
    return [density - epsilon + step * order.index(i) for i in range(len(row))]


def test_survivors_of_magprune_are_divided_by_their_own_probability() -> None:
    """Every survivor is its entry over the probability of its rank in its row, or in the tensor."""
    X = randn(1, 5, 8)
    for rank, rows in (("row", X[0].tolist()), ("tensor", [X[0].flatten().tolist()])):
        p = torch.tensor([rising(row, 0.6, 0.3) for row in rows]).view(5, 8)
        kept = torch.zeros(5, 8)
        for seed in range(40):
            found = run(f"magprune(0.6, epsilon=0.3, rank={rank})", state(X, seed=seed))[0]
            assert ((found == 0) | ((found - X[0] / p).abs() < 1e-4)).all()
            kept += found != 0
        assert float((kept / 40 - p).abs().mean()) < 0.1


def test_magprune_by_magnitude_rises_linearly() -> None:
    """The least of a row has density - epsilon, the greatest density + epsilon, one in the middle the density."""
    X = torch.tensor([[[1.0, 3.0, -2.0]]])
    seen: set[tuple[int, float]] = set()
    for seed in range(60):
        found = run("magprune(0.5, epsilon=0.25, rank=magnitude)", state(X, seed=seed))[0, 0]
        seen |= {(i, round(x, 4)) for i, x in enumerate(found.tolist()) if x}

    assert seen == {(0, 4.0), (1, 4.0), (2, -4.0)}


def test_magprune_is_unbiased_and_without_epsilon_it_is_drop() -> None:
    """Each entry comes back on average, small or great; epsilon 0 thins as DARE does, by the same draws."""
    x, trials = randn(1, 2, 8), 3000
    found = torch.stack([run("magprune(0.5, epsilon=0.3)", state(x, seed=seed))[0] for seed in range(trials)])
    p = torch.tensor([rising(row, 0.5, 0.3) for row in x[0].tolist()])

    assert ((found.mean(dim=0) - x[0]).abs() < 5 * x[0].abs() * ((1 - p) / p / trials).sqrt()).all()
    torch.testing.assert_close(run("magprune(0.4, epsilon=0)", state(x)), run("drop(0.4)", state(x)))


def test_probabilities_stay_within_the_unit_interval() -> None:
    """An epsilon that reaches beyond 0 or 1 is cut down, so the expected share stays the density."""
    X = randn(1, 30, 33)
    for density in (0.05, 0.9):
        factors: list[float] = []
        for seed in range(20):
            found = run("magprune(epsilon=0.4)", state(X, seed=seed), density=density)
            assert torch.isfinite(found).all()
            factors += (X / found)[found != 0].tolist()
        assert 0 < min(factors) < max(factors) < 1
        assert len(factors) / (20 * X.numel()) == pytest.approx(density, abs=0.02)


def test_masks_depend_on_seed_source_and_tensor_only() -> None:
    """The same source thins the same entries whoever else takes part; another seed or name thins others."""
    X = torch.ones(2, 200)
    both = run("drop", state(X))

    assert torch.equal(run("drop", state(X[:1]))[0], both[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(run("drop", state(X, seed=1)), both)
    other = state(X)
    renamed = dataclasses.replace(other, site=dataclasses.replace(other.site, tensor="v"))
    assert not torch.equal(run("drop", renamed), both)


# --- band, sign1bit, winsor


def banded(values: list[float], density: float, gamma: float, count: str) -> list[float]:
    """Return what Breadcrumbs keeps, by sorting places: the definitions of its three codes."""
    n = len(values)
    places = sorted(range(n), key=lambda i: abs(values[i]))
    top, wanted = int(gamma * n), int(density * n)
    if count == "after":
        kept = places[: n - top][max(0, n - top - wanted) :] if wanted else []
    elif count == "within":
        kept = places[n - wanted : n - top]
    elif count == "full":
        below = max(0, n - wanted - top)
        kept = places[below : below + wanted]
    else:
        above = int(n * (1 - density)) - top
        kept = places[max(0, top - 1) : n - max(0, above)]
    return [value if i in kept else 0.0 for i, value in enumerate(values)]


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 40),
    density=st.floats(0.05, 1.0),
    gamma=st.floats(0.0, 0.6),
    count=st.sampled_from(["after", "within", "full", "bottom"]),
)
@example(size=2, density=0.5, gamma=0.5, count="after")
@example(size=2, density=0.5, gamma=0.0, count="bottom")
def test_band_keeps_the_middle(size: int, density: float, gamma: float, count: str) -> None:
    """Against a sort in plain Python, by each of the rules, also where a rule asks for less than one entry."""
    if count == "bottom" and int(density * size) < 1:
        return  # nothing is wanted
    x = randn(size, seed=size)
    found = run(f"band(scope=tensor, count={count})", state(x[None]), density=density, gamma=gamma)[0]

    torch.testing.assert_close(found, torch.tensor(banded(x.tolist(), density, gamma, count)))


def test_band_is_of_each_row_and_loses_no_small_or_even_tensor() -> None:
    """A gamma of less than one entry takes nothing off the top; equal magnitudes stay together."""
    X = torch.tensor([[[1.0, 5, 3, 4], [8, 7, 6, 9]]])

    assert run("band(0.5, gamma=0.25)", state(X))[0].tolist() == [[0, 0, 3, 4], [8, 7, 0, 0]]
    assert run("band(0.5, gamma=0.1)", state(X))[0].tolist() == [[0, 5, 0, 4], [8, 0, 0, 9]]
    assert torch.equal(run("band(0.5, gamma=0.25)", state(torch.full((1, 8), 2.0))), torch.full((1, 8), 2.0))
    assert torch.equal(run("band(1, gamma=0)", state(X)), X)


def test_one_bit_keeps_signs_and_the_l1_norm() -> None:
    """All entries that are not zero get one magnitude, of the tensor or of the row; zeros stay."""
    X = randn(2, 6, 5)
    X[0, 0, 0] = 0
    for scope, dims in (("tensor", (1, 2)), ("row", (2,))):
        found = run("sign1bit", state(X), scope=scope)
        assert torch.equal(found.sign(), X.sign())
        torch.testing.assert_close(found.abs().sum(dim=dims), X.abs().sum(dim=dims))
    whole = run("sign1bit", state(X)).abs()
    assert len(set(whole[0].flatten().tolist())) == 2
    assert not run("sign1bit", state(torch.zeros(1, 4))).any()
    assert run("sign1bit", state(torch.tensor([[-3.0]]))).tolist() == [[-3.0]]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 50), q=st.floats(0.0, 0.5))
def test_winsor_moves_magnitudes_to_order_statistics(size: int, q: float) -> None:
    """Against clipping in plain Python between two entries of the sorted magnitudes; q 0 changes nothing."""
    x = randn(size, seed=size)
    ordered = sorted(x.abs().tolist())
    high = max(0, int(size * (1 - q) - 1))
    low, up = ordered[min(size - 1, int(size * q))], ordered[high] if high else math.inf
    expected = [math.copysign(min(max(abs(v), low), up), v) for v in x.tolist()]

    torch.testing.assert_close(run("winsor", state(x[None]), q=q)[0], torch.tensor(expected))
    assert torch.equal(run("winsor(0)", state(x[None]))[0], x)


# --- gates


def test_elect_counts_zero_sum_as_told_and_zero_entries_never() -> None:
    """A tie goes where `zero` says, a zero entry is on nobody's side, a negative weight turns a vote around."""
    X = torch.tensor([[1.0, 2.0, 0.0, -3.0], [-1.0, 1.0, -1.0, 1.0]])

    assert run("elect", state(X)).tolist() == [[1, 1, 0, 1], [0, 1, 1, 0]]
    assert run("elect(minus)", state(X)).tolist() == [[0, 1, 0, 1], [1, 1, 1, 0]]
    assert run("elect(none)", state(X)).tolist() == [[0, 1, 0, 1], [0, 1, 1, 0]]
    assert run("elect(tensor_majority)", state(X)).tolist() == [[0, 1, 0, 1], [1, 1, 1, 0]]
    assert run("elect", state(X, [1.0, -1.0])).tolist() == [[1, 1, 0, 1], [1, 0, 1, 1]]


def test_the_majority_is_of_the_model_or_of_the_tensor() -> None:
    """A tie in one tensor follows the signs of all tensors, or of its own."""
    base = {"v": torch.zeros(1), "w": torch.zeros(3)}
    models = [{"v": torch.tensor([1.0]), "w": torch.tensor([2.0, 2.0, 2.0])},
              {"v": torch.tensor([-1.0]), "w": torch.tensor([-1.0, -1.0, -1.0])}]  # fmt: skip
    line = "base | elect(zero={}) | sum"

    assert merge(line.format("majority"), models, base)["v"].tolist() == [1.0]
    assert merge(line.format("tensor_majority"), models, base)["v"].tolist() == [0.0]


def test_votes_may_count_heads_or_shares_of_the_norm() -> None:
    """Two small entries outvote a great one by heads; a source of small norm weighs as much as a great one."""
    heads = torch.tensor([[5.0], [-1.0], [-2.0]])
    assert run("elect", state(heads))[:, 0].tolist() == [1, 0, 0]
    assert run("elect(vote=count)", state(heads))[:, 0].tolist() == [0, 1, 1]

    shares = torch.tensor([[10.0, 100.0], [-0.9, 0.1]])
    assert run("elect", state(shares))[:, 0].tolist() == [1, 0]
    assert run("elect(vote=share)", state(shares))[:, 0].tolist() == [0, 1]


def test_slack_protects_one_source() -> None:
    """TIES-SV: without slack it is TIES, with much of it the protected source keeps every entry that it has."""
    base, sources = torch.zeros(60), [randn(60, seed=i) * 2**i for i in range(3)]
    found = merged("ties_sv", base, sources, slack=[1e6, 0.0, 0.0], density=0.5)
    own = torch.where(sources[0].abs() >= sources[0].abs().sort().values[30], sources[0], 0.0)

    assert torch.equal(merged("ties_sv", base, sources), merged("ties", base, sources))
    assert (found.sign() == own.sign())[own != 0].all()
    assert not torch.equal(found, merged("ties_sv", base, sources, density=0.5))


def test_argmax_lets_the_greatest_count_and_the_later_of_equals() -> None:
    """One source counts at each entry; weights and gates before it take part in what is greatest."""
    X = torch.tensor([[1.0, -5.0, 2.0, 0.0], [-3.0, 4.0, -2.0, 0.0], [2.0, 5.0, 1.0, 0.0]])

    found = run("argmax", state(X))
    assert found.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert run("argmax", state(X, [10.0, 1.0, 1.0])).argmax(dim=0)[:3].tolist() == [0, 0, 0]
    gate = torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4])
    assert run("argmax", state(X, G=gate)).argmax(dim=0)[:3].tolist() == [2, 2, 0]


def test_magmax_and_emr_are_made_of_greatest_entries() -> None:
    """MagMax takes the entry of greatest magnitude; EMR the greatest of those that agree with the sign of the sum."""
    base, sources = randn(4, 5, seed=9), [randn(4, 5, seed=i) for i in range(3)]
    D = torch.stack([source - base for source in sources])
    sign = torch.where(D.sum(dim=0) > 0, 1.0, -1.0)

    found = merged("magmax", base, sources) - base
    torch.testing.assert_close(found.abs(), D.abs().amax(dim=0) / 2)
    expected = sign * (D * sign).clamp(min=0).amax(dim=0)
    torch.testing.assert_close(merged("emr", base, sources) - base, expected)


def taken(values: list[list[float]], n: int, m: int, turns: list[int]) -> list[list[float]]:
    """Return what CABS leaves of each source, in plain Python."""
    found = [[0.0] * len(row) for row in values]
    for start in range(0, len(values[0]) // m * m, m):
        free = set(range(start, start + m))
        for source in turns:
            mine = sorted(free, key=lambda i: -abs(values[source][i]))[:n]
            free -= set(mine)
            for i in mine:
                found[source][i] = values[source][i]
    return found


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 8), (5, 8), (7, 7), (9, 4), (2, 64)])
def test_exclusive_takes_n_of_m_in_turn(n: int, m: int) -> None:
    """Against plain Python: disjoint, n of each block while they last, nothing of an incomplete block."""
    X = randn(3, 5, 7)
    flat = X.flatten(1).tolist()
    for order, turns in ((0.0, [0, 1, 2]), ({"a": 2.0, "b": 0.5, "c": 1.0}, [1, 2, 0])):
        G = run("exclusive", state(X), n=float(n), m=float(m), order=order)
        assert torch.equal((G * X).flatten(1), torch.tensor(taken(flat, n, m, turns)))
        assert float(G.sum(dim=0).max()) <= 1


def test_order_is_a_parameter_of_cabs() -> None:
    """Giving sources their turns by order is giving them in that order."""
    base, sources = torch.zeros(64), [randn(64, seed=i) for i in range(2)]
    one = merged("cabs", base, sources, n=4, m=16, order=[1.0, 0.0])

    assert torch.equal(one, merged("cabs", base, sources[::-1], n=4, m=16))
    assert not torch.equal(one, merged("cabs", base, sources, n=4, m=16))


def test_reuse_gives_later_sources_what_is_left_and_half_a_block() -> None:
    """Where n is half a block or more the second takes all free cells and m/2 of those taken; else nothing changes."""
    X = torch.arange(1.0, 9.0).repeat(2, 1)

    assert run("exclusive(6, m=8, reuse=1)", state(X)).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1, 1]]
    assert torch.equal(run("exclusive(3, m=8, reuse=1)", state(X)), run("exclusive(3, m=8)", state(X)))


def test_running_averages_of_checkpoints() -> None:
    """EMA is its recursion, WMA weighs by number, SMA is the plain mean; one checkpoint is itself."""
    models = [{"w": randn(5, seed=i)} for i in range(4)]
    average = models[0]["w"]
    for model in models[1:]:
        average = 0.7 * average + 0.3 * model["w"]

    torch.testing.assert_close(merge("ema", models, parameters={"decay": 0.7})["w"], average)
    expected = torch.stack([(i + 1) * model["w"] for i, model in enumerate(models)]).sum(dim=0) / 10
    torch.testing.assert_close(merge("wma", models)["w"], expected)
    torch.testing.assert_close(merge("sma", models)["w"], torch.stack([m["w"] for m in models]).mean(dim=0))
    assert torch.equal(merge("ema", models[:1])["w"], models[0]["w"])


def test_mean_with_gates_is_an_entrywise_weighted_mean() -> None:
    """Against plain Python, entry by entry, over those that count."""
    X, w = randn(4, 9), [0.5, 1.0, 2.0, 0.25]
    G = (randn(4, 9, seed=2) > 0).float()
    G[:, 0] = 0

    found = run("mean", state(X, w, G=G)).tolist()

    assert found[0] == 0
    for j in range(1, 9):
        counting = [(w[i], float(X[i, j])) for i in range(4) if G[i, j]]
        expected = sum(a * b for a, b in counting) / sum(a for a, _ in counting) if counting else 0
        assert found[j] == pytest.approx(expected, rel=1e-5)


def test_mean_is_bounded_where_mixed_weights_cancel() -> None:
    """A sum of weights near zero never blows entries up beyond the greatest contribution."""
    X = randn(2, 50)
    for other in (-1.0, -1.0 + 1e-9, -0.9999):
        for G in (None, torch.ones(2, 50)):
            assert (run("mean", state(X, [1.0, other], G=G)).abs() <= X.abs().max() + 1e-6).all()


def test_weights_of_tiny_size_keep_their_ratio() -> None:
    """The guard is relative: weights of 1e-9 normalise like weights of 1."""
    X = randn(2, 20)
    for G in (None, torch.ones(2, 20)):
        torch.testing.assert_close(run("mean", state(X, [3e-9, 1e-9], G=G)), 0.75 * X[0] + 0.25 * X[1])


def test_sum_without_normalisation() -> None:
    """The mean with normalize 0 is the sum, gated or not."""
    X, G = randn(3, 8), (randn(3, 8, seed=1) > 0).float()
    for gate in (None, G):
        expected = (X * (1 if gate is None else G) * torch.tensor([[1.0], [2.0], [-0.5]])).sum(dim=0)
        for text in ("sum", "mean(normalize=0)"):
            torch.testing.assert_close(run(text, state(X, [1.0, 2.0, -0.5], G=gate)), expected)


def test_restored_makes_up_for_what_a_row_lost() -> None:
    """Each term is stretched by its row's entries over those that count; without a gate it is the mean."""
    X = torch.tensor([[[1.0, 0.0, 2.0, 3.0], [1.0] * 4], [[-1.0, 4.0, -2.0, 5.0], [2.0] * 4]])
    G = torch.tensor([[[1.0, 1.0, 0.0, 1.0], [1.0] * 4], [[0.0, 1.0, 1.0, 1.0], [0.0] * 4]])
    # in the first row 3 entries of the first source are not zero and 2 count, of the second 4 and 3
    expected = [1.0 * 1.5, 3 * 4 * (4 / 3) / 4, 3 * -2 * (4 / 3) / 3, (1 * 3 * 1.5 + 3 * 5 * (4 / 3)) / 4]

    found = run("restored", state(X, [1.0, 3.0], G=G))
    torch.testing.assert_close(found, torch.tensor([expected, [1.0] * 4]))
    torch.testing.assert_close(run("restored", state(X, [1.0, 3.0])), run("mean", state(X, [1.0, 3.0])))


# --- shapes


def test_consensus_keeps_what_k_sources_claim() -> None:
    """Against plain Python; k = 0 is task arithmetic, more than there are sources the base."""
    base, sources = randn(30, seed=9), [randn(30, seed=i) for i in range(3)]
    D = [(source - base).tolist() for source in sources]
    scales = [0.2, 0.4, 0.6]
    expected = []
    for j in range(30):
        total = sum(row[j] for row in D)
        claims = sum(abs(row[j]) > by * abs(total - row[j]) for row, by in zip(D, scales, strict=True))
        expected.append(0.3 * total if claims >= 2 else 0.0)

    found = merged("consensus_ta", base, sources, mask_scale=scales)
    torch.testing.assert_close(found - base, torch.tensor(expected))
    assert 0 < sum(x == 0 for x in expected) < 30
    everything = merged("task_arithmetic", base, sources, scale=0.3)
    torch.testing.assert_close(merged("consensus_ta", base, sources, k=0), everything)
    assert torch.equal(merged("consensus_ta", base, sources, k=4), base)
    torch.testing.assert_close(
        merged("consensus_ta", base, sources[:1], k=1), merged("task_arithmetic", base, sources[:1], scale=0.3)
    )


def test_consensus_of_ties_claims_by_the_whole_task_vectors() -> None:
    """The claims compare untrimmed task vectors with the trimmed and elected sum."""
    base, sources = torch.zeros(40), [randn(40, seed=i) for i in range(3)]
    y = merged("base | trim(0.2, scope=model) | elect | sum", base, sources)
    claims = torch.stack([D.abs() > 0.4 * (y - D).abs() for D in sources]).sum(dim=0)

    found = merged("consensus_ties", base, sources, k=3)
    torch.testing.assert_close(found, 0.3 * y * (claims >= 3))
    assert found.any()
    assert not torch.allclose(found, 0.3 * y)


def test_tall_mask_is_one_sources_claim() -> None:
    """The mask of one task on the sum; a number that no source has is refused."""
    base, sources = torch.zeros(40), [randn(40, seed=i) for i in range(3)]
    y = torch.stack(sources).sum(dim=0)
    for i in range(3):
        expected = y * (sources[i].abs() > 0.5 * (y - sources[i]).abs())
        torch.testing.assert_close(merged("tall_mask", base, sources, source=i, mask_scale=0.5), expected)
    with pytest.raises(RecipeError, match="tensor 'w': tall: source must be below 3, got 3"):
        merged("tall_mask", base, sources, source=3)


def layered(count: int, seed: int) -> dict[str, Tensor]:
    """Return a model of so many layers and two ends."""
    names = ["embed", *(f"layers.{i}.w" for i in range(count)), "norm"]
    return {name: randn(3, 4, seed=seed * 100 + i) for i, name in enumerate(names)}


def test_lines_scales_by_depth() -> None:
    """From a at the first layer to a + b at the last, a outside; the last layer of a + b = 1 is left as it is."""
    base, one = layered(5, 1), layered(5, 2)
    found = merge("lines", [one], base, parameters={"mode": "given", "a": 0.2, "b": 0.8})
    shares = {"embed": 0.2, "norm": 0.2, **{f"layers.{i}.w": 0.2 + 0.2 * i for i in range(5)}}

    for name, share in shares.items():
        torch.testing.assert_close(found[name], base[name] + share * (one[name] - base[name]))
    torch.testing.assert_close(found["layers.4.w"], one["layers.4.w"])


def test_automatic_start_of_lines_is_a_ratio_of_norms() -> None:
    """On a sum it is 1/N; on any merge the L1 norm of the mean task vector over that of the result, of the model."""
    base, models = layered(3, 1), [layered(3, i) for i in (2, 3, 4)]
    found = merge("lines", models, base, parameters={"b": 0.0})
    average = merge("task_arithmetic", models, base, parameters={"scale": 1 / 3})
    for name in base:
        torch.testing.assert_close(found[name], average[name])

    y = merge("base | argmax | sum", models, base)
    norm = sum(float((average[name] - base[name]).abs().sum()) for name in base)
    start = norm / sum(float((y[name] - base[name]).abs().sum()) for name in base)
    found = merge("base | argmax | sum | lines", models, base, parameters={"b": 0.4})
    torch.testing.assert_close(found["embed"] - base["embed"], start * (y["embed"] - base["embed"]))
    middle = found["layers.1.w"] - base["layers.1.w"]
    torch.testing.assert_close(middle, (start + 0.2) * (y["layers.1.w"] - base["layers.1.w"]))
    assert torch.equal(merge("lines", [base], base)["embed"], base["embed"])


def test_a_single_layer_is_the_last() -> None:
    """A model of one layer has a + b there: no division by L - 1 = 0."""
    s = state(randn(1, 4), y=torch.ones(4), layer=0, depth=1)

    assert run("lines(0.3, b=0.5, mode=given)", s).tolist() == pytest.approx([0.8] * 4)


def test_plain_methods_by_their_formulas() -> None:
    """ExPO goes beyond the source, passthrough copies or scales, task arithmetic at 1/N is the average."""
    base, sources = randn(6, seed=9), [randn(6, seed=i) for i in range(2)]

    torch.testing.assert_close(merged("expo", base, sources[:1]), base + 1.3 * (sources[0] - base))
    assert torch.equal(merge("passthrough", [{"w": sources[0]}])["w"], sources[0])
    half = merge("passthrough", [{"w": sources[0]}], parameters={"scale": -0.5})["w"]
    assert torch.equal(half, -0.5 * sources[0])
    torch.testing.assert_close(merged("task_arithmetic", base, sources, scale=0.5), (sources[0] + sources[1]) / 2)
    torch.testing.assert_close(merged("ties", base, sources[:1], [0.7], density=1.0), sources[0])
    D = torch.stack([source - base for source in sources])
    expected = base + (D.sign() * D.abs().mean(dim=1, keepdim=True)).sum(dim=0)
    torch.testing.assert_close(merged("one_bit", base, sources), expected)


@pytest.mark.parametrize(("gain", "of"), [(0.25, 1.0), (4.0, 1.0), (0.5, 0.0), (1.5, -2.0)])
def test_gain_multiplies_what_a_norm_multiplies_by(gain: float, of: float) -> None:
    """A norm that multiplies by `of` + weight then multiplies by gain times that; where `of` is 0 it is a scale."""
    y = randn(3, 5, seed=4)
    found = run("gain", state(randn(1, 3, 5), y=y), gain=gain, of=of)
    line = merge("zero | sum | gain", [{"w": y}], parameters={"gain": gain, "of": of})["w"]
    expected = [[gain * (of + entry) - of for entry in row] for row in y.double().tolist()]

    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(line, torch.tensor(expected))
    if of == 0:
        assert torch.equal(line, merge("passthrough", [{"w": y}], parameters={"scale": gain})["w"])


def test_gain_is_of_a_weight_without_1_unless_told() -> None:
    """A half of 1 + y, less 1: what is stored for Gemma's norms, in numbers that float32 has."""
    y = torch.tensor([0.0, -1.0, 1.0, 0.5, -3.0])

    assert run("gain(0.5)", state(y[None], y=y)).tolist() == [-0.5, -1.0, 0.0, -0.25, -2.0]


def test_a_gain_of_1_drops_out_of_a_line() -> None:
    """Whatever it is of: the form and the bits are those of the line without it, though of + y - of would round."""
    y = randn(40, seed=5)
    for of in (1.0, 1e6):
        parameters = {"gain": 1.0, "of": of}
        line = "zero | sum | gain"
        assert canonical(line, {"a": 1.0}, parameters) == canonical("zero | sum", {"a": 1.0}, {})
        assert torch.equal(merge(line, [{"w": y}], parameters=parameters)["w"], y)
    assert not torch.equal((y + 1e6) - 1e6, y)
    assert canonical(line, {"a": 1.0}, {"gain": 1.5}) != canonical("zero | sum", {"a": 1.0}, {})
    assert canonical(line, {"a": 1.0}, {"gain": 1.5}) != canonical(line, {"a": 1.0}, {"gain": 1.5, "of": 0.0})


# --- what the table says


@pytest.mark.parametrize(
    "name", [name for name, stage in STAGES.items() if stage.elementwise and hasattr(elementwise, name)]
)
def test_elementwise_stages_work_on_pieces(name: str) -> None:
    """Run on flat pieces, with the answers about the whole, a stage gives the entries that it gives whole."""
    whole = state(randn(3, 6, 8), [1.0, 0.5, -0.3], W0=randn(6, 8, seed=7), y=randn(6, 8, seed=8), layer=1, depth=4)
    whole = dataclasses.replace(whole, D=whole.X)
    step_values = {own: p.default for own, p in STAGES[name].parameters.items()}
    if "scope" in step_values:
        step_values["scope"] = "tensor"
    answers: list[Tensor] = []

    def settled(s: State, replies: list[Tensor] | None) -> Any:
        found = functions()[name](s, **step_values)
        if not isinstance(found, Generator):
            return found
        given, reply = iter(replies or []), None
        while True:
            try:
                ask = found.send(reply)
            except StopIteration as end:
                return end.value
            if replies is None:
                answers.append(facts.answer(ask))
                reply = answers[-1]
            else:
                reply = next(given).view(-1, 1)

    def first(found: Any) -> Any:
        return found[0] if isinstance(found, tuple) else found

    expected = first(settled(whole, None))
    flat = {field: getattr(whole, field) for field in ("X", "D", "W0", "y")}
    for start, stop in ((0, 17), (17, 48)):
        cut = {
            field: value.reshape(*value.shape[: value.dim() - 2], -1)[..., start:stop] for field, value in flat.items()
        }
        found = first(settled(dataclasses.replace(whole, **cut, start=start), answers))
        wanted = expected if STAGES[name].kind == "weigh" else expected.flatten(-2)[..., start:stop]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
