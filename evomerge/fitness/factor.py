"""The factor estimator: a Gaussian factor model chooses the items and foretells scores, together with a partner.

The partner sees the same items another way, and their mean is better than either: p-IRT while rows are few, a Gaussian
process when they are many.
"""

# ruff: noqa: N802, N815  fields and properties carry their shapes in capitals, as variables do

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np

from evomerge.errors import ExperimentError, nearest
from evomerge.fitness.conditional import Gain, Joint, expected, gain, joint, most_telling
from evomerge.fitness.estimator import Choice, Estimate, Fit, checked, settled
from evomerge.fitness.forecast import PIrt
from evomerge.fitness.gaussian import GaussianProcess, fit_process
from evomerge.fitness.lowrank import effective, factorise, fill
from evomerge.fitness.margins import Soft, soft_law
from evomerge.fitness.responses import Floats, Places, Responses
from evomerge.fitness.shrinkage import shrunk, target
from evomerge.value import value

PARTNERS = ("auto", "p_irt", "gaussian", "both", "none")
#: Complete rows from which shrinkage is cross-validated and a Gaussian process is a partner; and from which it is the
#: only one. Between them three are better than two by a hair, and their errors are truer.
MANY_ROWS, MOST_ROWS = 100, 250
#: Shrinkage where rows are few; where candidates will differ from the rows; and where they are merges of known ones.
FEW_SHRINKAGE, DRIFT_SHRINKAGE, MERGED_SHRINKAGE = 0.3, 0.4, 0.6
#: Rows of unequal weight that are worth less than this share of their number are taken as made for a frontier.
EVEN_SHARE = 0.9
#: What cross-validation chooses from, on how many rows at most, and with how many items.
SHRINKAGES, VALIDATED_ROWS, VALIDATED_ITEMS, FOLDS = (0.05, 0.1, 0.2, 0.4, 0.6), 1000, (10, 30, 100), 5
MOST_FACTORS = 40
#: Below so many complete rows the user is warned, and no Gaussian process is fitted.
ENOUGH_ROWS, LEAST_PROCESS_ROWS = 20, 10
#: Sets of items whose gains are kept.
KEPT = 64


