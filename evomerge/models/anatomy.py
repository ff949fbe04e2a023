"""What a model's layers are, found by running small ones: whether they can be stacked, and what they add to the stream.

No table per architecture: a small model of the same config with random weights is run once, in float64 on the CPU.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import ModelError
from evomerge.recipe import Recipe
from evomerge.value import value

#: The size of a small model where its config can be cut without another structure.
_SMALL = {"vocab_size": 32, "intermediate_size": 16, "n_inner": 16, "ffn_dim": 16, "moe_intermediate_size": 16}

#: How far results may be apart, relative to their size, and still be one: in float64, where a norm computes in float32,
#: and with the epsilon of norms between.
_EXACT, _ROUNDED, _NEAR = 1e-8, 1e-5, 1e-3

#: Tokens that the small model reads.
_BATCH, _LENGTH = 3, 6


@value
class Anatomy:
    """What is known of a model's layers.

    Attributes:
        layers: the path of the list of layers in the live model, such as `model.layers`.
        kinds: the kind of each layer of the config (`full_attention` …); empty where all are of one.
        additions: the parameters that what a layer adds to the stream is proportional to, by their names within the
            layer, each with what it is stored without (1 where a norm multiplies by 1 + weight). Empty where scales
            cannot be folded.
        unscalable: why scales cannot be folded; empty where they can.
        parameters: the names of all parameters within a layer of some kind.
        returned: how many things a layer returns as a tuple, hidden states first; 0 where it returns them alone.
    """

    layers: str
    kinds: tuple[str, ...]
    additions: Mapping[str, float]
    unscalable: str = ""
    returned: int = 0
    parameters: frozenset[str] = frozenset()


@lru_cache(maxsize=16)
def anatomy_of(folder: Path, trust_remote_code: bool = False) -> Anatomy:
    """Return what is known of the layers of the model in a folder, from its config alone.

    Raises:
        ModelError: if its layers cannot be stacked, with the reason.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"{folder}: transformers cannot read its config ({_line(problem)})") from None
    text = config.get_text_config()
    kind = config.model_type
    kinds = tuple(getattr(text, "layer_types", None) or ())
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError(f"{folder}: layers of {kind} share keys and values across depth, so they cannot be stacked")
    with _refused(f"{folder}: no small {kind} can be built to look at its layers"):
        model = _small(config, trust_remote_code)
    path = list_of_layers(model)
    if not path:
        raise ModelError(f"{folder}: {kind} has no one list of layers, so they cannot be stacked")
    with _refused(f"{folder}: a small {kind} cannot be run, so nothing is stacked"):
        seen = _run(model, path)
    why = _unstackable(seen)
    if why:
        raise ModelError(f"{folder}: layers of {kind} cannot be stacked: {why}")
    additions, unscalable = _additions(seen)
    return Anatomy(
        layers=path,
        kinds=kinds,
        additions=additions,
        unscalable=unscalable,
        returned=seen[0].returned,
        parameters=frozenset(name for one in seen for name, _ in one.layer.named_parameters()),
    )


