"""Bookkeeping of the rows of a batch, on the host: counts of tokens, slots of blocks, ranges of pads.

All functions are pure: an edit of a cache makes other rows and then takes them in place of the old ones.

A slot of a row is a place in its text, of a token or a pad; a slot of the pool is where a block is stored.
"""

from itertools import accumulate, groupby
from operator import attrgetter
from typing import NamedTuple

import torch

from modules.cache.scheme import CacheScheme

#: Half-open ranges of the slots of a row that hold no token, in rising order.
Pads = tuple[tuple[int, int], ...]


class Step(NamedTuple):
    """What new tokens change in a row.

    Attributes:
        to_sinks: New tokens that become sinks; the others go behind the window.
        blocks: Blocks that leave the window.
        window: Tokens that are left in it.
        packed: The newest of these blocks, which are kept.
        unseen: Of the row's blocks, these among them, so many at the front that no query will see any more.
    """

    to_sinks: int
    blocks: int
    window: int
    packed: int
    unseen: int = 0


class Row(NamedTuple):
    """One row of the batch.

    Attributes:
        sinks, window: Tokens in full precision at the start and at the end.
        blocks: Slots of its packed blocks in the pool.
        counts: Valid tokens of each block: all of them, unless a crop has cut it.
        pads: Ranges of the row's slots that held no token.
        dropped: Tokens between the sinks and the first block, which a sliding window has left behind.
    """

    sinks: int = 0
    window: int = 0
    blocks: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    pads: Pads = ()
    dropped: int = 0

    @property
    def packed(self) -> int:
        """Tokens in packed blocks."""
        return sum(self.counts)

    @property
    def tokens(self) -> int:
        """Tokens that the row stands for, the dropped ones included."""
        return self.window_start + self.window

    @property
    def slots(self) -> int:
        """Tokens and pads."""
        return self.tokens + count_pads(self.pads)

    @property
    def starts(self) -> list[int]:
        """Position of the first token of each block."""
        return list(accumulate(self.counts, initial=self.sinks + self.dropped))[:-1]

    @property
    def window_start(self) -> int:
        """Position of the first token of the window."""
        return self.sinks + self.dropped + self.packed

    def step(self, new_tokens: int, scheme: CacheScheme, sliding_window: int | None = None) -> Step:
        """Where `new_tokens` go, what they push out of the window, and which blocks a sliding window then drops."""
        # Sinks are a row's first tokens: once others stand behind them there are no more.
        behind = self.window or self.blocks or self.dropped
        to_sinks = 0 if behind else min(scheme.sink_length - self.sinks, new_tokens)
        window = self.window + new_tokens - to_sinks
        blocks = scheme.flushed_blocks(window)
        step = Step(to_sinks, blocks, window - blocks * scheme.block_length, blocks)
        if sliding_window is None or not blocks:
            return step
        counts = self.counts + (scheme.block_length,) * blocks
        unseen = unseen_blocks(counts, sliding_window)
        return step._replace(packed=min(blocks, len(counts) - unseen), unseen=unseen)

    def after(self, step: Step, slots: tuple[int, ...], block_length: int, pads: Pads) -> "Row":
        """The row after a `step` whose blocks, but for the unseen ones, stand in `slots`; `pads`: of the new tokens."""
        counts = self.counts + (block_length,) * step.blocks
        return Row(
            self.sinks + step.to_sinks,
            step.window,
            self.blocks[step.unseen :] + slots,
            counts[step.unseen :],
            self.pads + pads,
            self.dropped + sum(counts[: step.unseen]),
        )

    def cropped(self, slots: int) -> "Row":
        """The first `slots` slots of the row."""
        # Slots count pads, tokens do not.
        pads = crop_pads(self.pads, slots)
        return self.shortened(slots - count_pads(pads), pads)

    def shortened(self, tokens: int, pads: Pads) -> "Row":
        """The first `tokens` tokens of the row, with other pads."""
        sinks = min(tokens, self.sinks)
        dropped = min(tokens - sinks, self.dropped)
        left, counts = tokens - sinks - dropped, []
        for count in self.counts:
            if left == 0:
                break
            # A cut inside a block lowers its count; the packed bytes stay.
            counts.append(min(count, left))
            left -= counts[-1]
        return Row(sinks, left, self.blocks[: len(counts)], tuple(counts), pads, dropped)

    def sees_dropped(self, sliding_window: int | None) -> bool:
        """Whether the next token would see one that was dropped, as only a crop can bring about."""
        # A row cut within its sinks has lost all tokens behind them.
        seen = self.tokens + 1 - (sliding_window or self.tokens + 1)
        return self.dropped > 0 and seen < self.sinks + self.dropped

    def moved(self, slots: dict[int, int]) -> "Row":
        """The row whose block in slot i stands in `slots[i]`."""
        return self._replace(blocks=tuple(map(slots.__getitem__, self.blocks)))


