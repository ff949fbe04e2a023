"""The stages that take statistics, against closed forms, least squares, scipy and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from evomerge.errors import CandidateError, RecipeError
from evomerge.operators import merge

MATS = {"mats_fisher": ("fisher",), "mats_gram": ("gram",), "mats": ("gram", "gram_out")}


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def models(*shape: int, n: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return n models of one tensor."""
    return [{"w": randn(*shape, seed=100 * seed + i)} for i in range(n)]


def grams(n: int, count: int, seed: int = 0, rows: int = 40) -> list[dict[str, Tensor]]:
    """Return Gram matrices of random inputs."""
    inputs = [randn(rows, n, seed=1000 + seed + i) for i in range(count)]
    return [{"w": x.T @ x / rows} for x in inputs]


# --- fisher


def test_fisher_is_the_mean_weighted_by_fisher_and_weight() -> None:
    """Two sources, one entry each, worked out by hand: (2 * 3 * 10 + 1 * 1 * 20) / (2 * 3 + 1 * 1)."""
    sources, fishers = [{"w": torch.tensor([10.0])}, {"w": torch.tensor([20.0])}], [3.0, 1.0]
    statistics = {"fisher": [{"w": torch.tensor([f])} for f in fishers]}

    found = merge("fisher", sources, weights=[2.0, 1.0], statistics=statistics, parameters={"norm": "none"})

    assert float(found["w"]) == pytest.approx(80 / 7)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0])
def test_equal_fishers_give_the_mean(scale: float) -> None:
    """Where sources are equally certain, or nothing is known, or numbers are too small to multiply: the mean."""
    sources = models(4, 3)
    statistics = {"fisher": [{"w": torch.full((4, 3), scale)}] * 3}
    for norm in ("none", "tensor", "model"):
        found = merge("fisher", sources, statistics=statistics, parameters={"floor": 0.0, "norm": norm})

        torch.testing.assert_close(found["w"], sum(s["w"] for s in sources) / 3)


@pytest.mark.parametrize("norm", ["tensor", "model"])
def test_a_norm_takes_away_the_scale_of_a_fisher(norm: str) -> None:
    """One source's Fisher times a thousand changes nothing once it is divided by its norm, only without."""
    sources = models(4, 3, n=2)
    F = [{"w": randn(4, 3, seed=7 + i) ** 2} for i in range(2)]
    more = [{"w": 1000 * F[0]["w"]}, F[1]]

    def found(fishers: list[dict[str, Tensor]], norm: str) -> Tensor:
        return merge("fisher", sources, statistics={"fisher": fishers}, parameters={"floor": 0.0, "norm": norm})["w"]

    torch.testing.assert_close(found(F, norm), found(more, norm))
    assert not torch.allclose(found(F, "none"), found(more, "none"), atol=1e-2)


def test_the_model_norm_is_over_all_tensors() -> None:
    """By hand: norms 5 and 1 over two tensors, of entries (3, 4) and (1, 0)."""
    sources = [
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])},
    ]
    fishers = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([1.0]), "b": torch.tensor([0.0])},
    ]

    found = merge("fisher", sources, statistics={"fisher": fishers}, parameters={"floor": 0.0})

    assert float(found["a"]) == pytest.approx(1 / (3 / 5 + 1))
    assert float(found["b"]) == 0


def test_floors() -> None:
    """By hand: max and plus, of all sources or the first, on Fishers 0 and 0.5 with floor 1, and 0 and 2."""
    sources = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}]

    def found(second: float, rule: str, floored: str) -> float:
        statistics = {"fisher": [{"w": torch.zeros(1)}, {"w": torch.tensor([second])}]}
        parameters = {"floor": 1.0, "rule": rule, "floored": floored, "norm": "none"}
        return float(merge("fisher", sources, statistics=statistics, parameters=parameters)["w"])

    assert found(0.5, "max", "all") == pytest.approx(1 / 2)
    assert found(0.5, "max", "first") == pytest.approx(0.5 / 1.5)
    assert found(0.5, "add", "all") == pytest.approx(1.5 / 2.5)
    assert found(2.0, "max", "all") == pytest.approx(2 / 3)


