"""Key-value caches that share what several texts begin with, without copying it for each and without changing it.

Legend of shapes: B rows, H heads, T tokens, D entries of a head.
"""

from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Branch(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer for tokens that go on from rows of another; fed once.

    What came before is put in front of them only while this layer computes. The layer they go on from stays as it is.

    Args:
        before: the layer that holds what came before, if anything did.
        rows_B: the row of it that each row goes on from; None: all from its only one.
    """

    is_sliding = False

    def __init__(self, before: "Branch | None" = None, rows_B: Tensor | None = None) -> None:
        """Hold nothing yet."""
        super().__init__()
        self._before, self._rows_B = before, rows_B
        self._stood_in = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the first keys and values."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of the new tokens; return those of all. Shapes (B, H, T, D)."""
        if self.is_initialized:
            raise RuntimeError("a branch is fed once; go on from it with another")
        self.lazy_initialization(key_states, value_states)
        return self.whole()

    def own(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of its own tokens."""
        return self.keys, self.values

    def stand_in(self, tokens: int) -> None:
        """Count tokens whose keys and values nobody will ask for."""
        self._stood_in = tokens

    def whole(self, rows_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values from the beginning on, of all rows or of some."""
        keys, values = (own if rows_B is None else own[rows_B] for own in (self.keys, self.values))
        if self._before is None:
            return keys, values
        rows = self._rows_B if rows_B is None or self._rows_B is None else self._rows_B[rows_B]
        old = self._before.whole(rows)
        # of one row that all go on from, a view is enough
        return tuple(  # type: ignore[return-value]  # two of them
            torch.cat((one.expand(len(new), *one.shape[1:]), new), dim=-2)
            for one, new in zip(old, (keys, values), strict=True)
        )

    def get_seq_length(self) -> int:
        """Return the number of tokens before the next one, padding included."""
        before = 0 if self._before is None else self._before.get_seq_length()
        return before + (self.keys.shape[-2] if self.is_initialized else self._stood_in)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys new tokens see, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1


class Room(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer with room for all tokens to come, so that a step writes only its own.

    Args:
        length: the most tokens, padding included.
        before: the layer that holds what all rows begin with, in its only row.
    """

    is_sliding = False

    def __init__(self, length: int, before: Branch | None = None) -> None:
        """Allocate nothing yet."""
        super().__init__()
        self._length, self._before = length, before
        self._used = 0 if before is None else before.get_seq_length()
        self._first = self._used

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, and put what all rows begin with at its start."""
        self.keys, self.values = (
            new.new_empty((*new.shape[:-2], self._length, new.shape[-1])) for new in (key_states, value_states)
        )
        if self._before is not None:
            keys, values = self._before.whole()
            self.keys[..., : self._used, :] = keys
            self.values[..., : self._used, :] = values
            self._before = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the new tokens; return a view of those of all. Shapes (B, H, T, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._used = self._used, self._used + key_states.shape[-2]
        self._first = start
        self.keys[..., start : self._used, :] = key_states
        self.values[..., start : self._used, :] = value_states
        return self.keys[..., : self._used, :], self.values[..., : self._used, :]

    def own(self) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of the tokens that were written last."""
        keys, values = self.keys[..., self._first : self._used, :], self.values[..., self._first : self._used, :]
        return keys.clone(), values.clone()

    def keep(self, rows_B: Tensor) -> None:
        """Drop all rows but these."""
        self.keys, self.values = self.keys[rows_B], self.values[rows_B]

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, padding included."""
        return self._used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys new tokens see, and the first of them."""
        return self._used + query_length, 0

    def get_max_length(self) -> int:
        """Return how many tokens there is room for."""
        return self._length


class Trunk(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache of branches: what a model read in one forward pass, for others to go on from."""

    @classmethod
    def root(cls) -> Self:
        """Return a cache that begins with nothing."""
        return cls(layer_class_to_replicate=Branch)

    def branch(self, rows_B: Tensor | None = None) -> "Trunk":
        """Return a cache whose rows go on from rows of this one, or all from its only one."""
        return type(self)(layers=[Branch(layer, rows_B) for layer in self.layers])

    def stand_in(self, layer: int, tokens: int) -> None:
        """Count tokens in a layer that is left out."""
        while len(self.layers) <= layer:
            self.layers.append(Branch())
        self.layers[layer].stand_in(tokens)

    def room(self, length: int) -> "Rooms":
        """Return a cache for generation, all of whose rows go on from this one's only row."""
        return Rooms(layers=[Room(length, layer) for layer in self.layers])


class Rooms(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache with room for all tokens to come."""

    holds = True

    @classmethod
    def root(cls, length: int) -> Self:
        """Return a cache that begins with nothing."""
        return cls(layer_class_to_replicate=lambda: Room(length))

    def keep(self, rows_B: Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            layer.keep(rows_B)
