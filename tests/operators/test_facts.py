"""Facts: what is asked about a layer or a model is answered from its parts as if they were one tensor."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from evomerge.operators import facts
from evomerge.operators.facts import Facts, Tally, Unanswered, answer, kth, labels
from evomerge.operators.parts import Merge, Part
from evomerge.operators.state import Ask
from evomerge.recipe import Blend

NAMES = ("a", "b", "c")


def rows(count: int, entries: int, seed: int = 0) -> Tensor:
    """Return random values of both signs with ties, zeros of both signs and subnormals, shape (count, entries)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, entries, generator=generator)
    values[:, ::5] = values[:, ::5].mul(4).round() / 4
    values[:, ::7] *= 1e-42
    values[:, 1::11] = 0.0
    values[:, 2::11] = -0.0
    return values


def split(values: Tensor, seed: int) -> list[Tensor]:
    """Return values in parts of random sizes, one of them a single entry, in random order, some as matrices."""
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randint(1, values.shape[1], (4,), generator=generator).tolist())
    ends = [0, *cuts, values.shape[1] - 1, values.shape[1]]
    found = [values[:, one:two] for one, two in pairwise(ends) if two > one]
    shaped = [part.reshape(len(part), 2, -1) if part.shape[1] % 2 == 0 else part for part in found]
    return [shaped[i] for i in torch.randperm(len(shaped), generator=generator).tolist()]


def tallied(how: str, parts: Sequence[Tensor], rank: object = None, names: Sequence[object] = NAMES) -> Tensor:
    """Return the answer of a tally about parts, for the first of them, flat."""
    asks = [Ask(how=how, values=part, scope="model", **({} if rank is None else {"rank": rank})) for part in parts]
    tally = Tally(asks[0])
    for _ in range(3):
        for ask in asks:
            tally.add(ask, tuple(names))
        if tally.close():
            found = [tally.answer(ask, tuple(names)) for ask in asks]
            assert all(torch.equal(one.flatten(), found[0].flatten()) for one in found)
            return found[0].reshape(len(found[0]), -1).squeeze(1)
    raise AssertionError("a tally takes at most two passes")


