"""One merge without a search: a recipe, ours or mergekit's, checked from headers and streamed to a model folder."""

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge import __version__
from evomerge.card import blended, model_card
from evomerge.errors import InvalidInput, RecipeError
from evomerge.hops import origins
from evomerge.methods import method
from evomerge.models import mergekit
from evomerge.models.anatomy import additions_of
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.footprint import building, in_pieces
from evomerge.models.locate import locate
from evomerge.models.materialize import Blueprint, Step, plan, statistics_for, without_scales
from evomerge.models.resident import OnDisk, Sources
from evomerge.models.save import save
from evomerge.models.statistics import digest_of
from evomerge.models.together import fitting, together
from evomerge.models.vocabulary import Aligned
from evomerge.recipe import Recipe, Source, models_of, read, to_yaml

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of an entry in the dtypes of a recipe.
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class OneOff:
    """A recipe whose models are at hand and fit together; nothing is built before `write`.

    Args:
        path: a recipe.yaml, or a file of mergekit's.
        dtype: in place of the recipe's; empty: as it says.

    Attributes:
        recipe: with the absolute path and the fingerprint of every model.
        folders: of the models, by name.
        steps: what is built.

    Raises:
        RecipeError: naming the file and what does not fit.
    """

    def __init__(self, path: Path, dtype: str = "") -> None:
        """Read the recipe, open its models, and check all that headers and tokenizers tell."""
        given = mergekit.read(path) if mergekit.is_mergekit(path) else read(path)
        try:
            given = dataclasses.replace(given, dtype=dtype) if dtype else given
            self.recipe = _located(given, path.parent)
            self.folders = {name: Path(source.path) for name, source in models_of(self.recipe).items()}
            self._first = next(iter(self.folders))
            self.sources = self._open()
            self._additions = additions_of(self.recipe, self.folders[self._first])
            plainly = without_scales(self.recipe, self.sources.names, self._additions)
            self.steps = plan(plainly, self.sources.names, self.sources.depth)
        except InvalidInput as problem:
            text = str(problem)
            raise RecipeError(text if text.startswith(str(path)) else f"{path}: {text}") from None

    def _open(self) -> Sources:
        if self.recipe.tokenizer:
            return Aligned(self.folders, self.recipe.tokenizer, self.recipe.base.name if self.recipe.base else None)
        return OnDisk(self.folders)

    @property
    def entries(self) -> int:
        """The number of elements of the model that is built."""
        return sum(self._entries(step) for step in self.steps)

    @property
    def bytes(self) -> int:
        """The size of the model that is built."""
        return self.entries * _BYTES[self.recipe.dtype]

    @property
    def together(self) -> int:
        """How many tensors are built at the same time on the CPU.

        Lines that take whole tensors have few and large operations, which are split among the threads instead.
        """
        return fitting() if self._plain and all(map(in_pieces, self.recipe.blends())) else 1

    @property
    def peak(self) -> int:
        """Bytes that the merge needs beside the program itself: those of the largest tensors that are built together.

        Of a line that is run piece by piece these are the tensors of all models as stored, the result in float32 and in
        its own dtype, and some pieces; of another line all models' tensors in float32 several times.
        """
        return sum(heapq.nlargest(self.together, map(self._bytes, self.steps)))

    @property
    def passes(self) -> int:
        """The number of questions about the whole that are answered before the merge, each in a pass over the models.

        One for a threshold takes two passes.
        """
        return max((wide(step.blend.method, dict(step.blend.parameters)) for step in self.steps), default=0)

    @property
    def _plain(self) -> bool:
        """Whether the tensors of all models are used as they lie on the disk."""
        named = (*self.recipe.sources, *([self.recipe.base] if self.recipe.base else []))
        return not isinstance(self.sources, Aligned) and all(source.recipe is None for source in named)

    def _entries(self, step: Step) -> int:
        return math.prod(self.sources.shape(self._first, step.of(self._first)))

    def _bytes(self, step: Step) -> int:
        """Return the bytes that building one tensor needs."""
        entries, models = self._entries(step), len(self.folders)
        stored = sum(self.sources.dtype(name, step.of(name)).itemsize for name in self.folders)
        return building(step.blend, entries, stored, self.recipe.dtype, models, straight=False, plain=self._plain)

    def write(
        self, directory: Path, device: str = "cpu", advance: Callable[[int], None] = lambda entries: None
    ) -> None:
        """Merge into a new folder, which appears when it is whole.

        Args:
            directory: the folder to make.
            device: where to merge.
            advance: called with the number of elements of each tensor that is finished.

        Raises:
            ModelError: if the folder exists.
            CandidateError: if values are not finite.
        """
        owner = self.recipe.base.name if self.recipe.base and self.recipe.base.name in self.folders else self._first
        aligned = self.sources if isinstance(self.sources, Aligned) else None
        files = {"recipe.yaml": to_yaml(self.recipe), "README.md": card(self), **(aligned.files if aligned else {})}
        save(
            self._stream(device, advance),
            aligned.template if aligned else Checkpoint(self.folders[owner]),
            directory,
            dtype=self.recipe.dtype,
            extra_files=files,
            depths=origins(self.recipe, self.sources.depth),
        )

    def _stream(self, device: str, advance: Callable[[int], None]) -> Iterator[tuple[str, "Tensor"]]:
        statistic = statistics_for(self.recipe, self.folders, device=device)
        blueprint = Blueprint(self.recipe, self.sources, device, statistic, additions=self._additions)
        apart = self.together > 1 and device == "cpu"
        names = (step.name for step in self.steps)
        for name, tensor in together(blueprint.tensor, names, self.together) if apart else blueprint.stream():
            yield name, tensor
            advance(tensor.numel())


def wide(name: str, parameters: dict[str, object]) -> int:
    """Return how many questions about layer or model a blend asks."""
    found = method(name)
    given = {known: parameters.get(known, parameter.default) for known, parameter in found.parameters.items()}
    return sum(
        (key.rpartition(".")[2] == "scope" and each in ("layer", "model")) or each == "majority"
        for key, each in given.items()
    )


def card(job: OneOff) -> str:
    """Return the README of a merged model: what it is made of and how to load it."""
    made = f"A {blended(job.recipe)}; made by evomerge {__version__}"
    return model_card("A merged model", made, [], job.recipe)


def _located(recipe: Recipe, near: Path) -> Recipe:
    """Return a recipe with absolute paths and the fingerprints of its models and texts.

    Raises:
        RecipeError: if a model or the texts are not those whose fingerprint the recipe gives.
        InvalidInput: if one cannot be read.
    """

    def found(source: Source) -> Source:
        if source.recipe is not None:
            return dataclasses.replace(source, recipe=_located(source.recipe, near))
        folder = locate(source.path, near)
        fingerprint = Checkpoint(folder).fingerprint
        source.check(fingerprint, "model")
        return dataclasses.replace(source, path=str(folder), fingerprint=fingerprint)

    texts = recipe.calibration
    if texts is not None:
        file = (near / Path(texts.path).expanduser()).resolve()
        fingerprint = digest_of(file)
        texts.check(fingerprint, "calibration")
        texts = dataclasses.replace(texts, path=str(file), fingerprint=fingerprint)
    return dataclasses.replace(
        recipe,
        sources=tuple(found(source) for source in recipe.sources),
        base=found(recipe.base) if recipe.base else None,
        calibration=texts,
    )
