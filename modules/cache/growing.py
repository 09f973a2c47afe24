"""The layer of a cache that grows with its tokens; rows are counted on the host.

Beam search, crops and shared prefixes edit the rows' block tables and copy no packed byte.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from operator import add
from typing import NamedTuple

import torch

from modules.cache.codecs import Fields
from modules.cache.exact import ExactTokens
from modules.cache.layer import LatentLayer, dense_channels, in_any_mode, warn_of_small_states
from modules.cache.pool import BlockPool
from modules.cache.rows import Row, block_table, check_seen, column, pad_ranges, sink_slots
from modules.cache.scheme import LayerScales, LayerWidths, SinkChannels
from modules.kernels.packed import LatentQuery, NewTokens, PackedCache, Tile


class _Table(NamedTuple):
    """The block table of a layer, with what else stays the same while tokens are only added to the windows.

    Attributes:
        entries: As `PackedCache.table`.
        full: As `PackedCache.full`.
        sinks: Tokens in the sinks of each row.
        window_starts: Position of the first token of each window.
    """

    entries: torch.Tensor
    full: bool
    sinks: tuple[int, ...]
    window_starts: tuple[int, ...]


@dataclass(eq=False)
class _Savepoint:
    """The state before appends; they replace these objects, or write only behind the tokens counted here.

    It owns the blocks of its rows, as some may be dropped that a rollback brings back.
    """

    slots: int
    rows: list[Row]
    exact: ExactTokens

    @classmethod
    def of(cls, layer: "KIVILatentLayer") -> "_Savepoint":
        with layer.pool.lock:
            savepoint = cls(layer.slots, layer.rows, layer.exact)
            layer.pool.owners.add(savepoint)
        return savepoint

    def block_slots(self) -> Iterator[int]:
        return chain.from_iterable(column(self.rows, "blocks"))

    def move_blocks(self, moved: dict[int, int]) -> None:
        self.rows = [row.moved(moved) for row in self.rows]


@dataclass
class SavedLayer:
    """The tokens of a layer as a file (`file.py`) holds them.

    Attributes:
        static_scales: Calibrated scales by side.
        slots: Tokens and pads fed.
        widths: Channels of each head group of keys and values; `None`: nothing was fed, and the others are empty.
        rows: Bookkeeping, with the places of blocks in `blocks` for their slots.
        exact: Sinks and windows.
        blocks: Fields of the packed blocks by side.
        sink_channels, sliding_window: As `KIVILatentLayer` has them.
    """

    static_scales: LayerScales
    slots: int = 0
    widths: LayerWidths | None = None
    rows: list[Row] = field(default_factory=list)
    exact: ExactTokens | None = None
    blocks: dict[str, Fields] = field(default_factory=dict)
    sink_channels: SinkChannels | None = None
    sliding_window: int | None = None


def add_received(
    rows: list[Row], scores: torch.Tensor, received: torch.Tensor, real: torch.Tensor | None, counts: list[int]
) -> torch.Tensor:
    """Add the attention that tokens have received to the scores of the windows.

    Args:
        rows: Before the new tokens.
        scores: `[B, N]` of the windows, which are changed.
        received: `[B, P]` by position.
        real: `[B, L]` bool, false for pads; `None`: no pads.
        counts: New tokens of each row.

    Returns:
        `[B, L]`, what the new tokens have received.
    """
    new = received.new_zeros((len(rows), max(counts, default=0) if real is None else real.shape[1]))
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        window, stop = row.window_start, row.tokens
        scores[i, : row.window] += received[i, window:stop]
        tokens = slice(None) if real is None else real[i].to(new.device)
        new[i, tokens] = received[i, stop : stop + count]
    return new


def _choose(
    states: dict[str, torch.Tensor], index: int, real: torch.Tensor | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """The tokens of a row; states may be of the first slots only."""
    chosen = {}
    for name, x in states.items():
        chosen[name] = x[index]
        if real is not None:
            chosen[name] = x[index][real[index, : x.shape[1]].to(device)]
    return chosen


def score_tokens(
    layer: "KIVILatentLayer", states: dict[str, torch.Tensor], real: torch.Tensor | None, received: torch.Tensor | None
) -> torch.Tensor:
    """Score `[B, L]` of new tokens of a layer; attention that the window has received is added to its scores."""
    keys, values = states["keys"], states["values"]
    if layer.score != "attention":
        score = layer.score(keys, values)
        if tuple(score.shape) != tuple(keys.shape[:2]):
            raise ValueError(f"token_score: returned {list(score.shape)}, must be {list(keys.shape[:2])}")
        return score.detach().float()
    if received is None:
        raise ValueError("token_score='attention': only ALRDLlamaForCausalLM tells the cache; give a function")
    counts = [keys.shape[1]] * len(keys) if real is None else real.sum(1).tolist()
    longest = max(map(add, layer.row_lengths(), counts))
    if received.dim() != 2 or len(received) != len(keys) or received.shape[1] < longest:
        raise ValueError(f"received: {list(received.shape)} must be [{len(keys)}, positions up to {longest}]")

    # A copy, since a savepoint may hold the tensor that is there.
    scores = layer.exact.window["score"].clone()
    layer.exact = ExactTokens(layer.exact.sinks, layer.exact.window | {"score": scores})
    return add_received(layer.rows, scores, received.detach().float(), real, counts)


class KIVILatentLayer(LatentLayer):
    """A `LatentLayer` whose pool of blocks grows, which forks share, and which a failed append leaves as it was."""

    def clear(self) -> None:
        # The pool may live on in forks; its blocks are free once no owner refers to them.
        if self.pool is not None:
            self.pool.owners.discard(self)
        self.is_initialized = False
        self.slots = 0
        self.rows: list[Row] = []
        self.pool, self.exact, self.sink_channels = None, ExactTokens({}, {}), None
        self._table: _Table | None = None
        self._has_dropped = False

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        # A copied pool has no owners: each copied layer says so itself.
        if self.pool is not None:
            self.pool.owners.add(self)

    @in_any_mode
    def start(
        self, batch: int, widths: LayerWidths, like: torch.Tensor, sink_channels: SinkChannels | None = None
    ) -> None:
        self.pool = BlockPool(self._settle(widths, like), self.device)
        self.pool.owners.add(self)
        self.rows = [Row()] * batch
        # A token more than the longest window, so that a step can write before blocks leave.
        lengths = (self.scheme.sink_length, self.scheme.longest_window + 1)
        self.sink_channels = sink_channels
        self.exact = ExactTokens.zeros(batch, lengths, self.channels, self.dtype, self.device, sink_channels)
        # Scores of the window's tokens wait there until the tokens' block is packed.
        if self.score is not None:
            scores = torch.zeros((batch, lengths[1]), dtype=torch.float32, device=self.device)
            self.exact.window["score"] = scores
        self.is_initialized = True

    def attend_and_append(
        self, query: LatentQuery, new: NewTokens, expand_values: Callable | None = None
    ) -> torch.Tensor:
        self.check_states(new.keys, new.values)  # before a kernel takes them at their word
        summed = self.backend.attend_values(query, self.packed(new.tile()), expand_values).summed
        self._store({"keys": new.keys.detach(), "values": new.values.detach()}, new.real)
        return summed

    @in_any_mode
    def _append(self, keys, values, real, widths: LayerWidths, received=None, dense=None) -> None:
        # A cache keeps no graph: gradients do not flow through packed codes, nor through the window.
        savepoint, states = self.savepoint(), {"keys": keys.detach()}
        if values is not None:
            states["values"] = values.detach()
        try:
            if not self.is_initialized:
                self.start(len(keys), widths, keys, dense_channels(dense))
            self.check_states(keys, values, real, dense)
            if savepoint is None:
                warn_of_small_states(self.scheme, states)
            if self.score is not None:
                states["score"] = score_tokens(self, states, real, received)
            self._store(states, real, dense)
        except BaseException:
            self.rollback(savepoint)
            raise

    @in_any_mode
    def _store(self, states: dict[str, torch.Tensor], real: torch.Tensor | None, dense=None) -> None:
        """Append states that have been checked; after an error the cache is as it was before."""
        if real is None and states["keys"].shape[1] == 1 and self._has_room_for_one():
            self._append_one(states)
        else:
            self._append_many(states, states if dense is None else dense, real)
        self.slots += states["keys"].shape[1]

    def _has_room_for_one(self) -> bool:
        sinks, longest = self.scheme.sink_length, self.scheme.longest_window
        return all(row.sinks == sinks and row.window < longest for row in self.rows)

    def _append_one(self, states: dict[str, torch.Tensor]) -> None:
        """The common decode step: one token per row into the window, nothing to pack."""
        self.exact.push_one(column(self.rows, "window"), states)
        self.rows = [row._replace(window=row.window + 1) for row in self.rows]

    def _append_many(self, states: dict[str, torch.Tensor], first: dict, real: torch.Tensor | None) -> None:
        """Append any number of tokens, pads among them, and pack the blocks that are due; `first` has the sinks."""
        # Everything that can fail comes first, on copies, so that a refused append leaves the cache as it was.
        exact, steps, encoded = self.exact.clone(), [], []
        for index, row in enumerate(self.rows):
            new = _choose(states, index, real, self.device)
            step = row.step(len(new["keys"]), self.scheme, self.sliding_window)
            due = exact.push(index, row, step, new, _choose(first, index, real, self.device))
            steps.append(step)
            if step.packed:
                # Blocks that no query will see are not packed at all.
                due = {name: x[-step.packed :] for name, x in due.items()}
                encoded.append(self.pool.encode(due, due.get("score")))

        # Slots are this layer's from the moment that its rows name them; until then the lock keeps others away.
        with self.pool.lock:
            written, rows = iter(self.pool.write(*encoded)), []
            for index, (row, step) in enumerate(zip(self.rows, steps, strict=True)):
                slots = next(written) if step.packed else ()
                pads = () if real is None else pad_ranges(real[index].tolist(), self.slots)
                rows.append(row.after(step, slots, self.scheme.block_length, pads))
            self.rows, self.exact, self._table = rows, exact, None
        self._has_dropped |= any(column(steps, "unseen"))

    def savepoint(self) -> _Savepoint | None:
        return _Savepoint.of(self) if self.is_initialized else None

    @in_any_mode
    def rollback(self, savepoint: _Savepoint | None) -> bool:
        # The layer held nothing.
        if savepoint is None:
            self.clear()
            return True
        with self.pool.lock:
            self._edit(savepoint.rows, savepoint.exact, savepoint.slots)
        return True

    @in_any_mode
    def give_back(self) -> None:
        if self._has_dropped:
            self._has_dropped = False
            with self.pool.lock, suppress(RuntimeError, MemoryError):
                self.pool.trim()

    def row_lengths(self) -> list[int]:
        return list(column(self.rows, "tokens"))

    def block_table(self) -> torch.Tensor:
        if self._table is None:
            self._table = self._make_table()
        return self._table.entries

    @in_any_mode
    def _make_table(self) -> _Table:
        # Attention skips the counts of a table in which every row has as many blocks, all of them whole.
        rows = self.rows
        entries = block_table(rows, self.device)
        whole = (self.scheme.block_length,) * entries.shape[2]
        full = set(column(rows, "counts")) == {whole}
        return _Table(entries, full, column(rows, "sinks"), column(rows, "window_start"))

    def packed(self, *new: Tile) -> PackedCache:
        if not self.is_initialized:
            return PackedCache(after=new)
        with self.pool.lock:  # all of the same state of the pool
            entries, sides, table = self.block_table(), self.pool.sides(), self._table
        # Those of a block are no latents: each of its layers has its own.
        sinks = ()
        if self.sink_channels is None:
            sinks = self.exact.tiles("sinks", (0,) * len(table.sinks), table.sinks)
        window = self.exact.tiles("window", table.window_starts, column(self.rows, "window"))
        # Before the first block a kernel has nothing to unpack.
        if not entries.shape[2]:
            return PackedCache(sinks, window + new)
        # One latent of keys and values is read as both.
        keys, values = sides[0], sides[-1]
        return PackedCache(sinks, window + new, keys, values, self.scheme.block_length, entries, table.full)

    def sinks(self) -> tuple[Tile, ...]:
        counts = column(self.rows, "sinks")
        return self.exact.tiles("sinks", (0,) * len(counts), counts)

    def sink_slots(self, real: torch.Tensor | None, new_slots: int) -> int:
        return sink_slots(self.rows, self.scheme, real, new_slots)

    @in_any_mode
    def _edit(self, rows: list[Row], exact: ExactTokens, slots: int) -> None:
        """Take other rows, of blocks that this layer refers to, and give back room."""
        self.rows, self.exact, self.slots, self._table = rows, exact, slots, None
        with suppress(RuntimeError, MemoryError):
            self.pool.trim()  # takes room to give room back; if there is none, the next edit does it

    @in_any_mode
    def selection(self, indices: list[int] | torch.Tensor) -> Callable[[], None]:
        if not self.is_initialized:
            return lambda: None
        if isinstance(indices, torch.Tensor):
            indices = indices.tolist()
        # Sinks and windows are copied now, since that takes memory; tables are edited when the edit is called.
        index = torch.tensor(indices, dtype=torch.long, device=self.device)
        exact = self.exact.map(lambda tensor: tensor.index_select(0, index))

        def edit() -> None:
            with self.pool.lock:
                self._edit([self.rows[i] for i in indices], exact, self.slots)

        return edit

    def cropping(self, tokens_to_remove: int) -> Callable[[], None]:
        removed = -int(tokens_to_remove)  # assisted decoding of transformers 5.17 gives a tensor
        if not 0 <= removed <= self.slots:
            raise ValueError(f"tokens_to_remove={-removed}: must be 0 or negative, the slots to remove of {self.slots}")
        check_seen([row.cropped(self.slots - removed) for row in self.rows], self.scheme, self.sliding_window)

        def edit() -> None:
            if removed and self.is_initialized:
                slots = self.slots - removed
                with self.pool.lock:
                    self._edit([row.cropped(slots) for row in self.rows], self.exact, slots)

        return edit

    def removal(self, removed: torch.Tensor, kept: torch.Tensor) -> Callable[[], None]:
        def shortened() -> list[Row]:
            rows = zip(self.rows, removed.tolist(), kept.tolist(), strict=True)
            return [row.shortened(row.tokens - count, pad_ranges(real)) for row, count, real in rows]

        def edit() -> None:
            with self.pool.lock:
                self._edit(shortened(), self.exact, self.slots)

        check_seen(shortened(), self.scheme, self.sliding_window)
        return edit

    def block_slots(self) -> Iterator[int]:
        for row in self.rows:
            yield from row.blocks

    def move_blocks(self, moved: dict[int, int]) -> None:
        self.rows = [row.moved(moved) for row in self.rows]
        self._table = None

    @in_any_mode
    def fork(self) -> "KIVILatentLayer":
        """A layer that goes on by itself from here and shares the packed blocks."""
        if not self.is_initialized:
            return copy.copy(self)
        with self.pool.lock:
            forked = copy.copy(self)
        forked.exact = self.exact.clone()
        return forked

    @in_any_mode
    def restore(self, saved: SavedLayer) -> None:
        """Take what a file holds in place of what the layer holds; after an error the layer is empty."""
        self.clear()
        self.static_scales = saved.static_scales
        if saved.widths is None:
            return
        try:
            self.start(len(saved.rows), saved.widths, saved.exact.window["keys"], saved.sink_channels)
            with self.pool.lock:
                (slots,) = self.pool.write(saved.blocks)
                self.rows = [row.moved(dict(enumerate(slots))) for row in saved.rows]
            self.slots, self.exact, self.sliding_window = saved.slots, saved.exact, saved.sliding_window
        except BaseException:
            self.clear()
            raise
