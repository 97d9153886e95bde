"""A key-value cache for transformers models that is written in place and from which rows can be dropped cheaply."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class InPlaceLayer(DynamicLayer):
    """Keys and values of one layer in buffers [rows, kv_heads, capacity, head_dim] that are written in place.

    DynamicLayer concatenates, which copies the whole cache at every step; here a step writes one column, and the buffers
    double (up to max_length) when full. Sliding-window models keep all columns too: their mask hides the old ones.
    """

    def __init__(self, max_length: int, first_capacity: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.capacity = min(first_capacity, max_length)
        self.length = 0
        self.buffers: list[Tensor] = []  # keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends states [rows, kv_heads, new, head_dim]; returns the keys and values of all columns so far, as views."""
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [self._allocate(states, states.shape[0]) for states in (key_states, value_states)]
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = min(max(2 * self.capacity, end), self.max_length)
            self.buffers = [self._moved(buffer, buffer.shape[0], slice(None)) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        return self._publish()

    def repeat_rows(self, index: Tensor) -> None:
        """Row i becomes a copy of the old row index[i]."""
        self.buffers = [self._moved(buffer, len(index), index) for buffer in self.buffers]
        self._publish()

    def compact(self, targets: list[int], sources: list[int], rows: int) -> None:
        """Copies the source rows over the target rows, then keeps the first `rows` rows."""
        for buffer in self.buffers:
            for target, source in zip(targets, sources, strict=True):
                buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.buffers = [buffer[:rows] for buffer in self.buffers]
        self._publish()

    def _allocate(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.capacity, like.shape[3])

    def _moved(self, buffer: Tensor, rows: int, index: Tensor | slice) -> Tensor:
        moved = self._allocate(buffer, rows)
        moved[:, :, : self.length] = buffer[index, :, : self.length]
        return moved

    def _publish(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values


class InPlaceCache(Cache):
    """An InPlaceLayer for each layer of the model."""

    def __init__(self, layers: int, max_length: int, first_capacity: int) -> None:
        self.in_place = [InPlaceLayer(max_length, first_capacity) for _ in range(layers)]
        super().__init__(layers=list(self.in_place))

    def repeat_rows(self, index: Tensor) -> None:
        """Row i becomes a copy of the old row index[i]."""
        for layer in self.in_place:
            layer.repeat_rows(index)

    def compact(self, keep: list[int]) -> list[int]:
        """Drops the rows not in `keep` (ascending) by moving the last rows into their places, so that little is copied.

        Returns the old row of each new row.
        """
        rows = len(keep)
        kept = set(keep)
        targets = [row for row in range(rows) if row not in kept]
        sources = [row for row in keep if row >= rows]
        for layer in self.in_place:
            layer.compact(targets, sources, rows)
        moved = dict(zip(targets, sources, strict=True))
        return [moved.get(row, row) for row in range(rows)]
