"""Tasks of lm-eval by name: their documents as items, their prompts made once, their own grading.

lm-eval is imported when a task is built and when it grades; what travels to workers is plain values.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, nearest
from evomerge.evaluation.harness_documents import Document, documents
from evomerge.evaluation.harness_grading import (
    Measure,
    check_weights,
    choose_measure,
    grade_document,
    margin,
    try_out,
)
from evomerge.evaluation.harness_loading import Source, live, load
from evomerge.evaluation.items import SHARES, dealer
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import SPLITS, Response
from evomerge.value import digest, parse, plain, value


@value
class HarnessFile:
    """What an experiment says of a task of lm-eval.

    Attributes:
        lm_eval: the name of a task, a group or a tag of lm-eval.
        include_path: a folder of YAML files of one's own, which is searched first.
        num_fewshot: the examples in a prompt; default: what the task says.
        metric: which of its metrics counts; default: the first that it, or its group, names.
        filter: which of its filters answers go through; default: the first.
        chat_template: whether prompts are set in the chat template of a tokenizer.
        tokenizer: the folder of that tokenizer, if not that of the search's template.
        system_instruction: a text that goes before all.
        gen_kwargs: arguments of generation that replace the task's own.
        splits: the share of each split (by a hash of the question), or for each the name of one of the task's own.
        bounded: whether values lie in [0, 1]; default: known for lm-eval's own metrics, false for others.
        mean_over_items: takes the mean over all items of a group that gives its tasks equal weights.
        confirm_run_unsafe_code: allows a task that runs code that the model wrote.
    """

    lm_eval: str
    include_path: str | None = None
    num_fewshot: int | None = None
    metric: str | None = None
    filter: str | None = None
    chat_template: bool = False
    tokenizer: str | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, Any] = field(default_factory=lambda: dict(SHARES))
    bounded: bool | None = None
    mean_over_items: bool = False
    confirm_run_unsafe_code: bool = False


@value
class HarnessTask:
    """A task, a group or a tag of lm-eval as items in three disjoint splits; a `Task`.

    Attributes:
        name: what objectives and the ledger call it.
        source: how lm-eval's task is loaded where an answer is graded.
        config: the content address of that task's settings and code.
        measure: which number counts.
        splits: the items by split; those of a group's tasks alternate, so that a first part holds its share of each.
        reference: never needed.
    """

    name: str
    source: Source
    config: str
    measure: Measure
    splits: Mapping[str, tuple[Document, ...]]
    reference: str | None = None

    @property
    def bounded(self) -> bool:
        """Whether responses lie in [0, 1]."""
        return self.measure.bounded

    @property
    def direction(self) -> str:
        """Whether more is better (`maximize`) or less (`minimize`), as lm-eval says."""
        return self.measure.direction

    @cached_property
    def fingerprint(self) -> str:
        """The content address of items, prompts and grading: 16 hexadecimal digits."""
        items = {split: [digest(item) for item in items] for split, items in self.splits.items()}
        return digest({"splits": items, "config": self.config, "measure": plain(self.measure)})

    def count(self, split: str) -> int:
        """Return the number of items of a split; 0 if the task has none."""
        return len(self.splits.get(split, ()))

    def ids(self, split: str) -> tuple[str, ...]:
        """Return the items' ids: task, place among its documents, and content."""
        return tuple(
            f"{'/'.join(filter(None, (item.leaf, item.part)))}/{item.place}-{item.content[:8]}"
            for item in self.splits.get(split, ())
        )

    def contents(self, split: str) -> tuple[str, ...]:
        """Return the content address of each item of a split, with its prompt and its grading."""
        shared = [self.config, plain(self.measure)]
        return tuple(digest([digest(item), *shared]) for item in self.splits.get(split, ()))

    def strata(self, split: str) -> tuple[str, ...]:
        """Return the name of each item's task, where there are several."""
        leaves = {item.leaf for items in self.splits.values() for item in items}
        return tuple(item.leaf if len(leaves) > 1 else "" for item in self.splits.get(split, ()))

    def requests(self, split: str, place: int, reference: tuple[Outcome, ...] = ()) -> tuple[Request, ...]:
        """Return what to ask for the item at a place of a split."""
        return self.splits[split][place].requests

    def grade(
        self, split: str, place: int, outcomes: Sequence[Outcome], reference: tuple[Outcome, ...] = ()
    ) -> Response:
        """Return the item's value and, for multiple choice, by how much the right choice leads.

        Raises:
            TaskError: if lm-eval's task cannot be loaded here, or is not the one that the prompts were made of.
            CandidateError: if the task's own code fails on this answer.
        """
        item = self.splits[split][place]
        loaded = live(self.source, self.config)
        return Response(
            value=grade_document(loaded, item, outcomes, self.measure),
            margin=margin(item, outcomes, self.measure.metric),
        )

    def cut(self, sizes: Mapping[str, int]) -> "HarnessTask":
        """Return the task with only the first items of each split that `sizes` names."""
        return replace(
            self, splits={split: items[: sizes.get(split, len(items))] for split, items in self.splits.items()}
        )


