"""Gates and weighs: closed forms, laws, and plain Python as the other implementation."""

import math

import pytest
import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.operators import merge


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(method: str, vectors: list[Tensor], base: Tensor | None = None, **more: object) -> Tensor:
    """Return the merged task vector of one tensor."""
    origin = torch.zeros_like(vectors[0]) if base is None else base
    name = str(more.pop("name", "w"))
    sources = [{name: origin + vector} for vector in vectors]
    return merge(method, sources, base={name: origin}, **more)[name] - origin  # type: ignore[arg-type]


# --- near


def test_near_moves_at_most_t() -> None:
    """Every entry goes towards the source by at most t, however many sources there are; t has one value per source."""
    D = randn(5, 7)

    torch.testing.assert_close(merged("nearswap", [D], parameters={"t": 0.3}), D.clamp(-0.3, 0.3))
    two = merged("nearswap", [D, -D], parameters={"t": [0.3, 0.1]})
    torch.testing.assert_close(two, D.clamp(-0.3, 0.3) - D.clamp(-0.1, 0.1))
    assert torch.equal(merged("nearswap", [D], parameters={"t": 0.0}), torch.zeros(5, 7))


# --- variance and energy


def plain_sce(vectors: list[Tensor], select: float) -> list[float]:
    """Merge as the official SCE, in plain Python."""
    columns = list(zip(*[v.double().flatten().tolist() for v in vectors], strict=True))
    spread = [sum((x - sum(c) / len(c)) ** 2 for x in c) for c in columns]
    count = int(select * sum(v > 0 for v in spread))
    chosen = sorted(range(len(spread)), key=lambda j: -spread[j])[:count]
    energies = [sum(columns[j][i] ** 2 for j in chosen) for i in range(len(vectors))]
    found = []
    for column in columns:
        sign = 1 if sum(column) >= 0 else -1
        votes = [(e, x) for e, x in zip(energies, column, strict=True) if x * sign > 0]
        found.append(sum(e * x for e, x in votes) / sum(e for e, x in votes) if votes else 0.0)
    return found


@pytest.mark.parametrize("select", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-20])
def test_sce_is_the_plain_one_whatever_the_size(select: float, size: float) -> None:
    """Against plain Python; weights of tiny contributions keep their ratio."""
    vectors = [randn(6, 9, seed=i) * (i + 1) for i in range(3)]

    found = merged("sce", [v * size for v in vectors], parameters={"select": select}) / size

    torch.testing.assert_close(
        found.flatten().double(), torch.tensor(plain_sce(vectors, select)).double(), rtol=1e-5, atol=1e-6
    )


def test_sce_at_its_ends() -> None:
    """Select 0 gives the base; a single source, or twice the same, comes back."""
    D = randn(4, 8)

    assert torch.equal(merged("sce", [D, randn(4, 8, seed=1)], parameters={"select": 0.0}), torch.zeros(4, 8))
    torch.testing.assert_close(merged("sce", [D]), D)
    torch.testing.assert_close(merged("sce", [D, D]), D)


def test_variance_keeps_the_share_of_entries_that_differ() -> None:
    """Of the entries that vary at all the share remains, those that vary most."""
    one, two = torch.zeros(100), torch.zeros(100)
    one[:40], two[:20] = torch.arange(1.0, 41.0), 1.0

    found = merged("base | variance | sum", [one, two], parameters={"share": 0.25})

    kept = int(0.25 * 39)  # both give entry 0 alike
    assert found.nonzero().flatten().tolist() == list(range(40 - kept, 40))


def test_floor_of_energy_makes_small_sources_equal() -> None:
    """Where mean squares add up to less than the floor all sources count alike, else by their energy."""
    D = randn(50)
    vectors = [D * 1e-4, D * 3e-4]

    plain = merged("base | energy | sum", vectors)
    equal = merged("base | energy | sum", vectors, parameters={"floor": 1e-6})

    torch.testing.assert_close(plain, D * 1e-4 * (0.1 * 1 + 0.9 * 3))
    torch.testing.assert_close(equal, D * 2e-4)
    assert torch.equal(merged("base | energy | sum", [D * 0, D * 0]), D * 0)