def unseen_blocks(counts: tuple[int, ...], sliding_window: int) -> int:
    """Of blocks of so many tokens, how many at the front no query behind the last of them sees.

    Those that a crop of the tokens behind the blocks would bring back are kept: the first such token counts as a query.
    """
    # That query sees the `sliding_window - 1` tokens before it.
    seen, unseen = 0, len(counts)
    while unseen and seen < sliding_window - 1:
        unseen -= 1
        seen += counts[unseen]
    return unseen


def check_seen(rows: list[Row], scheme: CacheScheme, sliding_window: int | None) -> None:
    """Raise a `ValueError` for rows cut so short that their next tokens would see dropped ones."""
    for row in rows:
        if row.sees_dropped(sliding_window):
            raise ValueError(
                f"tokens_to_remove: must leave what the next token sees; that of a row cut to {row.tokens} tokens sees "
                f"{sliding_window} positions (sliding_window), but those from {row.sinks} to "
                f"{row.sinks + row.dropped - 1} were dropped. Up to residual_length={scheme.residual_length} tokens "
                "of a row can always be removed"
            )


def sink_slots(rows: list[Row], scheme: CacheScheme, real: torch.Tensor | None, new_slots: int) -> int:
    """Of the new slots of rows, so many at the front hold all new tokens that become sinks.

    Args:
        rows: Before the new tokens; none if they are the first.
        scheme: Of the cache.
        real: `[B, L]` bool on the CPU, false for pads; `None`: no pads.
        new_slots: L.
    """
    # The common step: all sinks are there.
    if rows and min(column(rows, "sinks")) == scheme.sink_length:
        return 0
    if real is None:
        real = torch.ones((max(1, len(rows)), new_slots), dtype=torch.bool, device="cpu")
    needed = 0
    for row, is_real in zip(rows or [Row()] * len(real), real, strict=True):
        to_sinks = row.step(int(is_real.sum()), scheme).to_sinks
        if to_sinks:
            # As far as the last token that becomes one.
            needed = max(needed, int((is_real.cumsum(0) < to_sinks).sum()) + 1)
    return needed


def column(rows: list[Row], name: str) -> tuple:
    """An attribute of all rows."""
    return tuple(map(attrgetter(name), rows))


def pad_ranges(real: list[bool], offset: int = 0) -> Pads:
    """Ranges of consecutive pads, false in `real`, shifted by `offset`."""
    ranges, start = [], offset
    for is_real, run in groupby(real):
        stop = start + len(list(run))
        if not is_real:
            ranges.append((start, stop))
        start = stop
    return tuple(ranges)


def count_pads(pads: Pads) -> int:
    count = 0
    for start, stop in pads:
        count += stop - start
    return count


def crop_pads(pads: Pads, slots: int) -> Pads:
    """The pads among the first `slots` slots."""
    return tuple((start, min(stop, slots)) for start, stop in pads if start < slots)


def block_table(rows: list[Row], device: torch.device) -> torch.Tensor:
    """`[3, B, blocks]` int32: slot in the pool, first position, valid tokens; rows with fewer blocks end in zeros."""
    widest = max(map(len, column(rows, "blocks")), default=0)
    # Made on the host and sent in one copy.
    table = torch.zeros((3, len(rows), widest), dtype=torch.int32, device="cpu")
    for i, row in enumerate(rows):
        columns = (row.blocks, row.starts, row.counts)
        table[:, i, : len(row.blocks)] = torch.tensor(columns, dtype=torch.int32, device="cpu")
    return table.to(device)


def repeated_rows(batch: int, repeats: int) -> list[int]:
    """Indices of `repeats` copies of each of `batch` rows side by side."""
    return torch.arange(batch, dtype=torch.int64, device="cpu").repeat_interleave(repeats).tolist()


def chosen_rows(batch: int, indices: torch.Tensor) -> list[int]:
    """Indices of those of `batch` rows that a tensor of indices or a mask `[B]` names."""
    return torch.arange(batch, dtype=torch.int64, device="cpu")[indices.cpu()].tolist()