def test_a_tensor_without_fisher_is_averaged() -> None:
    """A tensor that has no statistic takes the weighted mean, beside one that has."""
    sources = [
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([4.0]), "b": torch.tensor([4.0])},
    ]
    fishers = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([0.0])}]

    found = merge("fisher", sources, weights=[3.0, 1.0], statistics={"fisher": fishers}, parameters={"floor": 0.0})

    assert found["a"].tolist() == [0.0]
    assert found["b"].tolist() == [1.0]


# --- regmean


def test_regmean_is_least_squares_on_the_sources_inputs() -> None:
    """With alpha 1 the result is the lstsq solution that maps each source's inputs to that source's outputs."""
    sources = models(5, 4)
    inputs = [randn(30, 4, seed=50 + i).double() for i in range(3)]
    weights = [1.0, 2.0, 0.5]
    statistics = {"gram": [{"w": (x.T @ x / 30).float()} for x in inputs]}
    rows = torch.cat([math.sqrt(w) * x for x, w in zip(inputs, weights, strict=True)])
    outputs = torch.cat(
        [math.sqrt(w) * x @ s["w"].double().T for x, s, w in zip(inputs, sources, weights, strict=True)]
    )

    found = merge("regmean", sources, weights=weights, statistics=statistics, parameters={"alpha": 1.0})

    torch.testing.assert_close(found["w"], torch.linalg.lstsq(rows, outputs).solution.T.float(), atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.0, 1.0), ridge=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
def test_regmean_of_equal_grams_is_the_mean(alpha: float, ridge: float, seed: int) -> None:
    """Sources with the same inputs are averaged, whatever alpha and ridge."""
    sources, gram = models(3, 4, seed=seed), grams(4, 1, seed)[0]

    found = merge("regmean", sources, statistics={"gram": [gram] * 3}, parameters={"alpha": alpha, "ridge": ridge})

    torch.testing.assert_close(found["w"], sum(s["w"] for s in sources) / 3, atol=1e-5, rtol=1e-5)


def test_regmean_at_alpha_0_is_a_mean_per_column() -> None:
    """Without off-diagonals each column is averaged with the diagonals as weights."""
    sources, gram = models(3, 4), grams(4, 3)
    diagonals = torch.stack([g["w"].diagonal() for g in gram])[:, None]
    expected = (diagonals * torch.stack([s["w"] for s in sources])).sum(0) / diagonals.sum(0)

    found = merge("regmean", sources, statistics={"gram": gram}, parameters={"alpha": 0.0})

    torch.testing.assert_close(found["w"], expected)


def test_a_great_ridge_gives_the_mean() -> None:
    """The ridge pulls towards the weighted mean."""
    sources = models(3, 4)

    found = merge(
        "regmean", sources, weights=[1, 1, 2], statistics={"gram": grams(4, 3)}, parameters={"ridge": 1e8}
    )  # fmt: skip

    torch.testing.assert_close(found["w"], (sources[0]["w"] + sources[1]["w"] + 2 * sources[2]["w"]) / 4)


def test_regmean_averages_what_has_no_gram() -> None:
    """Biases and embeddings take the weighted mean."""
    found = merge("regmean", models(4), weights=[1, 1, 2], statistics={"gram": [{}, {}, {}]})

    torch.testing.assert_close(found["w"], sum(w * s["w"] for w, s in zip((1, 1, 2), models(4), strict=True)) / 4)


def test_regmean_flattens_convolutions() -> None:
    """A 4-D kernel is merged as the matrix out x rest."""
    sources, gram = models(3, 2, 2, 1), grams(4, 3)
    flat = [{"w": s["w"].flatten(1)} for s in sources]

    found = merge("regmean", sources, statistics={"gram": gram})["w"]

    assert found.shape == (3, 2, 2, 1)
    torch.testing.assert_close(found.flatten(1), merge("regmean", flat, statistics={"gram": gram})["w"])