# --- competition


def test_pcb_of_one_source_keeps_or_drops() -> None:
    """Entries of a single source are kept as they are or dropped, never shrunk, and ratio of them are kept."""
    D = randn(40, 50)

    found = merged("pcb", [D], parameters={"ratio": 0.1, "q": 0.0, "scale": 1.0})

    torch.testing.assert_close(found[found != 0], D[found != 0])
    assert int((found != 0).sum()) == 199  # the entry at the threshold has the gate 0
    assert D[found != 0].abs().min() >= D[found == 0].abs().max()


def plain_pcb(vectors: list[list[float]], ratio: float) -> list[float]:
    """Merge as PCB without winsorising, in plain Python."""
    gates = []
    for x in vectors:
        size = [abs(v) for v in x]
        least, span = min(size), max(size) - min(size)
        scores = []
        for j, v in enumerate(x):
            within = math.exp(len(vectors) * ((abs(v) - least) / span) ** 2)
            scores.append(within * math.tanh(v * sum(other[j] for other in vectors)))
        low = sorted(scores)[int(len(x) * (1 - ratio))]
        gates.append([(max(score, low) - low) / (max(scores) - low) for score in scores])
    totals = [sum(g) for g in zip(*gates, strict=True)]
    return [
        sum(g[j] * x[j] for g, x in zip(gates, vectors, strict=True)) / total if total else 0.0
        for j, total in enumerate(totals)
    ]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.95])
def test_pcb_is_the_plain_one_over_the_whole_model(ratio: float) -> None:
    """Against plain Python, the model split over two tensors; thresholds below zero (ratio near 1) included."""
    vectors = [randn(60, seed=i) for i in range(3)]
    zero = {"a": torch.zeros(4, 5), "b": torch.zeros(40)}
    sources = [{"a": v[:20].view(4, 5), "b": v[20:]} for v in vectors]

    found = merge("pcb", sources, base=zero, parameters={"ratio": ratio, "q": 0.0, "scale": 1.0})

    expected = torch.tensor(plain_pcb([v.tolist() for v in vectors], ratio))
    torch.testing.assert_close(torch.cat([found["a"].flatten(), found["b"]]), expected, rtol=1e-4, atol=1e-5)


def test_compete_at_its_ends() -> None:
    """Ratio 0 opens no gate, ratio 1 all but the last; sources without a vector give the base; weights are linear."""
    vectors = [randn(30), randn(30, seed=1)]
    zero = torch.zeros(30)

    assert torch.equal(merged("base | compete | sum", vectors, parameters={"ratio": 0.0}), zero)
    assert torch.equal(merged("pcb", [zero, zero]), zero)
    assert int((merged("base | compete | sum", vectors[:1], parameters={"ratio": 1.0}) == 0).sum()) == 1
    one, two, both = (merged("pcb", vectors, weights=w) for w in ([2.0, 1e-9], [1e-9, 3.0], [2.0, 3.0]))
    torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-6)


def test_normalized_competition_differs_only_in_what_is_added_up() -> None:
    """With sources of two magnitudes, 0 and 1, level and sign give the source itself: both rules are one."""
    vectors = [randn(80, seed=i).sign() * (randn(80, seed=i + 9) > 0) for i in range(3)]

    raw, normalized = (
        merged("pcb", vectors, parameters={"q": 0.0, "inter": rule, "ratio": 0.5}) for rule in ("raw", "normalized")
    )

    assert raw.abs().sum() > 0
    assert torch.equal(raw, normalized)


# --- columns


