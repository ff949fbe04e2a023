"""Gates: compare the sources' contributions and say which entries of each count.

Shapes: N sources, `...` the shape of the tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.operators.combine import column


def elect(X: Tensor, weights: Sequence[float]) -> Tensor:  # X_i of the papers
    """Return the gate of entries that have the elected sign: 1 where they count, else 0.

    s = sign(sum_i w_i X_i), a sum of zero counting as +;
    G_i = [sign(w_i X_i) = s], so an entry that is zero never counts.

    Args:
        X: contributions, shape (N, ...), float32.
        weights: w_i; a negative weight turns that source's vote around.

    Returns:
        The gate, shape (N, ...), float32.

    Source: Yadav 2023 (arXiv:2306.01708) section 4.1, step 2. The paper votes without weights;
    with equal positive weights this is the paper's vote.
    """
    votes = X * column(weights, X)
    plus = votes.sum(dim=0) >= 0
    return torch.where(plus, votes > 0, votes < 0).to(X.dtype)