def test_a_singular_system_names_the_tensor_and_the_way_out() -> None:
    """Fewer texts than channels, or a channel that is never active, are told with what to do."""
    few = grams(4, 3, rows=1)
    dead = [{"w": torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))}] * 3
    for gram, parameters in ((few, {"alpha": 1.0}), (dead, {"alpha": 0.5})):
        with pytest.raises(CandidateError, match=r"'w'.*4 x 4.*singular.*ridge 0"):
            merge("regmean", models(3, 4), statistics={"gram": gram}, parameters=parameters)
        found = merge("regmean", models(3, 4), statistics={"gram": gram}, parameters={**parameters, "ridge": 1e-3})
        assert bool(found["w"].isfinite().all())


def test_a_gram_of_another_shape_is_refused() -> None:
    """A weight that is stored in x out does not fit its Gram matrix, which is told."""
    with pytest.raises(CandidateError, match=r"'w' \(3, 4\).*\(4, 4\), got \(3, 3\)"):
        merge("regmean", models(3, 4), statistics={"gram": grams(3, 3)})


# --- conjugate gradients


def system(kind: str, n: int = 3) -> tuple[dict[str, list[dict[str, Tensor]]], list[Tensor]]:
    """Return statistics of a metric for 4 x 5 matrices and the dense C_i (20 x 20), float64."""
    if kind == "mats_fisher":
        F = [randn(4, 5, seed=300 + i) ** 2 for i in range(n)]
        return {"fisher": [{"w": f} for f in F]}, [torch.diag(f.double().flatten()) for f in F]
    gram, out = grams(5, n, 20), grams(4, n, 40)
    eye = torch.eye(4, dtype=torch.float64)
    if kind == "mats_gram":
        return {"gram": gram}, [torch.kron(eye, g["w"].double()) for g in gram]
    dense = [torch.kron(o["w"].double(), g["w"].double()) for o, g in zip(out, gram, strict=True)]
    return {"gram": gram, "gram_out": out}, dense


@pytest.mark.parametrize("method", MATS)
@pytest.mark.parametrize("init", ["average", "base"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 200])
def test_mats_is_scipys_conjugate_gradient(method: str, init: str, iterations: int) -> None:
    """The cg of scipy on the dense system of full weights, from the same start, stops at the same place."""
    sources, base, weights = models(4, 5), {"w": randn(4, 5, seed=9)}, [1.0, 2.0, 0.5]
    statistics, dense = system(method)
    C = [w * c for w, c in zip(weights, dense, strict=True)]
    right = sum(c @ s["w"].double().flatten() for c, s in zip(C, sources, strict=True))
    mean = sum(w * s["w"].double() for w, s in zip(weights, sources, strict=True)) / 3.5
    start = (base["w"].double() if init == "base" else mean).flatten().numpy()
    A = LinearOperator((20, 20), matvec=lambda v: (sum(C) @ torch.from_numpy(v)).numpy(), dtype=float)
    expected, _ = cg(A, right.numpy(), x0=start, rtol=1e-5, maxiter=iterations)

    found = merge(
        method, sources, base, weights, {"iterations": iterations, "init": init}, statistics
    )["w"]  # fmt: skip

    torch.testing.assert_close(found, torch.from_numpy(expected).view(4, 5).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", MATS)
def test_mats_converges_to_the_solution(method: str) -> None:
    """After many iterations sum_i C_i (W - W_i) = 0 holds, as the dense solve gives it."""
    sources, (statistics, C) = models(4, 5), system(method)
    right = sum(c @ s["w"].double().flatten() for c, s in zip(C, sources, strict=True))

    found = merge(method, sources, parameters={"iterations": 500}, statistics=statistics)["w"]

    expected = torch.linalg.solve(sum(C), right).view(4, 5).float()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("method", MATS)
def test_mats_begins_at_the_mean(method: str) -> None:
    """Where all sources have the same metric the mean solves the system, so nothing moves; for a metric of zero too."""
    statistics, _ = system(method, 1)
    for factor in (0.0, 1.0):
        alike = {kind: [{"w": factor * each[0]["w"]}] * 3 for kind, each in statistics.items()}

        found = merge(method, models(4, 5), statistics=alike)["w"]

        torch.testing.assert_close(found, sum(s["w"] for s in models(4, 5)) / 3, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", MATS)
def test_mats_averages_what_has_no_statistic(method: str) -> None:
    """A tensor without one of the statistics takes the plain mean."""
    statistics = {kind: [{}] * 3 for kind in MATS[method]}

    found = merge(method, models(4, 5), statistics=statistics)["w"]

    torch.testing.assert_close(found, sum(s["w"] for s in models(4, 5)) / 3)


def test_init_base_needs_a_base() -> None:
    """Without a base there is nothing to begin from, which is told."""
    with pytest.raises(RecipeError, match="'w': init 'base' needs a base"):
        merge("mats_fisher", models(4, 5), parameters={"init": "base"}, statistics=system("mats_fisher")[0])


# --- AIM


def aim(activation: dict[str, Tensor], omega: float, shape: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor]:
    """Return the task vector of a merge with AIM, and the one without."""
    sources, base = models(*shape, n=2), {"w": randn(*shape, seed=5)}
    found = merge("aim", sources, base, parameters={"omega": omega}, statistics={"activation": activation})["w"]
    return found - base["w"], sum(s["w"] - base["w"] for s in sources)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (2, 3, 2, 2)])
