"""The table of methods, and what `check_blend` refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

import evomerge.operators
from evomerge.errors import RecipeError
from evomerge.operators import METHODS, check_blend, method
from evomerge.operators.methods import KINDS
from evomerge.recipe import Blend, Parameter


def blend(name: str, parameters: dict[str, Parameter] | None = None, **weights: float) -> Blend:
    """Return a blend of two sources."""
    return Blend(method=name, weights=weights or {"a": 0.5, "b": 0.5}, parameters=parameters or {})


def test_every_stage_refers_to_a_parameter_and_stands_in_order() -> None:
    """A method's stages come in the order of kinds, and every parameter is used by one of them."""
    for found in METHODS.values():
        places = [KINDS.index(stage.kind) for stage in found.stages]
        used = {argument for stage in found.stages for argument in stage.parameters.values()}

        assert places == sorted(places)
        assert places.count(KINDS.index("combine")) == 1
        assert used == set(found.parameters)


def test_defaults_are_accepted() -> None:
    """Every method with its own defaults passes the check, with a base."""
    for found in METHODS.values():
        check_blend(blend(found.name, {n: p.default for n, p in found.parameters.items()}), "x", has_base=True)


def test_only_linear_and_slerp_do_without_a_base() -> None:
    """Methods on task vectors are refused where the recipe has no base."""
    for name in ("linear", "slerp"):
        check_blend(blend(name), "recipe", has_base=False)
    for name in set(METHODS) - {"linear", "slerp"}:
        with pytest.raises(RecipeError, match=r"recipe\.method: .* needs a base; name one"):
            check_blend(blend(name), "recipe", has_base=False)


def test_unknown_method_names_the_nearest() -> None:
    """A misspelt method is answered with the nearest name."""
    with pytest.raises(RecipeError, match=r"method 'tiess' is not known; did you mean 'ties'"):
        method("tiess")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (blend("dare_tie"), r"x\.method: unknown method 'dare_tie'; did you mean 'dare_ties'"),
        (blend("ties", {"desity": 0.5}), r"x\.parameters\.desity: ties has no such parameter; did you mean 'density'"),
        (blend("ties", {"density": 1.4}), r"x\.parameters\.density: must be finite and lie in \[0, 1\], got 1\.4"),
        (blend("ties", {"density": {"a": -0.1}}), r"x\.parameters\.density\.a: must be .* got -0\.1"),
        (blend("ties", {"density": {"c": 0.1}}), r"x\.parameters\.density\.c: not a source of this blend"),
        (blend("ties", {"density": "high"}), r"x\.parameters\.density: must be a number, got 'high'"),
        (blend("ties", {"scale": {"a": 1.0}}), r"x\.parameters\.scale: one value for all sources"),
        (blend("ties", {"rescale": "1/p"}), r"x\.parameters\.rescale: must be one of none, l1, got '1/p'"),
        (blend("linear", {"scale": 1.0}), r"x\.parameters\.scale: linear has no such parameter; did you mean|known"),
        (blend("task_arithmetic", {"scale": float("nan")}), r"must be finite"),
        (blend("linear", a=float("inf")), r"x\.weights\.a: a weight must be finite, got inf"),
    ],
)
def test_wrong_blends_are_refused_in_one_line(wrong: Blend, says: str) -> None:
    """Each mistake gives one line with place, value and way out."""
    with pytest.raises(RecipeError, match=says) as caught:
        check_blend(wrong, "x", has_base=True)

    assert "\n" not in str(caught.value)


def test_scaled_slerp_needs_a_base() -> None:
    """Scaling full weights is refused, scaling the interpolated task vector is not."""
    check_blend(blend("slerp", {"scale": 0.5}), "x", has_base=True)
    check_blend(blend("slerp", {"scale": 1.0}), "x", has_base=False)

    with pytest.raises(RecipeError, match="name a base or remove scale"):
        check_blend(blend("slerp", {"scale": 0.5}), "x", has_base=False)


def test_names_can_be_checked_without_torch() -> None:
    """Importing the package and its table of methods loads no torch."""
    code = "import sys, evomerge.operators; evomerge.operators.METHODS; sys.exit('torch' in sys.modules)"
    root = str(Path(evomerge.operators.__file__).parents[2])

    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_public_names_are_those_listed() -> None:
    """Everything in `__all__` can be had, what is not there cannot."""
    assert all(getattr(evomerge.operators, name) is not None for name in evomerge.operators.__all__)

    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        evomerge.operators.merg  # noqa: B018  # the access is what is tested