SIZES = [7, 100, 5003]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("entries", SIZES)
def test_ranks_over_parts_are_those_of_a_sort(entries: int, seed: int) -> None:
    """Any rank of any row equals the sorted value, with ties, zeros and subnormals, however the entries are split."""
    values = rows(3, entries, seed).abs()
    ordered = values.sort(dim=1, descending=True).values
    wanted = [1, entries // 3, entries - 1]
    for turn in range(3):
        counts = wanted[turn:] + wanted[:turn]
        found = tallied("rank", split(values, seed), lambda n, counts=counts: counts)

        assert found.tolist() == [float(row[count - 1]) for row, count in zip(ordered, counts, strict=True)]


def test_ranks_at_and_beyond_the_edges() -> None:
    """None is infinity and all is minus infinity, in the same question as a rank between; one pass if all are edges."""
    values = rows(3, 100).abs()
    middle = float(values[1].sort(descending=True).values[49])

    assert tallied("rank", split(values, 0), lambda n: [0, 50, n]).tolist() == [math.inf, middle, -math.inf]
    assert tallied("rank", split(values, 1), lambda n: [-5, n + 1, n]).tolist() == [math.inf, -math.inf, -math.inf]


def test_a_rank_is_asked_with_the_number_of_entries_of_all_parts() -> None:
    """The function that turns a share into a rank sees the whole scope, and not one part."""
    seen: list[int] = []

    def rank(entries: int) -> list[int]:
        seen.append(entries)
        return [entries // 2] * 3

    tallied("rank", split(rows(3, 500).abs(), 2), rank)

    assert set(seen) == {500}


def test_equal_values_have_one_rank() -> None:
    """Where all values are the same, so is every rank between the edges; the least subnormal is not zero."""
    for value in (0.0, 1e-45, 1.5, math.inf):
        parts = split(torch.full((3, 64), value), 3)
        assert tallied("rank", parts, lambda n: [1, n // 2, n - 1]).tolist() == [torch.tensor(value).item()] * 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("entries", SIZES)
def test_sums_extremes_and_products_over_parts(entries: int, seed: int) -> None:
    """Sums, maxima and inner products over parts are those over the whole; maxima may be negative."""
    values = rows(3, entries, seed)
    parts = split(values, seed)
    exact = [float(sum(map(Fraction, row))) for row in values.tolist()]
    columns = values.double()
    products = [[math.fsum((one * two).tolist()) for two in columns] for one in columns]  # of 24 bits each: exact

    torch.testing.assert_close(tallied("sum", parts).tolist(), exact, rtol=1e-13, atol=1e-13)
    assert tallied("max", parts).tolist() == values.amax(dim=1).tolist()
    assert tallied("max", [-part.abs() - 1 for part in parts]).tolist() == (-values.abs() - 1).amax(dim=1).tolist()
    torch.testing.assert_close(tallied("gram", parts).tolist(), products, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["sum", "gram", "max", "rank"])
def test_the_order_of_parts_changes_no_bit(how: str) -> None:
    """Parts in another order give the same bits, sums of great and small numbers included."""
    values = rows(3, 3000)
    values[:, ::3] *= 1e8
    parts = values.abs().split(311, dim=1)

    forward, backward = (tallied(how, order, lambda n: [10, 20, 30]) for order in (parts, parts[::-1]))

    assert torch.equal(forward, backward)


@pytest.mark.parametrize("how", ["sum", "max", "gram", "rank"])
def test_one_part_is_answered_as_at_once(how: str) -> None:
    """The answer over the one part that there is equals that to the same question of scope tensor, to the bit."""
    values = rows(3, 40_000).abs().view(3, 200, 200)
    at_once = answer(Ask(how=how, values=values, scope="tensor", rank=lambda n: [1, n // 2, n - 1]))

    assert torch.equal(tallied(how, [values], lambda n: [1, n // 2, n - 1]), at_once.reshape(3, -1).squeeze(1))


def test_rows_answer_each_for_itself() -> None:
    """Scope row asks along the last dimension."""
    values = rows(3, 60).abs().view(3, 4, 15)
    ask = lambda how, given: answer(Ask(how=how, values=given, scope="row", rank=lambda n: [0, 4, n]))  # noqa: E731  # short

    ranks = ask("rank", values)
    assert (ranks[0] == math.inf).all()
    assert (ranks[2] == -math.inf).all()
    assert torch.equal(ranks[1, :, 0], values[1].sort(dim=-1, descending=True).values[:, 3])
    torch.testing.assert_close(ask("sum", values), values.double().sum(-1, keepdim=True))
    assert torch.equal(ask("max", values)[..., 0], values.amax(-1))


def test_threads_change_no_bit_of_a_sum() -> None:
    """Sums and inner products of a million entries are the same on one thread and on two."""
    values = rows(3, 1_000_003)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((facts.sums(values), facts.gram(values), kth(values[0].abs(), 1000)))
    finally:
        torch.set_num_threads(1)

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_sums_hold_where_float32_would_not() -> None:
    """A sum of a hundred million and many ones is exact."""
    values = torch.ones(1, 50_000)
    values[0, 7] = 1e8

    assert facts.sums(values).tolist() == [1e8 + 49_999]


def test_labels_are_sources_unless_the_rows_are_about_all() -> None:
    """One row per source is called by it; other numbers of rows, and rows in common, by their numbers."""
    values = torch.zeros(3, 2)

    assert labels(Ask(how="sum", values=values), NAMES) == NAMES
    assert labels(Ask(how="sum", values=values, common=True), NAMES) == (0, 1, 2)
    assert labels(Ask(how="sum", values=values[:2]), NAMES) == (0, 1)
    assert labels(Ask(how="sum", values=values), NAMES[:2]) == (0, 1, 2)


def test_rows_go_by_their_labels_and_not_by_their_place() -> None:
    """Where a source takes no part in a tensor, the rows of the others still meet their own."""
    tally = Tally(Ask(how="sum", values=torch.zeros(1, 1), scope="model"))
    tally.add(Ask(how="sum", values=torch.tensor([[1.0], [10.0]])), ("a", "b"))
    tally.add(Ask(how="sum", values=torch.tensor([[100.0], [1000.0]])), ("b", "c"))
    tally.close()

    ask = Ask(how="sum", values=torch.zeros(3, 1))
    assert tally.answer(ask, ("c", "b", "a")).flatten().tolist() == [1000.0, 110.0, 1.0]


def test_what_has_no_answer_says_so() -> None:
    """A question is raised until its tallies are closed, and each number has its own answer."""
    found, ask = Facts(), Ask(how="max", values=torch.tensor([[3.0]]), scope="layer")
    one, two = ("group", ("trim", 0), 1), ("group", ("trim", 0), 2)
    with pytest.raises(Unanswered) as raised:
        found.answer(ask, one, (0,))
    found.add(raised.value, (0,))
    with pytest.raises(Unanswered):
        found.answer(ask, one, (0,))
    found.close()

    assert raised.value.number == one
    assert found.answer(ask, one, (0,)).tolist() == [[3.0]]
    with pytest.raises(Unanswered):
        found.answer(ask, two, (0,))


@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
def test_scope_says_which_entries_compete(scope: str) -> None:
    """Keeping a share of the entries by magnitude keeps those of the tensor, of the layer, or of the model."""
    names = [f"model.layers.{k}.{name}" for k in range(3) for name in ("x", "y")] + ["model.norm.weight"]
    values = {name: rows(1, 40 + 7 * i, i)[0] * 2.0**i for i, name in enumerate(names)}
    blend = Blend(method=f"base | trim(0.25, scope={scope}) | sum", weights={"a": 1.0}, parameters={})
    place = {name: int(name.split(".")[2]) if "layers" in name else None for name in names}
    parts = [Part(tensor=name, blend=blend, layer=place[name], shape=(len(values[name]),)) for name in names]
    merge = Merge(parts, lambda part, source: values[part.tensor] * (source is not None), ["a"], has_base=True, depth=3)

    for part in parts:
        scoped = [
            values[name]
            for name in names
            if scope == "model" or name == part.tensor or (scope == "layer" and place[name] == part.layer)
        ]
        together = torch.cat(scoped).abs()
        threshold = together.sort(descending=True).values[int(0.25 * len(together)) - 1]
        mine = values[part.tensor]
        expected = torch.where(mine.abs() >= threshold, mine, 0.0)

        assert torch.equal(dict(merge.build(part))[part.tensor], expected)