def test_aim_keeps_active_channels_near_the_base(shape: tuple[int, ...]) -> None:
    """Task vector entries are multiplied per input channel: by omega at the most active, by 1 at a silent one."""
    activation = torch.tensor([0.0, 2.0, 4.0])
    factor = torch.tensor([1.0, 0.7, 0.4]).view(-1, *[1] * (len(shape) - 2))

    found, plain = aim({"w": activation}, 0.4, shape)

    torch.testing.assert_close(found, plain * factor, atol=1e-6, rtol=1e-5)


def test_aim_leaves_alone_what_it_knows_nothing_about() -> None:
    """Omega 1, no statistic, or only silent channels: the merge as it was."""
    for activation, omega in (({"w": torch.rand(3)}, 1.0), ({}, 0.0), ({"w": torch.zeros(3)}, 0.0)):
        found, plain = aim(activation, omega)

        torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)


def test_aim_needs_a_base() -> None:
    """Full weights are never shrunk: a line that has no base is refused."""
    with pytest.raises(RecipeError, match="'w': relax keeps near to a base"):
        merge("zero | mean | relax", models(2, 3), statistics={"activation": {"w": torch.ones(3)}})


# --- OBIM


def obim(density: float | list[float], **parameters: list[float]) -> list[list[float]]:
    """Merge two sources of four entries (2 x 2) with inputs of uneven size, from a base of zeros."""
    sources = [{"w": torch.tensor([[4.0, 1.0], [3.0, 2.0]])}, {"w": torch.tensor([[40.0, 30.0], [20.0, 10.0]])}]
    squares = [{"w": torch.tensor([1.0, 100.0])}, {"w": torch.tensor([1.0, 1.0])}]
    return merge(
        "obim", sources, {"w": torch.zeros(2, 2)}, parameters={"density": density, **parameters},
        statistics={"square": squares},
    )["w"].tolist()  # fmt: skip


def test_obim_takes_turns() -> None:
    """By hand: saliencies 16, 100, 9, 400: the first takes its right column, the second the best of what is left."""
    assert obim(0.5) == [[40.0, 1.0], [20.0, 2.0]]
    assert obim(0.25) == [[40.0, 0.0], [0.0, 2.0]]
    assert obim([0.5, 0.25]) == [[40.0, 1.0], [0.0, 2.0]]
    assert obim(1.0) == [[4.0, 1.0], [3.0, 2.0]]
    assert obim(0.0) == [[0.0, 0.0], [0.0, 0.0]]
    assert obim(0.5, order=[1.0, 0.0]) == [[40.0, 30.0], [3.0, 2.0]]


