"""Inputs of attention: queries, the packed blocks of a cache, and the tokens beside them in full precision."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from modules.svd_linear import ALinear, Expansion


@lru_cache(maxsize=256)
def _differences(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)[:, None]


@lru_cache(maxsize=64)
def _kept_counts(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # The differences between rows are the same in every step, in which all rows grow alike.
    least, differences = min(counts), []
    for count in counts:
        differences.append(count - least)
    with torch.inference_mode(False):
        return _differences(tuple(differences), dtype, device) + least


def counts_of_rows(counts: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """`[B, 1]` of the rows' counts, to be read only; kept, since all layers ask for the same.

    The differences between the rows stay on the device from step to step, so that a step copies nothing.
    """
    column = _kept_counts(counts, dtype, device)
    # A fake tensor, of an export say, must not meet later steps.
    if type(column) is not torch.Tensor:
        _kept_counts.cache_clear()
        _differences.cache_clear()
    return column


@dataclass(frozen=True, eq=False)
class Rope:
    """Frequencies `[d/2]` of a rotary embedding and the factor that scales its cosines and sines (yarn)."""

    inv_freq: torch.Tensor
    attention_scaling: float = 1.0

    @cached_property
    def frequencies(self) -> tuple[float, ...]:
        """`inv_freq` on the host."""
        return tuple(self.inv_freq.tolist())

    def on(self, device: torch.device) -> "Rope":
        """The same on a device."""
        return replace(self, inv_freq=self.inv_freq.to(device))

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `x` `[..., d]` to `positions`, which broadcast to `x.shape[:-1]`, in the type of `x`."""
        # Channel i of the lower half turns with channel i of the upper half, as in the library's Llama.
        angle = positions[..., None].to(x.dtype) * self.inv_freq.to(x)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@dataclass(eq=False)  # made in every step: a frozen one takes three times as long
class Tile:
    """A piece of the cache as attention reads it: m runs of t tokens per row, dequantized.

    Attributes:
        keys, values: `[B, m, t, C_k]` and `[B, m, t, C_v]`; one tensor where a latent is both.
        start: `[B, m]` int32, position of the first token of each run.
        count: `[B, m]` int32, how many of its t tokens are valid.
        hidden: Tokens at positions below it are not seen.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    hidden: int = 0

    def masked(self) -> "Tile":
        """The tile with zeros beyond the counts, where tokens of another row, NaN or Inf may lie."""
        offsets = torch.arange(self.keys.shape[2], dtype=torch.int32, device=self.keys.device)
        valid = (offsets < self.count[..., None])[..., None]
        keys = values = self.keys.where(valid, 0)
        if self.values is not self.keys:
            values = self.values.where(valid, 0)
        return replace(self, keys=keys, values=values)

    def of_channels(self, channels: slice) -> "Tile":
        """The tile of some channels of the keys, and of the values."""
        return Tile(self.keys[..., channels], self.values[..., channels], self.start, self.count, self.hidden)


class NewTokens(NamedTuple):
    """The new tokens of a step in one layer, not cached yet.

    Attributes:
        keys, values: `[B, L, C_k]` and `[B, L, C_v]`.
        start: `[B, 1]` int32, tokens that the row holds already.
        count: `[B, 1]` int32, new tokens of the row.
        real: `[B, L]` bool on the CPU, false for pads; `None`: no pads.
        order: `[B, L, 1]` int64, the row's tokens, then its pads; `None`: no pads.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    real: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def tile(self) -> Tile:
        """The tile that attention reads, pads moved behind the row's tokens."""
        keys, values = self.keys, self.values
        # Pads may stand between tokens of the row; attention takes runs without gaps.
        if self.order is not None:
            keys = keys.gather(1, self.order.expand_as(keys))
            values = values.gather(1, self.order.expand_as(values))
        return Tile(keys[:, None], values[:, None], self.start, self.count)


@dataclass(frozen=True, eq=False)
class PackedPart:
    """Channels of one side that every block of a pool stores alike; the format is that of `modules/quant_utils.py`.

    Attributes:
        bits: Width of a code. 16: `packed` holds the states themselves.
        widths: Channels of each head group, n in all; a head group may have none.
        packed: `[slots, words, n]` int32 codes; at 16 bits `[slots, T, n]` states in the type of the model.
        scale: Float. Per channel `[slots, runs, n]`, per token `[slots, T, groups]`, calibrated `[1, 1, n]` float32
            for all slots; `None` at 16 bits.
        zero_point: As `scale`; `None`: symmetric.
        run: Tokens of a block that are packed by themselves and, per channel, share a scale; the last run may be
            shorter. T if a block is one run.
        groups: Per token, the channels of each scale group, within head groups; `None`: per channel.
        trellis: Whether the channels of each head group are a chain of trellis codes (`modules/trellis.py`).
    """

    bits: float
    widths: tuple[int, ...]
    packed: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    run: int = 0
    groups: tuple[int, ...] | None = None
    trellis: bool = False


