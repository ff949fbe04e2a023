"""How far estimates were off, in units of their errors, where the truth became known: of promoted candidates."""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.ledger import Promoted
from evomerge.search.asking import Answers


def deviations(
    promoted: Sequence[Promoted], answers: Mapping[int, Answers], spread: Mapping[str, float]
) -> list[float]:
    """Return of each promoted candidate the root mean square over tasks of truth minus estimate, in errors.

    Args:
        promoted: the promotions of a run, with what was thought of each candidate before.
        answers: what the candidates answered; who failed is left out.
        spread: by how much raw errors are multiplied, by task; those that are not named: 1.
    """
    found = []
    for event in promoted:
        for number, estimates in zip(event.candidates, event.estimates, strict=False):
            own = answers[number]
            if own.error is None:
                offs = [
                    (float(np.mean(list(own.values[task].values()))) - value) / (spread.get(task, 1.0) * raw)
                    for task, (value, raw) in estimates.items()
                    if raw > 0.0
                ]
                found.append(float(np.sqrt(np.mean(np.square(offs)))) if offs else 0.0)
    return found
