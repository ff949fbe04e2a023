"""The estimator of anchors: items that stand for the items that are answered alike, and their weighted mean."""

from functools import lru_cache

import numpy as np

from evomerge.errors import ExperimentError, nearest
from evomerge.fitness.anchors import EMBEDDINGS, anchors, correctness, embedding, nearest_shares
from evomerge.fitness.estimator import Choice, Estimate, Fit, checked, settled
from evomerge.fitness.irt import fit
from evomerge.fitness.responses import Floats, Responses
from evomerge.value import value

#: Answers that are added, half right and half wrong, so that no candidate is certain (Agresti 1998).
_ADDED = 4.0


@value
class Anchors:
    """The mean of the responses to the anchors, each weighted with the share that its cluster has in the score.

    value = sum_i w_i y_i,    error^2 = (1 - n/N) v sum_i w_i^2 / 4 + (1 - n/N)^2 (p - m)^2

    (Polo 2024, tinyBenchmarks, arXiv 2402.14992, section 3.2; their code takes a quarter of the variance v of single
    responses for what is left within clusters), with v and the second term as for `Mean`. Asked items that were not
    chosen as anchors stand for what is nearest to them.

    Attributes:
        embedding: what items are clustered by, "correctness" or "irt".
        dimensions: of the abilities, for "irt".
    """

    embedding: str = "correctness"
    dimensions: int = 5

    def __post_init__(self) -> None:
        if self.embedding not in EMBEDDINGS:
            raise ExperimentError(
                f"anchors: unknown embedding {self.embedding!r}; {nearest(self.embedding, EMBEDDINGS)}"
            )
        if self.dimensions < 1:
            raise ExperimentError(f"anchors: dimensions must be at least 1, got {self.dimensions}")

    def fit(self, responses: Responses, seed: int) -> Fit:
        """Return the fit.

        Raises:
            ExperimentError: if there is no row to describe items by.
        """
        if not np.isfinite(responses.values_MN).any():
            raise ExperimentError("anchors: no row of responses to cluster items by; use mean or stratified until then")
        if self.embedding == "correctness":
            features_NF = correctness(responses)
        else:
            model = fit(responses.values_MN, responses.rows_M, dimensions=self.dimensions)
            features_NF = embedding("irt", responses, model.items)
        return _AnchorsFit(features_NF, responses.targets_KN, seed)


class _AnchorsFit:
    """Items with features, and the scores that they count in."""

    reason: str = ""
    warnings: tuple[str, ...] = ()

    def __init__(self, features_NF: Floats, targets_KN: Floats, seed: int) -> None:
        self._features_NF = features_NF
        self._targets_KN = targets_KN
        self._seed = seed
        self._weights = lru_cache(maxsize=32)(self._make_weights)

    def choose(self, count: int, taken: tuple[int, ...] = ()) -> Choice:
        """Return the anchors of `count` clusters."""
        return anchors(self._features_NF, self._targets_KN.mean(axis=0), count, taken, self._seed)

    def estimate(self, items: tuple[int, ...], values_Cn: Floats, margins_Cn: Floats | None = None) -> Estimate:
        """Return weighted means; an item without an answer leaves its share to the nearest one with."""
        item_n, values_Cn = checked(items, values_Cn, self._targets_KN.shape[1])
        shape = (len(values_Cn), len(self._targets_KN))
        found = Estimate(np.full(shape, 0.5), np.full(shape, 0.5))  # of a score without any answer nothing is known
        order_n = np.argsort(item_n)  # an item that is as near to two others goes to the first
        item_n, values_Cn = item_n[order_n], values_Cn[:, order_n]
        for row, values_n in enumerate(values_Cn):
            answered_n = np.isfinite(values_n)
            for k, (target_N, weight_n) in enumerate(
                zip(self._targets_KN, self._weights(tuple(item_n[answered_n].tolist())), strict=True)
            ):
                own_n = target_N[item_n[answered_n]] > 0.0
                if own_n.any():
                    total = int((target_N > 0.0).sum())
                    score = _score(values_n[answered_n][own_n], weight_n[own_n], total)
                    found.value_CK[row, k], found.error_CK[row, k] = score
        return settled(found, self._targets_KN, tuple(item_n.tolist()), values_Cn)

    def _make_weights(self, answered: tuple[int, ...]) -> Floats:
        return nearest_shares(self._features_NF, self._targets_KN, np.array(answered, dtype=np.intp))


def _score(values_n: Floats, weight_n: Floats, total: int) -> tuple[float, float]:
    """Return the weighted mean and its error."""
    n, found = len(values_n), float((values_n * weight_n).sum())
    middle = (n * found + _ADDED / 2.0) / (n + _ADDED)
    doubt = (found - middle) ** 2
    # the weighted variance: anchors are no random sample
    squares = n * float((weight_n * (values_n - middle) ** 2).sum())
    variance = (squares + _ADDED / 2.0 * (middle**2 + (1.0 - middle) ** 2)) / (n + _ADDED)
    open_ = 1.0 - n / total
    return found, float(np.sqrt(open_ * variance * (weight_n**2).sum() / 4.0 + open_**2 * doubt))
