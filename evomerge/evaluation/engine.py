"""The engine: one live model that takes the weights of candidate after candidate and answers items."""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import CandidateError, ModelError, TaskError
from evomerge.evaluation.decoding import Stops, continue_greedily, make_stops
from evomerge.evaluation.plan import Contexts, Plan, plan_contexts, plan_prompts
from evomerge.evaluation.task import Response, Task, grade

#: How many plans an engine keeps; a search asks for few distinct ones, again and again.
PLANS = 256

#: Most elements of the float32 copy of logits that is made at once.
CHUNK = 1 << 26

#: Buffers that old checkpoints hold and today's models compute.
LEGACY = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")

#: Most answers whose text is remembered.
TEXTS = 1 << 16


class Engine:
    """A live transformers model, built once from a folder's config, and the folder's tokenizer.

    The weights come with `load`; before that they mean nothing, unless `pretrained` asks for the
    folder's own. One engine serves one thread.

    Args:
        folder: a model folder with config.json and tokenizer files.
        dtype: the dtype that the model computes in.
        device: a torch device.
        batch: the most rows of a batch.
        trust_remote_code: whether code in the model's folder may run.
        pretrained: whether to load the folder's weights, as `AutoModelForCausalLM.from_pretrained` does.

    Raises:
        ModelError: if config, tokenizer or weights cannot be loaded, or the model comes in another dtype.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str = "cpu",
        batch: int = 64,
        trust_remote_code: bool = False,
        pretrained: bool = False,
    ) -> None:
        self.device, self.batch = device, batch
        self.tokenizer, self.model = _build(folder, getattr(torch, dtype), trust_remote_code, pretrained)
        self.model.to(device)
        config = self.model.config.get_text_config()
        self._room: int | None = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int = config.vocab_size
        self._accepts = frozenset(inspect.signature(self.model.forward).parameters)
        self._targets: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = [re.compile(form) for form in (*LEGACY, *ignored)]
        self._ends = _ends(folder, self.model, self.tokenizer)
        self._plans: dict[tuple[str, str, tuple[int, ...]], Plan] = {}
        self._stops: dict[tuple[str, ...], Stops] = {}
        self._texts: dict[tuple[int, ...], str] = {}

    def load(self, stream: Iterable[tuple[str, Tensor | Callable[[Tensor], None]]]) -> None:
        """Put a candidate's tensors into the live model.

        Every parameter must come, as a tensor that is copied or as a function that writes it; buffers may. Where
        head and embedding are tied, either name will do.

        Raises:
            ModelError: for a tensor that the model does not have or has in another shape, and for a
                parameter that did not come.
        """
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

    def plan(self, task: Task, split: str, items: Sequence[int]) -> Plan:
        """Return the plan that asks these items of a split (places in it); made once, then kept.

        Raises:
            TaskError: for an item that does not exist, or that is too long for the model.
        """
        key = (task.fingerprint, split, tuple(items))
        if key not in self._plans:
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._make_plan(task, split, items)
        return self._plans[key]

    def answer(self, plan: Plan) -> list[Response]:
        """Ask the live model; the responses are in the order of the plan's items.

        Raises:
            CandidateError: if logits are not finite, or all choices of all items are equally likely.
        """
        with torch.inference_mode():
            return self._choose(plan) if plan.task.kind == "multiple_choice" else self._generate(plan)

    def _make_plan(self, task: Task, split: str, items: Sequence[int]) -> Plan:
        known = task.items(split)
        for place in items:
            if not 0 <= place < len(known):
                raise TaskError(f"task {task.name!r}: split {split!r} has {len(known)} items, none at place {place}")
        chosen = [known[place] for place in items]
        if task.kind == "multiple_choice":
            return plan_contexts(task, chosen, self.tokenizer, batch=self.batch, room=self._room, device=self.device)
        # a model that takes no position ids cannot be told where a padded prompt starts
        padding = {"position_ids", "past_key_values"} <= self._accepts
        return plan_prompts(
            task, chosen, self.tokenizer, batch=self.batch, room=self._room, padding=padding, device=self.device
        )

    def _target(self, name: str) -> Tensor | None:
        """Return where a tensor goes; None for the leftovers of old checkpoints."""
        prefix = f"{self.model.base_model_prefix}."  # files saved from the bare model leave it out
        for form in (name, prefix + name, name.removeprefix(prefix)):
            if form in self._targets:
                return self._targets[form]
        if any(pattern.search(name) for pattern in self._ignored):
            return None
        kind = self.model.config.model_type
        raise ModelError(f"tensor {name!r} is not in the {kind} model that the base's config.json describes")

    def _forward(self, **arguments: Any) -> Any:
        return self.model(**{name: thing for name, thing in arguments.items() if name in self._accepts})

    def _choose(self, plan: Plan) -> list[Response]:
        total = np.zeros(plan.first[-1])
        for contexts in plan.contexts:
            total += np.bincount(contexts.choice_R.numpy(), weights=self._read(contexts), minlength=len(total))
        if not np.isfinite(total).all():
            raise CandidateError(f"task {plan.task.name!r}: the log-likelihood of a choice is not finite")
        own = [total[a:b] for a, b in zip(plan.first, plan.first[1:], strict=False)]
        if own and all((found == found[0]).all() for found in own):
            raise CandidateError(f"task {plan.task.name!r}: all choices of every item have one log-likelihood")
        margins = [found[right] - np.delete(found, right).max() for found, right in zip(own, plan.right, strict=True)]
        return [Response(value=float(margin > 0), margin=float(margin)) for margin in margins]

    def _read(self, contexts: Contexts) -> NDArray[np.float64]:
        """Return log p of each reading, in nats. Shape (R,)."""
        logits_BKV = self._forward(input_ids=contexts.ids_BT, logits_to_keep=contexts.keep_K, use_cache=False).logits
        if "logits_to_keep" not in self._accepts:
            logits_BKV = logits_BKV[:, contexts.keep_K]
        step = max(1, CHUNK // logits_BKV.shape[-1])
        parts = []
        for start in range(0, len(contexts.row_R), step):
            part = slice(start, start + step)
            logits_RV = logits_BKV[contexts.row_R[part], contexts.place_R[part]].float()
            parts.append(logits_RV.gather(1, contexts.token_R[part, None])[:, 0] - logits_RV.logsumexp(1))
        read: NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
        return read

    def _generate(self, plan: Plan) -> list[Response]:
        task, values = plan.task, [0.0] * len(plan.items)
        if task.stop not in self._stops:
            self._stops[task.stop] = make_stops(self.tokenizer, self._ends, task.stop, self._vocabulary, self.device)
        for prompts in plan.prompts:
            answers, finite = continue_greedily(
                self._forward, prompts, self._stops[task.stop], task.max_new_tokens, self._text
            )
            if not finite:
                raise CandidateError(f"task {task.name!r}: logits are not finite")
            for row, ids in zip(prompts.rows, answers, strict=True):
                values[row] = grade(task, plan.items[row], self._text(ids))
        return [Response(value=found) for found in values]

    def _text(self, ids: tuple[int, ...]) -> str:
        """Decode an answer; short answers come again and again, so their texts are remembered."""
        if ids not in self._texts:
            if len(self._texts) >= TEXTS:
                self._texts.clear()
            self._texts[ids] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return self._texts[ids]


def _build(folder: Path, dtype: torch.dtype, trust_remote_code: bool, pretrained: bool) -> tuple[Any, Any]:
    """Return tokenizer and model; unless pretrained, the model's weights are whatever memory held."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give the folder of a transformers model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if pretrained:
            model = _load_plainly(folder, trust_remote_code)
        else:
            # random initial weights would cost minutes for a large model, and move the global random stream
            with torch.random.fork_rng(devices=[]), no_init_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            model.tie_weights()
        model.config.pad_token_id = None  # else some models warn when a generated token happens to be it
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"{folder}: transformers cannot build it ({type(problem).__name__}: {reason})") from None
    if model.dtype != dtype:
        raise ModelError(f"{folder}: loads as {model.dtype}, but {dtype} is declared; check dtype in its config.json")
    return tokenizer, model.eval().requires_grad_(False)


def _load_plainly(folder: Path, trust_remote_code: bool) -> Any:
    """Return the model as a user's one line loads it: no dtype is named, so config.json's must be right."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _ends(folder: Path, model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a sequence, from all three places that may name some."""
    named = [tokenizer.eos_token_id, model.config.get_text_config().eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        named.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    flat = [token for one in named for token in (one if isinstance(one, list) else [one])]
    return frozenset(token for token in flat if token is not None)