def test_widen_of_one_source_is_that_source() -> None:
    """With score 1 a single source comes back, in matrices, vectors and convolutions."""
    for shape in ((6, 9), (11,), (4, 3, 2)):
        torch.testing.assert_close(merged("widen", [randn(*shape)], base=randn(*shape, seed=5)), randn(*shape))


def test_widen_with_a_low_threshold_is_the_scored_sum() -> None:
    """Where every rank but the first is above the threshold the gates are the score."""
    base, vectors = randn(5, 8, seed=9), [randn(5, 8), randn(5, 8, seed=1)]

    found = merged("widen", vectors, base=base, parameters={"threshold": 0.0, "score": 0.4})

    scored = ((found - 0.4 * sum(vectors)).abs() < 1e-6).all(dim=0)
    assert int(scored.sum()) >= 8 - 4  # per source and rank at most one column is first


def test_widen_scores_columns_and_tokens() -> None:
    """The gate is one per column; of an embedding one per row, as the transposed tensor would have it."""
    base, vectors = randn(6, 10, seed=9), [randn(6, 10), randn(6, 10, seed=1)]

    plain = merged("widen", vectors, base=base)
    tokens = merged(
        "widen", [v.T.contiguous() for v in vectors], base=base.T.contiguous(), name="model.embed_tokens.weight"
    )

    torch.testing.assert_close(tokens.T, plain)


def test_widen_ranks_what_moved_most_first() -> None:
    """The column that a source changed most counts with the score, one that it left alone less than half."""
    base = torch.ones(4, 3)
    one, two = torch.zeros(4, 3), torch.zeros(4, 3)
    one[:, 2] = torch.tensor([3.0, 0.0, 0.0, 0.0])
    two[:, 0] = torch.tensor([0.0, 3.0, 0.0, 0.0])

    found = merged("widen", [one, two], base=base, parameters={"score": 0.9})

    assert found[0, 2] == pytest.approx(3 * 0.9)
    assert found[:, 1].tolist() == [0.0] * 4


# --- RAM, trust, fusion


def test_ram_on_disjoint_supports_is_the_sum_and_on_common_ones_the_mean() -> None:
    """What one source changed counts in full, what all changed is averaged, noise below epsilon is dropped."""
    D = randn(3, 30)
    mine = torch.arange(30) % 3 == torch.arange(3)[:, None]
    apart = [x * m for x, m in zip(D, mine, strict=True)]

    assert torch.equal(merged("ram", apart), sum(apart))
    torch.testing.assert_close(merged("ram", list(D)), D.mean(dim=0))
    assert torch.equal(merged("ram", [D[0] * 1e-6]), torch.zeros(30))


def test_ram_plus_makes_up_for_what_was_shared() -> None:
    """Own entries count 1 + r min(alpha, shared / own) times: here 2 shared, 4 and 8 own."""
    one, two = torch.ones(14), torch.ones(14)
    one[6:], two[2:6] = 0.0, 0.0

    found = merged("ramplus_tl", [one, two], parameters={"r": 0.4, "alpha": 0.3})

    torch.testing.assert_close(found, torch.tensor([1.0] * 2 + [1 + 0.4 * 0.3] * 4 + [1 + 0.4 * 0.25] * 8))


def test_trust_leaves_out_where_sources_disturb_each_other() -> None:
    """The entries where products of magnitudes are greatest go; a single source, and quantile 1, lose nothing."""
    one, two = torch.ones(100), torch.arange(100.0)

    found = merged("tatr", [one, two], parameters={"quantile": 0.9})

    assert found.nonzero().flatten().tolist() == list(range(90))
    D = randn(60)
    torch.testing.assert_close(merged("tatr", [D], parameters={"quantile": 0.5}), D)
    torch.testing.assert_close(merged("tatr", [D, 2 * D], parameters={"quantile": 1.0}), 3 * D)


