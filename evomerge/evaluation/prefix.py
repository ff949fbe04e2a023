"""Hidden states that stacks share: what the first hops made of a plan's texts is kept, and later stacks begin there.

Stacks that begin with the same hops (source, layer, scale) make the same hidden states of the same batches, bit for
bit. A trie of hops keeps them where stacks branch off, under a budget of bytes, least recently used out first; while
there is room, it also keeps what no stack is known to branch off from, which goes before all else. What is kept is for
one plan as a whole: the states of every forward pass of it, in the order of the passes, and where answers are generated
the keys and values of the hops that are left out.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from evomerge.evaluation.plan import Plan

#: What a hop does: source, layer, scale.
Key = tuple[str, int, float]

#: A plan, and the most tokens of its batches: together they settle every forward pass.
Asked = tuple[int, int]

#: Keys and values of one hop for the tokens of a pass.
Pair = tuple[Tensor, Tensor]

#: The share of the budget below which there is room for what no stack is known to branch off from.
ROOM = 0.9

#: The most nodes of a trie, kept states or not.
NODES = 1 << 16


@dataclass
class Counts:
    """How many layers were run on a batch, and on how many tokens; and how many were spared by what was kept."""

    run: int = 0
    spared: int = 0
    run_tokens: int = 0
    spared_tokens: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """What is kept at a node for one plan.

    Attributes:
        plan: the plan, so that its id stays its own.
        depth: how many hops have been run.
        states: the hidden states after them, one tensor a pass.
        pairs: keys and values of those hops for each pass; empty where nobody will need them.
    """

    plan: Plan
    depth: int
    states: tuple[Tensor, ...]
    pairs: tuple[tuple[Pair, ...], ...]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that it holds."""
        yield from self.states
        for own in self.pairs:
            for pair in own:
                yield from pair


@dataclass
class _Node:
    """A beginning of stacks: what follows it, and what is kept of it, by plan."""

    after: dict[Key, "_Node"] = field(default_factory=dict)
    kept: dict[Asked, Entry] = field(default_factory=dict)


class Prefixes:
    """The trie of all stacks that a worker has met.

    Args:
        budget: the most bytes that are kept; 0: nothing is.
    """

    def __init__(self, budget: int) -> None:
        """Keep nothing yet."""
        self._budget = budget
        self._root, self._nodes = _Node(), 1
        self._order: OrderedDict[int, tuple[_Node, Asked]] = OrderedDict()
        self._held: dict[int, int] = {}
        self.bytes = 0
        self.most = 0

    @property
    def on(self) -> bool:
        """Whether anything may be kept."""
        return self._budget > 0

    @property
    def roomy(self) -> bool:
        """Whether there is room for what may be of use some day."""
        return self.bytes < ROOM * self._budget

    def meet(self, path: Sequence[Key], asked: Asked) -> tuple[Entry | None, int]:
        """Return the deepest entry on a path for a plan, and how much of the path other stacks have begun with.

        From then on the path is one of them.
        """
        node, found, known = self._root, None, 0
        if self._nodes > NODES:
            self.clear()
            node = self._root
        for depth, key in enumerate(path):
            if key in node.after:
                known = depth + 1
            else:
                node.after[key] = _Node()
                self._nodes += 1
            node = node.after[key]
            found = node.kept.get(asked, found)
        if found is not None:
            self._order.move_to_end(id(found))
        return found, known

    def keep(self, path: Sequence[Key], asked: Asked, entry: Entry, wanted: bool = True) -> None:
        """Keep an entry; the least recently used go until all that is kept fits the budget.

        Args:
            path: what was run.
            asked: for which plan.
            entry: what is kept.
            wanted: whether stacks are known to branch off there; what is not wanted is the first to go.
        """
        node = self._root
        for key in path[: entry.depth]:
            node = node.after.setdefault(key, _Node())
        if asked in node.kept:
            self._drop(id(node.kept[asked]))
        node.kept[asked] = entry
        self._order[id(entry)] = node, asked
        self._order.move_to_end(id(entry), last=wanted)
        for tensor in entry.tensors():
            where = _where(tensor)
            self._held[where] = self._held.get(where, 0) + 1
            self.bytes += _size(tensor) if self._held[where] == 1 else 0
        self.make_room(0)
        self.most = max(self.most, self.bytes)

    def make_room(self, more: int) -> None:
        """Forget the least recently used until so many bytes more would fit the budget, or nothing is left."""
        while self._order and not self.fits(more):
            self._drop(next(iter(self._order)))

    def fits(self, more: int) -> bool:
        """Tell whether so many bytes more fit the budget beside what is kept."""
        return self.bytes + more <= self._budget

    def clear(self) -> None:
        """Forget everything."""
        self._root, self._nodes = _Node(), 1
        self._order.clear()
        self._held.clear()
        self.bytes = 0

    def _drop(self, number: int) -> None:
        node, asked = self._order.pop(number)
        for tensor in node.kept.pop(asked).tensors():
            where = _where(tensor)
            self._held[where] -= 1
            if not self._held[where]:
                del self._held[where]
                self.bytes -= _size(tensor)


def _where(tensor: Tensor) -> int:
    """Return where the memory is that a tensor keeps; keys and values may be views of one projection."""
    return tensor.untyped_storage().data_ptr()


def _size(tensor: Tensor) -> int:
    """Return how much memory a tensor keeps."""
    return tensor.untyped_storage().nbytes()


