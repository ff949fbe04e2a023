"""The engine: one live model that takes the weights of candidate after candidate and answers requests."""

import gc
import inspect
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError, ModelError
from evomerge.evaluation.batches import Prompts, Read, Texts
from evomerge.evaluation.building import abilities_of, build, end_tokens
from evomerge.evaluation.caches import Rooms, Trunk
from evomerge.evaluation.decoding import Stops, continue_greedily, make_stops
from evomerge.evaluation.encoding import Encoder
from evomerge.evaluation.plan import Plan, make_plan
from evomerge.evaluation.prefix import Course
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.sheet import Sheet

#: The most tokens of a batch, rows times length, unless it is told otherwise.
TOKENS = 1 << 14

#: How many plans an engine keeps; a search asks for few distinct ones, again and again.
PLANS = 256

#: Buffers that old checkpoints hold and today's models compute.
LEGACY = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")

#: What files call the weight of the output head.
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")

#: Most answers whose text is remembered.
TEXTS = 1 << 16

#: How torch says that there is no memory where it has no class of errors for it: on the CPU, and in CUDA's libraries.
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|_ALLOC_FAILED")


class _Own:
    """The state that a model keeps in its own way between the steps of an answer."""

    past: Any = None

    @property
    def holds(self) -> bool:
        """Whether the model gave anything to go on with."""
        return self.past is not None

    def keep(self, rows_B: Tensor) -> None:
        """Drop all rows but these."""
        self.past.reorder_cache(rows_B)


