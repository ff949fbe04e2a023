"""Statistics that merge methods take as inputs: computed once from calibration texts, kept in safetensors.

Every kind runs the live model in float32, one text at a time, so that there is no padding that could count. Sums run in
float32 inside a text and in float64 across texts. The log-likelihood of a text is the sum over its predicted tokens.
"""

import gc
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from evomerge.errors import InvalidInput, ModelError, nearest
from evomerge.models.architecture import place
from evomerge.models.checkpoint import Checkpoint
from evomerge.value import digest, value

__all__ = ["KINDS", "Statistics", "digest_of"]

#: What each kind is. Linear modules map n inputs to m outputs; x is an input row, g the gradient of an output row.
KINDS = {
    "activation": "mean over tokens of |x_c| per input channel, shape (n,): weights of linear and norm modules",
    "square": "mean over tokens of x_c^2 per input channel, shape (n,): weights of linear and norm modules",
    "gram": "X'X/T over T tokens, shape (n, n): weights of linear modules",
    "gram_out": "mean over tokens of g g', g of the text's negative log-likelihood, (m, m): linear weights in layers",
    "fisher": "mean over texts of the squared gradient of the text's log-likelihood: every parameter, its shape",
    "loss": "mean cross entropy per token in nats: one scalar per model, under the name ''",
    "sensitivity": "|sum of theta * gradient of the mean cross entropy per token|: every parameter, a scalar",
}

#: Kinds that one forward pass gives together; kinds whose labels may be drawn from the model.
_CHEAP, _LABELLED = ("activation", "square", "loss"), ("gram_out", "fisher")

#: Most elements of a product that is added to its sum at once.
_BLOCK = 1 << 20

#: Part of every digest, to be raised when the values change their meaning.
_FORM = 1

_Tensors = dict[str, Tensor]


@value
class _Settings:
    """What the values depend on beside model and texts."""

    tokens: int
    examples: int
    labels: str
    seed: int


def digest_of(texts: Path, *, tokens: int = 512, examples: int = 256, labels: str = "text", seed: int = 0) -> str:
    """Return the digest of what statistics depend on beside the model: the texts that are read, and the settings.

    Raises:
        InvalidInput: if the file or a setting cannot be used.
    """
    return digest([_FORM, _read(Path(texts), examples), _settings(tokens, examples, labels, seed)])


