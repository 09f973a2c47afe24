r"""A packed KV cache: full-precision sinks, immutable quantized blocks, a full-precision window.

A row of a layer holds, in the order of its tokens: the first `sink_length` ones as they are; blocks of G tokens in a
pool (`modules/block_pool.py`), reached through the row's block table; and a window of between `residual_length` and
`residual_length + G - 1` of the newest tokens. A block is written once, as soon as `residual_length` newer tokens
exist; beam search, crops and shared prefixes edit the table and copy no packed byte.

The states of a token are a flat vector of channels. Latents `[B, 1, T, r]` are stored as they are; the `[B, H, T, D]`
states of any other model lose their heads to the channels, and each head keeps scales of its own.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial

import torch
from safetensors import safe_open
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme, check_choice, check_count, side_scheme
from modules.block_pool import BlockPool
from modules.codecs import StaticScales, block_length, block_nbytes, check_codec, make_codec
from modules.files import save_tensors
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


#: Kind and version of a saved cache, in the file's metadata.
_FILE_KEY, _FILE_VERSION = "kivi_latent_cache", 2

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


def _pad_ranges(real: list[bool], offset: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of consecutive pads, shifted by `offset`."""
    edges = [i for i in range(len(real) + 1) if (real[i - 1] if i else True) != (real[i] if i < len(real) else True)]
    return tuple((start + offset, stop + offset) for start, stop in zip(edges[::2], edges[1::2], strict=True))


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
        self.is_initialized = False
        self.slots = 0
        self.rows: list[Row] = []
        self.pool: BlockPool | None = None
        self._table: torch.Tensor | None = None
        self._exact: dict[str, torch.Tensor] = {}

    # ---- appending

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the batch, type and device of `[B, H, L, D]` states."""
        self._allocate(len(key_states), self._head_widths(key_states, value_states), key_states)

    def _head_widths(self, *states: torch.Tensor) -> LayerWidths:
        return self.given_widths or tuple((x.shape[3],) * x.shape[1] for x in states)

    def _allocate(self, batch: int, widths: LayerWidths, like: torch.Tensor) -> None:
        scheme, codecs = self.scheme, self._start(widths, like)
        self.rows = [Row()] * batch
        self.pool = BlockPool(codecs, self.device)
        rooms = {"sink": scheme.sink_length, "window": scheme.residual_length + scheme.block_length}
        self._exact = {
            f"{room}_{side}": torch.zeros((batch, length, channels), dtype=self.dtype, device=self.device)
            for room, length in rooms.items()
            for side, channels in self.channels.items()
        }
        if self.score is not None:
            self._exact["window_score"] = torch.zeros((batch, rooms["window"]), device=self.device)
        self.is_initialized = True

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
        keys, values, fresh = keys.detach(), values.detach(), not self.is_initialized
        scores = self._exact.get("window_score")
        try:
            if fresh:
                self._allocate(len(keys), widths, keys)
            self._check_states(keys, values, real)
            states = {"keys": keys, "values": values}
            if self.score is not None:
                states["score"] = self._scores(keys, values, real, received)
            if real is None and keys.shape[1] == 1 and self._has_room_for_one():
                self._append_one(states)
            else:
                self._append_many(states, real)
        except Exception:
            if scores is not None:
                self._exact["window_score"] = scores
            if fresh:
                self._clear()
            raise
        self.slots += keys.shape[1]

    def _check_states(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
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
        self._exact["window_score"] = self._exact["window_score"].clone()
        for i, row in enumerate(self.rows):
            start, stop = row.sinks + row.packed, row.tokens
            self._exact["window_score"][i, : row.window] += received[i, start:stop]
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

        for index, (sinks, encoded, kept) in enumerate(plans):
            row = self.rows[index]
            slots = self.pool.write(encoded) if encoded else ()
            for side, x in sinks.items():
                self._exact[f"sink_{side}"][index, row.sinks : row.sinks + len(x)] = x
            for name, x in kept.items():
                self._exact[f"window_{name}"][index, : len(x)] = x
            pads = () if real is None else _pad_ranges(real[index].tolist(), self.slots)
            self.rows[index] = Row(
                sinks=row.sinks + len(sinks["keys"]),
                window=len(kept["keys"]),
                blocks=row.blocks + slots,
                counts=row.counts + (length,) * len(slots),
                pads=row.pads + pads,
            )
        self._table = None

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
        table = self.block_table()
        full = {row.counts for row in self.rows} == {(self.scheme.block_length,) * table.shape[2]}
        sinks = self._exact_tile("sink", [0 for _ in self.rows], [row.sinks for row in self.rows])
        window = self._exact_tile(
            "window", [row.sinks + row.packed for row in self.rows], [row.window for row in self.rows]
        )
        if not table.shape[2]:
            return PackedCache(sinks, window + new)
        sides = self.pool.sides()
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
            self._check_states(*new)
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
        old, self.rows = self.rows, [self.rows[i] for i in indices]
        for row in self.rows:
            self.pool.retain(row.blocks)
        for row in old:
            self.pool.release(row.blocks)
        index = torch.tensor(indices, dtype=torch.long, device=self.device)
        self._exact = {name: exact.index_select(0, index) for name, exact in self._exact.items()}
        self._trim()

    def _trim(self) -> None:
        moved = self.pool.trim()
        self.rows = [replace(row, blocks=tuple(moved[slot] for slot in row.blocks)) for row in self.rows]
        self._table = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select([i for i in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last slots; `tokens_to_remove` is 0 or negative, as for `DynamicCache`.

        A cut inside a packed block lowers the block's count of valid tokens: nothing is quantized again, and the next
        block starts after it.

        Raises:
            ValueError: `tokens_to_remove` is positive or exceeds the slots held.
        """
        if not -self.slots <= tokens_to_remove <= 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: must be 0 or negative, the slots to remove of {self.slots}"
            )
        if tokens_to_remove and self.is_initialized:
            slots = self.slots + tokens_to_remove
            self.rows = [self._cropped(row, slots) for row in self.rows]
            self.slots = slots
            self._trim()

    def _cropped(self, row: Row, slots: int) -> Row:
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
        self.pool.release(row.blocks[len(counts) :])
        return Row(sinks, left, row.blocks[: len(counts)], tuple(counts), pads)

    def reset(self) -> None:
        """Forget every token and free the memory."""
        self._clear()

    # ---- persistence

    def export(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The tokens held: tensors without slack, and the bookkeeping as JSON types."""
        static = {
            f"static.{side}.{name}": tensor
            for side, pair in (self.static_scales or {}).items()
            for name, tensor in zip(("scale", "zero_point"), pair)
        }
        if not self.is_initialized:
            return static, {"slots": 0}
        live = sorted({slot for row in self.rows for slot in row.blocks})
        moved = {slot: i for i, slot in enumerate(live)}
        tensors = {
            f"{side}.{name}": t[live] for side, fields in self.pool.storage.items() for name, t in fields.items()
        }
        tensors.update({name: exact.clone() for name, exact in self._exact.items()})
        tensors.update(static)
        rows = [asdict(replace(row, blocks=tuple(moved[slot] for slot in row.blocks))) for row in self.rows]
        return tensors, {"slots": self.slots, "widths": self.widths, "rows": rows}

    def restore(self, tensors: dict[str, torch.Tensor], record: dict) -> None:
        """Inverse of `export` for a fresh layer."""
        self._clear()
        self.static_scales = {
            side: (tensors[f"static.{side}.scale"], tensors[f"static.{side}.zero_point"])
            for side in ("keys", "values")
            if f"static.{side}.scale" in tensors
        }
        if not record["slots"]:
            return
        widths = tuple(tuple(side) for side in record["widths"])
        self._allocate(len(record["rows"]), widths, tensors["window_keys"])
        self._exact = {name: tensors[name] for name in self._exact}
        blocks = {
            side: {name: tensors[f"{side}.{name}"] for name in codec.fields()}
            for side, codec in self.pool.codecs.items()
        }
        slots = self.pool.write(blocks)
        self.rows = [
            Row(
                sinks=row["sinks"],
                window=row["window"],
                blocks=tuple(slots[i] for i in row["blocks"]),
                counts=tuple(row["counts"]),
                pads=tuple((start, stop) for start, stop in row["pads"]),
            )
            for row in record["rows"]
        ]
        for row in self.rows:
            self.pool.retain(row.blocks)
        self.pool.release(slots)
        self.slots = record["slots"]

    # ---- size

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, allocated room included."""
        if not self.is_initialized:
            return 0
        exact = sum(t.untyped_storage().nbytes() for t in self._exact.values())
        return self.pool.nbytes + exact + self.block_table().untyped_storage().nbytes() + self._static_nbytes

    @property
    def _static_nbytes(self) -> int:
        return sum(t.nbytes for pair in (self.static_scales or {}).values() for t in pair)

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
        return blocks * self.pool.slot_nbytes + exact + entries + self._static_nbytes


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
            self._check_states(keys, values, real)
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
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: must be 0 or negative, the slots to remove")
        if not self.is_fed or tokens_to_remove == 0:
            return
        removed = torch.full((self.store.batch,), -tokens_to_remove, device=self.device)
        if any(self.pads):
            left = self.slots + tokens_to_remove
            cut = [sum(max(0, stop - max(start, left)) for start, stop in pads) for pads in self.pads]
            removed -= torch.tensor(cut, device=self.device)
            self.pads = [tuple((a, min(b, left)) for a, b in pads if a < left) for pads in self.pads]
        self.store.crop(removed)

    def reset(self) -> None:
        """Forget every token; the allocation stays, for as many rows."""
        if self.is_initialized:
            self.store.clear()
            self.is_fed, self.pads = False, [()] * self.store.batch

    def restore(self, tensors: dict[str, torch.Tensor], record: dict) -> None:
        raise ValueError("restore: a saved cache is loaded without a fixed capacity (KIVILatentCache.load)")

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.store.state.nbytes if self.is_initialized else 0)


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
        layer.given_widths = layer.given_widths or widths
        return layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.layer(layer_idx).update(key_states, value_states, *args, **kwargs)

    def row_tokens(self) -> list[int]:
        """Tokens that each row holds, pads not counted; empty before the first one."""
        return [row.tokens for row in self.layers[self.first_layer].rows] if self.layers else []

    def row_lengths(self) -> list[int] | torch.Tensor:
        """As `row_tokens`; with a fixed capacity `[B]` int32 on the device, which nothing has waited for."""
        return self.layers[self.first_layer].row_lengths() if self.layers else []

    @property
    def first_layer(self) -> int:
        """Index of the first layer that holds tokens: a stage of a pipeline feeds only its own. 0 before."""
        return next((i for i, layer in enumerate(self.layers) if layer.is_initialized), 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx or self.first_layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, layer_idx or self.first_layer)

    def crop(self, tokens_to_remove: int) -> None:
        """As `DynamicCache.crop`, of the layers that hold tokens."""
        for layer in [layer for layer in self.layers if layer.is_initialized] or self.layers:
            layer.crop(tokens_to_remove)

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache, packed as it is, to a safetensors file; an interrupted save leaves an old file whole."""
        tensors, layers = {}, []
        if self.static_scales:
            self.layer(max(self.static_scales))  # so that each set of scales has a layer to be written with
        for i, layer in enumerate(self.layers):
            exported, record = layer.export()
            tensors.update({f"{i}.{name}": tensor for name, tensor in exported.items()})
            layers.append(record)
        header = {
            "version": _FILE_VERSION,
            "scheme": asdict(self.scheme),
            "token_score": "function" if callable(self.token_score) else self.token_score,
            "layer_schemes": {str(i): asdict(scheme) for i, scheme in self.layer_schemes.items()},
            "layers": layers,
        }
        save_tensors(path, tensors, {_FILE_KEY: json.dumps(header)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        token_score: TokenScore | None = None,
    ) -> "KIVILatentCache":
        """Read a cache that `save` has written.

        Args:
            path, device: The file, and where the tensors go.
            backend: As for `KIVILatentCache`.
            token_score: The function of a cache that had one; it is not in the file.

        Raises:
            ValueError: The file is of another kind or version, or `token_score` is missing.
        """
        with safe_open(path, "pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get(_FILE_KEY, "{}"))
            if header.get("version") != _FILE_VERSION:
                raise ValueError(f"{path}: version {header.get('version')} must be {_FILE_VERSION}, a saved cache")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        layer_schemes = {int(i): CacheScheme(**scheme) for i, scheme in header["layer_schemes"].items()}
        if header["token_score"] == "function" and token_score is None:
            raise ValueError(f"{path}: token_score must be given, the function by which the saved cache scored tokens")
        if token_score is not None and header["token_score"] != "function":
            raise ValueError(f"{path}: token_score must not be given, the saved cache had {header['token_score']!r}")
        token_score = token_score or header["token_score"]
        scheme = CacheScheme(**header["scheme"])
        cache = cls(scheme, layer_schemes=layer_schemes, backend=backend, token_score=token_score)
        for i, record in enumerate(header["layers"]):
            restored = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            cache.layer(i).restore(restored, record)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, allocated room included."""
        return sum(layer.nbytes for layer in self.layers)

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
