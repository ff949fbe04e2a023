"""Estimators by name, and what only some of them refuse."""

import numpy as np
import pytest

from evomerge.errors import ExperimentError
from evomerge.fitness.forecast import GpIrt
from evomerge.fitness.registry import ESTIMATORS, PUBLISHED, plain_estimator, read_estimator
from evomerge.fitness.responses import Responses
from evomerge.fitness.sampling import Mean


def test_all_names_are_there() -> None:
    """The names that an experiment file may give."""
    assert set(ESTIMATORS) == {
        *("mean", "stratified", "anchors", "p_irt", "gp_irt", "mp_irt", "gmp_irt", "factor", "aipw", "auto")
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_plain_form_is_read_back(name: str) -> None:
    """The defaults, by name alone and as a mapping."""
    assert read_estimator(name, "here") == ESTIMATORS[name]()
    assert read_estimator(plain_estimator(ESTIMATORS[name]()), "here") == ESTIMATORS[name]()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_have_a_plain_form(name: str) -> None:
    """So that an experiment file can ask for them."""
    assert read_estimator(plain_estimator(PUBLISHED[name]), "here") == PUBLISHED[name]


def test_settings_are_read() -> None:
    """A mapping gives the name and what differs from the defaults."""
    found = read_estimator({"name": "gp_irt", "ability": "ml", "anchors": "irt"}, "here")
    assert found == GpIrt(ability="ml", anchors="irt") == PUBLISHED["gp_irt"]
    assert read_estimator("mean", "here") == Mean()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("strat", r"exp.estimator.name: unknown estimator 'strat'; did you mean 'stratified'"),
        ({"rows": 3}, r"exp.estimator: give the name of an estimator"),
        (7, r"exp.estimator: give the name of an estimator"),
        ({"name": "auto", "row": 3}, r"exp.estimator.row: unknown key; did you mean 'rows'"),
        ({"name": "auto", "rows": 1}, r"exp.estimator: auto: rows must be at least 2"),
        ({"name": "anchors", "embedding": "correct"}, r"did you mean 'correctness'"),
        ({"name": "anchors", "dimensions": 0}, r"dimensions must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(data: object, message: str) -> None:
    """And the way out."""
    with pytest.raises(ExperimentError, match=message):
        read_estimator(data, "exp.estimator")


@pytest.mark.parametrize("name", ["anchors", "p_irt", "gp_irt", "mp_irt", "gmp_irt", "factor"])
def test_estimators_that_need_rows_say_so(name: str) -> None:
    """Rather than fit nothing."""
    with pytest.raises(ExperimentError, match=r"row|response"):
        ESTIMATORS[name]().fit(Responses.of(np.zeros((0, 9))), 0)
