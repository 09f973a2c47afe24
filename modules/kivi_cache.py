r"""A packed KV cache: full-precision sinks, immutable quantized blocks, a full-precision window.

A row of a layer holds, in the order of its tokens: the first `sink_length` ones as they are; blocks of G tokens in a
pool (`modules/block_pool.py`), reached through the row's block table; and a window of between `residual_length` and
`residual_length + G - 1` of the newest tokens. A block is written once, as soon as `residual_length` newer tokens
exist; beam search, crops and shared prefixes edit the table and copy no packed byte.

The states of a token are a flat vector of channels. Latents `[B, 1, T, r]` are stored as they are; the `[B, H, T, D]`
states of any other model lose their heads to the channels, and each head keeps scales of its own.
"""

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme, check_choice, check_count, side_scheme
from modules.block_pool import BlockPool
from modules.cache_file import read_cache_file, write_cache_file
from modules.codecs import StaticScales, block_length, block_nbytes, check_codec, make_codec
from modules.fingerprint import differences, model_fingerprint
from modules.fixed_cache import SIDES, FixedStore, Room, check_fixed
from modules.kernels import BACKENDS, FUSED_DTYPES, Backend, get_backend
from modules.kernels.packed import PackedCache, Tile
from modules.quant_utils import KIVIQuantizer
from modules.vidkv import parse_quantization_config

#: Channels of each head group of the keys and of the values of one layer.
LayerWidths = tuple[tuple[int, ...], tuple[int, ...]]


#: Calibrated scales of a layer by side, "keys" and "values".
LayerScales = dict[str, StaticScales]

#: Worth of new tokens `[B, L]`, from the layer's index and their `[B, L, C]` keys and values.
TokenScore = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class CacheScheme:
    """What a cache stores and how; the fields are those of `ALRDLlamaConfig`.

    `keys` and `values` are the `QuantScheme` of each side, `block_length` the tokens per block, G.
    """

    k_bits: float = 2
    v_bits: float = 2
    group_size: int = 128
    residual_length: int = 32
    sink_length: int = 4
    k_scheme: dict = field(default_factory=dict)
    v_scheme: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("k_scheme", "v_scheme"):
            fields_of_side = getattr(self, name)
            copied = dict(fields_of_side) if isinstance(fields_of_side, dict) else fields_of_side or {}
            object.__setattr__(self, name, copied)
        for name in ("residual_length", "sink_length"):
            check_count(name, getattr(self, name))
        for side in (self.keys, self.values):
            check_codec(side, self.block_length)

    @classmethod
    def from_config(cls, config: ALRDLlamaConfig) -> "CacheScheme":
        """The settings of a model's configuration."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @classmethod
    def of(cls, keys: QuantScheme, values: QuantScheme, **window) -> "CacheScheme":
        """The scheme of two sides; `window`: `residual_length` and `sink_length`."""
        sides = [asdict(side) for side in (keys, values)]
        k_bits, v_bits = (side.pop("bits") for side in sides)
        return cls(k_bits, v_bits, keys.group_size, **window, k_scheme=sides[0], v_scheme=sides[1])

    @cached_property
    def keys(self) -> QuantScheme:
        return side_scheme("k", self.k_bits, self.group_size, self.k_scheme)

    @cached_property
    def values(self) -> QuantScheme:
        return side_scheme("v", self.v_bits, self.group_size, self.v_scheme)

    @cached_property
    def block_length(self) -> int:
        return block_length(self.keys, self.values)

    def codecs(
        self,
        widths: LayerWidths,
        dtype: torch.dtype,
        backend: Backend | None = None,
        static_scales: LayerScales | None = None,
    ) -> dict:
        """Quantizer of each side, `{"keys": …, "values": …}`; the arguments are those of `make_codec`."""
        return {
            side: make_codec(scheme, self.block_length, width, dtype, backend, (static_scales or {}).get(side))
            for side, scheme, width in (("keys", self.keys, widths[0]), ("values", self.values, widths[1]))
        }

    def flushed_blocks(self, window: int) -> int:
        """Blocks that leave a window which has grown to this many tokens."""
        return max(0, (window - self.residual_length) // self.block_length)

    def static_nbytes(self, widths: LayerWidths) -> int:
        """Bytes of the calibrated scales of a layer, two float32 per channel of a static side; once for all rows."""
        sides = zip((self.keys, self.values), widths)
        return sum(2 * 4 * sum(width) for side, width in sides if side.static)

    def layer_nbytes(self, length: int, widths: LayerWidths, dtype: torch.dtype) -> int:
        """Bytes that one row of `length` tokens takes in a layer: `nbytes_used` without `static_nbytes`."""
        exact = min(length, self.sink_length)
        blocks = self.flushed_blocks(length - exact)
        exact = length - blocks * self.block_length
        block = sum(block_nbytes(codec) for codec in self.codecs(widths, dtype).values())
        return blocks * (block + TABLE_ENTRY_NBYTES) + exact * sum(map(sum, widths)) * dtype.itemsize


#: Tensors of the calibrated scales of a side.
STATIC_NAMES = ("scale", "zero_point")

#: Types that states can have.
STATE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: A block costs a row three int32 in its table: slot, first position, valid tokens.
TABLE_ENTRY_NBYTES = 12


@dataclass(frozen=True)
class Row:
    """Bookkeeping of one row of the batch, on the host: counts of tokens, and where its pads were.

    Attributes:
        sinks, window: Tokens in full precision at the start and at the end.
        blocks: Slots of its packed blocks in the pool.
        counts: Valid tokens of each block: all of them, unless a crop has cut it.
        pads: Half-open ranges of the row's slots that held no token.
    """

    sinks: int = 0
    window: int = 0
    blocks: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()

    @property
    def packed(self) -> int:
        return sum(self.counts)

    @property
    def tokens(self) -> int:
        return self.sinks + self.packed + self.window

    @classmethod
    def from_record(cls, record: dict, scheme: CacheScheme, slots: int, blocks: int) -> "Row":
        """Inverse of `asdict`, for a row of so many slots of a layer of so many packed blocks.

        Raises:
            ValueError: The record is not that of such a row.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(record, dict) or set(record) != names:
            raise ValueError(f"row: must have {', '.join(sorted(names))}")
        window = scheme.residual_length + scheme.block_length - 1
        for name, limit in (("sinks", scheme.sink_length), ("window", window)):
            _check_integers(f"row: {name}", [record[name]], 0, limit)
        _check_integers("row: blocks", record["blocks"], 0, blocks - 1)
        _check_integers("row: counts", record["counts"], 1, scheme.block_length)
        if not isinstance(record["pads"], list):
            raise ValueError("row: pads must be a list")
        for pad in record["pads"]:
            _check_integers("row: pads", pad, 0, slots)
        edges = [edge for pad in record["pads"] for edge in pad]
        if edges != sorted(edges) or any(len(pad) != 2 for pad in record["pads"]):
            raise ValueError("row: pads must be rising ranges")
        if len(record["blocks"]) != len(record["counts"]):
            raise ValueError("row: blocks and counts must be as many")
        pads = tuple(map(tuple, record["pads"]))
        row = cls(record["sinks"], record["window"], tuple(record["blocks"]), tuple(record["counts"]), pads)
        if row.tokens + sum(stop - start for start, stop in pads) != slots:
            raise ValueError(f"row: tokens and pads must be its {slots} slots")
        return row


