r"""One layer of a packed KV cache: full-precision sinks, immutable quantized blocks, a full-precision window.

A row of a layer holds, in the order of its tokens: the first `sink_length` ones as they are; blocks of G tokens in a
pool (`modules/cache/pool.py`), reached through the row's block table; and a window of between `residual_length` and
`residual_length + G - 1` of the newest tokens. A block is written once, as soon as `residual_length` newer tokens
exist; beam search, crops and shared prefixes edit the table and copy no packed byte.

The states of a token are a flat vector of channels. Latents `[B, 1, T, r]` are stored as they are; the `[B, H, T, D]`
states of any other model lose their heads to the channels, and each head keeps scales of its own.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, wraps
from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme, check_count, side_scheme
from modules.cache.codecs import StaticScales, block_length, block_nbytes, check_codec, make_codec
from modules.cache.fixed_store import SIDES, FixedStore, Room, check_fixed, field_without_capacity
from modules.cache.pool import BlockPool
from modules.kernels import FUSED_DTYPES, Backend, get_backend
from modules.kernels.packed import LatentQuery, NewTokens, PackedCache, Tile, counts_of_rows

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

    @property
    def takes_capacity(self) -> bool:
        """Whether a cache of fixed capacity can store it."""
        return all(field_without_capacity(side) is None for side in (self.keys, self.values))

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

#: Distance of two levels below which a float16 scale has less than three bits: eight times the smallest float16.
LEAST_STEP = 2.0**-21

#: A block costs a row three int32 in its table: slot, first position, valid tokens.
TABLE_ENTRY_NBYTES = 12


class Row(NamedTuple):
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
        """Inverse of `_asdict`, for a row of so many slots of a layer of so many packed blocks.

        Raises:
            ValueError: The record is not that of such a row.
        """
        names = set(cls._fields)
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


class _Table(NamedTuple):
    """The block table of a layer, and what else of its rows an append to the windows leaves as it is.

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


def in_any_mode(method: Callable) -> Callable:
    """A method that makes tensors which a cache keeps: ordinary ones in `torch.inference_mode()` too.

    Those made in that mode could not be changed outside it, nor meet a query that asks for its gradient.
    """

    @wraps(method)
    def run(*args, **kwargs):
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


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


def repeated_rows(rows: list[Row], repeats: int) -> list[int]:
    """Indices of `repeats` copies of each row side by side."""
    return [i for i in range(len(rows)) for _ in range(repeats)]


