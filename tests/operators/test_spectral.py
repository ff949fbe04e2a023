"""The stages that look at matrices by their singular vectors: closed forms, and the laws of each method."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from evomerge.operators import METHODS, merge, spectral

MATRIX, NORM = "layers.0.mlp.weight", "layers.0.norm.weight"
torch.set_num_threads(1)


def randn(*shape: int, seed: int) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(count: int = 3, shape: Sequence[int] = (8, 6), name: str = MATRIX) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return a base of one tensor and task vectors."""
    return {name: randn(*shape, seed=99)}, [randn(*shape, seed=i) for i in range(count)]


def delta(method: str, base: dict[str, Tensor], deltas: Sequence[Tensor], weights: Sequence[float] | None = None,
          **parameters: float | str | Sequence[float]) -> Tensor:  # fmt: skip
    """Return the merged task vector of models of one tensor."""
    ((name, tensor),) = base.items()
    sources = [{name: tensor + each} for each in deltas]
    return merge(method, sources, base, weights, parameters)[name] - tensor


def near(one: Tensor, two: Tensor, allowed: float = 2e-5) -> bool:
    """Tell whether two tensors are the same but for rounding."""
    return one.shape == two.shape and float((one - two).abs().max()) < allowed


def spectrum(matrix: Tensor) -> Tensor:
    """Return the singular values."""
    return torch.linalg.svdvals(matrix.double())


SPECTRAL = [
    "star", "iso_c", "iso_cts", "tsv_m", "svc", "wudi", "swudi", "aswudi", "wudi_adam", "actmat", "knots_ties",
    "knots_mean", "cart", "lore", "opcm",
]  # fmt: skip


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 7), (7, 1), (1, 7), (4, 3, 2)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_sources_that_equal_the_base_give_the_base(name: str, shape: tuple[int, ...]) -> None:
    """No task vector, of any shape, gives no change and nothing that is not finite."""
    base, _ = family(shape=shape)
    assert near(delta(name, base, [torch.zeros(shape)] * 3), torch.zeros(shape), 1e-6)


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 7), (7, 1), (1, 7), (4, 3, 2)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_every_shape_merges_and_repeats(name: str, shape: tuple[int, ...]) -> None:
    """Tensors of any shape come out finite, in their shape, with the same bits every time."""
    base, deltas = family(shape=shape)
    one = delta(name, base, deltas, [0.5, -0.2, 1.0])
    assert one.shape == shape
    assert bool(one.isfinite().all())
    assert torch.equal(one, delta(name, base, deltas, [0.5, -0.2, 1.0]))


@pytest.mark.parametrize("name", [name for name in SPECTRAL if name != "opcm"])
def test_the_order_of_the_sources_does_not_count(name: str) -> None:
    """Permuting sources with their weights changes nothing."""
    base, deltas = family()
    one = delta(name, base, deltas, [1.0, 0.5, 0.7])
    assert near(one, delta(name, base, [deltas[2], deltas[0], deltas[1]], [0.7, 1.0, 0.5]))


# --- star, lowrank


def test_star_keeps_the_nuclear_norm_with_the_fewest_values_that_reach_eta() -> None:
    """The rank is the least whose singular values reach eta of their sum; their sum stays."""
    base, (one, *_) = family()
    s = spectrum(one)
    rank = next(k for k in range(1, 7) if s[:k].sum() >= 0.6 * s.sum())
    found = spectrum(delta("star", base, [one], eta=0.6))
    assert int((found > 1e-4).sum()) == rank
    assert found.sum() == pytest.approx(float(s.sum()), rel=1e-5)
    assert near(found[:rank] / found[0], s[:rank] / s[0])


def test_star_at_eta_one_is_the_mean() -> None:
    """All singular values are kept, so nothing changes; at eta 0 one of them is."""
    base, deltas = family()
    assert near(delta("star", base, deltas, eta=1.0), sum(deltas) / 3)
    assert near(delta("star", base, deltas, eta=[1.0, 1.0, 0.9999999]), sum(deltas) / 3)
    assert int((spectrum(delta("star", base, deltas[:1], eta=0.0)) > 1e-4).sum()) == 1