def storage_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())


def _check_integers(name: str, values: list, low: int, high: int) -> None:
    if not isinstance(values, list) or not all(type(x) is int and low <= x <= high for x in values):
        raise ValueError(f"{name}={values!r}: must be integers from {low} to {high}")


def _pad_ranges(real: list[bool], offset: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of consecutive pads, shifted by `offset`."""
    edges = [i for i in range(len(real) + 1) if (real[i - 1] if i else True) != (real[i] if i < len(real) else True)]
    return tuple((start + offset, stop + offset) for start, stop in zip(edges[::2], edges[1::2], strict=True))


def _repeated(rows: list[Row], repeats: int) -> list[int]:
    return [i for i in range(len(rows)) for _ in range(repeats)]


def _chosen(rows: list[Row], indices: torch.Tensor) -> list[int]:
    return torch.arange(len(rows))[indices.cpu()].tolist()


class KIVILatentLayer(CacheLayerMixin):
    """The cache of one layer. States enter as `[B, H, L, D]` through `update`, or flat as `[B, L, C]` by `append`.

    Args:
        scheme: Widths, group size, window and sinks.
        widths: Channels of each head group of keys and values; `None` takes one group per head of the first states.
        static_scales: Calibrated scales of each side that the scheme calls static.
        backend: Name of the back end (`modules/kernels`); `None`: chosen by the device.
        score: Worth `[B, L]` of new tokens from their keys and values, for protected tokens; "attention": the model
            passes it to `append`; `None`: the quantizer goes by its own error.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    pool: BlockPool | None = None

    def __init__(
        self,
        scheme: CacheScheme,
        widths: LayerWidths | None = None,
        static_scales: LayerScales | None = None,
        backend: str | None = None,
        score: Callable | str | None = None,
    ):
        super().__init__()
        self.scheme = scheme
        self.given_widths = widths
        static = {"keys": scheme.keys.static, "values": scheme.values.static}
        self.static_scales = {side: pair for side, pair in (static_scales or {}).items() if static[side]}
        self.backend_name = backend
        self.score = score if scheme.keys.protected or scheme.values.protected else None
        self._clear()

    def _clear(self) -> None:
        if self.pool is not None:
            self.pool.owners.discard(self)
        self.is_initialized = False
        self.slots = 0
        self.rows: list[Row] = []
        self.pool = None
        self._table: torch.Tensor | None = None
        self._exact: dict[str, torch.Tensor] = {}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.pool is not None:
            self.pool.owners.add(self)

    # ---- appending

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the batch, type and device of `[B, H, L, D]` states."""
        self._allocate(len(key_states), self._head_widths(key_states, value_states), key_states)

    def _head_widths(self, *states: torch.Tensor) -> LayerWidths:
        return self.given_widths or tuple((x.shape[3],) * x.shape[1] for x in states)

    def _allocate(self, batch: int, widths: LayerWidths, like: torch.Tensor) -> None:
        codecs = self._start(widths, like)
        self.rows = [Row()] * batch
        self.pool = BlockPool(codecs, self.device)
        self.pool.owners.add(self)
        self._exact = {
            f"{room}_{side}": torch.zeros((batch, length, channels), dtype=self.dtype, device=self.device)
            for room, length in self._rooms().items()
            for side, channels in self.channels.items()
        }
        if self.score is not None:
            self._exact["window_score"] = torch.zeros((batch, self._rooms()["window"]), device=self.device)
        self.is_initialized = True

    def _rooms(self) -> dict[str, int]:
        """Tokens for which there is room in full precision."""
        return {"sink": self.scheme.sink_length, "window": self.scheme.residual_length + self.scheme.block_length}

    def _start(self, widths: LayerWidths, like: torch.Tensor) -> dict:
        """Settle widths, type, device and back end; returns the quantizers."""
        scheme, self.widths, self.dtype, self.device = self.scheme, widths, like.dtype, like.device
        self.channels = {"keys": sum(widths[0]), "values": sum(widths[1])}
        for side, its_scheme in (("keys", scheme.keys), ("values", scheme.values)):
            if its_scheme.static and side not in (self.static_scales or {}):
                raise ValueError(f"static=True of the {side}: needs calibrated scales (modules/calibrated_int8.py)")
        if self.static_scales is not None:
            moved = {side: tuple(t.to(self.device) for t in pair) for side, pair in self.static_scales.items()}
            self.static_scales = moved
        self.backend = get_backend(self.backend_name, self.device)
        return scheme.codecs(widths, self.dtype, self.backend, self.static_scales)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        real: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
    ) -> None:
        """Store new tokens, then pack every block that has become old enough.

        Args:
            keys, values: `[B, L, C_k]` and `[B, L, C_v]` states in full precision.
            real: `[B, L]` bool on the CPU, false for the pads, which are not stored; `None`: no pads.
            received: `[B, P]`, attention that the tokens at positions 0 … P - 1 of each row, the new ones included,
                have received in this step; for `score="attention"`.

        Raises:
            ValueError: The states do not fit the cache, or a block that is due holds NaN, Inf or values beyond the
                range of its scales; the cache is then as it was before.
        """
        widths = self.given_widths or ((keys.shape[2],), (values.shape[2],))
        self._append(keys, values, real, widths, received)

    def _append(self, keys, values, real, widths: LayerWidths, received=None) -> None:
        keys, values, mark = keys.detach(), values.detach(), self.mark()
        try:
            if not self.is_initialized:
                self._allocate(len(keys), widths, keys)
            self.check_states(keys, values, real)
            states = {"keys": keys, "values": values}
            if self.score is not None:
                states["score"] = self._scores(keys, values, real, received)
            if real is None and keys.shape[1] == 1 and self._has_room_for_one():
                self._append_one(states)
            else:
                self._append_many(states, real)
        except BaseException:
            self.return_to(mark)
            raise
        self.slots += keys.shape[1]

    def mark(self) -> tuple | None:
        """What `return_to` takes to forget the appends that are still to come; nothing else may come between."""
        return (self.slots, self.rows, self._exact) if self.is_initialized else None

    def return_to(self, mark: tuple | None) -> None:
        """Forget what was appended since the mark. An append changes no list and no token that it found."""
        if mark is None:
            self._clear()
            return
        self.slots, rows, self._exact = mark
        with self.pool.lock, suppress(RuntimeError, MemoryError):
            # The first blocks of a row are those of the mark, wherever they have moved.
            blocks = (row.blocks for row in self.rows)
            self.rows = [replace(row, blocks=now[: len(row.blocks)]) for row, now in zip(rows, blocks, strict=True)]
            self._table = None
            self.pool.trim()  # takes room to give room back; if there is none, the next edit does it

    def check_states(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Raise a `ValueError` unless states `[B, L, C]` are of the rows, channels and type of those held."""
        for side, states in (("keys", keys), ("values", values)):
            expected = (len(self._exact["window_keys"]), keys.shape[1], self.channels[side])
            if tuple(states.shape) != expected or states.dtype != self.dtype:
                raise ValueError(
                    f"{side}: [batch, tokens, channels] of {list(states.shape)} in {states.dtype} must be "
                    f"{list(expected)} in {self.dtype}, as the cache was started"
                )
        if real is not None and (real.dtype != torch.bool or real.shape != keys.shape[:2]):
            raise ValueError(
                f"real: {list(real.shape)} of {real.dtype} must be a bool for each of {list(keys.shape[:2])}"
            )

    def _scores(self, keys, values, real: torch.Tensor | None, received: torch.Tensor | None) -> torch.Tensor:
        """Score `[B, L]` of the new tokens; attention that the window has received is added to its scores."""
        if self.score != "attention":
            score = self.score(keys, values)
            if tuple(score.shape) != tuple(keys.shape[:2]):
                raise ValueError(f"token_score: returned {list(score.shape)}, must be {list(keys.shape[:2])}")
            return score.detach().float()
        if received is None:
            raise ValueError("token_score='attention': only ALRDLlamaForCausalLM tells the cache; give a function")
        new_tokens = [keys.shape[1]] * len(keys) if real is None else real.sum(1).tolist()
        longest = max(row.tokens + new for row, new in zip(self.rows, new_tokens))
        if received.dim() != 2 or len(received) != len(keys) or received.shape[1] < longest:
            raise ValueError(f"received: {list(received.shape)} must be [{len(keys)}, positions up to {longest}]")
        received = received.detach()
        new = keys.new_zeros(keys.shape[:2], dtype=torch.float32)
        scores = self._exact["window_score"].clone()
        self._exact = self._exact | {"window_score": scores}
        for i, row in enumerate(self.rows):
            start, stop = row.sinks + row.packed, row.tokens
            scores[i, : row.window] += received[i, start:stop]
            tokens = slice(None) if real is None else real[i].to(keys.device)
            new[i, tokens] = received[i, stop : stop + len(new[i, tokens])]
        return new

    def _has_room_for_one(self) -> bool:
        limit = self.scheme.residual_length + self.scheme.block_length - 1
        return all(row.sinks == self.scheme.sink_length and row.window < limit for row in self.rows)

    def _append_one(self, states: dict[str, torch.Tensor]) -> None:
        """The common decode step: one token per row into the window, nothing to pack."""
        rows = torch.arange(len(self.rows), device=self.device)
        ends = torch.tensor([row.window for row in self.rows], device=self.device)
        for name, x in states.items():
            self._exact[f"window_{name}"][rows, ends] = x[:, 0]
        self.rows = [replace(row, window=row.window + 1) for row in self.rows]

    def _append_many(self, states: dict[str, torch.Tensor], real: torch.Tensor | None) -> None:
        length = self.scheme.block_length
        # Everything that can fail comes first, so that a refused append leaves the cache as it was.
        plans = []
        for index, row in enumerate(self.rows):
            new = {name: x[index] for name, x in states.items()}
            if real is not None:
                new = {name: x[real[index].to(x.device)] for name, x in new.items()}
            to_sinks = 0 if row.window or row.blocks else min(self.scheme.sink_length - row.sinks, len(new["keys"]))
            sinks = {side: new[side][:to_sinks] for side in self.channels}
            stream = {
                name: torch.cat([self._exact[f"window_{name}"][index, : row.window], x[to_sinks:]])
                for name, x in new.items()
            }
            flushed = self.scheme.flushed_blocks(len(stream["keys"]))
            due = {name: x[: flushed * length].unflatten(0, (flushed, length)) for name, x in stream.items()}
            kept = {name: x[flushed * length :] for name, x in stream.items()}
            plans.append((sinks, self.pool.encode(due, due.get("score")) if flushed else None, kept))

        exact = {name: tensor.clone() for name, tensor in self._exact.items()}
        with self.pool.lock:
            rows, written = list(self.rows), iter(self.pool.write(*[encoded for _, encoded, _ in plans if encoded]))
            for index, (sinks, encoded, kept) in enumerate(plans):
                row, slots = rows[index], next(written) if encoded else ()
                for side, x in sinks.items():
                    exact[f"sink_{side}"][index, row.sinks : row.sinks + len(x)] = x
                for name, x in kept.items():
                    exact[f"window_{name}"][index, : len(x)] = x
                pads = () if real is None else _pad_ranges(real[index].tolist(), self.slots)
                rows[index] = Row(
                    sinks=row.sinks + len(sinks["keys"]),
                    window=len(kept["keys"]),
                    blocks=row.blocks + slots,
                    counts=row.counts + (length,) * len(slots),
                    pads=row.pads + pads,
                )
            self.rows, self._exact, self._table = rows, exact, None

    # ---- reading

    def row_lengths(self) -> list[int] | torch.Tensor:
        """Tokens of each row; empty before the first one. A layer of fixed capacity gives `[B]` int32, unread."""
        return [row.tokens for row in self.rows]

    @property
    def backend_note(self) -> str:
        """The back end, and whether the reference attends to the blocks in its place."""
        fused = self.backend.attends_to(*self.pool.sides()) and self.dtype in FUSED_DTYPES
        return (
            self.backend.name if fused or self.backend.name == "reference" else f"{self.backend} (attention: reference)"
        )

    def block_table(self) -> torch.Tensor:
        """`[3, B, blocks]` int32: slot in the pool, first position, valid tokens; rows with fewer blocks end in 0."""
        if self._table is None:
            widest = max((len(row.blocks) for row in self.rows), default=0)
            entries: list[list[list[int]]] = [[], [], []]
            for row in self.rows:
                starts, position = [], row.sinks
                for count in row.counts:
                    starts.append(position)
                    position += count
                fill = [0] * (widest - len(row.blocks))
                for entry, column in zip(entries, (row.blocks, starts, row.counts), strict=True):
                    entry.append([*column, *fill])
            shape = (3, len(self.rows), widest)
            self._table = torch.tensor(entries, dtype=torch.int32, device=self.device).view(shape)
        return self._table

    def packed(self, *new: Tile) -> PackedCache:
        """What new tokens attend to: all that is cached, and the `new` tokens themselves."""
        if not self.is_initialized:
            return PackedCache(after=new)
        with self.pool.lock:  # both of the same state of the pool
            table, sides = self.block_table(), self.pool.sides()
        full = {row.counts for row in self.rows} == {(self.scheme.block_length,) * table.shape[2]}
        sinks = self._exact_tile("sink", [0 for _ in self.rows], [row.sinks for row in self.rows])
        window = self._exact_tile(
            "window", [row.sinks + row.packed for row in self.rows], [row.window for row in self.rows]
        )
        if not table.shape[2]:
            return PackedCache(sinks, window + new)
        return PackedCache(sinks, window + new, *sides, self.scheme.block_length, table, full)

    def tiles(self, tokens: int = 256) -> Iterator[Tile]:
        """The cached tokens in order, dequantized; packed ones about `tokens` at a time."""
        return self.packed().tiles(tokens)

    def _exact_tile(self, room: str, starts: list[int], counts: list[int]) -> tuple[Tile, ...]:
        longest = max(counts)
        if not longest:
            return ()
        keys, values = (self._exact[f"{room}_{side}"][:, None, :longest] for side in ("keys", "values"))
        index = torch.tensor([starts, counts], dtype=torch.int32, device=self.device).unsqueeze(-1)
        tile = Tile(keys, values, index[0], index[1])
        return (tile if min(counts) == longest else tile.masked(),)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All cached states, dequantized: `[B, T, C_k]` and `[B, T, C_v]`.

        Raises:
            ValueError: The rows hold different numbers of tokens, or hold them in different blocks.
        """
        if len({(row.sinks, row.counts, row.window) for row in self.rows}) > 1:
            raise ValueError(
                f"rows of {[row.tokens for row in self.rows]} tokens, blocks of {[row.counts for row in self.rows]}, "
                "cannot be read as one tensor"
            )
        parts: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
        for tile in self.tiles():
            for run, count in enumerate(tile.count[0].tolist()):
                parts["keys"].append(tile.keys[:, run, :count])
                parts["values"].append(tile.values[:, run, :count])
        empty = {side: self._exact[f"window_{side}"][:, :0] for side in parts}
        return tuple(torch.cat([empty[side], *parts[side]], dim=1) for side in ("keys", "values"))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `[B, H, L, D]` states; returns what their attention sees, `[B, H, T, D]` keys and values.

        The new tokens and the window are in full precision, older ones as they are stored; blocks that have become
        old enough are packed before the call returns. Every token counts: a model that passes no mask has its pads
        treated as tokens.
        """
        new = [x.transpose(1, 2).flatten(2) for x in (key_states, value_states)]
        seen = new
        if self.is_initialized:
            self.check_states(*new)
            seen = [torch.cat(pair, dim=1) for pair in zip(self.states(), new, strict=True)]
        self._append(*new, None, self._head_widths(key_states, value_states))
        heads = (key_states.shape[1], value_states.shape[1])
        return tuple(x.unflatten(2, (h, -1)).transpose(1, 2) for x, h in zip(seen, heads, strict=True))

    def get_seq_length(self) -> int:
        """Slots fed to the cache, pads included, as the library counts them."""
        return self.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # ---- editing

    def _select(self, indices: list[int]) -> None:
        """Make row i a copy of row `indices[i]`: an edit of the table, unless much room is to be freed."""
        self.selection(indices)()

    def selection(self, indices: list[int]) -> Callable[[], None]:
        """As `_select`, but that the tables are edited when what is returned is called; that takes no memory."""
        index = torch.tensor(indices, dtype=torch.long, device=self.device)
        exact = {name: tensor.index_select(0, index) for name, tensor in self._exact.items()}

        def edit() -> None:
            with self.pool.lock:
                self._edit([self.rows[i] for i in indices], exact, self.slots)

        return edit

    def _edit(self, rows: list[Row], exact: dict[str, torch.Tensor], slots: int) -> None:
        """Take other rows, of blocks that this layer refers to, and give back room."""
        self.rows, self._exact, self.slots, self._table = rows, exact, slots, None
        with suppress(RuntimeError, MemoryError):  # as in `return_to`
            self.pool.trim()

    def block_slots(self) -> Iterator[int]:
        return (slot for row in self.rows for slot in row.blocks)

    def move_blocks(self, moved: dict[int, int]) -> None:
        self.rows = [replace(row, blocks=tuple(moved[slot] for slot in row.blocks)) for row in self.rows]
        self._table = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(_repeated(self.rows, repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(_chosen(self.rows, indices))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last slots; `tokens_to_remove` is 0 or negative, as for `DynamicCache`.

        A cut inside a packed block lowers the block's count of valid tokens: nothing is quantized again, and the next
        block starts after it.

        Raises:
            ValueError: `tokens_to_remove` is positive or exceeds the slots held.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding of transformers 5.17 gives a tensor
        if not -self.slots <= tokens_to_remove <= 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: must be 0 or negative, the slots to remove of {self.slots}"
            )
        if tokens_to_remove and self.is_initialized:
            slots = self.slots + tokens_to_remove
            with self.pool.lock:
                self._edit([self._cropped(row, slots) for row in self.rows], self._exact, slots)

    @staticmethod
    def _cropped(row: Row, slots: int) -> Row:
        pads = tuple((start, min(stop, slots)) for start, stop in row.pads if start < slots)
        left = slots - sum(stop - start for start, stop in pads)
        sinks = min(left, row.sinks)
        left -= sinks
        counts = []
        for count in row.counts:
            if left == 0:
                break
            counts.append(min(count, left))
            left -= counts[-1]
        return Row(sinks, left, row.blocks[: len(counts)], tuple(counts), pads)

    def reset(self) -> None:
        """Forget every token and free the memory."""
        self._clear()

    # ---- copies

    def fork(self) -> "KIVILatentLayer":
        """A layer that goes on by itself from here and shares the packed blocks."""
        if not self.is_initialized:
            return copy.copy(self)
        with self.pool.lock:
            forked = copy.copy(self)
        forked._exact = {name: tensor.clone() for name, tensor in self._exact.items()}
        return forked

    def export(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The tokens held: tensors without slack, and the bookkeeping as JSON types."""
        static = {
            f"static.{side}.{name}": tensor.clone()
            for side, pair in (self.static_scales or {}).items()
            for name, tensor in zip(STATIC_NAMES, pair)
        }
        if not self.is_initialized:
            return static, {"slots": 0}
        with self.pool.lock:
            live = sorted(set(self.block_slots()))
            storage, rows = self.pool.storage, self.rows
            tensors = {f"{side}.{name}": t[live] for side, fields in storage.items() for name, t in fields.items()}
        rooms = self._rooms()
        tensors |= static | {name: exact[:, : rooms[name.split("_")[0]]] for name, exact in self._exact.items()}
        moved = {slot: i for i, slot in enumerate(live)}
        rows = [asdict(replace(row, blocks=tuple(moved[slot] for slot in row.blocks))) for row in rows]
        return tensors, {"slots": self.slots, "widths": self.widths, "rows": rows}

    def restore(self, tensors: dict[str, torch.Tensor], record: dict) -> None:
        """Inverse of `export` for a fresh layer, on the device of the tensors, which it copies.

        Raises:
            ValueError: Tensors and record are not those of a layer of this scheme; the layer is then empty.
        """
        self._clear()
        try:
            self._restore(dict(tensors), record)
        except BaseException:
            self._clear()
            raise

    def _restore(self, tensors: dict[str, torch.Tensor], record: dict) -> None:
        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            tensor = tensors.pop(name, None)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"{name}: {found}, must be {list(shape)} of {dtype}")
            return tensor.clone()

        names = {"slots", "widths", "rows"} if record.get("slots") else {"slots"}
        if set(record) != names:
            raise ValueError(f"record: {sorted(record)} must be {sorted(names)}")
        _check_integers("slots", [record["slots"]], 0, 2**62)
        static = {n.split(".")[1]: t for n, t in tensors.items() if n.startswith("static.") and n.endswith(".scale")}
        self.static_scales = {
            side: tuple(take(f"static.{side}.{name}", tuple(scale.shape), torch.float32) for name in STATIC_NAMES)
            for side, scale in static.items()
        }
        if record["slots"]:
            window, widths, rows = tensors.get("window_keys"), record["widths"], record["rows"]
            if window is None or window.dim() != 3 or not len(window) or window.dtype not in STATE_DTYPES:
                raise ValueError("window_keys: must be [rows, tokens, channels] floats")
            if not isinstance(widths, list) or len(widths) != 2:
                raise ValueError("widths: must be those of keys and values")
            for side in widths:
                _check_integers("widths", side, 1, 2**31)
            if not isinstance(rows, list) or len(rows) != len(window):
                raise ValueError(f"rows: must be the {len(window)} of window_keys")
            channels = {side: sum(width) for side, width in zip(SIDES, widths)}
            for side, scale in static.items():
                if scale.shape != (channels.get(side),):
                    raise ValueError(f"static.{side}.scale: {list(scale.shape)} must be one for each channel")
            exact = {
                f"{room}_{side}": take(f"{room}_{side}", (len(window), length, channels[side]), window.dtype)
                for room, length in self._rooms().items()
                for side in SIDES
            }
            if self.score is not None:
                exact["window_score"] = take("window_score", tuple(window.shape[:2]), torch.float32)
            self._allocate(len(window), tuple(map(tuple, widths)), window)
            count = len(tensors.get(f"keys.{next(iter(self.pool.codecs['keys'].fields()))}", ()))
            rows = [Row.from_record(row, self.scheme, record["slots"], count) for row in rows]
            blocks = {
                side: {n: take(f"{side}.{n}", (count, *shape), dtype) for n, (shape, dtype) in codec.fields().items()}
                for side, codec in self.pool.codecs.items()
            }
            with self.pool.lock:
                (slots,) = self.pool.write(blocks)
                self.rows = [replace(row, blocks=tuple(slots[i] for i in row.blocks)) for row in rows]
            self.slots, self._exact = record["slots"], exact
        if tensors:
            raise ValueError(f"{', '.join(sorted(tensors))}: no such tensor in a layer of this scheme")

    # ---- size

    def tensors(self) -> list[torch.Tensor]:
        """All that is allocated."""
        if not self.is_initialized:
            return []
        static = [tensor for pair in (self.static_scales or {}).values() for tensor in pair]
        return [*self.pool.tensors(), *self._exact.values(), self.block_table(), *static]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, allocated room and blocks shared with forks included."""
        return storage_nbytes(self.tensors())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held: codes, scales, zero points, table, window and sinks. Shared blocks count once.

        Not in `CacheScheme.layer_nbytes`: static scales, and four bytes per token of a window that is scored.
        """
        if not self.is_initialized:
            return 0
        rows = self.rows
        exact = sum(row.sinks + row.window for row in rows) * sum(self.channels.values()) * self.dtype.itemsize
        exact += 0 if self.score is None else sum(row.window for row in rows) * 4
        entries = sum(len(row.blocks) for row in rows) * TABLE_ENTRY_NBYTES
        blocks = len({slot for row in rows for slot in row.blocks})
        static = sum(tensor.nbytes for pair in (self.static_scales or {}).values() for tensor in pair)
        return blocks * self.pool.slot_nbytes + exact + entries + static


class FixedLatentLayer(KIVILatentLayer):
    """A `KIVILatentLayer` of fixed capacity (`modules/fixed_cache.py`): the same bytes, no wait in a step.

    A step appends any number of tokens; one of up to 16 without pads never waits for the device. `rows`, `slots`,
    `states()`, `update()`, the sizes and saving read the bookkeeping from the device, and so wait.

    Args:
        capacity: Tokens that a row can hold.
        arguments: As for `KIVILatentLayer`.

    Raises:
        ValueError: A side is stored by a scheme that has no fixed size on the device (`check_fixed`).
    """

    def __init__(self, scheme: CacheScheme, *arguments, capacity: int):
        check_count("capacity", capacity)
        for side in SIDES:
            check_fixed(side, getattr(scheme, side))
        self.room = Room(scheme.residual_length, scheme.block_length, scheme.sink_length, capacity)
        super().__init__(scheme, *arguments)

    def _clear(self) -> None:
        self.is_initialized = self.is_fed = False
        self.store: FixedStore | None = None
        self.pads: list[tuple[tuple[int, int], ...]] = []

    @property
    def is_compileable(self) -> bool:
        """Whether a step of the model compiles: that of a model whose attention reads the cache where it lies."""
        return self.given_widths is not None

    @property
    def rows(self) -> list[Row]:
        """Bookkeeping of the rows, read from the device."""
        if not self.is_fed:
            return []
        rows = zip(self.store.read_rows(), self.pads, strict=True)
        return [Row(sinks, window, tuple(slots), tuple(counts), pads) for (sinks, window, slots, counts), pads in rows]

    @property
    def slots(self) -> int:
        return max((row.tokens + sum(stop - start for start, stop in row.pads) for row in self.rows), default=0)

    def row_lengths(self) -> list[int] | torch.Tensor:
        return self.store.lengths if self.is_fed else []

    def _allocate(self, batch: int, widths: LayerWidths, like: torch.Tensor) -> None:
        codecs = self._start(widths, like)
        self.store = FixedStore(codecs, self.room, batch, self.dtype, self.device)
        self.pool, self._exact, self.pads = self.store.pool, self.store.exact, [()] * batch
        self.is_initialized = True

    def _append(self, keys, values, real, widths: LayerWidths, received=None) -> None:
        keys, values, fresh = keys.detach(), values.detach(), not self.is_initialized
        try:
            if fresh:
                self._allocate(len(keys), widths, keys)
            self.check_states(keys, values, real)
            pads = self.pads
            if real is not None:
                slots = self.slots
                pads = [old + _pad_ranges(row, slots) for old, row in zip(pads, real.tolist(), strict=True)]
            self.store.append(keys, values, real)
        except Exception:
            if fresh:
                self._clear()
            raise
        self.pads, self.is_fed = pads, True

    def block_table(self) -> torch.Tensor:
        return self.store.table

    def packed(self, *new: Tile) -> PackedCache:
        return self.store.packed(*new) if self.is_fed else PackedCache(after=new)

    def get_max_length(self) -> int:
        return self.room.capacity

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`; this copies packed bytes, of which a row here owns its own."""
        if self.is_fed:
            self.store.select(beam_idx)
            if any(self.pads):
                self.pads = [self.pads[i] for i in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("batch_repeat_interleave: a cache of fixed capacity keeps its rows; repeat the prompt's rows")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ValueError("batch_select_indices: a cache of fixed capacity keeps its rows; use reorder_cache()")

    def crop(self, tokens_to_remove: int) -> None:
        """As `KIVILatentLayer.crop`; waits for the device only if rows have pads."""
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: must be 0 or negative, the slots to remove")
        if not self.is_fed or tokens_to_remove == 0:
            return
        removed, pads_left = torch.full((self.store.batch,), -tokens_to_remove, device=self.device), self.pads
        if any(self.pads):
            left = self.slots + tokens_to_remove
            cut = [sum(max(0, stop - max(start, left)) for start, stop in pads) for pads in self.pads]
            removed -= torch.tensor(cut, device=self.device)
            pads_left = [tuple((a, min(b, left)) for a, b in pads if a < left) for pads in self.pads]
        self.store.crop(removed)
        self.pads = pads_left

    def reset(self) -> None:
        """Forget every token; the allocation stays, for as many rows."""
        if self.is_initialized:
            self.store.clear()
            self.is_fed, self.pads = False, [()] * self.store.batch

    def restore(self, tensors: dict[str, torch.Tensor], record: dict) -> None:
        raise ValueError("restore: a saved cache is loaded without a fixed capacity (KIVILatentCache.load)")

    def fork(self) -> "FixedLatentLayer":
        raise ValueError("fork: a row of a cache of fixed capacity owns its blocks; copy.deepcopy() copies them")

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), self.store.state] if self.is_initialized else []


class KIVILatentCache(Cache):
    """A `transformers` cache whose history is packed; for the latents of `ALRDLlamaForCausalLM` and for any model.

    Args:
        scheme: What every layer stores.
        widths: Channels of the head groups, per layer; `None` adds layers as they come, one group per head.
        layer_schemes: What single layers store instead, by index; window and sinks must be those of `scheme`.
        static_scales: Calibrated scales of each layer, by index.
        backend: "reference", "triton", or `None`: chosen by the device (`modules/kernels`).
        token_score: For protected tokens: a function `(layer_idx, keys, values) -> [B, L]` of the flat `[B, L, C]`
            states of new tokens; "attention": what they receive in `ALRDLlamaForCausalLM`; `None`: the quantizer's own
            error.
        capacity: Allocate for this many tokens per row when the first ones come, and keep all bookkeeping on the
            device, so that CUDA graphs and `torch.compile` can take a step (`FixedLatentLayer`); `None`: grow.
    """

    def __init__(
        self,
        scheme: CacheScheme | None = None,
        widths: list[LayerWidths] | None = None,
        layer_schemes: dict[int, CacheScheme] | None = None,
        static_scales: dict[int, LayerScales] | None = None,
        backend: str | None = None,
        token_score: TokenScore | str | None = None,
        capacity: int | None = None,
    ):
        self.capacity = capacity
        self._torn = False  # whether layers of fixed capacity may hold different tokens
        self._model: Callable | None = None  # weak reference to the decoder that feeds the cache
        self._fingerprint: dict | None = None  # of the model that has filled it, if another object or process
        self.scheme = scheme or CacheScheme()
        self.layer_schemes = dict(layer_schemes or {})
        self.static_scales = dict(static_scales or {})
        self.backend, self.token_score = backend, token_score
        if token_score is not None and token_score != "attention" and not callable(token_score):
            raise ValueError(f"token_score={token_score!r}: must be a function, 'attention' or None")
        for i, other in self.layer_schemes.items():
            check_count("layer_schemes: index of a layer", i)
            if widths is not None and i >= len(widths):
                raise ValueError(f"layer_schemes[{i}]: the model has {len(widths)} layers")
            for name in ("residual_length", "sink_length", "block_length"):
                if getattr(other, name) != getattr(self.scheme, name):
                    raise ValueError(f"layer_schemes[{i}]: {name} must be {getattr(self.scheme, name)} as in scheme")
        check_choice("backend", backend, (*BACKENDS, None))
        super().__init__(layers=[self._new_layer(i, w) for i, w in enumerate(widths or ())])

    def _new_layer(self, layer_idx: int, widths: LayerWidths | None = None) -> KIVILatentLayer:
        arguments = (
            self.layer_schemes.get(layer_idx, self.scheme),
            widths,
            self.static_scales.get(layer_idx),
            self.backend,
            partial(self.token_score, layer_idx) if callable(self.token_score) else self.token_score,
        )
        if self.capacity is not None:
            return FixedLatentLayer(*arguments, capacity=self.capacity)
        return KIVILatentLayer(*arguments)

    def layer(self, layer_idx: int, widths: LayerWidths | None = None) -> KIVILatentLayer:
        """The cache of a layer, added if need be; `widths` are those of the model that asks."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        layer = self.layers[layer_idx]
        if widths is not None and layer.is_initialized and layer.widths != widths:
            raise ValueError(
                f"layer {layer_idx}: holds keys and values of {layer.widths} channels by head group, the model's have "
                f"{widths}"
            )
        layer.given_widths = layer.given_widths or widths
        return layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.layer(layer_idx).update(key_states, value_states, *args, **kwargs)

    def row_tokens(self) -> list[int]:
        """Tokens that each row holds, pads not counted; empty before the first one."""
        return [row.tokens for row in self.layers[0].rows] if self.layers else []

    def row_lengths(self) -> list[int] | torch.Tensor:
        """As `row_tokens`; with a fixed capacity `[B]` int32 on the device, which nothing has waited for."""
        return self.layers[0].row_lengths() if self.layers else []

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is appended inside is appended to all layers or, if an error comes through, to none.

        A cache of fixed capacity cannot take an append back: it is refused from then on, until it is reset.

        Raises:
            ValueError: An error has come through before.
        """
        self._check_whole()
        marks = [] if self.capacity is not None else [layer.mark() for layer in self.layers]
        try:
            yield
        except BaseException:
            for i, layer in enumerate(self.layers if self.capacity is None else ()):
                layer.return_to(marks[i] if i < len(marks) else None)
            self._torn = self.capacity is not None
            raise

    def _check_whole(self) -> None:
        if self._torn:
            raise ValueError(
                f"capacity={self.capacity}: an error came in the middle of a step or an edit, after which the layers "
                "of a cache of fixed capacity may differ; reset() it"
            )

    # ---- editing, of all layers or of none

    def _select(self, indices_of: Callable[[list[Row]], list[int]]) -> None:
        layers = [layer for layer in self.layers if layer.is_initialized]
        for edit in [layer.selection(indices_of(layer.rows)) for layer in layers]:
            edit()

    def _edit_layers(self, edit: str, argument) -> None:
        """Layers of fixed capacity, of which each is edited or left as it was."""
        self._check_whole()
        for i, layer in enumerate(self.layers):
            try:
                getattr(layer, edit)(argument)
            except BaseException:
                self._torn = i > 0
                raise

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`."""
        if self.capacity is None:
            self._select(lambda rows: beam_idx.tolist())
        else:
            self._edit_layers("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row side by side."""
        if self.capacity is None:
            self._select(lambda rows: _repeated(rows, repeats))
        else:
            self._edit_layers("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these indices, or those where a mask is true."""
        if self.capacity is None:
            self._select(lambda rows: _chosen(rows, indices))
        else:
            self._edit_layers("batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last slots; see `KIVILatentLayer.crop`."""
        if self.capacity is None:
            super().crop(tokens_to_remove)
        else:
            self._edit_layers("crop", tokens_to_remove)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._torn = False

    # ---- sharing, saving

    def fork(self) -> "KIVILatentCache":
        """A cache that goes on by itself from here: packed blocks are shared, sinks and window copied.

        Blocks are immutable, so whatever happens to one of the two is not seen by the other; those that nobody refers
        to any more are freed. Two threads may each use a fork.

        Raises:
            ValueError: The cache has a fixed capacity.
        """
        forked = copy.copy(self)
        forked.layers = [layer.fork() for layer in self.layers]
        return forked

    def bind(self, decoder: torch.nn.Module) -> None:
        """Note the decoder that feeds the cache, for the fingerprint of a saved file.

        Raises:
            ValueError: The cache was filled by another model.
        """
        if self._fingerprint is not None:
            differing = differences(model_fingerprint(decoder), self._fingerprint)
            if differing:
                raise ValueError(f"past_key_values: filled by another model than this one: {'; '.join(differing)}")
        self._model, self._fingerprint = weakref.ref(decoder), None

    @property
    def is_bound(self) -> bool:
        return self._model is not None

    def fingerprint(self) -> dict | None:
        """Fingerprint of the model that has filled the cache (`modules/fingerprint.py`); `None`: not known."""
        decoder = self._model() if self._model is not None else None
        return self._fingerprint if decoder is None else model_fingerprint(decoder)

    def __getstate__(self) -> dict:
        """A copy in another process knows the model by its fingerprint."""
        return vars(self) | {"_model": None, "_fingerprint": self.fingerprint()}

    def save(self, path: str | os.PathLike, model: torch.nn.Module | None = None) -> None:
        """Write the cache, packed as it is, to a safetensors file; an interrupted save leaves an old file whole.

        Args:
            path: The file (`modules/cache_file.py`).
            model: The model that has filled the cache, for its fingerprint; an `ALRDLlamaForCausalLM` is known. A file
                without fingerprint is taken for that of any model.
        """
        tensors, layers = {}, []
        if self.static_scales:
            self.layer(max(self.static_scales))  # so that each set of scales has a layer to be written with
        for i, layer in enumerate(self.layers):
            exported, record = layer.export()
            tensors.update({f"{i}.{name}": tensor for name, tensor in exported.items()})
            layers.append(record)
        header = {
            "model": self.fingerprint() if model is None else model_fingerprint(model),
            "scheme": asdict(self.scheme),
            "token_score": "function" if callable(self.token_score) else self.token_score,
            "layer_schemes": {str(i): asdict(scheme) for i, scheme in self.layer_schemes.items()},
            "layers": layers,
        }
        write_cache_file(path, header, tensors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: torch.device | str | None = None,
        backend: str | None = None,
        token_score: TokenScore | None = None,
        model: torch.nn.Module | None = None,
        scheme: CacheScheme | None = None,
    ) -> "KIVILatentCache":
        """Read a cache that `save` has written.

        Args:
            path: The file.
            device: Where the tensors go; `None`: where the layers of `model` are, or the CPU.
            backend: As for `KIVILatentCache`.
            token_score: The function of a cache that had one; it is not in the file.
            model: The model that is to go on with the cache; without it an `ALRDLlamaForCausalLM` checks the cache at
                its first step.
            scheme: What the cache must have been stored by, if it must; `None`: whatever the file says.

        Raises:
            ValueError: The file is truncated, altered, or of another kind, version, model or scheme; or `token_score`
                is missing. The message starts with the path and names what differs.
            OSError: There is no such file.
        """
        header, tensors = read_cache_file(path)
        try:
            return cls._load(header, tensors, device, backend, token_score, model, scheme)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: its header is not that of a cache ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _load(cls, header: dict, tensors: dict, device, backend, token_score, model, scheme) -> "KIVILatentCache":
        stored, found = CacheScheme(**header["scheme"]), header["model"]
        if scheme is not None and scheme != stored:
            raise ValueError(f"another scheme: {'; '.join(differences(asdict(stored), asdict(scheme)))}")
        if model is not None and found is not None and (differing := differences(found, model_fingerprint(model))):
            raise ValueError(f"of another model: {'; '.join(differing)}")
        if (header["token_score"] == "function") != (token_score is not None):
            need = "must be given, the function by which the saved cache scored tokens"
            never = f"must not be given, the saved cache had {header['token_score']!r}"
            raise ValueError(f"token_score: {need if token_score is None else never}")
        layer_schemes = {int(i): CacheScheme(**fields) for i, fields in header["layer_schemes"].items()}
        score = token_score or header["token_score"]
        cache = cls(stored, layer_schemes=layer_schemes, backend=backend, token_score=score)
        mine = {i: {} for i in range(len(header["layers"]))}
        for name, tensor in tensors.items():
            i, _, field_name = name.partition(".")
            mine[int(i)][field_name] = tensor
        for i, record in enumerate(header["layers"]):
            place = device or (_layer_device(model, i) if model is not None else "cpu")
            try:
                cache.layer(i).restore({name: tensor.to(place) for name, tensor in mine[i].items()}, record)
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from error
        if (
            len(
                {
                    (layer.slots, *((row.tokens, row.pads) for row in layer.rows))
                    for layer in cache.layers
                    if layer.slots
                }
            )
            > 1
        ):
            raise ValueError("layers: must hold the same tokens")
        cache.static_scales = {i: layer.static_scales for i, layer in enumerate(cache.layers) if layer.static_scales}
        cache._fingerprint = found
        if model is not None:
            cache.bind(model.get_decoder())
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, allocated room and blocks shared with forks included."""
        return self.nbytes_together(self)

    @staticmethod
    def nbytes_together(*caches: "KIVILatentCache") -> int:
        """Bytes of all storages of several caches; what forks share counts once."""
        return storage_nbytes(tensor for cache in caches for layer in cache.layers for tensor in layer.tensors())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, everything counted; the formula is `CacheScheme.layer_nbytes`."""
        return sum(layer.nbytes_used for layer in self.layers)

    @property
    def bits_per_element(self) -> dict[str, float]:
        """True bits per element of the packed keys and values: all that a block takes, over all layers started."""
        bits, elements = dict.fromkeys(("keys", "values"), 0), dict.fromkeys(("keys", "values"), 0)
        for layer in self.layers:
            for side, codec in (layer.pool.codecs if layer.is_initialized else {}).items():
                bits[side] += 8 * block_nbytes(codec)
                elements[side] += layer.scheme.block_length * layer.channels[side]
        return {side: bits[side] / elements[side] for side in bits if elements[side]}

    def __repr__(self) -> str:
        first, tokens = self.layer_schemes.get(0, self.scheme), self.row_tokens()
        s = first if first.keys.tiers or first.values.tiers else self.scheme
        held = f"rows of {tokens} tokens" if tokens else "empty"
        slack = self.nbytes - self.nbytes_used
        backends = sorted({layer.backend_note for layer in self.layers if layer.is_initialized})
        true_bits = " / ".join(f"{bits:.3g}" for bits in self.bits_per_element.values())
        special = f", {len(self.layer_schemes)} layers of their own" if self.layer_schemes else ""
        return (
            f"KIVILatentCache(keys {s.keys}, values {s.values}{special}, "
            f"residual_length={s.residual_length}, sink_length={s.sink_length}"
            f"{'' if self.capacity is None else f', capacity={self.capacity}'}; "
            f"{true_bits + ' true bits; ' if true_bits else ''}"
            f"backend {' and '.join(backends) or self.backend or 'by device'}; "
            f"{len(self.layers)} layers, {held}, {self.nbytes_used:,} bytes used + {slack:,} slack)"
        )


def _layer_device(model: torch.nn.Module, layer_idx: int) -> torch.device:
    """Where the states of a layer are computed."""
    layer = model.get_decoder().layers[layer_idx]
    device = next(layer.parameters()).device
    return device if device.type != "meta" else torch.device(layer._hf_hook.execution_device)


def config_widths(config: ALRDLlamaConfig) -> list[LayerWidths]:
    """Channels that each layer of a model caches, by head group; checks the config."""
    config.check_latent_cache()
    layers = range(config.num_hidden_layers)
    return [(config.cached_widths(i, "k_proj"), config.cached_widths(i, "v_proj")) for i in layers]


def config_schemes(config: ALRDLlamaConfig, **settings) -> tuple[CacheScheme, dict[int, CacheScheme]]:
    """What the cache of a model stores: the scheme of every layer, and those of layers with width tiers in its place.

    Args:
        config: Of the model.
        settings: Fields of `CacheScheme` in place of the config's. A side whose bits or scheme are given has one width
            for all channels: the config's tiers and scheme, calibrated for each other, are not used for it.
    """
    own = {f.name: getattr(config, f.name) for f in fields(CacheScheme)}
    tiered = {name[-6] for name in config.width_tiers}  # "k" and "v" of k_proj and v_proj
    for side in tuple(tiered):
        if {f"{side}_bits", f"{side}_scheme"} & set(settings):
            tiered.remove(side)
            own[f"{side}_scheme"] = None
    scheme, layers = CacheScheme(**(own | settings)), {}
    for i in range(config.num_hidden_layers):
        tiers = {side: config.width_tiers.get(f"model.layers.{i}.self_attn.{side}_proj") for side in tiered}
        sides = {f"{side}_scheme": {**getattr(scheme, f"{side}_scheme"), "tiers": t} for side, t in tiers.items() if t}
        if sides:
            layers[i] = replace(scheme, **sides)
    return scheme, layers


def create_kivi_cache(
    k_bits: float = 2,
    v_bits: float = 2,
    group_size: int = 128,
    residual_length: int = 32,
    sink_length: int = 4,
    config: ALRDLlamaConfig | None = None,
    *,
    k_scheme: dict | None = None,
    v_scheme: dict | None = None,
    quantization_config: dict | str | None = None,
    layer_schemes: dict[int, CacheScheme] | None = None,
    static_scales: dict[int, LayerScales] | None = None,
    backend: str | None = None,
    token_score: TokenScore | str | None = None,
    capacity: int | None = None,
) -> KIVILatentCache:
    """Make an empty `KIVILatentCache`.

    Args:
        k_bits, v_bits: One of `SUPPORTED_BITS`; 16 is the lossless mode.
        group_size: Elements per scale; 0: one per channel and block of 128 tokens, one per token and head group.
        residual_length: At least this many of the newest tokens stay in full precision.
        sink_length: This many of the first tokens stay in full precision.
        config: The latent model that will use the cache (its settings are not read, only its ranks); `None` makes a
            drop-in cache for any model.
        k_scheme, v_scheme: Other fields of `QuantScheme` for keys or values.
        quantization_config: VidKV's dictionary or string instead of the settings above (`modules/vidkv.py`).
        layer_schemes, static_scales, backend, token_score, capacity: As for `KIVILatentCache`.

    Raises:
        ValueError: A setting is out of range; the message names field, value and rule.
    """
    scheme = CacheScheme(k_bits, v_bits, group_size, residual_length, sink_length, k_scheme or {}, v_scheme or {})
    if quantization_config is not None:
        if scheme != CacheScheme():
            raise ValueError("quantization_config: stands for all settings of the cache; give no others beside it")
        scheme = CacheScheme(**parse_quantization_config(quantization_config))
    widths = None if config is None else config_widths(config)
    return KIVILatentCache(scheme, widths, layer_schemes, static_scales, backend, token_score, capacity)


__all__ = [
    "CacheScheme",
    "FixedLatentLayer",
    "KIVILatentCache",
    "KIVILatentLayer",
    "KIVIQuantizer",
    "config_schemes",
    "config_widths",
    "create_kivi_cache",
]