def harness_task(
    given: Mapping[str, Any], name: str, near: Path, place: str, tokenizer: Path | None = None
) -> HarnessTask:
    """Return the task of lm-eval that an experiment names, with all its prompts made.

    Args:
        given: the entry of the experiment, a `HarnessFile` in plain form.
        name: what to call the task.
        near: the folder that paths start from.
        place: file and key path, for errors.
        tokenizer: the folder whose chat template is meant where the entry names none.

    Raises:
        TaskError: one line with the place and the way out; for instance if a prompt depends on which other items
            are asked, if an answer is sampled, or if the metric has no value of one item.
    """
    file = parse(HarnessFile, given, place, TaskError)
    shares, own = _splits(file.splits, place)
    loaded = load(_source(file, near, place, tokenizer), place)
    measure = choose_measure(loaded, place, metric=file.metric, filter_name=file.filter, bounded=file.bounded)
    found: dict[str, list[Document]] = {split: [] for split in SPLITS}
    sizes = []
    for leaf in loaded.tasks:
        parts = {part: documents(loaded, leaf, part, place) for part in (own.values() if own else [""])}
        sizes.append(sum(map(len, parts.values())))
        for split, items in _dealt(parts, shares, own).items():
            found[split].extend(items)
        try_out(loaded, next(items[0] for items in parts.values() if items), measure, place)
    if not file.mean_over_items:
        check_weights(loaded, measure, sizes, place)
    splits = {split: _alternating(items) for split, items in _disjoint(found).items() if items}
    return HarnessTask(name=name, source=loaded.source, config=loaded.config, measure=measure, splits=splits)


def _source(file: HarnessFile, near: Path, place: str, tokenizer: Path | None) -> Source:
    folder = None if file.include_path is None else near / file.include_path
    if folder is not None and not folder.is_dir():
        raise TaskError(f"{place}.include_path: no folder {folder}; give a folder of lm-eval's YAML files")
    if file.num_fewshot is not None and file.num_fewshot < 0:
        raise TaskError(f"{place}.num_fewshot: must not be negative, got {file.num_fewshot}")
    template = near / file.tokenizer if file.tokenizer is not None else tokenizer
    if file.chat_template and template is None:
        raise TaskError(f"{place}.chat_template: needs the folder of a tokenizer; name it by the key tokenizer")
    return Source(
        task=file.lm_eval,
        include_path=None if folder is None else str(folder.resolve()),
        num_fewshot=file.num_fewshot,
        gen_kwargs=file.gen_kwargs,
        system_instruction=file.system_instruction,
        tokenizer=str(template) if file.chat_template else None,
        unsafe=file.confirm_run_unsafe_code,
    )


def _splits(given: Mapping[str, Any], place: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the shares of the splits, or the task's own splits that they are."""
    place = f"{place}.splits"
    for split in given:
        if split not in SPLITS:
            raise TaskError(f"{place}.{split}: unknown split; {nearest(split, SPLITS)}")
    own = {split: found for split, found in given.items() if isinstance(found, str) and found}
    if given and len(own) == len(given):
        if len(set(own.values())) < len(own):
            raise TaskError(f"{place}: two splits are the same documents, {list(own.values())}; splits are disjoint")
        return {}, own
    shares = {split: found for split, found in given.items() if isinstance(found, int | float)}
    if len(shares) < len(given) or any(share < 0 for share in shares.values()):
        raise TaskError(f"{place}: expected a share for each split, or for each the name of a split, got {dict(given)}")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise TaskError(f"{place}: shares must add up to 1, got {sum(shares.values())}")
    return shares, {}


def _dealt(
    parts: Mapping[str, Sequence[Document]], shares: Mapping[str, float], own: Mapping[str, str]
) -> dict[str, list[Document]]:
    """Deal a leaf's documents to the splits: by name, or by a hash of the question alone."""
    if own:
        return {split: list(parts[part]) for split, part in own.items()}
    home = dealer(shares)
    found: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for item in itertools.chain.from_iterable(parts.values()):
        found[home(item.question)].append(item)
    return found


def _disjoint(splits: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
    """Leave out of each split the questions that a later one asks too; what is reported stays unseen."""
    later: set[str] = set()
    found: dict[str, list[Document]] = {}
    for split in reversed(SPLITS):
        found[split] = [item for item in splits[split] if item.question not in later]
        later |= {item.question for item in splits[split]}
    return {split: found[split] for split in SPLITS}


def _alternating(items: Sequence[Document]) -> tuple[Document, ...]:
    """Order the items of several leaves so that any first part holds each in proportion."""
    total: dict[str, int] = {}
    for item in items:
        total[item.leaf] = total.get(item.leaf, 0) + 1
    seen = dict.fromkeys(total, 0)
    order: list[tuple[float, int]] = []
    for place, item in enumerate(items):
        order.append(((seen[item.leaf] + 0.5) / total[item.leaf], place))
        seen[item.leaf] += 1
    return tuple(items[place] for _, place in sorted(order))
