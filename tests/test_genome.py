"""Genomes: the map between axes and the unit cube, and what is refused."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.genome import (
    ActiveIf,
    Choice,
    Real,
    Whole,
    active,
    check_axes,
    check_genome,
    from_unit,
    to_unit,
)

UNIT = st.floats(0.0, 1.0)
SETTINGS = settings(max_examples=100, deadline=None)


@st.composite
def reals(draw):
    """Draw a real axis, linear or logarithmic, of any width down to none."""
    log = draw(st.booleans())
    bound = st.floats(1e-9, 1e9) if log else st.floats(-1e9, 1e9)
    low, high = sorted((draw(bound), draw(bound)))
    return Real(name="r", low=low, high=high, log=log)


@st.composite
def wholes(draw):
    """Draw an integer axis, linear or logarithmic."""
    log = draw(st.booleans())
    bound = st.integers(1, 10**6) if log else st.integers(-(10**6), 10**6)
    low, high = sorted((draw(bound), draw(bound)))
    return Whole(name="w", low=low, high=high, log=log)


CHOICES = st.lists(st.text(max_size=3), min_size=1, max_size=9, unique=True).map(
    lambda options: Choice(name="c", options=tuple(options))
)
AXES = st.one_of(reals(), wholes(), CHOICES)


@given(AXES, st.floats(allow_nan=False))
@SETTINGS
def test_every_number_gives_a_gene_within_the_axis(axis, u):
    """The map from the line is total: outside [0, 1] it is clipped, and the gene always fits."""
    gene = axis.from_unit(u)

    assert axis.contains(gene)
    assert gene == axis.from_unit(min(max(u, 0.0), 1.0))


@given(reals(), UNIT)
@SETTINGS
def test_real_genes_come_back_from_the_unit_interval(axis, u):
    """A real gene is its own image, up to rounding, and its place lies in the unit interval."""
    gene = axis.from_unit(u)
    back = axis.to_unit(gene)

    assert 0.0 <= back <= 1.0
    scale = abs(gene) if axis.log else max(abs(axis.low), abs(axis.high))
    assert axis.from_unit(back) == pytest.approx(gene, rel=0, abs=1e-12 * scale)


@given(wholes(), st.data())
@SETTINGS
def test_whole_genes_come_back_exactly(axis, data):
    """An integer is its own image, bounds included."""
    for gene in (axis.low, axis.high, data.draw(st.integers(axis.low, axis.high))):
        assert 0.0 < axis.to_unit(gene) < 1.0
        assert axis.from_unit(axis.to_unit(gene)) == gene


@given(CHOICES)
@SETTINGS
def test_options_come_back_exactly(axis):
    """Every option is its own image."""
    assert tuple(axis.from_unit(axis.to_unit(option)) for option in axis.options) == axis.options


@given(st.one_of(reals(), wholes()), UNIT, UNIT)
@SETTINGS
def test_numbers_rise_with_the_unit_interval(axis, one, other):
    """A greater coordinate never gives a smaller number."""
    assume(one <= other)
    assert axis.from_unit(one) <= axis.from_unit(other)


@given(st.lists(st.tuples(AXES, UNIT), max_size=6))
@SETTINGS
def test_genomes_are_mapped_axis_by_axis(pairs):
    """The cube is the product of the intervals, and a genome of the cube passes the check."""
    axes = [axis for axis, _ in pairs]
    genome = from_unit(axes, np.array([u for _, u in pairs]))

    assert genome == tuple(axis.from_unit(u) for axis, u in pairs)
    assert to_unit(axes, genome).tolist() == [axis.to_unit(gene) for axis, gene in zip(axes, genome, strict=True)]
    check_genome(axes, genome, "here")


def test_real_scale_is_linear_or_logarithmic():
    """The middle is the arithmetic mean, or the geometric one."""
    assert Real(name="r", low=1.0, high=100.0).from_unit(0.5) == pytest.approx(50.5)
    assert Real(name="r", low=1.0, high=100.0, log=True).from_unit(0.5) == pytest.approx(10.0)


def test_whole_numbers_have_equal_cells():
    """A grid of 1000 points falls on 10 integers 100 times each, both bounds included."""
    axis = Whole(name="w", low=-3, high=6)
    counts = Counter(axis.from_unit((i + 0.5) / 1000) for i in range(1000))

    assert counts == dict.fromkeys(range(-3, 7), 100)


def test_logarithmic_whole_numbers_have_cells_of_the_logarithm():
    """The share of an integer k is the logarithm's share of [k - 1/2, k + 1/2]."""
    axis = Whole(name="w", low=1, high=16, log=True)
    counts = Counter(axis.from_unit((i + 0.5) / 20000) for i in range(20000))

    for k in range(1, 17):
        share = math.log((k + 0.5) / (k - 0.5)) / math.log(16.5 / 0.5)
        assert counts[k] / 20000 == pytest.approx(share, abs=2e-4)


