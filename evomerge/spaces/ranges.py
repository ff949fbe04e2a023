"""What a parameter space may choose from: bounds of weights and of methods' parameters, and the slots of a line."""

from evomerge.genome import ActiveIf, Axis, Choice, Real, Whole
from evomerge.value import value

#: The name of the axis that chooses the method, where there is a choice.
METHOD_AXIS = "method"

#: The option of a slot that leaves it empty.
NONE = "none"


@value
class Range:
    """Bounds of the weight genes; with `log` they are searched on a logarithmic scale.

    Where both are equal, that is every weight, and no gene. With `methods` the genes count under these alone; under
    others every source has a weight of 1.
    """

    low: float
    high: float
    log: bool = False
    methods: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return self.low == self.high


@value
class ParameterRange:
    """What a method's parameter may be: a range or options, one gene for the whole recipe, or one per source or knot.

    With one value or option it is no gene.

    Attributes:
        low: the least value, where it is a number.
        high: the greatest.
        log: whether it is searched on a logarithmic scale.
        whole: whether it is a whole number.
        options: its values, where it is a word.
        per_source: whether each source has its own.
        per_knot: whether it has its own at each knot over depth of each module set, as weights have.
        methods: those that have the parameter; where the method is itself a gene, the parameter's genes are active
            only under them. Where a line is made of slots, these are options of `slot`.
        slot: the slot whose choice decides whether the parameter counts.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    options: tuple[str, ...] = ()
    per_source: bool = False
    per_knot: bool = False
    methods: tuple[str, ...] = ()
    slot: str = METHOD_AXIS

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.options) == 1 if self.options else self.low == self.high

    @property
    def constant(self) -> str | float:
        """What it is where there is nothing to choose."""
        return self.options[0] if self.options else self.low

    def axis(self, name: str, active_if: ActiveIf | None) -> Axis:
        """Return the axis of one of its genes."""
        if self.options:
            return Choice(name=name, options=self.options, active_if=active_if)
        if self.whole:
            return Whole(name=name, low=int(self.low), high=int(self.high), log=self.log, active_if=active_if)
        return Real(name=name, low=self.low, high=self.high, log=self.log, active_if=active_if)


@value
class Slot:
    """A place in a line of stages and what may stand there: stages with or without settings, or `none`."""

    name: str
    options: tuple[str, ...]