def test_lowrank_is_the_nearest_matrix_of_its_rank() -> None:
    """The error of a truncation to rank k is the tail of the spectrum; rank 0 leaves nothing."""
    base, (one, *_) = family()
    error = torch.linalg.matrix_norm(delta("base | lowrank | sum", base, [one], rank=0.5).double() - one.double())
    assert float(error) == pytest.approx(float(spectrum(one)[3:].square().sum().sqrt()), rel=1e-5)
    assert near(delta("base | lowrank | sum", base, [one], rank=0.0), torch.zeros(8, 6))


def test_flattened_tensors_are_out_by_the_rest() -> None:
    """A convolution is truncated as the matrix of its output channels."""
    base, (one, *_) = family(shape=(4, 3, 2))
    flat = {MATRIX: base[MATRIX].flatten(1)}
    for line in ("base | lowrank(0.5) | sum", "base | star | sum", "base | sum | iso", "base | knots | mean"):
        assert near(delta(line, base, [one]).flatten(1), delta(line, flat, [one.flatten(1)]))


# --- iso, polar_stack


def test_iso_makes_singular_values_equal_and_keeps_their_sum() -> None:
    """Every singular value is the mean of those of the sum."""
    base, deltas = family()
    mean = float(spectrum(sum(deltas)).mean())
    for name in ("iso_c", "base | sum | iso"):
        assert near(spectrum(delta(name, base, deltas)), torch.full((6,), mean).double(), 1e-4)


def test_iso_twice_is_iso() -> None:
    """A flat spectrum stays as it is, a power of one changes nothing, and half-way keeps the sum."""
    base, deltas = family()
    once = delta("base | sum | iso", base, deltas)
    assert near(delta("base | sum | iso", base, [once]), once)
    assert near(delta("base | sum | iso(1)", base, deltas), sum(deltas))
    half = spectrum(delta("base | sum | iso(0.5)", base, deltas))
    assert float(half.sum()) == pytest.approx(float(spectrum(sum(deltas)).sum()), rel=1e-5)
    assert near(half / half[0], (spectrum(sum(deltas)) / spectrum(sum(deltas))[0]).sqrt())


def test_iso_leaves_zero_singular_values_alone() -> None:
    """Directions that no task vector has stay unchanged: there is nothing to say which they are."""
    one = torch.outer(torch.arange(1.0, 9.0), torch.ones(6))
    one[:, 0] = 0
    assert near(delta("iso_c", {MATRIX: torch.zeros(8, 6)}, [one]), one, 1e-4)


def test_iso_c_is_iso_cts_without_task_space() -> None:
    """With everything in common, Iso-CTS is Iso-C."""
    base, deltas = family()
    assert near(delta("iso_cts", base, deltas, common=1.0), delta("iso_c", base, deltas))


def test_iso_cts_takes_task_vectors_beyond_the_common_space() -> None:
    """Of a single source, what is not common is its own, so the split changes nothing."""
    base, (one, *_) = family()
    assert near(delta("iso_cts", base, [one], common=0.5), delta("iso_c", base, [one]))


def test_polar_has_orthonormal_columns() -> None:
    """The polar factor is orthonormal and nearest; of a matrix of lower rank it has that rank."""
    A = randn(7, 4, seed=5).double()
    Q = spectral.polar(A)
    assert near(Q.T @ Q, torch.eye(4, dtype=torch.float64), 1e-10)
    stretch = Q.T @ A
    assert near(stretch, stretch.T, 1e-10)
    assert bool((torch.linalg.eigvalsh(stretch) > 0).all())
    assert near(spectral.polar(torch.cat([Q, Q], dim=1)), torch.cat([Q, Q], dim=1) / math.sqrt(2), 1e-10)


