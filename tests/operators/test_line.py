"""The interpreter of lines: in what order stages see what, how gates meet, what questions are called."""

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods import Step, method
from evomerge.operators import facts
from evomerge.operators import line as lines
from evomerge.operators.line import at_once, functions, run
from evomerge.operators.state import Ask, Site, State
from evomerge.stages import METHODS, STAGES

NAMES = ("a", "b", "c")


def state(*shape: int, base: bool = True, seed: int = 0) -> State:
    """Return three random sources, and a base."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3, *shape, generator=generator)
    W0 = torch.randn(*shape, generator=generator) if base else None
    return State(X=X, w=torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64), site=Site(tensor="t", names=NAMES), W0=W0)


def steps(text: str) -> tuple[Step, ...]:
    """Return the steps of a line."""
    return method(text).bound({}, NAMES)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that puts others in place of the functions of stages."""

    def replace(**given: Any) -> None:
        known = functions() | given
        monkeypatch.setattr(lines, "functions", lambda: known)

    return replace


def test_every_stage_has_a_function_of_its_name() -> None:
    """The table of stages and the modules with their functions agree."""
    found = functions()

    assert set(found) == set(STAGES)
    for name, function in found.items():
        parameters = set(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        assert parameters == set(STAGES[name].parameters), name


def test_the_base_is_added_back_to_what_was_made_of_the_task_vectors() -> None:
    """An origin that takes the base away gets it back at the end; one that does not gets nothing."""
    s = state(4, 5)
    assert s.W0 is not None
    w = s.w.float()

    expected = s.W0 + sum(w[i] * (s.X[i] - s.W0) for i in range(3))
    torch.testing.assert_close(run(steps("base | sum"), s), expected)
    torch.testing.assert_close(run(steps("zero | sum"), s), sum(w[i] * s.X[i] for i in range(3)))


def test_gates_multiply(replaced: Any) -> None:
    """Each gate leaves what the gates before it left; a single one counts as it is."""
    first, second = torch.tensor([1.0, 0.0, 0.5]).view(3, 1), torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    seen: list[Tensor | None] = []

    def ram(s: State, epsilon: float) -> Tensor:
        seen.append(s.G)
        return first.expand_as(s.X)

    def argmax(s: State) -> Tensor:
        seen.append(s.G)
        return second.expand_as(s.X)

    replaced(ram=ram, argmax=argmax)
    s = state(4)

    expected = (s.w.float().view(3, 1) * s.X * first * second).sum(dim=0)
    torch.testing.assert_close(run(steps("zero | ram | argmax | sum"), s), expected)
    assert seen[0] is None
    assert seen[1] is not None
    assert torch.equal(seen[1], first.expand(3, 4))


def test_weighs_replace_the_weights() -> None:
    """The combine sees the weights that the last weigh made of those given."""
    s = state(6)

    by_hand = s.w * torch.tensor([1.0, 2.0, 3.0])
    expected = (by_hand.float().view(3, 1) * s.X).sum(dim=0) / by_hand.sum().float()
    torch.testing.assert_close(run(steps("zero | wma | mean"), s), expected)


def test_edits_see_what_edits_before_them_made_and_the_origins_stay_known(replaced: Any) -> None:
    """X goes from edit to edit; D stays what the origin gave, for those who compare with it."""
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def near(s: State, t: float) -> Tensor:
        seen["near"] = s.X, s.D
        return s.X * 2

    def star(s: State, eta: float) -> Tensor:
        seen["star"] = s.X, s.D
        return s.X + 1

    replaced(near=near, star=star)
    s = state(4, 5)
    assert s.W0 is not None
    D = s.X - s.W0

    result = run(steps("base | near | star | sum"), s)

    assert torch.equal(seen["near"][0], D)
    assert torch.equal(seen["star"][0], 2 * D)
    assert all(origin is not None and torch.equal(origin, D) for _, origin in seen.values())
    torch.testing.assert_close(result, s.W0 + (s.w.float().view(3, 1, 1) * (2 * D + 1)).sum(dim=0))


def test_after_a_basis_a_shape_sees_the_tensors_own_coordinates(replaced: Any) -> None:
    """Edits and the combine work in the basis; what comes after it sees X and y brought back, and D as it was."""
    seen: dict[str, State] = {}

    def knots(s: State, cut: float) -> tuple[Tensor, Any]:
        return s.X.flip(-1)[..., :3], lambda z: torch.nn.functional.pad(z, (0, 1)).flip(-1)

    def near(s: State, t: float) -> Tensor:
        seen["near"] = s
        return s.X

    def scale(s: State, scale: float) -> Tensor:
        seen["scale"] = s
        return s.merged * 2

    replaced(knots=knots, near=near, scale=scale)
    s = state(5, 4, base=False)
    back = s.X.clone()
    back[..., 0] = 0.0

    result = run(steps("zero | knots | near | sum | scale(3)"), s)

    assert seen["near"].X.shape == (3, 5, 3)
    assert torch.equal(seen["scale"].X, back)
    assert seen["scale"].D is not None
    assert torch.equal(seen["scale"].D, s.X)
    y = (s.w.float().view(3, 1, 1) * back).sum(dim=0)
    torch.testing.assert_close(seen["scale"].merged, y)
    torch.testing.assert_close(result, 2 * y)


def test_a_real_basis_with_a_shape_after_it() -> None:
    """KnOTS with plain sums inside is the sum, and what follows (a consensus) decides in the tensor's coordinates."""
    s = state(6, 8)

    for shape in ("", " | consensus(0.4)", " | stock"):
        there = run(steps(f"base | knots | sum{shape}"), s)
        torch.testing.assert_close(there, run(steps(f"base | sum{shape}"), s), rtol=1e-4, atol=1e-5)


def test_a_shape_before_a_combine_is_refused() -> None:
    """Whoever asks for what is merged before anything is, is told."""
    with pytest.raises(RecipeError, match="before the combine"):
        _ = state(3).merged


def test_questions_are_called_by_stage_and_number(replaced: Any) -> None:
    """A stage's questions are numbered from 0, whatever else stands in the line."""
    called: list[tuple[tuple[str, int], str]] = []

    def reply(number: tuple[str, int], ask: Ask) -> Tensor:
        called.append((number, ask.how))
        return at_once(number, ask)

    run(steps("base | band | elect(tensor_majority) | energy(0.5) | mean | scale(2)"), state(4, 5), reply)

    ranks_and_sums = ["rank", "rank", "sum", "sum", "rank", "sum", "sum"]
    places = [("band", 0), ("band", 1), ("elect", 0), *(("energy", i) for i in range(4))]
    assert called == list(zip(places, ranks_and_sums, strict=True))

    called.clear()
    whole = method("base | band | elect(tensor_majority) | mean").bound({"density": 1.0, "gamma": 0.0}, NAMES)
    run(whole, state(4, 5), reply)
    assert [number for number, _ in called] == [("elect", 0)]


def test_answers_reach_the_stage_that_asked(replaced: Any) -> None:
    """What the answerer says is what `yield` gives, whatever the truth."""

    def trim(s: State, density: float, scope: str, rescale: str, count: str) -> Generator[Ask, Tensor, Tensor]:
        first = yield Ask(how="max", values=s.X)
        second = yield Ask(how="sum", values=s.X)
        return s.X * 0 + first + 10 * second

    replaced(trim=trim)
    told = iter([torch.tensor(2.0), torch.tensor(3.0)])

    assert run(steps("zero | trim | sum"), state(4), lambda number, ask: next(told)).tolist() == [32.0 * 1.25] * 4


def test_functions_of_no_stage_are_unknown() -> None:
    """Neither a helper that has the place of a stage's function nor a misspelt stage is one."""
    assert "weighted" not in functions()
    with pytest.raises(RecipeError, match="did you mean 'trim'"):
        method("base | trimm(0.2) | sum")


def test_small_tensors_pass_the_border() -> None:
    """What meets the contributions and came from a number or an answer is shown to `border` first, in order."""
    shown: list[Tensor] = []
    s = state(7)
    bordered = State(X=s.X, w=s.w, site=s.site, W0=s.W0, border=lambda values: shown.append(values) or values)
    text = "base | trim(0.5) | elect | mean(0) | scale(0.3)"

    assert torch.equal(run(steps(text), bordered), run(steps(text), s))
    threshold = facts.answer(Ask(how="rank", values=(s.X - s.W0).abs(), rank=lambda n: [3, 3, 3]))
    assert torch.equal(shown[0], threshold)
    assert [value.numel() for value in shown] == [3, 3, 3, 3, 1]
    assert float(shown[-1]) == pytest.approx(0.3)


def test_every_named_method_starts_with_an_origin_and_has_one_combine() -> None:
    """The table of methods is made of lines that the interpreter takes."""
    for name, found in METHODS.items():
        kinds = [step.stage.kind for step in found.steps]
        assert kinds[0] == "origin", name
        assert kinds.count("combine") == 1, name