@value
class Factor:
    """Gaussian factor model with structured shrinkage, c-optimal items, and a partner; the default estimator.

        y = p + L z + e,    cov y = (1 - a) (L L' + D) + a (target: ability, strata, noise)
        value_k = p . t_k + cov(t_k . y, y_S) cov(y_S)^-1 (y_S - p_S),    error_k^2 = what is left of var(t_k . y)

    for the answers y_S to the items S asked and the shares t_k of the items in score k. Value and error are averaged
    with the partner's.

    Attributes:
        shrinkage: a, in [0, 1]. None: cross-validated from 100 complete rows on, .3 below; under drift .6 where sources
            are known, else .4.
        rank: factors of L. None: half the rows, at most 40.
        partner: "p_irt", "gaussian", "both", "none"; "auto": p-IRT below 100 complete rows, both below 250, then the
            Gaussian process. Under drift p-IRT where sources are known, because merges of them stay relatives; else
            none, as either follows the rows that were left behind.
        margins: whether log-likelihood margins, of items where rows have them, are features from which the scores are
            foretold; the scores stay those of the graded responses.
        drift: whether candidates will differ from most rows, as late in a search: then the shrinkage is not
            cross-validated, because the rows cannot tell what it is needed for. None: where rows weigh unequally, as
            `evomerge.fitness.frontier` makes them.
    """

    shrinkage: float | None = None
    rank: int | None = None
    partner: str = "auto"
    margins: bool = False
    drift: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.partner not in PARTNERS:
            raise ExperimentError(f"partner: unknown {self.partner!r}; {nearest(self.partner, PARTNERS)}")
        if self.shrinkage is not None and not 0.0 <= self.shrinkage <= 1.0:
            raise ExperimentError(f"shrinkage: must be in [0, 1], got {self.shrinkage}")
        if self.rank is not None and self.rank < 0:
            raise ExperimentError(f"rank: there are at least 0 factors, got {self.rank}")

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit.

        Rows that miss items take part: what they miss is filled in with what the rest of the row lets expect, and
        they count less by the share that they miss.

        Raises:
            ExperimentError: if there are fewer than 2 rows.
        """
        return _fitted(self, responses, seed)

    def pinned(self, responses: Responses, seed: int) -> Self:
        """Return the settings with what these responses make it choose, so that it chooses no more."""
        table = _table(responses)
        return replace(
            self,
            shrinkage=_shrinkage(self, table, seed),
            partner=_partner(self, table),
            drift=_drifts(self, table),
        )


class _Table(NamedTuple):
    """Responses made ready: between 0 and 1, none missing.

    The responses are low + width values; weights are effective, and less for rows that miss items; full says which rows
    miss nothing that counts;
    even whether rows weigh about alike, and merged whether sources of them are known.
    """

    values_MN: Floats
    targets_KN: Floats
    strata_N: Places
    rows_M: Floats
    lost_N: Floats
    full_M: Places
    low: float
    width: float
    even: bool
    merged: bool

    @property
    def scores_MK(self) -> Floats:
        return self.values_MN @ self.targets_KN.T

    @property
    def full(self) -> int:
        """How many rows miss nothing that counts, and count."""
        return int((self.rows_M[self.full_M] > 0.0).sum())

    def only(self, rows: Places) -> "_Table":
        """Return some of the rows."""
        return self._replace(
            values_MN=self.values_MN[rows],
            rows_M=self.rows_M[rows],
            lost_N=self.lost_N * len(rows) / len(self.rows_M),
            full_M=np.flatnonzero(np.isin(rows, self.full_M)),
        )


def _table(responses: Responses) -> _Table:
    if len(responses.rows_M) < 2 or not (responses.rows_M > 0.0).any():
        raise ExperimentError(
            f"factor: needs at least 2 rows of responses, got {len(responses.rows_M)}; "
            "use 'stratified', or evaluate some models fully"
        )
    values_MN = responses.values_MN
    known_MN = np.isfinite(values_MN)
    low, width = 0.0, 1.0
    if not responses.bounded and known_MN.any():
        low = float(np.nanmin(values_MN))
        width = (float(np.nanmax(values_MN)) - low) or 1.0
    counted_N = responses.targets_KN.sum(axis=0)
    rows_M = effective(responses.rows_M) * (known_MN @ counted_N) / counted_N.sum()
    even = float(effective(responses.rows_M).sum()) >= EVEN_SHARE * int((responses.rows_M > 0.0).sum())
    filled = fill((values_MN - low) / width, rows_M)
    full_M = np.flatnonzero(np.asarray(known_MN[:, counted_N > 0.0].all(axis=1)))
    return _Table(
        values_MN=filled.values_MN,
        targets_KN=responses.targets_KN,
        strata_N=responses.strata_N,
        rows_M=rows_M,
        lost_N=filled.lost_N,
        full_M=full_M,
        low=low,
        width=width,
        even=even,
        merged=bool(responses.sources),
    )


def _joint(table: _Table, rank: int | None, shrinkages: tuple[float, ...]) -> list[Joint]:
    """Return the joint laws of responses and scores, one for each shrinkage."""
    toward = target(table.values_MN, table.rows_M, table.strata_N)
    law = factorise(table.values_MN, table.rows_M, _rank(rank, len(table.rows_M)), toward.noise_N, lost_N=table.lost_N)
    return [joint(shrunk(law, toward, share), table.targets_KN) for share in shrinkages]


def _shrinkage(settings: Factor, table: _Table, seed: int) -> float:
    """Return the shrinkage as the settings say."""
    if settings.shrinkage is not None:
        return settings.shrinkage
    if _drifts(settings, table):
        return MERGED_SHRINKAGE if table.merged else DRIFT_SHRINKAGE
    if table.full < MANY_ROWS:
        return FEW_SHRINKAGE
    return _validated(settings, table, seed)


def _drifts(settings: Factor, table: _Table) -> bool:
    return not table.even if settings.drift is None else settings.drift


def _partner(settings: Factor, table: _Table) -> str:
    if settings.partner != "auto":
        return settings.partner
    if _drifts(settings, table):
        return "p_irt" if table.merged else "none"
    if table.full < MANY_ROWS:
        return "p_irt"
    return "both" if table.full < MOST_ROWS else "gaussian"


def _validated(settings: Factor, table: _Table, seed: int) -> float:
    """Return the shrinkage with the least squared error of held-out rows at the items that it chooses.

    Compared is the mean, over numbers of items and scores, of the logarithm of the weighted mean square: each counts
    alike.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(table.full_M)[:VALIDATED_ROWS]
    counts = [n for n in VALIDATED_ITEMS if n <= table.values_MN.shape[1] // 3] or [1]
    squares = np.zeros((len(SHRINKAGES), len(counts), len(table.targets_KN)))
    for f in range(FOLDS):
        held = table.only(rows[f::FOLDS])
        rest = np.delete(rows, np.s_[f::FOLDS])
        for a, law in enumerate(_joint(table.only(rest), settings.rank, SHRINKAGES)):
            items = np.array(most_telling(law, counts[-1]), dtype=np.intp)
            for c, n in enumerate(counts):
                found_CK = _conditional(law, gain(law, items[:n]), items[:n], held.values_MN[:, items[:n]])
                squares[a, c] += held.rows_M @ (found_CK - held.scores_MK) ** 2
    return SHRINKAGES[int(np.argmin(np.log(squares + 1e-12).mean(axis=(1, 2))))]


def _conditional(law: Joint, found: Gain, items: Places, values_Cn: Floats) -> Floats:
    """Return the posterior means of scores [C, K]."""
    return np.asarray(law.center_K + (values_Cn - law.mean_N[items]) @ found.weights_Kn.T)


def _fitted(settings: Factor, responses: Responses, seed: int) -> "_Fit":
    table = _table(responses)
    share = _shrinkage(settings, table, seed)
    partner = _partner(settings, table)
    # answers without bounds are no probabilities, so no response model
    irt = PIrt().fit(responses, seed) if partner in ("p_irt", "both") and responses.bounded else None
    process = partner in ("gaussian", "both") and table.full >= LEAST_PROCESS_ROWS
    with_ = " and ".join(name for name, used in (("p_irt", irt), ("a Gaussian process", process)) if used)
    soft = _soft(settings, table, responses, share) if settings.margins else None
    if soft is not None:
        with_ = f"{with_}, with margins".removeprefix(", ")
    return _Fit(
        table=table,
        law=_joint(table, settings.rank, (share,))[0],
        soft=soft,
        irt=irt,
        process=process,
        seed=seed,
        reason=f"factor: shrinkage {share:g}, with {with_ or 'no partner'}, fitted to {table.full} complete rows",
    )


def _soft(settings: Factor, table: _Table, responses: Responses, share: float) -> Soft | None:
    """Return the law with margins as features, if at least half of the complete rows have those of some items.

    Items of which fewer have margins, as those of a task that is answered in words, stay with their responses.
    """
    if responses.margins_MN is None or len(table.full_M) < 2:
        return None
    known_MN = np.isfinite(responses.margins_MN[table.full_M])
    soft_N = np.asarray(known_MN.mean(axis=0) >= 0.5)
    rows = table.full_M[known_MN[:, soft_N].all(axis=1)]
    if not soft_N.any() or len(rows) < max(2, len(table.full_M) / 2):
        return None
    some = table.only(rows)
    margins_MN = np.where(soft_N, responses.margins_MN[rows], np.nan)
    rank = _rank(settings.rank, len(rows))
    return soft_law(some.values_MN, margins_MN, some.rows_M, some.strata_N, some.targets_KN, rank=rank, shrinkage=share)


def _rank(rank: int | None, rows: int) -> int:
    return min(MOST_FACTORS, max(rows // 2, 1)) if rank is None else rank


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit:
    """A fitted factor model with its partners; what was computed for a set of items is kept for the next candidates."""

    table: _Table
    law: Joint
    soft: Soft | None
    irt: Fit | None
    process: bool
    seed: int
    reason: str
    _gains: dict[tuple[int, ...], Gain] = field(default_factory=dict)
    _processes: dict[tuple[int, ...], list[GaussianProcess]] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Says when there are too few rows."""
        if self.table.full >= ENOUGH_ROWS:
            return ()
        return (f"factor: fitted to {self.table.full} complete rows; below {ENOUGH_ROWS} its errors are too small",)

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Return the items that lower the variance of the scores most, none of those taken."""
        # a response is the better feature of its own item, but that is so for soft items too, whose responses count as
        # well: among items of both kinds the law of responses alone is fair
        law = self.law if self.soft is None or not self.soft.soft_N.all() else self.soft.law
        items = tuple(sorted(most_telling(law, count, taken)))
        # what all candidates' estimates have in common is made now, so that the first is as quick as the others
        self.estimate(items, np.zeros((1, len(items))))
        return Choice(items, (1.0 / max(len(items), 1),) * len(items))

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Return scores and raw errors; see `evomerge.fitness.estimator.Fit.estimate`."""
        table = self.table
        item_n, values_Cn = checked(items, values_Cn, table.values_MN.shape[1])
        unit_Cn = (values_Cn - table.low) / table.width
        parts = [self._own(self.law, item_n, unit_Cn)]
        if self.irt is not None:
            parts.append(self.irt.estimate(items, values_Cn))
        if self.process and len(item_n):
            parts.append(self._process(item_n, expected(self.law, item_n, unit_Cn)))
        found = Estimate(*(np.mean(each, axis=0) for each in zip(*parts, strict=True)))
        if self.soft is not None and margins_Cn is not None:
            found = self._with_margins(self.soft, found, item_n, unit_Cn, np.asarray(margins_Cn, dtype=np.float64))
        found = Estimate(table.low + table.width * found.value_CK, table.width * found.error_CK)
        return settled(found, table.targets_KN, items, values_Cn)

    def _with_margins(
        self, features: Soft, hard: Estimate, items: Places, values_Cn: Floats, margins_Cn: Floats
    ) -> Estimate:
        """Return the mean of what responses and margins say, by inverse variance; without margins the former."""
        soft = self._own(features.law, items, features.features(items, values_Cn, margins_Cn))
        has_C1 = (np.isfinite(margins_Cn) & features.soft_N[items]).any(axis=1, keepdims=True)
        trust_CK = hard.error_CK**2 / np.maximum(hard.error_CK**2 + soft.error_CK**2, 1e-300)
        trust_CK = np.where(has_C1, trust_CK, 0.0)
        return Estimate(*(trust_CK * s + (1.0 - trust_CK) * h for s, h in zip(soft, hard, strict=True)))

    def _own(self, law: Joint, items: Places, values_Cn: Floats) -> Estimate:
        """Return the estimates of a joint law, candidates with the same items missing together."""
        value_CK = np.zeros((len(values_Cn), len(self.table.targets_KN)))
        error_CK = np.zeros_like(value_CK)
        pattern_Pn, row_C = np.unique(np.isfinite(values_Cn), axis=0, return_inverse=True)
        for p, known_n in enumerate(pattern_Pn):
            some, rows = items[known_n], np.flatnonzero(row_C.ravel() == p)
            key = (law is self.law, *some.tolist())
            if key not in self._gains:
                if len(self._gains) >= KEPT:
                    self._gains.clear()
                self._gains[key] = gain(law, some)
            value_CK[rows] = _conditional(law, self._gains[key], some, values_Cn[np.ix_(rows, known_n)])
            error_CK[rows] = np.sqrt(self._gains[key].variance_K)
        return Estimate(value_CK, error_CK)

    def _process(self, items: Places, values_Cn: Floats) -> Estimate:
        """Return the estimates of the Gaussian processes, one a score, which are fitted when their items come first."""
        key = tuple(items.tolist())
        if key not in self._processes:
            if len(self._processes) >= KEPT:
                self._processes.clear()
            full = self.table.only(self.table.full_M)
            self._processes[key] = [
                fit_process(full.values_MN[:, items], scores_M, full.rows_M, self.seed) for scores_M in full.scores_MK.T
            ]
        means, errors = zip(*(each.predict(values_Cn) for each in self._processes[key]), strict=True)
        return Estimate(np.stack(means, axis=1), np.stack(errors, axis=1))