def test_obim_without_statistic_goes_by_magnitude() -> None:
    """A tensor whose inputs are unknown is shared by the magnitude of task vectors."""
    sources = [{"w": torch.tensor([4.0, -1.0, 3.0, 2.0])}, {"w": torch.tensor([40.0, 30.0, 20.0, 10.0])}]

    found = merge(
        "obim", sources, {"w": torch.zeros(4)}, parameters={"density": 0.5}, statistics={"square": [{}, {}]}
    )  # fmt: skip

    assert found["w"].tolist() == [4.0, 30.0, 3.0, 10.0]


# --- weighs


def test_sens_merging_weighs_by_the_sensitivity_of_layers() -> None:
    """By hand: layer sensitivities (3, 4) / 5 and (0, 2) / 2; a layer's is the sum over its tensors."""
    names = ["l.0.a", "l.0.b", "l.1.a"]
    sources = [{name: torch.tensor([1.0]) for name in names}, {name: torch.tensor([0.0]) for name in names}]
    base = {name: torch.tensor([0.0]) for name in names}
    sensitivities = [
        {name: torch.tensor(value) for name, value in zip(names, values, strict=True)}
        for values in ((1.0, 2.0, 4.0), (0.0, 0.0, 2.0))
    ]

    def found(**parameters: object) -> list[float]:
        merged = merge("sens_merging", sources, base, None, parameters, {"sensitivity": sensitivities})  # type: ignore[arg-type]  # test values
        return [float(merged[name]) for name in names]

    def share(one: float, two: float) -> float:
        return math.exp(one) / (math.exp(one) + math.exp(two))

    assert found() == pytest.approx([share(0.6, 0), share(0.6, 0), share(0.8, 1)])
    assert found(temperature=0.1) == pytest.approx([share(6, 0), share(6, 0), share(8, 10)])
    assert found(transfer=[2.0, 1.0]) == pytest.approx([share(1.2, 0), share(1.2, 0), share(1.6, 1)])
    assert found(temperature=1e9) == pytest.approx([0.5] * 3)
    norm = math.sqrt(21)
    assert found(scope="tensor") == pytest.approx([share(1 / norm, 0), share(2 / norm, 0), share(4 / norm, 1)])


def test_sens_merging_without_sensitivity_is_uniform() -> None:
    """Where nothing is known, or all is zero, sources share alike."""
    base = {"w": torch.zeros(2, 3)}
    for each in ({}, {"w": torch.tensor(0.0)}):
        found = merge("sens_merging", models(2, 3), base, statistics={"sensitivity": [each] * 3})

        torch.testing.assert_close(found["w"], sum(s["w"] for s in models(2, 3)) / 3)


def test_lm_cocktail_is_a_softmax_of_losses() -> None:
    """Weights are exp(-loss / T), of the whole model; by hand for losses that differ by T log 3."""
    sources = [
        {"w": torch.tensor([0.0]), "v": torch.tensor([0.0])},
        {"w": torch.tensor([4.0]), "v": torch.tensor([8.0])},
    ]
    losses = [{"": torch.tensor(1.0)}, {"": torch.tensor(1.0 + 2.0 * math.log(3))}]

    found = merge("lm_cocktail", sources, parameters={"temperature": 2.0}, statistics={"loss": losses})

    assert float(found["w"]) == pytest.approx(1.0)
    assert float(found["v"]) == pytest.approx(2.0)


def test_losses_that_are_missing_are_told() -> None:
    """No loss is no weight: an error with the tensor, rather than the mean."""
    with pytest.raises(RecipeError, match="'w': sources have no statistic 'loss'"):
        merge("lm_cocktail", models(2, 3), statistics={"loss": [{}] * 3})
    with pytest.raises(RecipeError, match="needs the statistic 'loss'"):
        merge("lm_cocktail", models(2, 3))


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_one_source_comes_back_bit_for_bit(method: str) -> None:
    """A single source is not computed on, whatever its statistics."""
    statistics = {"fisher": [{"w": torch.rand(3, 4)}], "gram": [{"w": torch.zeros(4, 4)}]}
    sources = models(3, 4, n=1)

    assert torch.equal(merge(method, sources, statistics=statistics)["w"], sources[0]["w"])