class Statistics:
    """Statistics by source, kind and tensor name, each kind computed when first asked for and then read from the cache.

    Args:
        folders: the model folder of each source, the base included, by name.
        texts: a text file, one text per non-empty line, or `.jsonl` whose objects have a field `text`.
        cache: the folder of the files; a file's name is model, texts with settings, and kind.
        device: where the live model and the sums are.
        memory: the most bytes of float64 sums at once; what is more takes further passes over the texts. The live
            model (4 bytes per parameter) comes on top, and for gradients the largest tensor's.
        tokens: how many tokens of each text count, from its start; never more than the model has positions.
        examples: how many texts count, from the start of the file; those of less than two tokens are left out.
        labels: of `fisher` and `gram_out`: `text`, the tokens that follow (the empirical Fisher), or `model`, tokens
            drawn from the model's own distribution (Matena 2022, section 3.1, https://arxiv.org/abs/2111.09832).
        seed: of the drawn labels.
        say: takes one line per computation.
        trust_remote_code: whether code in the folders may run.

    Raises:
        InvalidInput: if texts or settings cannot be used; what is wrong with a model is said when it is asked for.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        texts: Path,
        cache: Path,
        *,
        device: str = "cpu",
        memory: int = 2 << 30,
        tokens: int = 512,
        examples: int = 256,
        labels: str = "text",
        seed: int = 0,
        say: Callable[[str], None] = lambda text: None,
        trust_remote_code: bool = False,
    ) -> None:
        self._folders, self._cache = {name: Path(folder) for name, folder in folders.items()}, Path(cache)
        self._settings = _settings(tokens, examples, labels, seed)
        self._texts = _read(Path(texts), examples)
        self._device, self._memory, self._say, self._trusts = device, memory, say, trust_remote_code
        self._checkpoints: dict[str, Checkpoint] = {}
        self._files: dict[tuple[str, str], Path] = {}
        self._homes: dict[Path, dict[str, tuple[str, str]]] = {}
        #: Digest of texts and settings, for the key of what is made from these statistics; equals `digest_of`.
        self.provenance = digest([_FORM, self._texts, self._settings])

    def tensor(self, source: str, kind: str, name: str) -> Tensor | None:
        """Return a statistic in float32 on the CPU; None if the tensor has none of this kind (an embedding's Gram).

        Args:
            source: one of the folders' names.
            kind: one of `KINDS`.
            name: a tensor of the model, as stored; of the kind `loss`, which is of the whole model, any name.

        Raises:
            InvalidInput, ModelError: for an unknown source, kind or tensor, for a broken file, and as `ensure` does.
        """
        file, checkpoint = self.ensure(source, kind), self._checkpoint(source)
        if kind == "loss":
            name = ""
        elif name not in checkpoint.names:
            raise ModelError(f"{checkpoint.path}: has no tensor {name!r}; {nearest(name, checkpoint.names)}")
        try:
            if file not in self._homes:
                with safe_open(file, framework="pt") as found:
                    self._homes[file] = json.loads(found.metadata()["names"])
            if name not in self._homes[file]:
                return None
            home, key = self._homes[file][name]
            with safe_open(file.with_name(home), framework="pt") as found:
                return found.get_tensor(key)  # type: ignore[no-any-return]  # safetensors is not annotated
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as problem:
            raise ModelError(f"{file}: cannot be read ({_line(problem)}); remove it to compute it again") from None

    def ensure(self, source: str, kind: str) -> Path:
        """Return the file of one kind of a source's statistics, computed first if the cache lacks it.

        Raises:
            InvalidInput: for an unknown kind or source, or if one statistic needs more than the memory.
            ModelError: if the model cannot be loaded, or a statistic is not finite.
        """
        if kind not in KINDS:
            raise InvalidInput(f"statistics have no kind {kind!r}; {nearest(kind, KINDS)}")
        if (source, kind) not in self._files:
            self._files[source, kind] = self._file(source, kind)
        file = self._files[source, kind]
        if not file.is_file():
            live = _Live(self._checkpoint(source), self._texts, self._settings, self._device, self._trusts)
            self._compute(source, kind, live)
            model = weakref.ref(live.model)
            del live
            if model() is not None:
                gc.collect()  # held by a cycle, it would stand beside the next one
        return file

    def _checkpoint(self, source: str) -> Checkpoint:
        if source not in self._folders:
            raise InvalidInput(f"statistics have no source {source!r}; {nearest(source, self._folders)}")
        if source not in self._checkpoints:
            self._checkpoints[source] = Checkpoint(self._folders[source])
        return self._checkpoints[source]

    def _file(self, source: str, kind: str) -> Path:
        """Return where a kind is kept: by model, by texts, tokenizer and the settings that change it, and by kind."""
        checkpoint, settings = self._checkpoint(source), self._settings
        if kind not in _LABELLED:
            settings = _settings(settings.tokens, settings.examples, "text", 0)
        tokenizer = [hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.tokenizer_files]
        inputs = digest([_FORM, self._texts, settings, tokenizer])
        return self._cache / f"{checkpoint.fingerprint}-{inputs}-{kind}.safetensors"

    def _compute(self, source: str, kind: str, live: "_Live") -> None:
        """Make the passes of a kind, and write its file last."""
        if live.strangers:
            some = f"{len(live.strangers)} tensors, the first is {live.strangers[0]!r}"
            self._say(f"source {source!r}: {some}, have no statistics: the live model has no such parameters")
        amount = f"statistics of {source!r}: {len(live.ids)} texts, {sum(map(len, live.ids))} tokens"
        if kind in _CHEAP:
            self._say(f"{amount}, one pass for {', '.join(_CHEAP)}")
            for each, (tensors, stems) in _cheap(live).items():
                self._write(source, each, tensors, stems)
            return
        collect, stems, sizes = _streamed(live, kind)
        groups = _groups(sizes, self._memory, f"source {source!r}: statistic {kind!r}")
        passes = "one pass" if len(groups) == 1 else f"{len(groups)} passes"
        self._say(f"{amount}, {passes} for {kind}: {sum(sizes.values())} bytes of sums")
        if len(groups) == 1:
            self._write(source, kind, collect(live, groups[0]), stems)
            return
        shards: dict[str, str] = {}
        for i, group in enumerate(groups, 1):
            tensors = collect(live, group)
            shard = self._write(source, kind, tensors, {}, f".{i}-of-{len(groups)}")
            shards |= dict.fromkeys(tensors, shard.name)
        self._write(source, kind, {}, stems, shards=shards)

    def _write(
        self,
        source: str,
        kind: str,
        tensors: _Tensors,
        stems: Mapping[str, str],
        suffix: str = "",
        shards: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a kind's file, or (with a suffix) one of its shards: whole, or not there at all.

        Args:
            source: whose statistics.
            kind: which.
            tensors: what to write, by stem.
            stems: the stem of each tensor name; a stem that no module fed is nowhere, and the name has no statistic.
            suffix: what distinguishes a shard from the kind's file.
            shards: the file of each stem, where that is another.
        """
        for stem, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"source {source!r}: statistic {kind!r} of {stem!r} is not finite; check its weights")
        whole = self._file(source, kind)
        file = whole.with_name(f"{whole.stem}{suffix}.safetensors")
        shards = dict.fromkeys(tensors, file.name) if shards is None else shards
        homes = {name: (shards[stem], stem) for name, stem in stems.items() if stem in shards}
        metadata = {"format": "pt", "key": file.stem, "provenance": self.provenance, "names": json.dumps(homes)}
        partial_ = file.with_name(f".{file.name}.partial-{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial_, metadata=metadata)
            with partial_.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial_, file)
        except (OSError, SafetensorError) as problem:  # as which of them a full disk comes depends on the library
            raise ModelError(
                f"{file}: statistics cannot be written ({' '.join(str(problem).split())}); free space, or name another "
                "folder for caches in XDG_CACHE_HOME"
            ) from None
        finally:
            partial_.unlink(missing_ok=True)
        return file