def test_tsv_of_orthogonal_tasks_is_their_sum() -> None:
    """Tasks of low rank in different rows and columns do not interfere and are all kept."""
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[:3, :3], two[3:, 3:] = randn(3, 3, seed=1), randn(3, 3, seed=2)
    found = delta("tsv_m", {MATRIX: torch.zeros(6, 6)}, [one, two])
    assert near(found, one + two)
    assert near(delta("iso_cts", {MATRIX: torch.zeros(6, 6)}, [one, two], exponent=1.0, common=1.0), one + two)


def test_tsv_of_a_task_twice_is_its_best_approximation() -> None:
    """The same vectors twice count once, at their strength: the truncated task vector."""
    base, (one, *_) = family()
    assert near(delta("tsv_m", base, [one, one]), delta("base | lowrank(0.5) | sum", base, [one]))


def test_iso_cts_has_a_flat_spectrum_of_full_rank() -> None:
    """Common and task vectors together are orthonormal, and all singular values are the same."""
    base, deltas = family()
    s = spectrum(delta("iso_cts", base, deltas, common=0.5))
    assert near(s, s.mean().expand(6), 1e-4)
    kept = spectrum(delta("tsv_m", base, deltas, rank=0.5))
    assert int((kept > 1e-4).sum()) == 3


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m", "wudi", "wudi_adam"])
def test_what_is_no_matrix_is_the_mean(name: str) -> None:
    """1-D tensors, excluded tensors, and matrices too small for one vector of each are means of task vectors."""
    base, deltas = family(shape=(6,), name=NORM)
    assert near(delta(name, base, deltas, scale=2.0), 2 * sum(deltas) / 3)
    base, deltas = family()
    assert near(delta(name, base, deltas, exclude="*.head *.mlp.*"), sum(deltas) / 3)
    base, deltas = family(shape=(2, 5))
    if name == "tsv_m":
        assert near(delta(name, base, deltas), sum(deltas) / 3)


# --- svc


def test_svc_of_copies_is_one_copy() -> None:
    """What K sources repeat counts once."""
    base, (one, *_) = family()
    assert near(delta("svc", base, [one] * 4), one)


def test_svc_changes_nothing_where_sources_do_not_overlap() -> None:
    """Orthogonal task vectors are projected on as themselves, so a sum stays the sum."""
    one, two = torch.zeros(6, 4), torch.zeros(6, 4)
    one[:3, :2], two[3:, 2:] = randn(3, 2, seed=1), randn(3, 2, seed=2)
    assert near(delta("svc", {MATRIX: torch.zeros(6, 4)}, [one, two]), one + two)
    assert near(delta("base | mean | svc", {MATRIX: torch.zeros(6, 4)}, [one, two], alpha=1.0), (one + two) / 2)


# --- WUDI


