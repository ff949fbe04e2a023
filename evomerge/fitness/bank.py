"""Item banks: what other models answered to named items, and how a fit takes it in beside the rows of its own.

Legend of shapes: see `evomerge.fitness.responses`; P rows of a bank.
"""

# ruff: noqa: N815  fields carry their shapes in capitals, as variables do

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.estimator import Estimator
from evomerge.fitness.frontier import LEAST_ROWS
from evomerge.fitness.irt import fit
from evomerge.fitness.lowrank import effective
from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.value import digest

Halves = NDArray[np.float16]
Singles = NDArray[np.float32]

#: The share of a bank's rows that is kept where only the nearest are wanted.
NEAREST = 1.0 / 3.0

_FOLDS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Responses of models to items, both by name.

    Attributes:
        values_MN: responses in [0, 1], NaN where an item was not asked; kept to half precision, which 0 and 1 are in.
        models: the names of the rows, all different.
        items: the names of the columns, all different; see `item_name`.
        tasks: the task of each item, or "".
        strata: the subtask or language of each item, or "".
        margins_MN: log-likelihood margins in nats, NaN where there are none.

    Raises:
        ValueError: in one line, if this is not so.
    """

    values_MN: Halves
    models: tuple[str, ...]
    items: tuple[str, ...]
    tasks: tuple[str, ...]
    strata: tuple[str, ...]
    margins_MN: Halves | None = None

    def __post_init__(self) -> None:
        shape = (len(self.models), len(self.items))
        margins = self.values_MN if self.margins_MN is None else self.margins_MN
        if not self.values_MN.shape == margins.shape == shape:
            raise ValueError(f"{shape[0]} models and {shape[1]} items do not fit responses {self.values_MN.shape}")
        if not len(self.tasks) == len(self.strata) == len(self.items):
            raise ValueError(f"{len(self.items)} items, but {len(self.tasks)} tasks and {len(self.strata)} strata")
        for kind, names in (("model", self.models), ("item", self.items)):
            if "" in names or not names:
                raise ValueError(f"at least one {kind} is needed, and each needs a name")
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind}s are called {Counter(names).most_common(1)[0][0]!r}; names must differ")
        odd = np.argwhere(~np.isnan(self.values_MN) & ~((self.values_MN >= 0.0) & (self.values_MN <= 1.0)))
        if len(odd):
            row, column = odd[0]
            where = f"model {self.models[row]!r}, item {self.items[column]!r}"
            raise ValueError(f"{where}: responses must lie in [0, 1], got {self.values_MN[row, column]:g}")
        if np.isnan(self.values_MN).all():
            raise ValueError("all responses are missing")

    @property
    def missing(self) -> float:
        """The share of the responses that are missing."""
        return float(np.isnan(self.values_MN).mean())

    @property
    def scores_M(self) -> Floats:  # noqa: N802  an array, so its name has its shape
        """Each model's mean response to the items that it was asked; NaN if it was asked none."""
        known_MN = ~np.isnan(self.values_MN)
        count_M = known_MN.sum(axis=1)
        sum_M = np.where(known_MN, self.values_MN, 0.0).sum(axis=1, dtype=np.float64)
        return np.asarray(np.divide(sum_M, count_M, out=np.full(len(sum_M), np.nan), where=count_M > 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Bank:
    """A table of responses, and the items' parameters in the two-parameter logistic model (`evomerge.fitness.irt`).

    Attributes:
        table: the responses.
        slope_N: a of sigmoid(a theta - b), theta standard normal over the models.
        difficulty_N: b; larger is harder.
        covariance_N3: what is not known of them: var a, cov(a, b), var b.
        source: where the responses come from.
        licence: under which they may be passed on.
        made_by: by which version they were fitted.
    """

    table: Table
    slope_N: Singles
    difficulty_N: Singles
    covariance_N3: Singles
    source: str = ""
    licence: str = ""
    made_by: str = ""

    @cached_property
    def digest(self) -> str:
        """The content address of names, responses and parameters: 16 hexadecimal digits."""
        table = self.table
        named = [table.models, table.items, table.tasks, table.strata]
        arrays = [table.values_MN, table.margins_MN, self.slope_N, self.difficulty_N, self.covariance_N3]
        return digest([*named, [None if array is None else _address(array) for array in arrays]])


class Prior(NamedTuple):
    """The rows of a bank, brought to the items of a search.

    Attributes:
        values: responses [P, N] to the items of each task.
        margins: their margins, if the bank has any.
        weight: the share of these rows in a fit.
        nearest: whether only those nearest to the rows of the search's own are taken.
        digest: of the bank.
        known: how many of the items the bank has.
    """

    values: Mapping[str, Floats]
    margins: Mapping[str, Floats]
    weight: float
    nearest: bool
    digest: str
    known: int

    @property
    def items(self) -> int:
        """How many items the search has."""
        return sum(values_PN.shape[1] for values_PN in self.values.values())

    @property
    def headline(self) -> str:
        """What it is, in a line."""
        models = len(next(iter(self.values.values())))
        which = "the nearest third of " if self.nearest else ""
        return f"{which}{models} models, {self.known} of {self.items} items, {100 * self.weight:g} % of a fit's weight"

    def beside(self, own: Responses, tasks: Sequence[str]) -> Responses:
        """Return responses to the items of these tasks, in this order, with the bank's rows after the own ones."""
        values_PN = np.hstack([self.values[task] for task in tasks])
        margins_PN = np.hstack([self.margins[task] for task in tasks]) if self.margins else None
        return with_bank(own, values_PN, margins_PN, weight=self.weight, nearest=self.nearest)


class HeldOut(NamedTuple):
    """How well scores of models that were held out are estimated from a few items."""

    correlation: float  # Spearman's, between estimates and scores
    error: float  # mean absolute error
    models: int
    items: int
    reason: str  # of the estimator


def item_name(task: str, id: str) -> str:
    """Return what an item is called in a bank: its id if that has a slash, as those of lm-eval's tasks; else TASK/ID.

    >>> item_name("sums", "17"), item_name("arc", "arc_easy/3-0a1b2c3d"), item_name("", "17")
    ('sums/17', 'arc_easy/3-0a1b2c3d', '17')
    """
    return f"{task}/{id}" if task and "/" not in id else id


def fit_bank(table: Table, source: str = "", licence: str = "", made_by: str = "") -> Bank:
    """Return the bank of a table: fits the two-parameter logistic model. 300 x 5000 responses take seconds."""
    model = fit(table.values_MN.astype(np.float64), dimensions=1)
    both_NE, cov_NEE = model.items.parameters_NE, model.items.covariance_NEE
    return Bank(
        table=table,
        slope_N=both_NE[:, 0].astype(np.float32),
        difficulty_N=both_NE[:, 1].astype(np.float32),
        covariance_N3=np.column_stack([cov_NEE[:, 0, 0], cov_NEE[:, 0, 1], cov_NEE[:, 1, 1]]).astype(np.float32),
        source=source,
        licence=licence,
        made_by=made_by,
    )


def matched(items: Sequence[str], asked: Mapping[str, Sequence[str]]) -> dict[str, Places]:
    """Return where the items of tasks stand among a bank's, by task; -1 for those that are not there.

    An item answers to `item_name`, to TASK/ID and to its id alone, in this order; a name to which two of the items
    would answer counts for neither.

    Args:
        items: the names in the bank.
        asked: the ids of the items, by task.
    """
    place = {name: i for i, name in enumerate(items)}
    names = {task: [_names(task, id) for id in ids] for task, ids in asked.items()}
    claims = Counter(name for own in names.values() for one in own for name in one)

    def find(one: tuple[str, ...]) -> int:
        return next((place[name] for name in one if claims[name] == 1 and name in place), -1)

    return {task: np.array([find(one) for one in own], dtype=np.intp) for task, own in names.items()}


def prior(bank: Bank, asked: Mapping[str, Sequence[str]], weight: float, nearest: bool) -> Prior:
    """Return the rows of a bank for the items of tasks, by name; see `matched`. Items that it lacks are missing."""
    found = matched(bank.table.items, asked)
    margins_MN = bank.table.margins_MN
    return Prior(
        values={task: _columns(bank.table.values_MN, places) for task, places in found.items()},
        margins={} if margins_MN is None else {task: _columns(margins_MN, places) for task, places in found.items()},
        weight=weight,
        nearest=nearest,
        digest=bank.digest,
        known=sum(int((places >= 0).sum()) for places in found.values()),
    )


def with_bank(
    own: Responses, values_PN: Floats, margins_PN: Floats | None = None, *, weight: float, nearest: bool
) -> Responses:
    """Return responses with rows of a bank after the own ones, which keep their places, strata and targets.

    The rows of the bank count alike, and together they have the share `weight` of the sum of all rows' weights. That
    sum is the number of equal rows that the whole is worth, (sum w)^2 / sum w^2 (Kish 1965, Survey Sampling, 11.7).
    Without rows of its own a fit has only the bank's, each counting 1.

    Args:
        own: the rows of the search.
        values_PN: the bank's responses to the same items, NaN where it lacks one; rows without any are left out.
        margins_PN: their margins; taken where the own rows have margins.
        weight: in (0, 1).
        nearest: keep only the third of the bank's rows, 30 at least, whose scores are nearest to the own rows' mean.

    Raises:
        ValueError: if shapes do not fit, responses have no bounds, or the weight is not in (0, 1).
    """
    if not own.bounded or not 0.0 < weight < 1.0 or values_PN.shape[1:] != own.strata_N.shape:
        raise ValueError(
            f"a bank of shape {values_PN.shape} and weight {weight} beside {own.strata_N.shape[0]} items: "
            "the weight must lie between 0 and 1, and responses in [0, 1]"
        )
    kept = np.flatnonzero(np.isfinite(values_PN).any(axis=1))
    if nearest and own.rows_M.sum() > 0.0:
        away_P = distances(own, values_PN[kept])
        count = max(int(np.ceil(NEAREST * len(kept))), LEAST_ROWS)
        kept = np.sort(kept[np.argsort(away_P, kind="stable")[:count]])
    if not len(kept):
        return own
    total = float(own.rows_M.sum())
    each = weight / (1.0 - weight) * total / len(kept) if total > 0.0 else 1.0
    margins_MN = None
    if own.margins_MN is not None:
        no_margins_PN = np.full(values_PN.shape, np.nan) if margins_PN is None else margins_PN
        margins_MN = np.vstack([own.margins_MN, no_margins_PN[kept]])
    return replace(
        own,
        values_MN=np.vstack([own.values_MN, values_PN[kept]]),
        rows_M=effective(np.concatenate([own.rows_M, np.full(len(kept), each)])),
        margins_MN=margins_MN,
    )


def distances(own: Responses, values_PN: Floats) -> Floats:
    """Return how far the scores of rows are from the own rows' mean scores, over the items that both were asked. [P].

    The root of the mean square over the scores; infinite for a row that has no item in common with any own row.
    """
    known_MN = np.isfinite(own.values_MN) * own.rows_M[:, None]
    count_N = known_MN.sum(axis=0)
    right_N = (np.where(known_MN > 0.0, own.values_MN, 0.0) * known_MN).sum(axis=0)
    mean_N = np.divide(right_N, count_N, out=np.zeros(len(count_N)), where=count_N > 0.0)
    common_PN = np.isfinite(values_PN) & (count_N > 0.0)
    away_PN = np.where(common_PN, np.nan_to_num(values_PN) - mean_N, 0.0)
    share_PK = common_PN @ own.targets_KN.T
    some_PK = share_PK > 0.0
    away_PK = np.divide(away_PN @ own.targets_KN.T, share_PK, out=np.zeros(share_PK.shape), where=some_PK)
    scores_P = some_PK.sum(axis=1)
    square_P = np.divide((away_PK**2).sum(axis=1), scores_P, out=np.full(len(scores_P), np.inf), where=scores_P > 0)
    return np.asarray(np.sqrt(square_P))


def held_out(table: Table, settings: Estimator, count: int, seed: int = 0) -> HeldOut | None:
    """Return how well an estimator does on models of a table that it has not seen, from so many items.

    In each of 5 folds it is fitted to the other models, chooses the items, and estimates the mean response of those
    held out to all items. Only models that answered everything are held out; None if there are fewer than 10 of them.

    Args:
        table: the responses.
        settings: the estimator.
        count: the items to ask; at most half of all.
        seed: of the folds and fits.
    """
    values_MN = table.values_MN.astype(np.float64)
    whole = np.flatnonzero(np.isfinite(values_MN).all(axis=1))
    count = min(count, len(table.items) // 2)
    if len(whole) < 2 * _FOLDS or count < 1:
        return None
    labels = sorted(set(zip(table.tasks, table.strata, strict=True)))
    number = {label: i for i, label in enumerate(labels)}
    strata_N = np.array([number[label] for label in zip(table.tasks, table.strata, strict=True)], dtype=np.intp)
    responses = Responses.of(values_MN, strata_N)
    order = whole[np.random.default_rng(seed).permutation(len(whole))]
    truth, found = [], []
    for fold in range(_FOLDS):
        held = np.sort(order[fold::_FOLDS])
        fitted = settings.fit(responses.only(np.setdiff1d(np.arange(len(values_MN)), held)), seed)
        items = fitted.choose(count).items
        found.append(fitted.estimate(items, values_MN[held][:, list(items)]).value_CK[:, 0])
        truth.append(values_MN[held].mean(axis=1))
    truth_C, found_C = np.concatenate(truth), np.concatenate(found)
    error = float(np.abs(found_C - truth_C).mean())
    return HeldOut(_spearman(truth_C, found_C), error, len(whole), count, fitted.reason)


def _spearman(one_C: Floats, other_C: Floats) -> float:
    from scipy.stats import rankdata  # slow to start

    ranks = rankdata(one_C), rankdata(other_C)
    return float(np.corrcoef(*ranks)[0, 1]) if min(np.ptp(own) for own in ranks) > 0.0 else 0.0


def _names(task: str, id: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((item_name(task, id), f"{task}/{id}", id)))


def _columns(values_MN: Halves, places: Places) -> Floats:
    return np.where(places >= 0, values_MN[:, np.maximum(places, 0)].astype(np.float64), np.nan)


def _address(array: NDArray[np.floating]) -> list[object]:
    little = array.astype(array.dtype.newbyteorder("<"))
    return [str(little.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()]
