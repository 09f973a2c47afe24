"""The packed cache's definition, told a second time: plain floats per token, numpy arithmetic, none of `modules/`.

A row is three lists of tokens: sinks, packed (already rounded to what a block would give back), window.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch


def round_parameter(x: np.ndarray, dtype: torch.dtype, up: bool) -> np.ndarray:
    """Round float32 to the type of the scales of `dtype` states, towards +inf or -inf; returned as float32."""
    x = np.asarray(x, dtype=np.float32)
    if dtype == torch.bfloat16:
        bits = x.view(np.uint32)
        truncated = bits & np.uint32(0xFFFF0000)
        grows = (truncated != bits) & ((x > 0) if up else (x < 0))
        return (truncated + np.where(grows, np.uint32(0x10000), np.uint32(0))).view(np.float32)
    nearest = x.astype(np.float16)
    if up:
        moved = np.where(nearest.astype(np.float32) < x, np.nextafter(nearest, np.float16(np.inf)), nearest)
    else:
        moved = np.where(nearest.astype(np.float32) > x, np.nextafter(nearest, np.float16(-np.inf)), nearest)
    return moved.astype(np.float32)


def round_trip(groups: np.ndarray, bits: int, dtype: torch.dtype) -> np.ndarray:
    """Groups of elements, `[N, n]` float32, to codes and back."""
    zero_point = round_parameter(groups.min(1, keepdims=True), dtype, up=False)
    scale = round_parameter((groups.max(1, keepdims=True) - zero_point) / np.float32(2**bits - 1), dtype, up=True)
    divisor = np.where(scale == 0, np.float32(np.inf), scale)
    codes = np.floor(np.clip((groups - zero_point) / divisor, 0, 2**bits - 1) + np.float32(0.5))
    return codes * scale + zero_point


def round_trip_block(block: torch.Tensor, bits: float, per_channel: bool, widths, group_size: int) -> torch.Tensor:
    """`[G, C]` states of a block as the cache would give them back, in the same type."""
    if bits == 16:
        return block.clone()
    x = block.float().numpy()
    if per_channel:
        back = round_trip(x.T, int(bits), block.dtype).T
    else:
        ends = np.cumsum(widths)
        cuts = {
            cut for end, width in zip(ends, widths, strict=True) for cut in range(end - width, end, group_size or width)
        }
        edges = [*sorted(cuts), ends[-1]]
        pieces = [round_trip(x[:, a:b], int(bits), block.dtype) for a, b in itertools.pairwise(edges)]
        back = np.concatenate(pieces, axis=1)
    limit = min(torch.finfo(block.dtype).max, torch.finfo(torch.float32).max)
    return torch.from_numpy(np.clip(back, -limit, limit)).to(block.dtype)


@dataclass
class SimulatedRow:
    """Tokens of one row, each a (keys, values) pair, and whether each slot held a token."""

    sinks: list = field(default_factory=list)
    packed: list = field(default_factory=list)
    window: list = field(default_factory=list)
    slots: list = field(default_factory=list)
    #: Positions of the first token of each block.
    starts: list = field(default_factory=list)

    def copy(self) -> "SimulatedRow":
        return SimulatedRow(*(list(part) for part in (self.sinks, self.packed, self.window, self.slots, self.starts)))

    @property
    def tokens(self) -> list:
        return self.sinks + self.packed + self.window


class SimulatedCache:
    """One layer. Arguments as the cache's scheme and widths: `([key groups], [value groups])`."""

    def __init__(self, k_bits, v_bits, group_size, residual_length, sink_length, widths):
        self.bits, self.group_size, self.widths = (k_bits, v_bits), group_size, widths
        self.residual_length, self.sink_length = residual_length, sink_length
        self.block_length = group_size or 128
        self.rows: list[SimulatedRow] = []

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None, sinks: tuple | None = None
    ) -> None:
        """Store `[B, L, C]` states, then round what has become old enough; `sinks`: what becomes sinks instead."""
        if not self.rows:
            self.rows = [SimulatedRow() for _ in keys]
        for i, row in enumerate(self.rows):
            for j in range(keys.shape[1]):
                row.slots.append(real is None or bool(real[i, j]))
                if row.slots[-1]:
                    growing = len(row.sinks) < self.sink_length and not row.packed and not row.window
                    token = (sinks or (keys, values)) if growing else (keys, values)
                    (row.sinks if growing else row.window).append((token[0][i, j], token[1][i, j]))
            while len(row.window) >= self.residual_length + self.block_length:
                block, row.window = row.window[: self.block_length], row.window[self.block_length :]
                row.starts.append(len(row.sinks) + len(row.packed))
                sides = [self.rounded(torch.stack([token[side] for token in block]), side) for side in (0, 1)]
                row.packed.extend(zip(*sides, strict=True))

    def rounded(self, states: torch.Tensor, side: int) -> torch.Tensor:
        """A block `[T, C]` of keys (side 0) or values (1), stored and read."""
        return round_trip_block(states, self.bits[side], side == 0, self.widths[side], self.group_size)

    def crop(self, slots_to_remove: int) -> None:
        """Remove the last `-slots_to_remove` slots of every row."""
        for row in self.rows:
            for _ in range(-slots_to_remove):
                if row.slots.pop():
                    (row.window or row.packed or row.sinks).pop()
            row.starts = [start for start in row.starts if start < len(row.sinks) + len(row.packed)]

    def take_out(self, kept: torch.Tensor) -> None:
        """Make pads of the last tokens of rows, those that `kept` `[B, slots]` does not mark."""
        for row, marks in zip(self.rows, kept.tolist(), strict=True):
            for i, mark in enumerate(marks):
                if row.slots[i] and not mark:
                    (row.window or row.packed or row.sinks).pop()
                row.slots[i] = mark
            row.starts = [start for start in row.starts if start < len(row.sinks) + len(row.packed)]

    def select(self, indices: list[int]) -> None:
        """Make row i a copy of row `indices[i]`."""
        self.rows = [self.rows[i].copy() for i in indices]

    def row_states(self, i: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, C]` keys and values of the tokens of a row from the `first` on, of which there are some."""
        return tuple(torch.stack([token[side] for token in self.rows[i].tokens[first:]]) for side in (0, 1))

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, T, C]` keys and values; the rows hold the same number of tokens."""
        rows = [self.row_states(i) for i in range(len(self.rows))]
        return tuple(torch.stack([row[side] for row in rows]) for side in (0, 1))