class _Head:
    """Makes a model's head compute only the positions that are wanted, whatever rows they stand in."""

    def __init__(self, model: Any) -> None:
        self._wanted: tuple[Tensor, Tensor] | None = None
        self.used = False
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._pick)

    @contextmanager
    def only(self, row_U: Tensor, place_U: Tensor) -> Iterator[None]:
        """Within the block, the logits of a forward pass are those of these positions, as one row, if `used` is set."""
        self._wanted, self.used = (row_U, place_U), False
        try:
            yield
        finally:
            self._wanted = None

    def _pick(self, _: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._wanted is None or not given or given[0].ndim != 3:
            return None
        self.used = True
        return (given[0][self._wanted][None], *given[1:])


class Engine:
    """A live transformers model, built once from a folder's config, and the folder's tokenizer.

    The weights come with `load`; before that they mean nothing, unless `pretrained` asks for the
    folder's own. One engine serves one thread. It knows requests and outcomes, and nothing of tasks.

    Args:
        folder: a model folder with config.json and tokenizer files.
        dtype: the dtype that the model computes in.
        device: a torch device.
        batch: the most rows of a batch.
        tokens: the most tokens of a batch, rows times length; a single row may be longer.
        trust_remote_code: whether code in the model's folder may run.
        pretrained: whether to load the folder's weights, as `AutoModelForCausalLM.from_pretrained` does.
        sharing: whether what texts begin with alike is fed once.
        prepare: takes the model before it goes to the device, and may take out of it what is put in later.
        say: takes a line when a batch did not fit into memory, the first time.

    Raises:
        ModelError: if config, tokenizer or weights cannot be loaded, or the model comes in another dtype.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str = "cpu",
        batch: int = 64,
        tokens: int = TOKENS,
        trust_remote_code: bool = False,
        pretrained: bool = False,
        sharing: bool = True,
        prepare: Callable[[Any], None] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Build the model; without `pretrained` its weights are whatever memory held."""
        self.device, self.batch, self.tokens, self.sharing = device, batch, tokens, sharing
        self._say, self._said = say, False
        self.tokenizer, self.model = build(folder, getattr(torch, dtype), trust_remote_code, pretrained)
        if prepare is not None:
            prepare(self.model)
        self.model.to(device)
        config = self.model.config.get_text_config()
        self._room: int | None = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int = config.vocab_size
        self._accepts = frozenset(inspect.signature(self.model.forward).parameters)
        self._abilities = abilities_of(self.model, self._accepts)
        self._targets: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = [re.compile(form) for form in (*LEGACY, *ignored)]
        self._ends = end_tokens(folder, self.model, self.tokenizer)
        self._plans: dict[Hashable, tuple[Plan, tuple[int, ...]]] = {}
        self._stops: dict[tuple[str, ...], Stops] = {}
        self._texts: dict[tuple[int, ...], str] = {}
        self._prefixes: dict[tuple[int, ...], Trunk] = {}
        self._head = _Head(self.model)
        self._course: Course | None = None

    def show(self, model: Any, course: Course) -> None:
        """Have a stack live, which shares the head that the engine was built with.

        Args:
            model: the live model.
            course: follows it, hop by hop.
        """
        self.forget()
        self.model, self._course = model, course

    def load(self, stream: Iterable[tuple[str, Tensor | Callable[[Tensor], None]]]) -> None:
        """Put a candidate's tensors into the live model.

        Every parameter must come, as a tensor that is copied or as a function that writes it; buffers may. Where
        head and embedding are tied, either name will do.

        Raises:
            ModelError: for a tensor that the model does not have or has in another shape, and for a
                parameter that did not come.
        """
        self.forget()
        came: set[int] = set()
        with torch.no_grad():
            for name, tensor in stream:
                target = self._target(name)
                if target is None:
                    continue
                came.add(id(target))
                if not isinstance(tensor, Tensor):
                    tensor(target)
                    continue
                if target.shape != tensor.shape:
                    raise ModelError(
                        f"tensor {name!r} has shape {list(tensor.shape)}, the live model's has {list(target.shape)}; "
                        "the base's config.json must fit the sources"
                    )
                target.copy_(tensor)
        left = [name for name, parameter in self.model.named_parameters() if id(parameter) not in came]
        if left:
            raise ModelError(
                f"{len(left)} parameters of the live model got no tensor, the first is {left[0]!r}; "
                "the base's config.json must fit the sources"
            )

    def forget(self) -> None:
        """Drop what was computed with the weights that were live; whoever changes them by other ways calls this."""
        self._prefixes.clear()

    def plan(self, requests: Sequence[Request]) -> Plan:
        """Return the plan that asks these requests; whoever asks them again keeps it.

        Raises:
            Refused: (a TaskError) for a request that the model cannot be asked: too long, or without tokens.
        """
        return make_plan(
            requests,
            Encoder(self.tokenizer, self._room),
            self._abilities,
            batch=self.batch,
            vocabulary=self._vocabulary,
            device=self.device,
            sharing=self.sharing,
        )

    def kept(self, key: Hashable, make: Callable[[], Sequence[Sequence[Request]]]) -> tuple[Plan, tuple[int, ...]]:
        """Return the plan of some groups of requests and the groups' sizes, made the first time that a key comes.

        The oldest goes when there are too many.
        """
        if key not in self._plans:
            groups = make()
            plan = self.plan([request for group in groups for request in group])
            while len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan, tuple(map(len, groups))
        return self._plans[key]

    @property
    def window(self) -> int:
        """The most tokens that are fed at once; where the model has no limit the tokenizer's counts, or lm-eval's."""
        return Encoder(self.tokenizer, self._room).window

    @property
    def finite(self) -> bool:
        """Whether all parameters of the live model are finite; one pass over them."""
        weights = [weight for weight in self.model.parameters() if weight.is_floating_point()]
        return bool(torch.nn.utils.get_total_norm(weights, norm_type=float("inf")).isfinite())

    def answer(self, plan: Plan) -> list[Outcome]:
        """Ask the live model; the outcomes are in the order of the plan's requests.

        A batch for which there is not enough memory is halved; from then on no batch has more tokens than its halves.

        Raises:
            CandidateError: if logits are not finite, or there is not enough memory for a single row.
        """
        sheet = Sheet(plan)
        left = deque(plan.batches(self.tokens))
        with torch.inference_mode(), self._asking(plan):
            while left:
                batch = left.popleft()
                if self._asked(batch, sheet):
                    continue
                if batch.alone:
                    raise CandidateError(f"there is not enough memory on {self.device} for a single row")
                self._halve(batch)
                left = deque(part for one in (batch, *left) for part in one.within(self.tokens))
        return sheet.outcomes()

    @contextmanager
    def _asking(self, plan: Plan) -> Iterator[None]:
        """Within the block, a plan is asked; of a stack, what hops made of it may be known already."""
        if self._course is None or (plan.generates and not self._abilities.caches):
            yield
            return
        self._prefixes.clear()  # what was begun with hops left out is of use to this plan alone
        with self._course.asking(plan, self.tokens):
            yield
        self._prefixes.clear()

    def _feeding(self, cache: Any) -> AbstractContextManager[None]:
        """Return a block within which texts are read from their beginning, or from what this plan has read."""
        return nullcontext() if self._course is None else self._course.feeding(cache)

    def _target(self, name: str) -> Tensor | None:
        """Return where a tensor goes; None for the leftovers of old checkpoints."""
        prefix = f"{self.model.base_model_prefix}."  # files saved from the bare model leave it out
        for form in (name, prefix + name, name.removeprefix(prefix)):
            if form in self._targets:
                return self._targets[form]
        head = self.model.get_output_embeddings()
        if head is not None and HEAD.search(name):  # GPT-NeoX files call it otherwise than the live model
            return head.weight  # type: ignore[no-any-return]  # a parameter
        if any(pattern.search(name) for pattern in self._ignored):
            return None
        kind = self.model.config.model_type
        raise ModelError(f"tensor {name!r} is not in the {kind} model that the base's config.json describes")

    def _asked(self, batch: Texts | Prompts, sheet: Sheet) -> bool:
        """Ask a batch; tell whether there was enough memory."""
        try:
            if isinstance(batch, Texts):
                self._read(batch, sheet)
            else:
                self._continue(batch, sheet)
            return True
        except (torch.OutOfMemoryError, MemoryError):
            pass  # what it had allocated is referred to by the error, and free only after this block
        except RuntimeError as problem:
            if not _NO_MEMORY.search(str(problem)):
                raise
        self._prefixes.clear()
        if self._course is not None:
            self._course.abandon()
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _halve(self, batch: Texts | Prompts) -> None:
        """Let no batch have more tokens than half of this one from now on, and say so the first time."""
        self.tokens = max(1, batch.size // 2)
        if not self._said:
            self._said = True
            self._say(
                f"there was not enough memory on {self.device} for a batch of {batch.size} tokens (rows times length); "
                f"from now on batches have {self.tokens} at most, and half of that where it does not fit either; "
                "to spare the tries, set `tokens` of `workers`"
            )

    def _read(self, batch: Texts, sheet: Sheet) -> None:
        """Read the texts of a batch, then what branches off them."""
        prefix = self._prefix(batch.prefix)
        trunk = prefix.branch() if prefix is not None else Trunk.root() if batch.after else None
        self._pass(batch.first, trunk, sheet)
        for read in batch.after:
            self._pass(read, None if trunk is None else trunk.branch(read.from_B), sheet)

    def _pass(self, read: Read, cache: Trunk | None, sheet: Sheet) -> None:
        """Feed a pass and note what it says."""
        arguments: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        if read.mask_BS is not None:
            arguments |= {"attention_mask": read.mask_BS, "position_ids": read.positions_BT}
        with self._feeding(cache):
            logits_UV = self._logits((read.row_U, read.place_U), input_ids=read.ids_BT, **arguments)
        if not sheet.note(read, logits_UV):
            raise CandidateError("a log-likelihood is not finite")

    def _prefix(self, ids: tuple[int, ...]) -> Trunk | None:
        """Return the keys and values of what texts begin with, computed once for the weights that are live."""
        if not ids:
            return None
        if ids not in self._prefixes:
            while self._prefixes and sum(map(len, self._prefixes)) + len(ids) > self.tokens:
                del self._prefixes[next(iter(self._prefixes))]
            trunk, last = Trunk.root(), torch.tensor([len(ids) - 1], device=self.device)
            ids_BT = torch.tensor([ids], device=self.device)
            with self._feeding(trunk):
                self._logits((last * 0, last), input_ids=ids_BT, past_key_values=trunk, use_cache=True)
            self._prefixes[ids] = trunk
        return self._prefixes[ids]

    def _continue(self, prompts: Prompts, sheet: Sheet) -> None:
        """Continue the prompts of a batch."""
        stop = prompts.way.stop
        if stop not in self._stops:
            self._stops[stop] = make_stops(self.tokenizer, self._ends, stop, self._vocabulary, self.device)
        cache, fed = self._cache(prompts), False

        def step(**arguments: Any) -> Tensor:
            nonlocal fed
            first, fed = not fed, True
            with self._feeding(cache) if first else nullcontext():
                return self._step(**arguments)

        answers, finite = continue_greedily(step, prompts, self._stops[stop], self._text, cache)
        if not finite:
            raise CandidateError("logits are not finite")
        for prompt, answer in zip(prompts.prompts, answers, strict=True):
            sheet.put(prompt.request, answer, self._text(tuple(answer.ids)), stop)

    def _cache(self, prompts: Prompts) -> Rooms | _Own | None:
        """Return what keeps keys and values of prompts and answers; None if the model has nothing of the kind."""
        if self._abilities.caches:
            length = len(prompts.prefix) + prompts.ids_BT.shape[1] + prompts.way.most
            prefix = self._prefix(prompts.prefix)
            return Rooms.root(length) if prefix is None else prefix.room(length)
        return _Own() if self._abilities.state else None

    def _step(self, *, input_ids: Tensor, past_key_values: Any = None, **arguments: Any) -> Tensor:
        """Return the logits after the last token of each row. Shape (B, V)."""
        row_U = torch.arange(len(input_ids), device=self.device)
        last = (row_U, torch.full_like(row_U, input_ids.shape[1] - 1))
        arguments |= {"input_ids": input_ids, "use_cache": past_key_values is not None}
        if isinstance(past_key_values, _Own):
            return self._logits(last, past_key_values=past_key_values.past, own=past_key_values, **arguments)
        return self._logits(last, past_key_values=past_key_values, **arguments)

    def _logits(self, wanted: tuple[Tensor, Tensor], own: _Own | None = None, **arguments: Any) -> Tensor:
        """Return the logits at some positions: rows, and places in them. Shape (U, V)."""
        given = {name: thing for name, thing in arguments.items() if name in self._accepts and thing is not None}
        with self._head.only(*wanted):
            out = self.model(**given)
        if own is not None:
            own.past = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits
        return logits[0] if self._head.used else logits[wanted]

    def _text(self, ids: tuple[int, ...]) -> str:
        """Decode an answer; short answers come again and again, so their texts are remembered."""
        if ids not in self._texts:
            if len(self._texts) >= TEXTS:
                self._texts.clear()
            self._texts[ids] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return self._texts[ids]