def test_options_have_equal_cells():
    """Three options share the interval in three, and each has its place in the middle of its cell."""
    axis = Choice(name="c", options=("a", "b", "c"))

    assert Counter(axis.from_unit((i + 0.5) / 300) for i in range(300)) == {"a": 100, "b": 100, "c": 100}
    assert [axis.to_unit(option) for option in axis.options] == pytest.approx([1 / 6, 1 / 2, 5 / 6])


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_of_one_point_has_its_place_in_the_middle(log):
    """Where there is nothing to choose the map still goes both ways, also for bounds one rounding apart."""
    for high in (1e300, float(np.nextafter(1e300, np.inf))):
        axis = Real(name="r", low=1e300, high=high, log=log)
        assert axis.contains(axis.from_unit(axis.to_unit(high)))
    assert Real(name="r", low=2.0, high=2.0, log=log).to_unit(2.0) == 0.5
    assert Whole(name="w", low=2, high=2).to_unit(2) == 0.5


@pytest.mark.parametrize(
    ("axis", "right", "wrong"),
    [
        (Real(name="r", low=0.0, high=1.0), [0, 0.0, 1.0, 1], [-1e-9, 1.1, math.nan, "0.5", True]),
        (Whole(name="w", low=0, high=2), [0, 1, 2], [-1, 3, 1.0, "1", True]),
        (Choice(name="c", options=("a", "1")), ["a", "1"], ["b", 1, ""]),
    ],
)
def test_genes_of_another_type_or_out_of_bounds_do_not_fit(axis, right, wrong):
    """Types are told apart, truth values are no numbers, and bounds are included."""
    assert all(axis.contains(gene) for gene in right)
    assert not any(axis.contains(gene) for gene in wrong)


def test_nan_is_no_coordinate():
    """A driver that proposes NaN is told so at once."""
    for axis in (Real(name="r", low=0, high=1), Whole(name="w", low=0, high=1), Choice(name="c", options=("a",))):
        with pytest.raises(ValueError, match="NaN"):
            axis.from_unit(math.nan)


def test_a_conditional_axis_is_active_under_its_options_only():
    """Axes without condition always count; the others as the named gene says."""
    method = Choice(name="method", options=("ties", "slerp", "linear"))
    density = Real(name="density", low=0, high=1, active_if=ActiveIf(axis="method", options=("ties", "linear")))
    axes = (density, method)
    check_axes(axes)

    assert [active(axes, (0.5, option)) for option in method.options] == [(True, True), (False, True), (True, True)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Real(name="r", low=1.0, high=0.0), r"axis 'r': bounds must be .* low <= high, got \[1.0, 0.0\]"),
        (lambda: Real(name="r", low=0.0, high=math.inf), "axis 'r': bounds must be finite"),
        (lambda: Real(name="r", low=math.nan, high=1.0), "axis 'r': bounds must be finite"),
        (lambda: Real(name="r", low=0.0, high=1.0, log=True), "axis 'r': a logarithmic axis needs low > 0, got 0.0"),
        (lambda: Whole(name="w", low=0, high=3, log=True), "axis 'w': a logarithmic axis needs low > 0, got 0"),
        (lambda: Whole(name="w", low=4, high=3), "axis 'w': bounds"),
        (lambda: Choice(name="c", options=()), r"axis 'c': options must be distinct and at least one, got \(\)"),
        (lambda: Choice(name="c", options=("a", "a")), "axis 'c': options must be distinct"),
    ],
)
def test_impossible_axes_are_refused(make, message):
    """An axis that holds nothing, or no logarithm, names itself and its bounds."""
    with pytest.raises(RecipeError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (ActiveIf(axis="metod", options=("a",)), "active_if names 'metod', not a choice; did you mean 'method'"),
        (ActiveIf(axis="x", options=("a",)), "active_if names 'x', not a choice; known: method"),
        (ActiveIf(axis="method", options=("tis",)), "active_if option 'tis'; did you mean 'ties'"),
    ],
)
def test_conditions_on_nothing_are_refused(condition, message):
    """A condition must name a categorical axis and options of it."""
    method = Choice(name="method", options=("ties", "slerp"))
    axes = (method, Real(name="x", low=0, high=1), Real(name="y", low=0, high=1, active_if=condition))

    with pytest.raises(RecipeError, match=f"^axis 'y': {message}"):
        check_axes(axes)


def test_two_axes_of_one_name_are_refused():
    """Genes are known by the name of their axis."""
    with pytest.raises(RecipeError, match="two axes of one name"):
        check_axes([Real(name="x", low=0, high=1), Whole(name="x", low=0, high=1)])


def test_genomes_that_do_not_fit_are_refused_with_their_place():
    """Length and genes are checked, and the gene and axis are named."""
    axes = [Real(name="x", low=0, high=1)]

    with pytest.raises(RecipeError, match=r"^here: the genome has 2 genes, the search space has 1 axes"):
        check_genome(axes, (0.5, 0.5), "here")
    with pytest.raises(RecipeError, match=r"^here: gene 1.5 is not within the axis Real\(name='x'"):
        check_genome(axes, (1.5,), "here")
    with pytest.raises(ValueError, match="zip"):
        from_unit(axes, [0.1, 0.2])
