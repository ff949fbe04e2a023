"""Layer stacks as live models without copies: sources' layers stay resident once, a stack is a list of references."""

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from evomerge.errors import CandidateError, ModelError
from evomerge.hops import Hop, Stack, origins, path_of, recipe_of, stack_of
from evomerge.models.anatomy import Anatomy, anatomy_of
from evomerge.models.architecture import is_head, place, renamed, split
from evomerge.models.materialize import Blueprint
from evomerge.models.resident import Sources
from evomerge.operators.parts import Statistic, no_statistics
from evomerge.recipe import Recipe, Source

T = TypeVar("T")

#: Modules within a module, by name, each with those within it.
_Tree = dict[str, "_Tree"]

#: The name of a recipe that is no stack, where it is seen as the only source of one.
_ITSELF = "itself"


class Watch(Protocol):
    """Follows the hidden states through the hops of a live stack; may keep them, and put kept ones in."""

    def skips(self, hop: int, hidden: Tensor) -> Tensor | None:
        """Return what a hop returns without being run, given what it takes before its scale; None: run it."""
        ...

    def leaves(self, hop: int, hidden: Tensor) -> None:
        """Take note of what a hop returned."""
        ...


class LiveStack:
    """A model made of resident layers; it is called and asked like any other transformers model.

    Attributes:
        model: the model.
        hops: what it is made of.
        path: what its hops do, in order; see `evomerge.hops.path_of`.
        watch: follows its hops, if anyone does.
    """

    def __init__(self, stack: Stack, path: tuple[tuple[str, int, float], ...]) -> None:
        self.model: Any = None
        self.hops = stack.hops
        self.path = path
        self.watch: Watch | None = None


