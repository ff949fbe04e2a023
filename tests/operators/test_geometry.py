"""Lengths and angles: closed forms on circles and spheres, and laws."""

import math

import pytest
import torch
from torch import Tensor

from evomerge.operators import merge

COMBINES = ["slerp", "nuslerp", "multislerp", "karcher"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(method: str, vectors: list[Tensor], base: Tensor | None = None, **more: object) -> Tensor:
    """Return the merged task vector of one tensor."""
    origin = torch.zeros_like(vectors[0]) if base is None else base
    return merge(method, [{"w": origin + v} for v in vectors], base={"w": origin}, **more)["w"] - origin  # type: ignore[arg-type]


def at(angle: float) -> Tensor:
    """Return the point of the unit circle at an angle."""
    return torch.tensor([math.cos(angle), math.sin(angle)])


# --- slerp


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_turns_by_the_share_of_the_angle(t: float) -> None:
    """On the unit circle the result is the point at t times the angle; t and weights say the same."""
    torch.testing.assert_close(merged("slerp", [at(0.0), at(1.2)], parameters={"t": t}), at(1.2 * t))
    torch.testing.assert_close(merged("slerp", [at(0.0), at(1.2)], weights=[1 - t, t]), at(1.2 * t))


def test_slerp_takes_the_two_heaviest_of_positive_weight() -> None:
    """Other sources play no part, equal ones go by name, a negative weight is none."""
    points = [at(0.1), at(0.7), at(2.0)]

    torch.testing.assert_close(merged("slerp", points, weights=[0.2, 0.9, 0.3]), at(0.7 + 0.25 * 1.3))
    torch.testing.assert_close(merged("slerp", points), at(0.4))
    torch.testing.assert_close(merged("slerp", points, weights=[0.5, -1.0, -2.0]), at(0.1))
    assert torch.equal(merged("slerp", points[:1], weights=[0.3]), at(0.1))


def test_t_and_weights_of_slerp_multiply() -> None:
    """The way is t w_2 / ((1 - t) w_1 + t w_2), from the first in the recipe's order, be it the lighter."""
    found = merged("slerp", [at(0.0), at(1.0)], weights=[1.0, 2.0], parameters={"t": 0.25})

    torch.testing.assert_close(found, at(0.4))


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher", "model_stock"])
def test_scope_row_is_row_by_row(method: str) -> None:
    """With scope row each row is merged as a tensor of its own."""
    vectors = [randn(3, 6, seed=i) + 0.5 for i in range(3)]

    found = merged(method, vectors, parameters={"scope": "row"})

    for i, row in enumerate(found):
        torch.testing.assert_close(row, merged(method, [v[i] for v in vectors]))


def test_slerp_without_an_angle_is_linear() -> None:
    """A zero vector or equal directions go along the chord: no factor sin(45 degrees), unless it is asked for."""
    a = randn(16)
    zero = torch.zeros(16)

    torch.testing.assert_close(merged("slerp", [zero, a]), a / 2)
    torch.testing.assert_close(merged("slerp", [a, 3 * a], parameters={"t": 0.25}), a * 1.5)
    torch.testing.assert_close(merged("slerp", [a, -a], parameters={"t": 0.25}), a / 2)
    assert torch.equal(merged("slerp", [zero, zero]), zero)
    torch.testing.assert_close(merged("slerp", [zero, a], parameters={"zero": "right_angle"}), a * math.sqrt(0.5))


@pytest.mark.parametrize("size", [1e-7, 1e-18])
@pytest.mark.parametrize("method", COMBINES)
def test_tiny_task_vectors_have_angles(method: str, size: float) -> None:
    """Task vectors are merged alike whatever their size, even where float32 products would vanish."""
    vectors = [randn(64), randn(64, seed=1), randn(64, seed=2)]

    torch.testing.assert_close(merged(method, [v * size for v in vectors]) / size, merged(method, vectors))


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
def test_slerp_keeps_the_length_of_unit_vectors_over_its_scope(scope: str) -> None:
    """The angle is that of the row, the tensor, or the model: unit vectors there give a unit vector there."""

    def unit(seed: int) -> dict[str, Tensor]:
        model = {"a": randn(4, 6, seed=seed), "b": randn(10, seed=seed + 50)}
        if scope == "row":
            return {name: v / v.norm(dim=-1, keepdim=True) for name, v in model.items()}
        if scope == "tensor":
            return {name: v / v.norm() for name, v in model.items()}
        whole = torch.cat([v.flatten() for v in model.values()]).norm()
        return {name: v / whole for name, v in model.items()}

    found = merge("zero | slerp", [unit(0), unit(1)], parameters={"scope": scope, "t": 0.3})

    rows = {"row": [*found["a"], found["b"]], "tensor": [found["a"], found["b"]]}
    whole = [torch.cat([found["a"].flatten(), found["b"]])]
    for vector in rows.get(scope, whole):
        assert float(vector.norm()) == pytest.approx(1.0, abs=1e-6)


def test_nuslerp_axes() -> None:
    """Rows are slerped row by row, columns column by column, a vector as a whole; more than two dimensions too."""
    a, b = randn(3, 5), randn(3, 5, seed=1)
    rows = merged("nuslerp", [a, b], weights=[0.6, 0.3], parameters={"axis": "rows"})
    columns = merged("nuslerp", [a.T, b.T], weights=[0.6, 0.3], parameters={"axis": "columns"})

    for i in range(3):
        torch.testing.assert_close(rows[i], merged("slerp", [a[i], b[i]], weights=[0.6, 0.3]))
        torch.testing.assert_close(
            merged("nuslerp", [a[i], b[i]], parameters={"axis": "columns"}), merged("slerp", [a[i], b[i]])
        )
    torch.testing.assert_close(columns.T, rows)
    torch.testing.assert_close(merged("nuslerp", [a, b]), merged("slerp", [a, b]))
    deep = merged("nuslerp", [a.T.reshape(5, 3, 1), b.T.reshape(5, 3, 1)], parameters={"axis": "columns"})
    torch.testing.assert_close(deep.flatten(1).T, merged("nuslerp", [a, b], parameters={"axis": "rows"}))


def test_nuslerp_sees_the_smallest_angles() -> None:
    """Where slerp takes the chord (cos > 0.9995) nuslerp stays on the circle."""
    found = merged("nuslerp", [at(0.0).double(), at(0.03).double()])
    chord = merged("slerp", [at(0.0).double(), at(0.03).double()])

    assert abs(float(found.norm()) - 1) < 1e-6
    assert float(chord.norm()) == pytest.approx(math.cos(0.015), abs=1e-6)


# --- multislerp and Karcher


def test_multislerp_is_mean_direction_times_mean_length() -> None:
    """On the circle: equal lengths, symmetric angles; then lengths 1 and 3 at equal weights."""
    torch.testing.assert_close(merged("multislerp", [at(0.2), at(0.5), at(0.8)]), at(0.5))
    torch.testing.assert_close(merged("multislerp", [at(0.2), 3 * at(0.8)]), 2 * at(0.5))
    torch.testing.assert_close(merged("multislerp", [at(0.2), 3 * at(0.8)], parameters={"normalize": 0.0}), 4 * at(0.5))
    torch.testing.assert_close(
        merged("multislerp", [at(0.2)], weights=[0.5], parameters={"normalize": 0.0}), at(0.2) / 2
    )


def test_multislerp_where_directions_cancel_is_the_mean() -> None:
    """Opposite directions have no mean direction."""
    torch.testing.assert_close(merged("multislerp", [at(0.3), -3 * at(0.3)]), -at(0.3))


def test_karcher_mean_of_points_on_a_circle_is_at_the_mean_angle() -> None:
    """Within a half circle the mean of least squared angles is at the weighted mean of angles, unlike the chord's."""
    angles, weights = [0.1, 0.4, 1.9], [0.5, 0.2, 0.3]
    mean = sum(w * a for w, a in zip(weights, angles, strict=True))

    found = merged("karcher", [at(a) for a in angles], weights=weights, parameters={"max_iter": 50, "tol": 1e-9})

    torch.testing.assert_close(found, at(mean))
    assert not torch.allclose(merged("multislerp", [at(a) for a in angles], weights=weights), at(mean), atol=1e-2)


def test_karcher_mean_of_symmetric_points_is_their_centre() -> None:
    """The axes of space have the diagonal as centre; lengths 1, 2 and 3 have 2 as mean."""
    axes = [torch.eye(3)[i] * (i + 1) for i in range(3)]

    torch.testing.assert_close(merged("karcher", axes), torch.full((3,), 2 / math.sqrt(3)))


def test_karcher_has_no_tangents_left_at_its_end() -> None:
    """At the mean the angles, as tangent vectors towards the sources, cancel: the condition that defines it."""
    vectors = [randn(40, seed=i) + 0.5 for i in range(4)]
    u = merged("karcher", vectors, parameters={"max_iter": 100, "tol": 1e-9}).double()
    u = u / u.norm()

    total = torch.zeros(40, dtype=torch.float64)
    for v in vectors:
        d = v.double() / v.double().norm()
        total += torch.acos(d @ u) * (d - (d @ u) * u) / (d - (d @ u) * u).norm()

    assert float(total.norm()) < 1e-5


def test_karcher_stopped_at_once_is_the_mean_direction() -> None:
    """Without iterations it is multislerp."""
    vectors = [randn(20, seed=i) for i in range(3)]

    torch.testing.assert_close(merged("karcher", vectors, parameters={"max_iter": 0}), merged("multislerp", vectors))


def test_opposite_directions_have_a_karcher_mean_of_some_kind() -> None:
    """Where the start vanishes the first direction is taken: finite, of the mean length."""
    found = merged("karcher", [at(0.3), -3 * at(0.3)])

    torch.testing.assert_close(found, 2 * at(0.3))


@pytest.mark.parametrize("method", COMBINES)
def test_laws_of_all_combines(method: str) -> None:
    """Zero task vectors give the base; identical ones that model; a single one comes back bit for bit."""
    D, base = randn(4, 6), randn(4, 6, seed=7)

    assert torch.equal(merged(method, [D * 0] * 4, base=base), D * 0)
    torch.testing.assert_close(merged(method, [D] * 3), D)
    assert torch.equal(merged(method, [D]), D)
    assert merge(method, [{"w": D[0, 0]}, {"w": D[0, 1]}])["w"].isfinite()


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_sources_without_a_vector_shorten_only(method: str) -> None:
    """A zero task vector has no direction: it counts in the mean length alone."""
    D = randn(30)

    torch.testing.assert_close(merged(method, [D, D * 0, D * 0]), D / 3)


def test_gates_come_before_angles() -> None:
    """A gate before a geometric combine acts as if its entries had been zeroed in the sources."""
    a, b = randn(5, 6), randn(5, 6, seed=1)
    mask = (a + b).sign()

    found = merged("base | elect | slerp", [a, b])

    torch.testing.assert_close(found, merged("slerp", [a * (a * mask > 0), b * (b * mask > 0)]))


# --- model stock


def test_model_stock_of_orthogonal_and_of_identical_vectors() -> None:
    """Sources at right angles give the base, identical ones their model, one source itself."""
    D = randn(12)

    torch.testing.assert_close(merged("model_stock", list(torch.eye(3))), torch.zeros(3))
    torch.testing.assert_close(merged("model_stock", [D, D, D]), D)
    assert torch.equal(merged("model_stock", [D]), D)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_has_the_published_ratio(count: int) -> None:
    """At a common angle of 60 degrees t = N / 2 / (1 + (N - 1) / 2)."""
    eye = torch.eye(count + 1)
    vectors = [(eye[0] + eye[i + 1]) for i in range(count)]
    expected = torch.stack(vectors).mean(dim=0) * count / (count + 1)

    for average in ("cosines", "angles"):
        torch.testing.assert_close(merged("model_stock", vectors, parameters={"average": average}), expected)


def test_model_stock_averages_cosines_or_angles() -> None:
    """Three directions in a plane, 0, 30 and 90 degrees: cosines have the mean 0.4553, angles 60 degrees."""
    vectors = [at(0.0), at(math.pi / 6), at(math.pi / 2)]
    mean = torch.stack(vectors).mean(dim=0)

    for average, c in (("cosines", (math.sqrt(3) / 2 + 0.5) / 3), ("angles", 0.5)):
        found = merged("model_stock", vectors, parameters={"average": average})
        torch.testing.assert_close(found, mean * 3 * c / (1 + 2 * c))


def test_model_stock_does_not_extrapolate() -> None:
    """A negative mean cosine gives the base unless the clamp is off; so does the point without a finite t."""
    vectors = [at(0.0), at(2.0)]
    c = math.cos(2.0)

    assert torch.equal(merged("model_stock", vectors), torch.zeros(2))
    free = merged("model_stock", vectors, parameters={"clamp": 0.0})
    torch.testing.assert_close(free, (vectors[0] + vectors[1]) * c / (1 + c))
    opposite = merged("model_stock", [at(0.0), -2 * at(0.0)], parameters={"clamp": 0.0})
    torch.testing.assert_close(opposite, torch.zeros(2))


def test_model_stock_by_rows() -> None:
    """With scope row each row has its own angle."""
    a, b = torch.stack([at(0.0), at(0.0)]), torch.stack([at(0.0), at(math.pi / 2)])

    found = merged("model_stock", [a, b], parameters={"scope": "row"})

    torch.testing.assert_close(found, torch.stack([at(0.0), torch.zeros(2)]))


# --- norms


def test_metagpt_weighs_by_squared_length_over_the_model() -> None:
    """Lengths 1 and 3 over two tensors give weights 0.1 and 0.9 to both; exponent 0 gives the mean."""
    zero = {"a": torch.zeros(1, 1), "b": torch.zeros(1)}
    sources = [{"a": torch.tensor([[1.0]]), "b": torch.zeros(1)}, {"a": torch.zeros(1, 1), "b": torch.tensor([3.0])}]

    found = merge("metagpt", sources, base=zero)
    mean = merge("metagpt", sources, base=zero, parameters={"exponent": 0.0})

    assert (float(found["a"]), float(found["b"])) == pytest.approx((0.1, 2.7))
    assert (float(mean["a"]), float(mean["b"])) == pytest.approx((0.5, 1.5))


def test_a_zero_vector_weighs_nothing() -> None:
    """Sources equal to the base leave the others' weights alone."""
    torch.testing.assert_close(merged("metagpt", [at(0.4), at(0.0) * 0, at(0.0) * 0]), at(0.4))


def test_norm_weighs_without_normalising() -> None:
    """A negative exponent makes lengths equal; a zero vector weighs nothing."""
    found = merged("base | norm(-1, normalize=0) | sum", [at(0.2) * 5, at(1.0) * 0.1, at(0.0) * 0])

    torch.testing.assert_close(found, at(0.2) + at(1.0))


def test_norm_match_restores_the_mean_length() -> None:
    """The direction stays, the length becomes the weighted mean of the sources'; nothing stays nothing."""
    found = merged("base | mean | norm_match", [at(0.0), 3 * at(math.pi / 2)], weights=[1.0, 3.0])

    direction = torch.tensor([0.25, 2.25])
    torch.testing.assert_close(found, direction / direction.norm() * 2.5)
    assert torch.equal(merged("base | mean | norm_match", [at(0.0) * 0]), torch.zeros(2))


# --- DOGE


def test_doge_gives_every_source_its_own_square() -> None:
    """Without a mask each merged row has the inner product |row of X_j|^2 with every source, whatever eta."""
    vectors = [randn(5, 30, seed=i) for i in range(3)]

    for eta in (0.07, 1.0):
        found = merged("doge", vectors, parameters={"density": 1.0, "eta": eta})
        for v in vectors:
            torch.testing.assert_close((found * v).sum(dim=1), (v * v).sum(dim=1), rtol=1e-4, atol=1e-4)


def test_doge_masks_over_the_model_and_leaves_vectors_alone() -> None:
    """Vectors stay the base's and take no part in the threshold, or are weighed by eta / length."""
    base = {"m": torch.zeros(4, 5), "v": torch.zeros(6)}
    source = {"m": randn(4, 5), "v": randn(6, seed=1) * 1e4}

    found = merge("doge", [source], base=base, parameters={"density": 0.5})
    other = merge("doge", [source], base=base, parameters={"density": 1.0, "elsewhere": "sum"})
    pair = {"a": torch.zeros(2, 5), "b": torch.zeros(2, 5)}
    apart = merge("doge", [{"a": randn(2, 5) + 100, "b": randn(2, 5, seed=1)}], base=pair, parameters={"density": 0.5})

    assert int((found["m"] != 0).sum()) == 10
    assert torch.equal(found["v"], base["v"])
    assert int((apart["a"] != 0).sum()) == 10
    assert torch.equal(apart["b"], pair["b"])
    torch.testing.assert_close(other["v"], source["v"] * 0.07 / source["v"].norm())


def test_doge_of_equal_or_missing_vectors_is_finite() -> None:
    """A singular system leaves its directions out: twice the same gives that model, nothing gives the base."""
    D = randn(4, 9)

    torch.testing.assert_close(merged("doge", [D, D], parameters={"density": 1.0}), D)
    near = merged("doge", [D, D * 1.01 + randn(4, 9, seed=1) * 1e-3], parameters={"density": 1.0})
    torch.testing.assert_close(near, D, rtol=0.05, atol=0.01)
    assert torch.equal(merged("doge", [D * 0, D * 0]), D * 0)