def chosen_rows(rows: list[Row], indices: torch.Tensor) -> list[int]:
    """Indices of the rows that a tensor of indices or a mask `[B]` names."""
    return torch.arange(len(rows), dtype=torch.int64, device="cpu")[indices.cpu()].tolist()


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
        scales = {side: pair for side, pair in (static_scales or {}).items() if static[side]}
        # As the kernels read them, whatever the default type was when they were made.
        self.static_scales = {side: tuple(t.float() for t in pair) for side, pair in scales.items()}
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
        self._table: _Table | None = None
        self._exact: dict[str, torch.Tensor] = {}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.pool is not None:
            self.pool.owners.add(self)

    # ---- appending

    @in_any_mode
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
            shape = (batch, self._rooms()["window"])
            self._exact["window_score"] = torch.zeros(shape, dtype=torch.float32, device=self.device)
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
                raise ValueError(
                    f"static=True of the {side}: needs calibrated scales (modules/formats/calibrated_int8.py)"
                )
        if self.static_scales is not None:
            moved = {side: tuple(t.to(self.device) for t in pair) for side, pair in self.static_scales.items()}
            self.static_scales = moved
        self.backend = get_backend(self.backend_name, self.device)
        return scheme.codecs(widths, self.dtype, self.backend, self.static_scales)

    def attend_and_append(self, query: LatentQuery, new: NewTokens) -> torch.Tensor:
        """Attention of new tokens to all that is cached and to themselves, who are cached then.

        Args:
            query: Queries of the new tokens.
            new: The new tokens.

        Returns:
            `[B, H_q, L, max(value_widths)]` float32, the weighted sums of the values' latents.

        Raises:
            ValueError: As for `append`.
        """
        self.check_states(new.keys, new.values)  # before a kernel takes them at their word
        summed, _ = self.backend.attend(query, self.packed(new.tile()))
        self._store({"keys": new.keys.detach(), "values": new.values.detach()}, new.real)
        return summed

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

    @in_any_mode
    def _append(self, keys, values, real, widths: LayerWidths, received=None) -> None:
        keys, values, mark = keys.detach(), values.detach(), self.mark()
        try:
            if not self.is_initialized:
                self._allocate(len(keys), widths, keys)
            self.check_states(keys, values, real)
            states = {"keys": keys, "values": values}
            if mark is None:
                self._check_magnitude(states)
            if self.score is not None:
                states["score"] = self._scores(keys, values, real, received)
            self._store(states, real)
        except BaseException:
            self.return_to(mark)
            raise

    @in_any_mode
    def _store(self, states: dict[str, torch.Tensor], real: torch.Tensor | None) -> None:
        """Append states that have been checked; after an error the cache is as it was before."""
        if real is None and states["keys"].shape[1] == 1 and self._has_room_for_one():
            self._append_one(states)
        else:
            self._append_many(states, real)
        self.slots += states["keys"].shape[1]

    def mark(self) -> tuple | None:
        """What `return_to` takes to forget the appends that are still to come; nothing else may come between."""
        return (self.slots, self.rows, self._exact) if self.is_initialized else None

    @in_any_mode
    def return_to(self, mark: tuple | None) -> None:
        """Forget what was appended since the mark. An append changes no list and no token that it found."""
        if mark is None:
            self._clear()
            return
        self.slots, rows, self._exact = mark
        with self.pool.lock, suppress(RuntimeError, MemoryError):
            # The first blocks of a row are those of the mark, wherever they have moved.
            blocks = (row.blocks for row in self.rows)
            self.rows = [row._replace(blocks=now[: len(row.blocks)]) for row, now in zip(rows, blocks, strict=True)]
            self._table = None
            self.pool.trim()  # takes room to give room back; if there is none, the next edit does it

    def check_states(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Raise a `ValueError` unless states `[B, L, C]` are of the rows, channels and type of those held."""
        for side, states in (("keys", keys), ("values", values)):
            expected = (self._exact["window_keys"].shape[0], keys.shape[1], self.channels[side])
            if states.shape != expected or states.dtype != self.dtype:
                raise ValueError(
                    f"{side}: [batch, tokens, channels] of {list(states.shape)} in {states.dtype} must be "
                    f"{list(expected)} in {self.dtype}, as the cache was started"
                )
        if real is not None and (real.dtype != torch.bool or real.shape != keys.shape[:2]):
            raise ValueError(
                f"real: {list(real.shape)} of {real.dtype} must be a bool for each of {list(keys.shape[:2])}"
            )

    def _check_magnitude(self, states: dict[str, torch.Tensor]) -> None:
        """Warn of first states `[B, L, C]` that are so small that their scales have few digits in float16."""
        if self.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
            return
        for side, x in states.items():
            scheme = getattr(self.scheme, side)
            widths = {b for group in scheme.tiers or () for _, b in group} or {scheme.bits}
            bits = max(widths - {16}, default=16)
            largest = x.abs().amax().item() if x.numel() and bits < 16 and not scheme.static else 0.0
            if 0 < largest < (2**bits - 1) * LEAST_STEP / 2:
                warnings.warn(
                    f"{side}: states of at most {largest:.1e} in {self.dtype} have scales in float16, which keep few "
                    f"digits of steps below {LEAST_STEP:.1e}; load the model in bfloat16, whose scales are bfloat16, "
                    "or take 16 bits",
                    stacklevel=2,
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
        received = received.detach().float()
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
        ends = tuple([row.window for row in self.rows])
        for name, x in states.items():
            window = self._exact[f"window_{name}"]
            if len(set(ends)) == 1:
                window.narrow(1, ends[0], 1).copy_(x)
            else:
                index = counts_of_rows(ends, self.device, torch.int64)
                window.scatter_(1, index if x.dim() == 2 else index[..., None].expand_as(x), x)
        self.rows = [row._replace(window=row.window + 1) for row in self.rows]

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
        if fused or self.backend.fused_attention is None:
            return self.backend.name
        return f"{self.backend} (attention: reference)"

    @in_any_mode
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
            self._table = _Table(
                torch.tensor(entries, dtype=torch.int32, device=self.device).view(shape),
                full={row.counts for row in self.rows} == {(self.scheme.block_length,) * widest},
                sinks=tuple(row.sinks for row in self.rows),
                window_starts=tuple(row.sinks + row.packed for row in self.rows),
            )
        return self._table.entries

    def packed(self, *new: Tile) -> PackedCache:
        """What new tokens attend to: all that is cached, and the `new` tokens themselves."""
        if not self.is_initialized:
            return PackedCache(after=new)
        with self.pool.lock:  # all of the same state of the pool
            entries, sides, table = self.block_table(), self.pool.sides(), self._table
        sinks = self._exact_tile("sink", (0,) * len(table.sinks), table.sinks)
        window = self._exact_tile("window", table.window_starts, tuple([row.window for row in self.rows]))
        if not entries.shape[2]:
            return PackedCache(sinks, window + new)
        return PackedCache(sinks, window + new, *sides, self.scheme.block_length, entries, table.full)

    def tiles(self, tokens: int = 256) -> Iterator[Tile]:
        """The cached tokens in order, dequantized; packed ones about `tokens` at a time."""
        return self.packed().tiles(tokens)

    def _exact_tile(self, room: str, starts: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Tile, ...]:
        longest = max(counts)
        if not longest:
            return ()
        keys, values = self._exact[f"{room}_keys"], self._exact[f"{room}_values"]
        if longest < keys.shape[1]:
            keys, values = keys.narrow(1, 0, longest), values.narrow(1, 0, longest)
        keys, values = keys.unsqueeze(1), values.unsqueeze(1)
        tile = Tile(keys, values, counts_of_rows(starts, self.device), counts_of_rows(counts, self.device))
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

    @property
    def keys(self) -> torch.Tensor | None:
        """`[B, H, T, D]`, dequantized at each reading, for cross-attention, which reads it in place of `update`."""
        return self._by_head(0)

    @property
    def values(self) -> torch.Tensor | None:
        """As `keys`."""
        return self._by_head(1)

    @keys.setter
    def keys(self, states: None) -> None:
        """The library's constructor has nothing to give; what is cached comes by `append` and `update`."""
        if states is not None:
            raise ValueError("keys: must not be assigned; update() adds to a packed cache")

    values = values.setter(keys.fset)

    def _by_head(self, side: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        return self.states()[side].unflatten(2, (len(self.widths[side]), -1)).transpose(1, 2)

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

    @in_any_mode
    def selection(self, indices: list[int]) -> Callable[[], None]:
        """As `_select`, but that the tables are edited when what is returned is called; that takes no memory."""
        index = torch.tensor(indices, dtype=torch.long, device=self.device)
        exact = {name: tensor.index_select(0, index) for name, tensor in self._exact.items()}

        def edit() -> None:
            with self.pool.lock:
                self._edit([self.rows[i] for i in indices], exact, self.slots)

        return edit

    @in_any_mode
    def _edit(self, rows: list[Row], exact: dict[str, torch.Tensor], slots: int) -> None:
        """Take other rows, of blocks that this layer refers to, and give back room."""
        self.rows, self._exact, self.slots, self._table = rows, exact, slots, None
        with suppress(RuntimeError, MemoryError):  # as in `return_to`
            self.pool.trim()

    def block_slots(self) -> Iterator[int]:
        return (slot for row in self.rows for slot in row.blocks)

    def move_blocks(self, moved: dict[int, int]) -> None:
        self.rows = [row._replace(blocks=tuple(moved[slot] for slot in row.blocks)) for row in self.rows]
        self._table = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(repeated_rows(self.rows, repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(chosen_rows(self.rows, indices))

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

    def take_out(self, removed: torch.Tensor, kept: torch.Tensor) -> None:
        """Make pads of the last `removed` `[B]` tokens of each row, whose tokens are then those that `kept` marks.

        Args:
            removed: int on the CPU.
            kept: `[B, slots]` bool on the CPU.
        """
        shortened = zip(self.rows, removed.tolist(), kept.tolist(), strict=True)
        with self.pool.lock:
            rows = [self._shortened(row, row.tokens - n, _pad_ranges(real, 0)) for row, n, real in shortened]
            self._edit(rows, self._exact, self.slots)

    @classmethod
    def _cropped(cls, row: Row, slots: int) -> Row:
        pads = tuple((start, min(stop, slots)) for start, stop in row.pads if start < slots)
        return cls._shortened(row, slots - sum(stop - start for start, stop in pads), pads)

    @staticmethod
    def _shortened(row: Row, left: int, pads: tuple[tuple[int, int], ...]) -> Row:
        """The first `left` tokens of a row."""
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

    @in_any_mode
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
        if not self.rows:  # nothing was fed, or a layer of fixed capacity was reset
            return static, {"slots": 0}
        with self.pool.lock:
            live = sorted(set(self.block_slots()))
            storage, rows = self.pool.storage, self.rows
            tensors = {f"{side}.{name}": t[live] for side, fields in storage.items() for name, t in fields.items()}
        rooms = self._rooms()
        tensors |= static | {name: exact[:, : rooms[name.split("_")[0]]] for name, exact in self._exact.items()}
        moved = {slot: i for i, slot in enumerate(live)}
        rows = [row._replace(blocks=tuple(moved[slot] for slot in row.blocks))._asdict() for row in rows]
        return tensors, {"slots": self.slots, "widths": self.widths, "rows": rows}

    @in_any_mode
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

        if set(record) not in ({"slots"}, {"slots", "widths", "rows"}):
            raise ValueError(f"record: {sorted(record)} must be slots, and widths and rows unless nothing was fed")
        _check_integers("slots", [record["slots"]], 0, 2**62 if "rows" in record else 0)
        static = {n.split(".")[1]: t for n, t in tensors.items() if n.startswith("static.") and n.endswith(".scale")}
        self.static_scales = {
            side: tuple(take(f"static.{side}.{name}", tuple(scale.shape), torch.float32) for name in STATIC_NAMES)
            for side, scale in static.items()
        }
        if "rows" in record:
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
                self.rows = [row._replace(blocks=tuple(slots[i] for i in row.blocks)) for row in rows]
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
    """A `KIVILatentLayer` of fixed capacity (`modules/cache/fixed_store.py`): the same bytes, no wait in a step.

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

    @in_any_mode
    def _append(self, keys, values, real, widths: LayerWidths, received=None) -> None:
        keys, values, fresh = keys.detach(), values.detach(), not self.is_initialized
        try:
            if fresh:
                self._allocate(len(keys), widths, keys)
            self.check_states(keys, values, real)
            if fresh and keys.device.type == "cpu":  # elsewhere it would wait for the device
                self._check_magnitude({"keys": keys, "values": values})
            pads = self._pads_after(real)
            self.store.append(keys, values, real)
        except Exception:
            if fresh:
                self._clear()
            raise
        self.pads, self.is_fed = pads, True

    def attend_and_append(self, query: LatentQuery, new: NewTokens) -> torch.Tensor:
        self.check_states(new.keys, new.values, new.real)
        pads = self._pads_after(new.real)
        summed = self.store.attend_and_append(query, new)
        self.pads = pads
        return summed

    def _pads_after(self, real: torch.Tensor | None) -> list[tuple[tuple[int, int], ...]]:
        """`pads` with those of new tokens."""
        if real is None:
            return self.pads
        slots = self.slots
        return [old + _pad_ranges(row, slots) for old, row in zip(self.pads, real.tolist(), strict=True)]

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
        int64 = {"dtype": torch.int64, "device": self.device}
        removed, pads_left = torch.full((self.store.batch,), -tokens_to_remove, **int64), self.pads
        if any(self.pads):
            left = self.slots + tokens_to_remove
            cut = [sum(max(0, stop - max(start, left)) for start, stop in pads) for pads in self.pads]
            removed -= torch.tensor(cut, **int64)
            pads_left = [tuple((a, min(b, left)) for a, b in pads if a < left) for pads in self.pads]
        self.store.crop(removed)
        self.pads = pads_left

    def take_out(self, removed: torch.Tensor, kept: torch.Tensor) -> None:
        self.store.crop(removed.to(self.device))
        self.pads = [_pad_ranges(real, 0) for real in kept.tolist()]

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


__all__ = [
    "STATE_DTYPES",
    "TABLE_ENTRY_NBYTES",
    "CacheScheme",
    "FixedLatentLayer",
    "KIVILatentLayer",
    "LayerScales",
    "LayerWidths",
    "Row",
    "TokenScore",
    "chosen_rows",
    "in_any_mode",
    "repeated_rows",
    "storage_nbytes",
]