@dataclass(frozen=True, eq=False)
class PackRecord:
    """How the channels of one width are packed into a block, for kernels that write blocks.

    Attributes:
        prefix: Beginning of the names of its fields: `{prefix}packed`, `{prefix}scale`, `{prefix}zero_point`, or
            `{prefix}states` at 16 bits.
        channels: Channels of the side that it stores, in the order of storage.
        bits: Width of a code. 16: the states themselves.
        runs: (how many, tokens) of the groups of a block that are packed by themselves.
        groups: Per token, the channels of each scale group; `None`: per channel.
        symmetric, range_method: As in `QuantScheme`, resolved.
        scale_dtype: Type of scales and zero points.
        scales: Calibrated scale and zero point `[n]` float32; `None`: they are measured.
    """

    prefix: str
    channels: tuple[int, ...]
    bits: float
    runs: tuple[tuple[int, int], ...] = ()
    groups: tuple[int, ...] | None = None
    symmetric: bool = False
    range_method: str = "minmax"
    scale_dtype: torch.dtype | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PackedSide:
    """Keys or values of the blocks of a pool.

    Attributes:
        read: Slots `[..., n]` to dequantized states `[..., n, T, C]`.
        parts: The storage itself, for kernels; `None`: a quantizer that kernels do not know.
        channels: `[C]` int64 on the CPU, the channel of each stored channel, the parts side by side; `None`: in
            order. Within a part the channels of a head group are consecutive, and the head groups in order.
        token_scale: `[slots, T, head groups]` uint8 (`decode_token_scale`): the scale of each token, by which the
            distance of its states from the middles of the calibrated ranges is multiplied; `None`: there is none.
    """

    read: Callable[[torch.Tensor], torch.Tensor]
    parts: tuple[PackedPart, ...] | None = None
    channels: torch.Tensor | None = None
    token_scale: torch.Tensor | None = None


@dataclass(eq=False)
class PackedCache:
    """All that the new tokens of a step attend to in one layer.

    Attributes:
        before, after: Tokens in full precision, of one run each (m = 1): the sinks; the window and the new tokens.
        keys, values: The packed blocks, one object where a latent is both; `None`: there are none.
        block_length: Tokens of a block, T.
        table: `[3, B, blocks]` int32: slot in the pool, position of the first token, valid tokens; rows with fewer
            blocks end in zeros.
        full: Whether every entry of the table is a block of T valid tokens.
        hidden: Packed tokens at positions below it are not seen: sinks that are in `before` too.
    """

    before: tuple[Tile, ...] = ()
    after: tuple[Tile, ...] = ()
    keys: PackedSide | None = None
    values: PackedSide | None = None
    block_length: int = 0
    table: torch.Tensor | None = None
    full: bool = False
    hidden: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is no tile and no packed block."""
        return not self.before and not self.after and self.keys is None

    @property
    def key_channels(self) -> int:
        """Channels of a key, or of its latent; 0 where only blocks of an unknown format could say."""
        # Every tile has the channels of the cache; without one the blocks say.
        tiles = (*self.before, *self.after)
        if tiles:
            return tiles[0].keys.shape[-1]
        return sum(part.packed.shape[2] for part in self.keys.parts or ())

    def tiles(self, tokens: int = 256) -> Iterator[Tile]:
        """Everything dequantized, in order; of the packed blocks about `tokens` tokens at a time."""
        # Sinks come first, then the packed blocks, then the window and the new tokens.
        yield from self.before
        if self.keys is not None:
            # As many blocks at a time as have that many tokens, so that little is dequantized at once.
            step = max(1, tokens // self.block_length)
            for slots, start, count in self.table.split(step, dim=2):
                keys = values = self.keys.read(slots)
                if self.values is not self.keys:
                    values = self.values.read(slots)
                tile = Tile(keys, values, start, count, self.hidden)
                # Rows with fewer blocks, and blocks that a crop has cut, end before the tile does.
                if not self.full:
                    tile = tile.masked()
                yield tile
        yield from self.after


@dataclass(eq=False)  # made in every layer of a step, as a `Tile`
class LatentQuery:
    """Queries of the new tokens of a step in one layer, and how they meet the latents of a cache.

    Attributes:
        states: `[B, H_q, L, d]` before RoPE.
        positions: `[B, L]` int64, position of each query in its row; it sees the keys whose positions are not larger.
        expand_keys: Key latents to keys before RoPE; `None`: the keys themselves are cached.
        value_widths: Channels of each head group of the value latents.
        rope: Rotary embedding; `None`: cached keys and queries are rotated already.
        scaling: Factor on the logits.
        sliding_window: A query sees this many positions at most, its own included; `None`: all up to its own.
    """

    states: torch.Tensor
    positions: torch.Tensor
    expand_keys: ALinear | Expansion | None
    value_widths: tuple[int, ...]
    rope: Rope | None
    scaling: float
    sliding_window: int | None = None

    def key_layout(self, cache: PackedCache) -> tuple[int, tuple[int, ...]]:
        """Number of key heads, and the channels of each head group of the cached keys."""
        if self.expand_keys is not None:
            return self.expand_keys.num_heads, self.expand_keys.ranks
        size = self.states.shape[-1]
        heads = cache.key_channels // size
        # Without an expansion every head is a group of its own.
        return heads, (size,) * heads
