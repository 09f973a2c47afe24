"""What attention reads: the packed blocks of a cache and the tokens beside them that are in full precision."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Rope:
    """Frequencies `[d/2]` of a rotary embedding and the factor that scales its cosines and sines (yarn)."""

    inv_freq: torch.Tensor
    attention_scaling: float = 1.0

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `x` `[..., d]` to `positions`, which broadcast to `x.shape[:-1]`, in the type of `x`."""
        angle = positions[..., None].to(x.dtype) * self.inv_freq.to(x)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@dataclass(frozen=True)
class Tile:
    """A piece of the cache as attention reads it: m runs of t tokens per row, dequantized.

    Attributes:
        keys, values: `[B, m, t, C_k]` and `[B, m, t, C_v]`.
        start: `[B, m]` int32, position of the first token of each run.
        count: `[B, m]` int32, how many of its t tokens are valid.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor

    def masked(self) -> "Tile":
        """The tile with zeros beyond the counts: what lies there is another row's, and may be NaN or Inf."""
        place = torch.arange(self.keys.shape[2], dtype=torch.int32, device=self.keys.device)
        valid = (place < self.count[..., None])[..., None]
        return replace(self, keys=self.keys.where(valid, 0), values=self.values.where(valid, 0))


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
    """

    bits: float
    widths: tuple[int, ...]
    packed: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    run: int = 0
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class PackedSide:
    """Keys or values of the blocks of a pool.

    Attributes:
        read: Slots `[..., n]` to dequantized states `[..., n, T, C]`.
        parts: The storage itself, for kernels; `None`: of a quantizer that they do not know.
        channels: `[C]` int64 on the CPU, the channel of each stored channel, the parts side by side; `None`: its own
            place. Within a part the channels of a head group are consecutive, and the head groups in order.
    """

    read: Callable[[torch.Tensor], torch.Tensor]
    parts: tuple[PackedPart, ...] | None = None
    channels: torch.Tensor | None = None


@dataclass(frozen=True)
class PackedCache:
    """All that the new tokens of a step attend to in one layer.

    Attributes:
        before, after: Tokens in full precision, of one run each (m = 1): the sinks; the window and the new tokens.
        keys, values: The packed blocks; `None`: there are none.
        block_length: Tokens of a block, T.
        table: `[3, B, blocks]` int32: slot in the pool, position of the first token, valid tokens; rows with fewer
            blocks end in zeros.
        full: Whether every entry of the table is a block of T valid tokens.
    """

    before: tuple[Tile, ...] = ()
    after: tuple[Tile, ...] = ()
    keys: PackedSide | None = None
    values: PackedSide | None = None
    block_length: int = 0
    table: torch.Tensor | None = None
    full: bool = False

    def tiles(self, tokens: int = 256) -> Iterator[Tile]:
        """Everything dequantized, in order; of the packed blocks about `tokens` tokens at a time."""
        yield from self.before
        if self.keys is not None:
            slots, start, count = self.table
            step = max(1, tokens // self.block_length)
            for j in range(0, slots.shape[1], step):
                piece = slice(j, j + step)
                keys, values = (side.read(slots[:, piece]) for side in (self.keys, self.values))
                tile = Tile(keys, values, start[:, piece], count[:, piece])
                yield tile if self.full else tile.masked()
        yield from self.after


__all__ = ["PackedCache", "PackedPart", "PackedSide", "Rope", "Tile"]