class _Live:
    """A source's live model with its texts; modules and parameters by the names that the checkpoint stores.

    A head that is tied is not among `linears`, for it has no tensor of its own.
    """

    def __init__(
        self, checkpoint: Checkpoint, texts: Sequence[str], settings: _Settings, device: str, trusts: bool
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        tokenizer, self.model = _load(checkpoint, trusts)
        self.model.to(device)
        self.depth, self.settings, self._transposed = checkpoint.depth, settings, Conv1D
        self.ids = _encode(texts, tokenizer, self.model.config.get_text_config(), settings.tokens, checkpoint, device)
        forms = dict(self.model.named_parameters(remove_duplicate=False))
        prefix = f"{self.model.base_model_prefix}."  # files saved from the bare model leave it out
        stored = {
            form: name
            for name in checkpoint.names
            for form in (name, prefix + name, name.removeprefix(prefix))
            if form in forms
        }
        self.parameters: dict[str, nn.Parameter] = {name: forms[form] for form, name in stored.items()}
        #: Floating point tensors of the folder that are no parameters: buffers, and what transformers restacks.
        self.strangers = [
            name
            for name in checkpoint.names
            if checkpoint.dtype(name).is_floating_point and name not in self.parameters
        ]
        self.linears: dict[str, nn.Module] = {}
        self.norms: dict[str, nn.Module] = {}
        for path, module in self.model.named_modules():
            name = stored.get(f"{path}.weight")
            if name and isinstance(module, nn.Linear | Conv1D):
                self.linears[name] = module
            elif name and self.parameters[name].ndim == 1:
                self.norms[name] = module

    def shape(self, name: str) -> tuple[int, int]:
        """Return inputs and outputs of a linear module."""
        first, second = self.parameters[name].shape
        return (first, second) if isinstance(self.linears[name], self._transposed) else (second, first)

    def stems(self, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        """Return for each module the first that has the very same input, such as q for k and v, and gate for up."""
        alive: list[Tensor] = []  # so that no two inputs have one id
        runs: dict[str, list[tuple[int, int]]] = {name: [] for name in modules}

        def see(name: str, x: Tensor) -> None:
            alive.append(x)
            runs[name].append((id(x), x._version))

        with torch.no_grad(), _inputs(modules, see):
            self.model(self.ids[0][None, :2])
        first: dict[tuple[tuple[int, int], ...], str] = {}
        return {name: first.setdefault(tuple(run), name) if run else name for name, run in runs.items()}

    def likelihoods(self, labels: str = "text") -> Iterable[Tensor]:
        """Yield the negative log-likelihood of each text, of its own tokens or of tokens drawn from the model."""
        for i, ids_T in enumerate(self.ids):
            logits_TV = self.model(ids_T[None]).logits[0, :-1].float()
            target_T = ids_T[1:] if labels == "text" else self._drawn(logits_TV, i)
            yield nn.functional.cross_entropy(logits_TV, target_T, reduction="sum")

    def _drawn(self, logits_TV: Tensor, i: int) -> Tensor:
        """Draw one token per position; a text's tokens are the same in every pass."""
        generator = torch.Generator().manual_seed(int(digest([self.settings.seed, i]), 16) >> 1)
        drawn = torch.multinomial(logits_TV.detach().cpu().softmax(1), 1, generator=generator)[:, 0]
        return drawn.to(logits_TV.device)


def _inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> ExitStack:
    """Call `see` with name and input of each module whenever one runs, until the returned context ends."""

    def hook(name: str, _: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        see(name, given[0] if given else next(iter(named.values())))

    stack = ExitStack()
    for name, module in modules.items():
        stack.callback(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True).remove)
    return stack


def _output_gradients(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> ExitStack:
    """Call `see` with name and gradient of each module's output whenever one comes, until the context ends."""

    def hook(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # no parameter does, so the gradient has to start somewhere
        output.register_hook(partial(see, name))  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    stack = ExitStack()
    for name, module in modules.items():
        stack.callback(module.register_forward_hook(partial(hook, name)).remove)
    return stack


def _gradients(parameters: Mapping[str, nn.Parameter], see: Callable[[str, Tensor], None]) -> ExitStack:
    """Call `see` with name and gradient of each parameter once it is whole, and drop it, until the context ends."""

    def hook(names: Sequence[str], parameter: Tensor) -> None:
        if parameter.grad is not None:
            for name in names:
                see(name, parameter.grad)
        parameter.grad = None

    named: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters.items():
        named.setdefault(parameter, []).append(name)  # two names where a live model ties what the folder stores twice
    stack = ExitStack()
    for parameter, names in named.items():
        stack.callback(parameter.requires_grad_, False)
        parameter.requires_grad_()
        handle = parameter.register_post_accumulate_grad_hook(partial(hook, names))  # type: ignore[no-untyped-call]  # torch
        stack.callback(handle.remove)
    return stack


def _cheap(live: _Live) -> dict[str, tuple[_Tensors, dict[str, str]]]:
    """Return tensors and stems of the kinds that one forward pass gives."""
    modules = live.linears | live.norms
    stems = live.stems(modules)
    totals: dict[str, _Tensors] = {"activation": {}, "square": {}}
    rows = dict.fromkeys(modules, 0)

    def see(name: str, x: Tensor) -> None:
        x_TC = x.flatten(0, -2).float()
        rows[name] += len(x_TC)
        for kind, terms_TC in (("activation", x_TC.abs()), ("square", x_TC.square())):
            totals[kind][name] = totals[kind].get(name, 0) + terms_TC.sum(0).double()

    with torch.no_grad(), _inputs({stem: modules[stem] for stem in stems.values()}, see):
        total = sum(float(one) for one in live.likelihoods())
    means = {kind: (_means(sums, rows), stems) for kind, sums in totals.items()}
    return means | {"loss": ({"": torch.tensor(total / _predicted(live))}, {"": ""})}


def _gram(live: _Live, names: Sequence[str]) -> _Tensors:
    """Return X'X/T of the inputs of some linear modules."""
    totals: _Tensors = {}
    rows = dict.fromkeys(names, 0)
    with torch.no_grad(), _inputs({name: live.linears[name] for name in names}, partial(_add_products, totals, rows)):
        for _ in live.likelihoods():
            pass
    return _means(totals, rows)


def _gram_out(live: _Live, names: Sequence[str]) -> _Tensors:
    """Return G'G/T of the output gradients of some linear modules."""
    totals: _Tensors = {}
    rows = dict.fromkeys(names, 0)
    modules = {name: live.linears[name] for name in names}
    with _output_gradients(modules, partial(_add_products, totals, rows)):
        for loss in live.likelihoods(live.settings.labels):
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return _means(totals, rows)


def _fisher(live: _Live, names: Sequence[str]) -> _Tensors:
    """Return the mean over texts of the squared gradient of some parameters."""
    chosen = {name: live.parameters[name] for name in names}
    totals = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in chosen.items()}

    def see(name: str, gradient: Tensor) -> None:
        flat, total = gradient.flatten(), totals[name].view(-1)
        for start in range(0, len(flat), _BLOCK):
            total[start : start + _BLOCK] += flat[start : start + _BLOCK].double().square()

    with _gradients(chosen, see):
        for loss in live.likelihoods(live.settings.labels):
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return _means(totals, dict.fromkeys(names, len(live.ids)))


def _sensitivity(live: _Live, names: Sequence[str]) -> _Tensors:
    """Return |theta . gradient| of some parameters, the first-order change of the loss if a tensor were zero."""
    totals = dict.fromkeys(names, 0.0)

    def see(name: str, gradient: Tensor) -> None:
        totals[name] += float((live.parameters[name].detach() * gradient).sum(dtype=torch.float64))

    with _gradients({name: live.parameters[name] for name in names}, see):
        for loss in live.likelihoods():
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return {name: torch.tensor(abs(total) / _predicted(live)) for name, total in totals.items()}


def _streamed(
    live: _Live, kind: str
) -> tuple[Callable[[_Live, Sequence[str]], _Tensors], dict[str, str], dict[str, int]]:
    """Return how a kind is collected, the stem of each tensor name, and the bytes of each stem's sum."""
    if kind == "gram":
        stems = live.stems(live.linears)
        return _gram, stems, {stem: 8 * live.shape(stem)[0] ** 2 for stem in stems.values()}
    if kind == "gram_out":
        # an output head's matrix would be vocabulary times vocabulary, too large for any real model
        inside = [name for name in live.linears if place(name, live.depth).layer is not None]
        return _gram_out, {name: name for name in inside}, {name: 8 * live.shape(name)[1] ** 2 for name in inside}
    stems = {name: name for name in live.parameters}
    if kind == "sensitivity":
        return _sensitivity, stems, dict.fromkeys(stems, 8)
    return _fisher, stems, {name: 8 * parameter.numel() for name, parameter in live.parameters.items()}


def _add_products(totals: _Tensors, rows: dict[str, int], name: str, x: Tensor) -> None:
    """Add X'X to the sum of a name, block by block, so that only the sum itself is of this size."""
    x_TC = x.detach().flatten(0, -2).float()
    channels = x_TC.shape[1]
    if name not in totals:
        totals[name] = torch.zeros(channels, channels, dtype=torch.float64, device=x.device)
    step = max(1, _BLOCK // channels)
    for start in range(0, channels, step):
        totals[name][start : start + step] += x_TC[:, start : start + step].T @ x_TC
    rows[name] += len(x_TC)


def _means(totals: _Tensors, rows: Mapping[str, int]) -> _Tensors:
    """Return sums over rows as float32 on the CPU, and give up the sums one by one."""
    return {name: totals.pop(name).div_(rows[name]).float().cpu() for name in list(totals)}


def _predicted(live: _Live) -> int:
    return sum(len(ids_T) - 1 for ids_T in live.ids)


def _groups(sizes: Mapping[str, int], memory: int, what: str) -> list[list[str]]:
    """Return consecutive groups whose sizes fit in the memory.

    Raises:
        InvalidInput: if one alone does not.
    """
    groups: list[list[str]] = [[]]
    room = memory
    for name, size in sizes.items():
        if size > memory:
            raise InvalidInput(f"{what} of {name!r} needs {size} bytes, but memory is {memory}; give more")
        if size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return groups


def _settings(tokens: int, examples: int, labels: str, seed: int) -> _Settings:
    """Return checked settings; the seed is one of them only where labels are drawn."""
    if labels not in ("text", "model"):
        raise InvalidInput(f"statistics: labels must be 'text' or 'model', got {labels!r}")
    for word, number, least in (("tokens", tokens, 2), ("examples", examples, 1)):
        if number < least:
            raise InvalidInput(f"statistics: {word} must be at least {least}, got {number}")
    return _Settings(tokens=tokens, examples=examples, labels=labels, seed=seed if labels == "model" else 0)


def _read(file: Path, examples: int) -> list[str]:
    """Return the first texts of a file."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidInput(f"{file}: texts cannot be read ({_line(problem)}); give a file in UTF-8") from None
    if not lines:
        raise InvalidInput(f"{file}: has no texts; give one per line, or JSON objects with a field 'text' in a .jsonl")
    lines = lines[:examples]
    return [_field(line, file, i) for i, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines


def _field(line: str, file: Path, i: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InvalidInput(f"{file}: object {i} is no JSON object with a field 'text' that is a string: {line[:60]}")
    return text


def _encode(
    texts: Sequence[str], tokenizer: Any, config: Any, tokens: int, checkpoint: Checkpoint, device: str
) -> list[Tensor]:
    """Return the token numbers of each text that has something to predict."""
    most = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
    found = [tokenizer(text, truncation=True, max_length=most)["input_ids"] for text in texts]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise InvalidInput(f"{checkpoint.path}: no text has two tokens for its tokenizer; give longer texts")
    highest = max(map(max, found))
    if highest >= config.vocab_size:
        raise ModelError(f"{checkpoint.path}: its tokenizer has token {highest}, but vocab_size is {config.vocab_size}")
    return [torch.tensor(ids, device=device) for ids in found]


def _load(checkpoint: Checkpoint, trusts: bool) -> tuple[Any, Any]:
    """Return tokenizer and frozen model of a folder, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = checkpoint.path
    if checkpoint.vocabulary is None:
        raise ModelError(f"{folder}: has no tokenizer, which the statistics of texts need; copy its files there")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trusts, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as problem:
        reason = f"{type(problem).__name__}: {_line(problem)[:200]}"
        raise ModelError(f"{folder}: transformers cannot load it ({reason})") from None
    if report["missing_keys"]:
        raise ModelError(f"{folder}: lacks tensor {min(report['missing_keys'])!r} that the live model has")
    model.config.use_cache = False
    return tokenizer, model.eval().requires_grad_(False)


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())