def loss(y: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """Return the interference that WUDI-Merging minimises, as its paper writes it."""
    return sum(((y - each) @ each.T).square().sum() / each.square().sum() for each in deltas)


def test_wudi_zeroes_the_gradient_of_its_loss() -> None:
    """The closed form is a stationary point of the published loss."""
    base, deltas = family()
    doubles = [each.double() for each in deltas]
    y = delta("wudi", base, deltas).double().requires_grad_()
    loss(y, doubles).backward()
    assert float(y.grad.abs().max()) < 1e-4
    start = sum(doubles).requires_grad_()
    loss(start, doubles).backward()
    assert float(start.grad.abs().max()) > 1


def test_wudi_is_weighted_least_squares() -> None:
    """Weights multiply the terms of the loss, and equal weights cancel."""
    base, deltas = family()
    doubles = [each.double() for each in deltas]
    y = delta("wudi", base, deltas, [2.0, 0.5, 1.0]).double().requires_grad_()
    sum(w * loss(y, [each]) for w, each in zip([2.0, 0.5, 1.0], doubles, strict=True)).backward()
    assert float(y.grad.abs().max()) < 1e-4
    assert near(delta("wudi", base, deltas, [0.3] * 3), delta("wudi", base, deltas))


def test_wudi_keeps_its_start_where_nothing_is_solved_for() -> None:
    """Without time nothing is filtered in; outside the kept eigenvectors the start stays."""
    base, deltas = family()
    for init, start in (("sum", sum(deltas)), ("mean", sum(deltas) / 3), ("zero", torch.zeros(8, 6))):
        assert near(delta("wudi", base, deltas, filter="exponential", time=0.0, init=init), start)
        gram = sum(each.T @ each / each.square().sum() for each in deltas)
        lowest = torch.linalg.eigh(gram).eigenvectors[:, 0]
        assert near(delta("wudi", base, deltas, rank=0.8, init=init) @ lowest, start @ lowest, 1e-4)


def test_the_exponential_filter_shrinks_singular_values() -> None:
    """Of a single source from zero, s becomes s (1 - exp(-t s^2 / sum s^2))."""
    base, (one, *_) = family()
    U, s, V = torch.linalg.svd(one.double(), full_matrices=False)
    expected = U * (s * (1 - (-7 * s**2 / s.square().sum()).exp())) @ V
    assert near(delta("wudi", base, [one], filter="exponential", time=7.0, init="zero").double(), expected)


def test_wudi_stays_at_the_start_where_its_loss_has_no_minimum() -> None:
    """A negative weight turns the loss upside down."""
    base, (one, *_) = family()
    assert near(delta("wudi", base, [one], [-1.0]), -one)


def test_actmat_is_regression_with_a_ridge_to_the_mean() -> None:
    """Trace-normalised Gram matrices of task vectors, each with its part of a ridge, in plain regression."""
    base, deltas = family()
    ridge = torch.eye(6, dtype=torch.float64) * 0.05 / 3
    grams = [each.double().T @ each.double() for each in deltas]
    metrics = [gram / gram.trace() + ridge for gram in grams]
    expected = sum(each.double() @ M for each, M in zip(deltas, metrics, strict=True)) @ torch.linalg.inv(sum(metrics))
    assert near(delta("actmat", base, deltas, time=20.0).double(), expected, 1e-5)


@pytest.mark.parametrize("rule", ["participation", "participation_sqrt", "entropy", "stable"])
def test_rank_rules_count_equal_eigenvalues(rule: str) -> None:
    """Of k equal eigenvalues and others of nearly nothing, each rule keeps k."""
    values = torch.tensor([2.0] * 3 + [1e-12] * 4, dtype=torch.float64)
    assert spectral._kept(values * (1 - 1e-9), 1.0, rule, (7, 7)) in (3, 4)
    assert spectral._kept(torch.full((5,), 0.3, dtype=torch.float64), 1.0, rule, (5, 5)) in (5,)


def test_rank_rules_with_a_share() -> None:
    """A ratio of the eigenvalues, a share of their sum, and the threshold in units of the median."""
    values = torch.tensor([5.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    assert [spectral._kept(values, share, "ratio", (4, 4)) for share in (0.0, 0.5, 0.6, 1.0)] == [1, 2, 3, 4]
    assert [spectral._kept(values, share, "energy", (4, 4)) for share in (0.4, 0.7, 0.95, 1.0)] == [1, 2, 4, 4]
    assert spectral._optimal_threshold(1.0) == pytest.approx(4 / math.sqrt(3) / math.sqrt(2 + math.sqrt(3)))
    assert spectral._kept(torch.tensor([9.0, 1.0, 1.0, 1.0]).double(), 1.0, "gavish_donoho", (4, 4)) == 1


def test_descent_follows_the_optimizer_of_torch() -> None:
    """Adam on the published loss, from the sum, by automatic differentiation."""
    base, deltas = family()
    y = sum(deltas).double().requires_grad_()
    adam = torch.optim.Adam([y], lr=1e-3)
    for _ in range(20):
        adam.zero_grad()
        loss(y, [each.double() for each in deltas]).backward()
        adam.step()
    assert near(delta("wudi_adam", base, deltas, iterations=20, rate=1e-3), y.detach().float(), 1e-5)
    assert not near(y.detach().float(), sum(deltas), 1e-3)


# --- knots


def test_the_mean_in_shared_coordinates_is_the_mean() -> None:
    """A linear change of coordinates changes no mean, for matrices with biases, norms and other vectors."""
    shapes = {MATRIX: (8, 6), "layers.0.mlp.bias": (8,), NORM: (6,), "scale": (5,), "conv.weight": (4, 2, 3),
              "conv.bias": (4,), "gpt.weight": (6, 8), "gpt.bias": (8,)}  # fmt: skip
    base = {name: randn(*shape, seed=9) for name, shape in shapes.items()}
    models = [{name: each + randn(*each.shape, seed=i) for name, each in base.items()} for i in range(3)]
    merged = merge("knots_mean", models, base)
    assert set(merged) == set(shapes)
    for name, tensor in merged.items():
        assert near(tensor, sum(model[name] for model in models) / 3), name


def test_knots_trims_in_shared_coordinates_of_the_whole_model() -> None:
    """A task vector that is small throughout is trimmed away; a bias stands with its weight, as one more column."""
    big, small = randn(4, 4, seed=1), randn(4, 4, seed=2) * 1e-3
    base = {"a.weight": torch.zeros(4, 3), "a.bias": torch.zeros(4), "b.weight": torch.zeros(4, 4)}
    source = {"a.weight": big[:, :3], "a.bias": big[:, 3], "b.weight": small}
    merged = merge("knots_ties", [source], base, parameters={"density": 15 / 32})
    assert near(merged["b.weight"], torch.zeros(4, 4))
    U, s, V = torch.linalg.svd(big)
    assert near(torch.cat([merged["a.weight"], merged["a.bias"][:, None]], 1), U @ torch.diag(s) @ V)
    joined = merge("knots_ties", [source], base, parameters={"density": 7 / 32})
    Z = torch.diag(s) @ V
    expected = U @ torch.where(Z.abs() >= Z.abs().flatten().sort().values[-8], Z, 0.0)
    assert near(torch.cat([joined["a.weight"], joined["a.bias"][:, None]], 1), expected)


def test_knots_leaves_out_small_singular_values() -> None:
    """Coordinates up to the cut are no coordinates."""
    base, (one, *_) = family()
    s = spectrum(one)
    found = spectrum(delta("knots_mean", base, [one], cut=float(s[2]) + 1e-4))
    assert near(found[:2], s[:2], 1e-4)
    assert float(found[2:].max()) < 1e-4


# --- cart, lore


def test_cart_is_the_mean_plus_low_rank_rests() -> None:
    """At full rank a sum of rests is scale * (sum - N mean) = 0; at low rank it is the truncated rests."""
    _, sources = family()
    middle = sum(sources) / 3

    def cart(**parameters: float) -> Tensor:
        return merge("cart", [{MATRIX: each} for each in sources], None, None, parameters)[MATRIX]

    assert near(cart(rank=1.0, scale=0.7), middle)
    rests = []
    for each in sources:
        U, s, V = torch.linalg.svd(each - middle, full_matrices=False)
        rests.append(U[:, :2] * s[:2] @ V[:2])
    assert near(cart(rank=0.34, scale=0.7), middle + 0.7 * sum(rests))


def test_lore_at_its_ends() -> None:
    """A great penalty leaves the mean, none leaves each source its own model."""
    _, sources = family()
    models = [{MATRIX: each} for each in sources]
    assert near(merge("lore", models, parameters={"mu": 1.0})[MATRIX], sum(sources) / 3)
    assert near(merge("lore", models, parameters={"mu": 0.0, "scale": 0.5})[MATRIX], sum(sources) / 3)
    alone = merge("lore | elect | sum", models[:1], parameters={"mu": 0.3})[MATRIX]
    assert near(alone, sources[0])


def test_lore_minimises_its_objective() -> None:
    """At the end of the turns no contribution and no mean lowers the objective (proximal optimality)."""
    _, sources = family()
    site = spectral.State(X=torch.stack(sources), w=torch.ones(3).double(), site=None)  # type: ignore[arg-type]  # it asks nothing of it
    X, t = spectral.lore(site, 0.3, 2000)
    middle = sum(sources) / 3
    limit = 0.3 * max(float(spectrum(each - middle)[0]) for each in sources)
    assert near(t, torch.stack([each - one for each, one in zip(sources, X, strict=True)]).mean(dim=0), 1e-4)
    for each, one in zip(sources, X, strict=True):
        rest = each - t - one  # limit times a subgradient of the nuclear norm at one
        assert float(spectrum(rest)[0]) < limit * (1 + 1e-3)
        assert float((rest * one).sum()) == pytest.approx(limit * float(spectrum(one).sum()), rel=1e-3)


# --- opcm


def test_the_same_model_again_adds_nothing() -> None:
    """All of a copy lies in what is there; the rescale keeps the norm."""
    base, (one, *_) = family()
    assert near(delta("opcm", base, [one, one, one]), one)


def test_an_update_is_orthogonal_to_what_was_merged() -> None:
    """The second model adds nothing along the first; the norm of the whole model is the mean of the norms."""
    base, (one, two, _) = family()
    found = delta("opcm", base, [one, two], alpha=0.8).double()
    share = float((found * one).sum() / one.double().square().sum())
    sizes = [float(torch.linalg.matrix_norm(each)) for each in (one, two)]
    assert float(torch.linalg.matrix_norm(found)) == pytest.approx(sum(sizes) / 2, rel=1e-5)
    update = found / share - one.double()
    assert abs(float((update * one).sum())) < 1e-3
    U, s, V = torch.linalg.svd(one.double(), full_matrices=False)
    P = U.T @ update @ V.T
    top = int((s.cumsum(0) / s.sum() <= 0.8).sum())
    assert top > 1
    assert float(P[:top, :top].abs().max()) < 1e-4
    assert float(P.diagonal().abs().max()) < 1e-4
    rest = two.double() - update
    assert float((U.T @ rest @ V.T)[top:, :top].abs().max()) < 1e-4


def test_opcm_folds_by_the_given_order() -> None:
    """An order says what is folded when; without one it is the order of the sources."""
    base, deltas = family()
    listed = delta("opcm", base, [deltas[1], deltas[2], deltas[0]])
    assert near(delta("opcm", base, deltas, order=[3.0, 1.0, 2.0]), listed)
    assert not near(delta("opcm", base, deltas), listed, 1e-3)


def test_opcm_adds_vectors_at_their_strength() -> None:
    """The rescale of a step is undone in the next: vectors come out along their sum, at the mean of the norms."""
    base, deltas = family(shape=(7,), name=NORM)
    total, size = sum(deltas), sum(float(each.norm()) for each in deltas) / 3
    assert near(delta("opcm", base, deltas), total * size / total.norm())


def test_opcm_projects_no_embedding_and_measures_the_whole_model() -> None:
    """Embeddings and 1-D tensors are added; all tensors are rescaled by one number per step."""
    names = {"embed_tokens.weight": (5, 4), NORM: (4,), MATRIX: (6, 4)}
    base = {name: torch.zeros(*shape) for name, shape in names.items()}
    models = [{name: randn(*shape, seed=i) for name, shape in names.items()} for i in range(2)]
    merged = merge("opcm", models, base)
    ratios = [merged[name] / (models[0][name] + models[1][name]) for name in ("embed_tokens.weight", NORM)]
    assert near(ratios[0], ratios[0].mean().expand(5, 4), 1e-4)
    assert float(ratios[0].mean()) == pytest.approx(float(ratios[1].mean()), rel=1e-4)
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in model.values())) for model in (*models, merged)]
    assert norms[2] == pytest.approx((norms[0] + norms[1]) / 2, rel=1e-5)


def test_every_method_of_this_family_is_named() -> None:
    """The list of the tests is that of the table."""
    own = {name for name in vars(spectral) if not name.startswith("_")}
    used = {name for name, found in METHODS.items() if own & {step.stage.name for step in found.steps}}
    assert set(SPECTRAL) <= used