class Stacks:
    """Layers of sources, resident once for a whole search, and the stacks that are made of them.

    A layer is a module whose parameters are the sources' own tensors where those have the dtype and the device of the
    live model, else copies that are made once. A source that is a recipe is built layer by layer when it is needed;
    what was built for a stack stays until the next is there, or for good where the recipe is named here.

    Args:
        folder: the model folder that lends config and code, one of the sources'.
        sources: where tensors come from.
        dtype: the dtype that live models compute in.
        device: a torch device.
        trust_remote_code: whether code in the folder may run.
        lasting: digests of recipes whose layers stay once they are built.

    Raises:
        ModelError: if layers of this architecture cannot be stacked.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        dtype: str,
        device: str = "cpu",
        trust_remote_code: bool = False,
        lasting: Collection[str] = (),
    ) -> None:
        """Look at the architecture; nothing is built."""
        self.anatomy: Anatomy = anatomy_of(folder, trust_remote_code)
        self._sources, self._device, self._dtype = sources, device, dtype
        self._lasting = frozenset(lasting)
        self._shell: Any = None
        self._bones: list[nn.Module] = []
        self._trees: list[_Tree] = []
        self._names = _by_layer(sources)
        #: Layers and ends of sources, blueprints of those that are recipes: what stays, and what the last stack had.
        self._stay: dict[tuple[str, int | str], Any] = {}
        self._last: dict[tuple[str, int | str], Any] = {}
        self._now: dict[tuple[str, int | str], Any] = {}

    def adopt(self, model: Any) -> None:
        """Take a model of the folder's config, whose weights mean nothing, as what stacks are put into.

        Its layers are taken out, so that they need no memory on the device.
        """
        parent, _, name = self.anatomy.layers.rpartition(".")
        owner = model.get_submodule(parent)
        self._bones = [_bared(layer, self._device) for layer in getattr(owner, name)]
        self._trees = [_tree(layer) for layer in self._bones]
        setattr(owner, name, nn.ModuleList())
        self._shell = model

    def build(self, recipe: Recipe, statistic: Statistic = no_statistics) -> LiveStack:
        """Return the live model of a recipe.

        Args:
            recipe: a stack of copies of sources' layers, some of which may be merges; or any other recipe, which is
                taken as the only source of a stack.
            statistic: the statistics that methods of merges among the sources take.

        Raises:
            CandidateError: if what is merged for it is not finite, or a source has not the layer that is taken.
            RecipeError: if it has scales and is no stack.
        """
        known = stack_of(recipe)
        recipe, stack = _alone(recipe, self._sources.depth) if known is None else (recipe, known)
        models = {source.name: source for source in recipe.sources}
        self._check(stack, models)
        self._last, self._now = self._now, {}
        live = LiveStack(stack, path_of(recipe, stack))
        kinds = origins(recipe, self._sources.depth, stack)
        layers = [
            self._layer(models[hop.source], hop.layer, kind, statistic)
            for hop, kind in zip(stack.hops, kinds, strict=True)
        ]
        hops = nn.ModuleList(self._hop(live, k, hop, layers[k], kinds[k]) for k, hop in enumerate(stack.hops))
        ends = self._end(models[stack.embedding], "embedding", statistic)
        live.model = self._assembled(hops, kinds, ends | self._end(models[stack.head], "head", statistic))
        return live

    def _check(self, stack: Stack, models: Mapping[str, Source]) -> None:
        """Refuse layers that their source does not have, as `plan` does."""
        depth = self._sources.depth
        depths = {
            name: depth if source.recipe is None else len(source.recipe.layers) or depth
            for name, source in models.items()
        }
        for k, hop in enumerate(stack.hops):
            if not 0 <= hop.layer < depths[hop.source]:
                raise CandidateError(
                    f"hop {k} takes layer {hop.layer} of {hop.source}, which has {depths[hop.source]} layers"
                )

    # Layers.

    def _layer(self, source: Source, layer: int, kind: int, statistic: Statistic) -> nn.Module:
        """Return a source's layer, of the kind that a layer of the folders has, as a module with its tensors."""

        def make() -> nn.Module:
            read = self._reader(source, statistic)
            names = {own: renamed(name, layer) for own, name in self._names[kind].items()}
            found: nn.Module = rebuilt(self._bones[kind], lambda own: read(names[own]) if own in names else None)
            return found

        return self._kept(source, layer, make)

    def _end(self, source: Source, end: str, statistic: Statistic) -> dict[str, Tensor]:
        """Return the tensors of one end of a source, by name."""

        def make() -> dict[str, Tensor]:
            read, depth = self._reader(source, statistic), self._sources.depth
            return {name: read(name) for name in self._sources.names if place(name, depth).end == end}

        return self._kept(source, end, make)

    def _kept(self, source: Source, part: int | str, make: Callable[[], T]) -> T:
        """Return a part of a source, made when it is not there: for good, or for this stack and the next."""
        key = (_content(source), part)
        lasts = source.recipe is None or source.recipe.digest in self._lasting
        home = self._stay if lasts else self._now
        if key not in home:
            home[key] = self._last[key] if key in self._last else make()
        found: T = home[key]
        return found

    def _reader(self, source: Source, statistic: Statistic) -> Callable[[str], Tensor]:
        """Return what gives a source's tensors in the dtype and on the device of the live model."""
        recipe = source.recipe
        if recipe is None:
            tensor: Callable[[str], Tensor] = partial(self._sources.tensor, source.name)
        else:
            tensor = self._kept(source, "blueprint", lambda: self._blueprint(recipe, statistic)).tensor
        dtype = getattr(torch, self._dtype)

        def read(name: str) -> Tensor:
            found = tensor(name)
            return found.to(self._device, dtype if found.is_floating_point() else None)

        return read

    def _blueprint(self, recipe: Recipe, statistic: Statistic) -> Blueprint:
        return Blueprint(recipe, self._sources, self._device, statistic, additions=self.anatomy.additions)

    # The model.

    def _hop(self, live: LiveStack, place_: int, hop: Hop, layer: nn.Module, kind: int) -> nn.Module:
        """Return a layer as one hop: with a slot of its own among keys and values, its scale, and the watch."""
        found = _numbered(layer, place_, self._trees[kind])
        forward = type(found).forward.__get__(found)
        returned = self.anatomy.returned

        def run(hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
            watch = live.watch
            if watch is not None:
                known = watch.skips(place_, hidden_states)
                if known is not None:
                    return (known, *[None] * (returned - 1)) if returned else known
            out = forward(hidden_states if hop.scale == 1.0 else hidden_states * hop.scale, *arguments, **named)
            if watch is not None:
                watch.leaves(place_, out[0] if returned else out)
            return out

        vars(found)["forward"] = run
        return found

    def _assembled(self, hops: nn.ModuleList, kinds: list[int], ends: Mapping[str, Tensor]) -> Any:
        """Return the shell with these hops and these ends; its config says how many and of which kinds they are."""
        config = copy.copy(self._shell.config)
        text = config.get_text_config()
        if text is not config:
            text = copy.copy(text)
            vars(config)["text_config"] = text
        text.num_hidden_layers = len(kinds)
        if self.anatomy.kinds:
            vars(text)["layer_types"] = [self.anatomy.kinds[kind] for kind in kinds]
        configs = {id(self._shell.config): config, id(self._shell.config.get_text_config()): text}
        model = rebuilt(self._shell, _at_targets(self._shell, ends).get, configs)
        parent, _, name = self.anatomy.layers.rpartition(".")
        setattr(model.get_submodule(parent), name, hops)
        return model


def rebuilt(
    module: nn.Module, tensor: Callable[[str], Tensor | None], configs: Mapping[int, Any] | None = None
) -> Any:
    """Return a copy of a module's structure with other tensors as its parameters and lasting buffers; none is copied.

    Args:
        module: whose structure it is.
        tensor: returns the tensor of a name, or None where there is none.
        configs: what stands in for a config, by its id.

    Raises:
        ModelError: for a parameter without a tensor, or with one of another shape.
    """
    made: dict[int, nn.Parameter] = {}

    def copied(old: nn.Module, before: str) -> nn.Module:
        new = _shallow(old)
        vars(new)["_modules"] = {
            name: None if child is None else copied(child, f"{before}{name}.") for name, child in old._modules.items()
        }
        vars(new)["_parameters"] = {
            name: None if parameter is None else parameter_of(parameter, before + name)
            for name, parameter in old._parameters.items()
        }
        buffers = dict(old._buffers)
        for name in buffers.keys() - old._non_persistent_buffers_set:
            found = tensor(before + name)
            buffers[name] = buffers[name] if found is None else found
        vars(new)["_buffers"] = buffers
        if configs and id(getattr(old, "config", None)) in configs:
            vars(new)["config"] = configs[id(old.config)]
        return new

    def parameter_of(parameter: nn.Parameter, name: str) -> nn.Parameter:
        if id(parameter) not in made:  # tied ones stay tied
            found = tensor(name)
            if found is None:
                raise ModelError(f"the live model's {name!r} has no tensor; config.json must fit the sources")
            if found.shape != parameter.shape:
                raise ModelError(
                    f"tensor {name!r} has shape {list(found.shape)}, the live model's has {list(parameter.shape)}; "
                    "config.json must fit the sources"
                )
            made[id(parameter)] = nn.Parameter(found, requires_grad=False)
        return made[id(parameter)]

    return copied(module, "")


def _bared(layer: nn.Module, device: str) -> nn.Module:
    """Take the memory of a layer's parameters away, and return it."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return layer


def _numbered(layer: nn.Module, index: int, inside: _Tree) -> nn.Module:
    """Return a shallow copy of a layer, and of those of its modules that know their number, with another number."""
    new = _shallow(layer)
    if "layer_idx" in vars(new):
        vars(new)["layer_idx"] = index
    if inside:
        changed = {name: _numbered(layer._modules[name], index, tree) for name, tree in inside.items()}  # type: ignore[arg-type]  # the tree names modules that are there
        vars(new)["_modules"] = {**layer._modules, **changed}
    return new


def _shallow(module: T) -> T:
    """Return a copy of a module that shares all that it holds."""
    new = object.__new__(type(module))
    vars(new).update(vars(module))
    return new


def _tree(layer: nn.Module) -> _Tree:
    """Return those of a layer's modules that know the layer's number, or hold one that does, by name."""
    return {
        name: _tree(child)
        for name, child in layer._modules.items()
        if child is not None and any("layer_idx" in vars(inside) for inside in child.modules())
    }


def _at_targets(shell: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of the live model; files that were saved from the bare model leave a prefix out."""
    known = dict(shell.named_parameters(remove_duplicate=False)) | dict(shell.named_buffers())
    prefix = f"{shell.base_model_prefix}."
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for form in (name, prefix + name, name.removeprefix(prefix)):
            if form in known:
                found[form] = tensor
                break
        else:
            if is_head(name) and (head := shell.get_output_embeddings()) is not None:
                found |= {own: tensor for own, parameter in known.items() if parameter is head.weight}
    twins: dict[int, list[str]] = {}
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    for names in twins.values():
        one = next((name for name in names if name in found), None)
        if one is not None:
            found |= dict.fromkeys(names, found[one])
    return found


def _by_layer(sources: Sources) -> list[dict[str, str]]:
    """Return for each layer the names of its tensors by what comes after the layer's number."""
    found: list[dict[str, str]] = [{} for _ in range(sources.depth)]
    for name in sources.names:
        parts = split(name)
        if parts is not None:
            found[parts[1]][parts[2]] = name
    return found


def _content(source: Source) -> str:
    return source.name if source.recipe is None else source.recipe.digest


def _alone(recipe: Recipe, depth: int) -> tuple[Recipe, Stack]:
    """Return a model that is no stack as the only source of one."""
    hops = tuple(Hop(source=_ITSELF, layer=k) for k in range(len(recipe.layers) or depth))
    stack = Stack(embedding=_ITSELF, hops=hops, head=_ITSELF)
    return recipe_of(stack, [Source(name=_ITSELF, recipe=recipe)], recipe.dtype), stack