class _Visit:
    """One plan asked of one stack: where it begins, and what is gathered on the way for others.

    Attributes:
        entry: what is known of its first hops.
        wanted: after how many hops others are known to branch off.
        keeps: after how many hops states are gathered; fewer where they would not fit the budget.
        bytes: the memory of what has been gathered.
    """

    def __init__(self, entry: Entry | None, wanted: Collection[int], keeps: Collection[int], pairs: bool) -> None:
        self.entry = entry
        self.start = 0 if entry is None else entry.depth
        self.wanted, self.keeps = frozenset(wanted), set(keeps)
        self.wants_pairs = pairs
        self.passes = -1
        self.states: dict[int, list[Tensor]] = {depth: [] for depth in keeps}
        self.pairs: list[list[Pair]] = []
        self.bytes = 0

    @property
    def deepest(self) -> int:
        """After how many hops nothing more is gathered."""
        return max(self.keeps, default=0)

    def leave_out(self, depth: int) -> None:
        """Gather nothing more at a depth, and forget what was."""
        self.keeps.discard(depth)
        self.bytes -= sum(_size(state) for state in self.states.pop(depth, ()))


class Course:
    """Follows one live stack: leaves out the hops whose result is kept, and keeps what others will begin with.

    Args:
        prefixes: the trie.
        path: what the hops of the stack do.
        counts: where layer passes are counted.
    """

    def __init__(self, prefixes: Prefixes, path: Sequence[Key], counts: Counts) -> None:
        """Follow a stack that is about to be asked."""
        self._prefixes, self._path, self._counts = prefixes, tuple(path), counts
        #: How many hops it shares with stacks that are still to come: where they branch off.
        self.branches: Collection[int] = ()
        self._visit: _Visit | None = None
        self._cache: Any = None
        self._feeding = False

    @contextmanager
    def asking(self, plan: Plan, tokens: int) -> Iterator[None]:
        """Within the block, the plan is asked; when it is left in peace, what was gathered is kept."""
        if not (self._prefixes.on and self._path):
            yield
            return
        asked = (id(plan), tokens)
        entry, known = self._prefixes.meet(self._path, asked)
        start = 0 if entry is None else entry.depth
        wanted = {*self.branches, *([known] if known < len(self._path) else [])}
        spare = range(start + 1, len(self._path) + 1) if self._prefixes.roomy else ()
        keeps = {depth for depth in (*wanted, *spare) if start < depth <= len(self._path)}
        self._visit = visit = _Visit(entry, wanted, keeps, plan.generates)
        try:
            yield
            for depth in sorted(visit.keeps) if self._visit is visit else ():
                found = Entry(
                    plan=plan,
                    depth=depth,
                    states=tuple(visit.states[depth]),
                    pairs=tuple(tuple(own[:depth]) for own in visit.pairs) if visit.wants_pairs else (),
                )
                visit.leave_out(depth)
                self._prefixes.keep(self._path, asked, found, depth in wanted)
        finally:
            self._visit = None

    @contextmanager
    def feeding(self, cache: Any) -> Iterator[None]:
        """Within the block, a forward pass reads texts from their beginning (or goes on from what this visit read).

        Args:
            cache: what takes up keys and values, if anything does.
        """
        visit = self._visit
        if visit is None:
            yield
            return
        visit.passes += 1
        self._feeding, self._cache = True, cache
        try:
            yield
            if visit.wants_pairs and visit.keeps:
                before = visit.entry.pairs[visit.passes] if visit.entry is not None else ()
                visit.pairs.append(list(before))
                if cache is not None:
                    own = [cache.layers[hop].own() for hop in range(visit.start, visit.deepest)]
                    visit.pairs[-1].extend(own)
                    memory = {_where(tensor): _size(tensor) for pair in own for tensor in pair}
                    visit.bytes += sum(memory.values())
                    self._spare()
        finally:
            self._feeding, self._cache = False, None

    def abandon(self) -> None:
        """Run everything from the start from now on; what was kept is forgotten, as there is too little memory."""
        self._prefixes.clear()
        if self._visit is not None:
            self._visit = _Visit(None, (), (), False)

    # What the hops call.

    def skips(self, hop: int, hidden: Tensor) -> Tensor | None:
        """Return what a hop need not be run for, or None if it must be."""
        visit, tokens = self._visit, hidden.shape[0] * hidden.shape[1]
        if visit is None or visit.entry is None or not self._feeding or hop >= visit.start:
            self._counts.run += 1
            self._counts.run_tokens += tokens
            return None
        self._counts.spared += 1
        self._counts.spared_tokens += tokens
        if self._cache is not None:
            own = visit.entry.pairs[visit.passes] if visit.entry.pairs else ()
            if own:
                self._cache.update(*own[hop], hop)
            else:
                self._cache.stand_in(hop, hidden.shape[1])
        return visit.entry.states[visit.passes] if hop == visit.start - 1 else hidden

    def leaves(self, hop: int, hidden: Tensor) -> None:
        """Note what a hop returned, where a stack to come branches off."""
        visit = self._visit
        if visit is not None and self._feeding and hop + 1 in visit.keeps:
            visit.states[hop + 1].append(hidden)
            visit.bytes += _size(hidden)
            self._spare()

    def _spare(self) -> None:
        """Keep what is gathered within the budget: first at the cost of what nobody is known to want, deepest first."""
        visit = self._visit
        if visit is None or self._prefixes.fits(visit.bytes):
            return
        for depth in sorted(visit.keeps - visit.wanted, reverse=True):
            visit.leave_out(depth)
            if self._prefixes.fits(visit.bytes):
                return
        self._prefixes.make_room(visit.bytes)
        for depth in sorted(visit.keeps, reverse=True):
            if self._prefixes.fits(visit.bytes):
                return
            visit.leave_out(depth)
        if not self._prefixes.fits(visit.bytes):
            visit.pairs, visit.wants_pairs, visit.bytes = [], False, 0