def test_trust_keeps_what_one_source_alone_moved_far() -> None:
    """There is no disturbance where only one source moved, however far."""
    one, two = torch.ones(50), torch.ones(50)
    one[:5], two[:5] = 100.0, 0.0

    assert (merged("tatr", [one, two], parameters={"quantile": 0.05})[:5] == 100).all()


def test_trust_does_not_depend_on_size() -> None:
    """Products of tiny task vectors would vanish in float32; the same entries are left out."""
    vectors = [randn(200), randn(200, seed=1)]

    small = merged("tatr", [v * 1e-25 for v in vectors], parameters={"quantile": 0.8})

    assert torch.equal(small != 0, merged("tatr", vectors, parameters={"quantile": 0.8}) != 0)


def plain_fusion(model: list[list[float]], base: list[list[float]], multiplier: float) -> list[bool]:
    """Tell which entries count, in plain Python."""

    def softmax(row: list[float]) -> list[float]:
        return [math.exp(v) / sum(math.exp(other) for other in row) for v in row]

    importance = []
    for one, two in zip(model, base, strict=True):
        divergence = sum(p * math.log(p / q) for p, q in zip(softmax(one), softmax(two), strict=True))
        importance += [abs(x - y) * divergence for x, y in zip(one, two, strict=True)]
    quartile = [sorted(importance)[int(share * (len(importance) - 1))] for share in (0.25, 0.5, 0.75)]
    return [value >= quartile[1] + multiplier * (quartile[2] - quartile[0]) for value in importance]


@pytest.mark.parametrize("multiplier", [0.0, 0.7, 1.5])
def test_fusion_keeps_what_stands_out(multiplier: float) -> None:
    """Against plain Python, on rows that moved unlike far; each source by itself."""
    base, D = randn(6, 7), [randn(6, 7, seed=i) * torch.arange(1.0, 7.0)[:, None] / 6 for i in (1, 2)]

    found = [merged("arcee_fusion", [d], base=base, parameters={"multiplier": multiplier}) for d in D]

    for d, one in zip(D, found, strict=True):
        kept = plain_fusion((base + d).tolist(), base.tolist(), multiplier)
        assert (one != 0).flatten().tolist() == kept
        assert 0 < sum(kept) < 42
    torch.testing.assert_close(merged("arcee_fusion", D, base=base, parameters={"multiplier": multiplier}), sum(found))


def test_fusion_at_its_ends() -> None:
    """A multiplier beyond every importance gives the base; a tensor without dimensions is merged too."""
    one = torch.ones(())

    assert torch.equal(merged("arcee_fusion", [randn(8, 9)], parameters={"multiplier": 1e9}), torch.zeros(8, 9))
    assert torch.equal(merged("arcee_fusion", [one], base=one), one)


@pytest.mark.parametrize("stage", ["widen", "fusion"])
def test_a_line_without_base_is_refused(stage: str) -> None:
    """Stages that compare with the base say so where there is none."""
    with pytest.raises(RecipeError, match=f"stage {stage} compares with the base"):
        merge(f"zero | {stage} | sum", [{"w": randn(3, 4)}])


@pytest.mark.parametrize("method", ["sce", "pcb", "widen", "ram", "ramplus_tl", "tatr", "nearswap", "arcee_fusion"])
@pytest.mark.parametrize("shape", [(6, 8), (5,), (1, 1), (3, 2, 4)])
def test_laws_of_all_gates(method: str, shape: tuple[int, ...]) -> None:
    """Sources equal to the base give the base; the order of sources says nothing; every shape has a finite result."""
    base, vectors = randn(*shape, seed=8), [randn(*shape, seed=i) for i in range(3)]

    assert torch.equal(merged(method, [torch.zeros(shape)] * 3, base=base), torch.zeros(shape))
    found, back = merged(method, vectors, base=base), merged(method, vectors[::-1], base=base)
    assert found.isfinite().all()
    torch.testing.assert_close(found, back, rtol=1e-4, atol=1e-5)
