"""What an answer to a task of lm-eval is worth: its own filters and metrics, item by item.

lm-eval reports a metric as an aggregate over all documents; a search needs one number for each. Where the
aggregate is a mean, that is what is averaged. Where it is a function of a mean, it is what stands inside:

- `perplexity`: exp of the mean surprise; an item's value is its surprise, -log p, in nats;
- `weighted_perplexity` (word and byte perplexity): an item's value is -log p per word, or byte, in nats;
- `bits_per_byte`: an item's value is -log2 p per byte.

The last two weigh documents by their length in lm-eval; here every document counts alike. What is made of all
documents together (F1, BLEU, correlation) has no value of one item and is refused.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.errors import CandidateError, TaskError, nearest
from evomerge.evaluation.harness_documents import Document
from evomerge.evaluation.harness_loading import Loaded, reason
from evomerge.evaluation.request import Outcome, Request
from evomerge.value import value

#: lm-eval's aggregates (by the name of its function) and how the value of one item comes out of what they aggregate.
FORMS: Mapping[str, str] = {
    "mean": "number",
    "perplexity": "surprise",
    "weighted_perplexity": "nats per unit",
    "bits_per_byte": "bits per unit",
    "brier_score": "brier",
}
#: Metrics of lm-eval's own that lie in [0, 1]; of others, the user knows.
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


@value
class Measure:
    """Which number of a task counts.

    Attributes:
        metric: the name of a metric of the task.
        filter: the name of the filter that answers go through first.
        form: one of the values of `FORMS`.
        bounded: whether values lie in [0, 1].
        direction: `maximize` or `minimize`.
    """

    metric: str
    filter: str
    form: str
    bounded: bool
    direction: str


def choose_measure(
    loaded: Loaded,
    place: str,
    *,
    metric: str | None = None,
    filter_name: str | None = None,
    bounded: bool | None = None,
) -> Measure:
    """Return the measure of a task or a group; by default the first metric and the first filter that it names.

    Raises:
        TaskError: if a task does not have them, or if the metric has no value of one item.
    """
    listed = _listed(loaded)
    first = next(iter(loaded.tasks.values()))
    if metric is None:
        metric = listed.metric if listed is not None else next(iter(first.aggregation()), "")
    if filter_name is None:
        names = getattr(listed, "filter_list", None) or [one.name for one in first._filters]
        filter_name = names[0]
    found = [
        _measure(task, metric, filter_name, bounded, f"{place}: task {name!r} of lm-eval")
        for name, task in loaded.tasks.items()
    ]
    odd = next((name for name, one in zip(loaded.tasks, found, strict=True) if one != found[0]), None)
    if odd is not None:
        raise TaskError(f"{place}: task {odd!r} of lm-eval has another {metric!r} than the rest of its group; name one")
    return found[0]


def check_weights(loaded: Loaded, measure: Measure, sizes: Sequence[int], place: str) -> None:
    """Refuse a group whose score is not the mean over its items.

    Args:
        loaded: the group, or a task.
        measure: what counts.
        sizes: the number of items of each of its tasks.
        place: for the error.

    Raises:
        TaskError: if lm-eval gives its tasks equal weights but they are not equally large.
    """
    listed = _listed(loaded, measure.metric)
    if listed is not None and not listed.weight_by_size and len(set(sizes)) > 1:
        raise TaskError(
            f"{place}: the group {loaded.source.task!r} of lm-eval gives its tasks equal weights, whatever their sizes "
            f"({min(sizes)} to {max(sizes)} items); an estimate is a mean over items: name its tasks one by one, or "
            "take that mean with mean_over_items: true"
        )


def grade_document(loaded: Loaded, document: Document, outcomes: Sequence[Outcome], measure: Measure) -> float:
    """Return the value of an answer, as the task's own filter and `process_results` find it.

    Raises:
        TaskError: if the task does not give what the measure says.
        CandidateError: if its own code fails on this answer.
    """
    task = loaded.tasks[document.leaf]
    fields = loaded.document(document.leaf, document.part, document.place, document.content)
    where = f"task {document.leaf!r} of lm-eval, document {document.place}"
    try:
        results = _filtered(task, fields, document.requests, outcomes, measure.filter)
        found = task.process_results(copy.deepcopy(fields), results)
    except Exception as problem:  # the task's own code may raise anything
        raise CandidateError(f"{where}: its own grading fails on the answer ({reason(problem)})") from None
    if measure.metric not in found:
        raise TaskError(f"{where}: no metric {measure.metric!r}; {nearest(measure.metric, found)}")
    try:
        number = _number(measure.form, found[measure.metric])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        raise TaskError(
            f"{where}: {measure.metric!r} is {str(found[measure.metric])[:60]!r}, which is no number of one item; "
            f"choose another metric: {', '.join(found)}"
        ) from None
    if measure.bounded and not 0 <= number <= 1:
        raise TaskError(f"{where}: {measure.metric!r} is {number:g}, not in [0, 1]; say bounded: false")
    return number


def margin(document: Document, outcomes: Sequence[Outcome], metric: str) -> float | None:
    """Return by how much the right choice leads, in the unit in which the metric compares choices.

    Nats for `acc` and `acc_mutual_info`; nats per character or byte for `acc_norm` and `acc_bytes`. None where
    the task has no choices or grades in its own way.
    """
    choices, gold = document.choices, document.gold
    if metric not in SHARES[:4] or not gold or "" in choices:
        return None
    level = [outcome.loglikelihood for outcome in outcomes[: len(choices)]]
    if metric == "acc_mutual_info":
        level = [one - alone.loglikelihood for one, alone in zip(level, outcomes[len(choices) :], strict=True)]
    if metric in ("acc_norm", "acc_bytes"):
        sizes = [len(text if metric == "acc_norm" else text.encode()) for text in choices]
        level = [one / size for one, size in zip(level, sizes, strict=True)]
    others = [one for place, one in enumerate(level) if place not in gold]
    return max(level[place] for place in gold) - max(others) if others else None


def try_out(loaded: Loaded, document: Document, measure: Measure, place: str) -> None:
    """Grade a made-up answer, so that what cannot be graded is refused before a model is asked.

    Raises:
        TaskError: if the task cannot grade, or gives no number.
    """
    outcomes = [Outcome(tokens=1, loglikelihood=-1.0 - number) for number in range(len(document.requests))]
    try:
        grade_document(loaded, document, outcomes, measure)
    except (CandidateError, TaskError) as problem:
        raise TaskError(f"{place}: {problem}") from None


def _listed(loaded: Loaded, metric: str | None = None) -> Any:
    """Return what a group says of how a metric (or its first) is put together, if it says so."""
    found = getattr(loaded.group, "aggregate_metric_list", None) or []
    return next((one for one in found if metric is None or one.metric == metric), None)


def _measure(task: Any, metric: str, filter_name: str, bounded: bool | None, where: str) -> Measure:
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    aggregates = task.aggregation()
    if metric not in aggregates:
        raise TaskError(f"{where}: no metric {metric!r}; {nearest(metric, aggregates)}")
    filters = [one.name for one in task._filters]
    if filter_name not in filters:
        raise TaskError(f"{where}: no filter {filter_name!r}; {nearest(filter_name, filters)}")
    own = {id(np.mean): "mean", **{id(found): name for name, found in AGGREGATION_REGISTRY.items()}}
    name = own.get(id(aggregates[metric]), getattr(aggregates[metric], "__name__", str(aggregates[metric])))
    if id(aggregates[metric]) not in own or name not in FORMS:
        usable = [key for key, found in aggregates.items() if own.get(id(found)) in FORMS]
        raise TaskError(
            f"{where}: {metric!r} is made of all documents together ({name}), so that one item has no value; "
            f"{'choose metric: ' + ' or '.join(usable) if usable else 'no metric of this task has one'}"
        )
    higher = task.higher_is_better().get(metric, FORMS[name] == "number")
    form = FORMS[name]
    return Measure(
        metric=metric,
        filter=filter_name,
        form=form,
        bounded=(form == "number" and metric in SHARES) if bounded is None else bounded,
        direction="maximize" if higher else "minimize",
    )


def _filtered(
    task: Any, fields: Any, requests: Sequence[Request], outcomes: Sequence[Outcome], filter_name: str
) -> list[Any]:
    """Return the answers as lm-eval's filter leaves them.

    A task that repeats its requests gets the one greedy answer as often as it asks.
    """
    from lm_eval.api.instance import Instance

    repeats = task.get_config("repeats") or 1
    instances = [
        Instance(request_type=_TYPES[request.kind], doc=fields, arguments=(), idx=place)
        for place, request in enumerate(requests)
    ]
    for instance, request, outcome in zip(instances, requests, outcomes, strict=True):
        instance.resps = [_said(request, outcome)] * repeats
    next(one for one in task._filters if one.name == filter_name).apply(instances)
    return [instance.filtered_resps[filter_name] for instance in instances]


#: What lm-eval calls the kinds of requests.
_TYPES: Mapping[str, Any] = {
    "loglikelihood": "loglikelihood",
    "rolling": "loglikelihood_rolling",
    "generate": "generate_until",
}


def _said(request: Request, outcome: Outcome) -> Any:
    """Return an outcome as lm-eval's models give it."""
    if request.kind == "loglikelihood":
        return outcome.loglikelihood, outcome.greedy
    return outcome.loglikelihood if request.kind == "rolling" else outcome.text


def _number(form: str, raw: Any) -> float:
    """Return the value of one item out of what lm-eval aggregates."""
    if form == "number":
        return _finite(float(raw))
    if form == "surprise":
        return _finite(-float(raw))
    if form == "brier":
        gold, shares = raw
        return float(np.sum((np.asarray(shares) - np.eye(len(shares))[gold]) ** 2))
    loglikelihood, units = raw
    return _finite(-float(loglikelihood) / float(units) / (math.log(2) if form == "bits per unit" else 1.0))


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number