def additions_of(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> Mapping[str, float]:
    """Return the parameters that a recipe's scales are folded into; nothing for a recipe without scales.

    Raises:
        ModelError: if the recipe has scales, and they cannot be folded into models like that in the folder.
    """
    if not scaled(recipe):
        return {}
    anatomy = anatomy_of(folder, trust_remote_code)
    if anatomy.unscalable:
        raise ModelError(f"{folder}: the recipe has scales, which cannot be written: {anatomy.unscalable}")
    return anatomy.additions


def scaled(recipe: Recipe) -> bool:
    """Tell whether a recipe has scales, or one of those that go into it."""
    inner = (source.recipe for source in (*recipe.sources, *([recipe.base] if recipe.base else [])))
    return recipe.scaled or any(scaled(each) for each in inner if each is not None)


def list_of_layers(model: Any) -> str:
    """Return the path of the one list that has as many modules as the config has layers; empty if there is none."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and not _nested(name, model)
    ]
    return found[0] if len(found) == 1 else ""


def _nested(name: str, model: nn.Module) -> bool:
    """Tell whether a list lies within another list."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:k])), nn.ModuleList) for k in range(1, len(parts)))


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Say in one line what could not be done with a small model, and why."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as problem:
        raise ModelError(f"{what} ({_line(problem)})") from None


class _Seen:
    """What one layer was given and gave."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.out: Any = None
        self.returned = 0
        #: Output of every module with parameters of its own, and what it was given, by name.
        self.inside: dict[str, tuple[tuple[Any, ...], Any]] = {}

    @property
    def stream(self) -> Any:
        """The hidden states that came in."""
        arguments, named = self.given
        return arguments[0] if arguments else named.get("hidden_states")

    def again(self, stream: Tensor) -> Tensor:
        """Run the layer on other hidden states."""
        arguments, named = self.given
        with torch.no_grad():
            if arguments:
                out = self.layer(stream, *arguments[1:], **named)
            else:
                out = self.layer(**{**named, "hidden_states": stream})
        found: Tensor = out[0] if self.returned else out
        return found


def _small(config: Any, trust_remote_code: bool) -> Any:
    """Return a small random model with a layer of every kind, and one more."""
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    old = text.num_hidden_layers
    depth = min(old, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    for name, given in list(vars(text).items()):
        if isinstance(given, list) and "layer" in name and len(given) == old:
            vars(text)[name] = given[:depth]
    text.num_hidden_layers = depth
    for name, size in _SMALL.items():
        given = getattr(text, name, None)
        if isinstance(given, int) and given > size:
            setattr(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        vars(text)[name] = None
    stream = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            small, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            # of size one, so that the epsilon of norms is small beside what they see
            scale = 1.0 / math.sqrt(weight.shape[-1]) if weight.ndim > 1 and "embed" not in name else 0.5
            weight.normal_(0.0, scale, generator=stream)
    return model.eval()


def _run(model: Any, path: str) -> list[_Seen]:
    """Run a model and return what was seen of each layer."""
    layers = model.get_submodule(path)
    seen = [_Seen(layer) for layer in layers]
    hooks = [hook for one in seen for hook in _watched(one)]
    ids_BT = torch.randint(0, 32, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _watched(one: _Seen) -> Iterator[Any]:
    """Yield the hooks that note what a layer and its modules are given and give."""

    def note(_: Any, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        one.given, one.returned = (arguments, named), len(out) if isinstance(out, tuple) else 0
        one.out = out[0] if one.returned else out

    def note_inside(name: str) -> Callable[..., None]:
        def inside(_: Any, arguments: tuple[Any, ...], out: Any) -> None:
            one.inside[name] = arguments, out

        return inside

    yield one.layer.register_forward_hook(note, with_kwargs=True)
    for name, module in one.layer.named_modules():
        if name and any(True for _ in module.parameters(recurse=False)):
            yield module.register_forward_hook(note_inside(name))


def _unstackable(seen: list[_Seen]) -> str:
    """Return why layers that were seen cannot be put in another order; empty where they can."""
    for k, one in enumerate(seen):
        if not isinstance(one.out, Tensor) or not isinstance(one.stream, Tensor):
            return f"layer {k} does not take and return hidden states alone"
        if one.out.shape != one.stream.shape:
            return f"layer {k} returns hidden states of another shape than it takes"
        if k and not torch.equal(one.stream, seen[k - 1].out):
            return f"layer {k} does not take what layer {k - 1} returns"
    first: dict[str, Any] = {}
    for k, one in enumerate(seen):
        for name, given in [*enumerate(one.given[0][1:]), *one.given[1].items()]:
            if not isinstance(given, Tensor) or name in ("hidden_states", "attention_mask", "position_embeddings"):
                continue  # the last two differ by kind of layer
            if not torch.equal(first.setdefault(str(name), given), given):
                return f"layer {k} is given {name!r} of its own"
    return ""


def _additions(seen: list[_Seen]) -> tuple[dict[str, float], str]:
    """Return the parameters that what layers add is proportional to, or why there are none."""
    found: dict[str, float] | None = None
    for one in seen:
        names = _added(one, one.out - one.stream)
        if names is None:
            return {}, "what its layers add to the stream comes from no modules that were found"
        own: dict[str, float] = {}
        for name in names:
            without = _without(one, name)
            if without is None:
                return {}, f"{name!r} is not proportional to its parameters"
            own |= without
        if not _scalable(one, own):
            return {}, "its layers take notice of the size of their input"
        if found is not None and own != found:
            return {}, "its layers add to the stream in different ways"
        found = own
    return found or {}, ""


def _scalable(one: _Seen, additions: Mapping[str, float]) -> bool:
    """Tell whether a layer that adds half as much does to the stream what it did to one of twice the size."""
    twice = one.again(2 * one.stream)
    with _halved(one.layer, additions):
        half = one.again(one.stream)
    return torch.allclose(2 * half, twice, rtol=_NEAR, atol=_NEAR * float(twice.abs().max()))


@contextmanager
def _halved(module: nn.Module, additions: Mapping[str, float]) -> Iterator[None]:
    """Within the block, what some parameters stand for is half of what it was."""
    parameters = [(module.get_parameter(name), without) for name, without in additions.items()]
    kept = [parameter.data for parameter, _ in parameters]
    for parameter, without in parameters:
        parameter.data = (parameter.data + without) / 2 - without
    try:
        yield
    finally:
        for (parameter, _), data in zip(parameters, kept, strict=True):
            parameter.data = data


def _added(one: _Seen, total: Tensor) -> list[str] | None:
    """Return the modules whose outputs, each times a number, sum up to what a layer adds.

    Outputs of random modules are linearly independent, so least squares tell which of them are in the sum.
    """
    outputs = {name: out for name, (_, out) in one.inside.items() if isinstance(out, Tensor) and _shaped(out, total)}
    if not outputs:
        return None
    matrix = torch.stack([out.reshape(-1) for out in outputs.values()], dim=1)
    shares = torch.linalg.lstsq(matrix, total.reshape(-1, 1)).solution[:, 0]
    left = total.reshape(-1) - matrix @ shares
    if float(left.norm()) > _EXACT * float(total.norm()):
        return None
    return [name for name, share in zip(outputs, shares.tolist(), strict=True) if abs(share) > _EXACT]


def _shaped(out: Tensor, like: Tensor) -> bool:
    return out.numel() == like.numel() and out.shape[-1] == like.shape[-1]


def _without(one: _Seen, name: str) -> dict[str, float] | None:
    """Return what each parameter of a module is stored without, if its output is proportional to the sum."""
    module = one.layer.get_submodule(name)
    arguments, out = one.inside[name]
    for amount in (0.0, 1.0):
        # only the weight of a norm is stored so, never a bias
        without = {own: amount if own == "weight" else 0.0 for own, _ in module.named_parameters(recurse=False)}
        with torch.no_grad(), _halved(module, without):
            half = module(*arguments)
        if torch.allclose(half, out / 2, rtol=_ROUNDED, atol=_ROUNDED):
            return {f"{name}.{own}": each for own, each in without.items()}
    return None


def _line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:160]
