r"""Rows of a cache layer with a fixed capacity, all of whose bookkeeping lives on the device.

Everything is allocated when the first tokens come: for each row the packed blocks that `capacity` tokens can fill, the
sinks and a window. What changes from step to step are the contents of these tensors, never their shapes or addresses,
and no operation waits for the device, so CUDA graphs and `torch.compile` can take a step.

    state   [4, B] int32        tokens in the sinks, position of the window's first token, tokens in the window, blocks
    table   [3, B, N] int32     of each block its slot (constant: row b owns the slots bN … bN + N - 1), the position of
                                its first token and its valid tokens; 0 and 0 for blocks yet to come

A step is the same operations whatever the rows hold. Blocks that may fall due are always quantized (on a CPU that is
not compiled for, only if one is due; by the Triton kernels, only those that are), and what is not due is written to a
spare slot. The bytes are those that `KIVILatentLayer` stores for the same tokens.
"""

from dataclasses import dataclass

import torch

from configuration_alrd_llama import QuantScheme
from modules.block_pool import BlockPool
from modules.codecs import BlockCodec, ExactCodec, Fields, StaticCodec, TieredCodec, UniformCodec
from modules.kernels import MAX_QUERY_LENGTH
from modules.kernels.packed import PackedCache, Tile
from modules.quant_utils import require

SIDES = ("keys", "values")


def check_fixed(name: str, scheme: QuantScheme) -> None:
    """Raise a `ValueError` for a scheme of the side `name` that a cache of fixed capacity does not store."""
    for field, refused in (
        ("quantizer", scheme.quantizer is not None),
        ("protected", bool(scheme.protected)),
        ("rotation", scheme.rotation),
        ("bits", scheme.bits == 1.5 and scheme.tiers is None),
    ):
        if refused:
            raise ValueError(
                f"capacity: {name} have {field}={getattr(scheme, field)!r}, which a cache of fixed capacity does not "
                "store; leave out capacity, or choose another width or scheme"
            )


@dataclass(frozen=True)
class Room:
    """Sizes of a row, in tokens: `CacheScheme`'s window, sinks and blocks, and what the row can hold in all."""

    residual_length: int
    block_length: int
    sink_length: int
    capacity: int

    @property
    def blocks(self) -> int:
        """Packed blocks of a row that is full; at least one, so that no shape is empty."""
        return max(1, (self.capacity - self.sink_length - self.residual_length) // self.block_length)

    @property
    def window(self) -> int:
        """Tokens that the window holds at most after a step."""
        return self.residual_length + self.block_length - 1

    def due(self, new_tokens: int) -> int:
        """Blocks of a row that fall due at most when this many tokens come."""
        return (self.block_length - 1 + new_tokens) // self.block_length


def leaves(codec: BlockCodec, fields: Fields) -> list[tuple[BlockCodec, tuple[int, ...], Fields]]:
    """The quantizers without tiers of a side, each with its channels and its tensors of all slots."""
    if not isinstance(codec, TieredCodec):
        return [(codec, tuple(range(sum(codec.widths))), fields)]
    found = []
    for name, inner in codec.codecs.items():
        own = {n.removeprefix(f"{name}."): t for n, t in fields.items() if n.startswith(f"{name}.")}
        found.append((inner, tuple(codec.channels[name].tolist()), own))
    return found


class FixedStore:
    """The tokens of one layer. After the constructor no method waits for the device but `read_rows`.

    Args:
        codecs: Quantizer of each side, `{"keys": …, "values": …}`.
        room: Sizes of a row.
        batch: Rows, B.
        dtype, device: Of the states.
    """

    def __init__(
        self, codecs: dict[str, BlockCodec], room: Room, batch: int, dtype: torch.dtype, device: torch.device
    ):
        self.room, self.batch = room, batch
        self.pool = BlockPool(codecs, device, batch * room.blocks + 1)
        self.state = torch.zeros((4, batch), dtype=torch.int32, device=device)
        self.table = torch.zeros((3, batch, room.blocks), dtype=torch.int32, device=device)
        self.table[0] = torch.arange(batch * room.blocks, device=device).view(batch, -1)
        self._origin = torch.zeros((batch, 1), dtype=torch.int32, device=device)
        # The kernels put the new tokens of a step behind the window before they take blocks from its front.
        rooms = {"sink": room.sink_length, "window": room.window + MAX_QUERY_LENGTH}
        self.exact = {
            f"{name}_{side}": torch.zeros((batch, length, sum(codecs[side].widths)), dtype=dtype, device=device)
            for name, length in rooms.items()
            for side in SIDES
        }
        self._fused = None
        if codecs["keys"].backend.name == "triton":
            from modules.kernels.append_triton import FusedAppend

            self._fused = FusedAppend(room, self._flat_leaves(), self.table, device)
        if not torch.compiler.is_compiling():
            for tensor in self._tensors():
                torch._dynamo.mark_static_address(tensor)

    def _flat_leaves(self):
        return [(i, *leaf) for i, s in enumerate(SIDES) for leaf in leaves(self.pool.codecs[s], self.pool.storage[s])]

    def _tensors(self) -> list[torch.Tensor]:
        stored = [t for fields in self.pool.storage.values() for t in fields.values()]
        return [self.state, self.table, self._origin, *self.exact.values(), *stored]

    @property
    def lengths(self) -> torch.Tensor:
        """`[B]` int32, tokens of each row."""
        return self.state[1] + self.state[2]

    # ---- appending

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Store new tokens `[B, L, C]` and pack the blocks that fall due; `real` `[B, L]` bool: false for pads.

        Raises:
            ValueError: A row would exceed the capacity, or a block that is due holds what cannot be quantized (see
                `check_scale`). On a CPU the rows are then as they were before; on an accelerator the error surfaces
                at a later call (`require`), in a compiled graph it is a `RuntimeError`, and the rows are not usable.
        """
        if self._fused is not None and real is None and keys.shape[1] <= MAX_QUERY_LENGTH:
            self._fused(keys, values, self.state, self.table, self.exact)
            return
        room, length, block = self.room, keys.shape[1], self.room.block_length
        new, count = {"keys": keys, "values": values}, torch.full_like(self.state[0], length)
        if real is not None:
            # Pads go behind the row's tokens; they may be NaN, and nothing that is not finite stays beyond a count.
            real = real.to(keys.device)
            count = real.sum(1, dtype=torch.int32)
            order = (~real).to(torch.int8).argsort(dim=1, stable=True)[..., None]
            kept = (self._arange(length) < count[:, None])[..., None]
            new = {side: x.gather(1, order.expand_as(x)).where(kept, 0) for side, x in new.items()}

        sinks, start, window, blocks = self.state
        to_sinks = torch.where((window == 0) & (blocks == 0), (room.sink_length - sinks).minimum(count), 0)
        total = window + count - to_sinks
        flushed = (total - room.residual_length).clamp(min=0) // block
        require(
            ((start + to_sinks + total <= room.capacity) & (blocks + flushed <= room.blocks)).all(), self.full_message
        )

        # The window and the tokens behind it, without gaps.
        place = self._arange(room.window + length)
        source = torch.where(place < window[:, None], place, place + (room.window - window + to_sinks)[:, None])
        source = source.clamp(max=room.window + length - 1).long()[..., None]
        streams = {}
        for side, x in new.items():
            stream = torch.cat([self.exact[f"window_{side}"][:, : room.window], x], dim=1)
            streams[side] = stream.gather(1, source.expand(-1, -1, x.shape[2]))
        self._flush(streams, blocks, flushed, length)

        kept = (self._arange(room.window) + (flushed * block)[:, None]).clamp(max=room.window + length - 1)
        index = self._arange(room.sink_length) - sinks[:, None]
        taken = ((index >= 0) & (index < to_sinks[:, None]))[..., None]
        for side, x in new.items():
            stream, sink = streams[side], self.exact[f"sink_{side}"]
            left = stream.gather(1, kept.long()[..., None].expand(-1, -1, x.shape[2]))
            self.exact[f"window_{side}"][:, : room.window].copy_(left)
            source = index.clamp(0, max(length - 1, 0)).long()[..., None].expand_as(sink)
            sink.copy_(torch.where(taken, x.gather(1, source), sink) if length else sink)
        begin = start + to_sinks
        block_index = self._arange(room.blocks) - blocks[:, None]
        written = (block_index >= 0) & (block_index < flushed[:, None])
        self.table[1].copy_(torch.where(written, begin[:, None] + block_index * block, self.table[1]))
        self.table[2].copy_(torch.where(written, block, self.table[2]))
        packed = flushed * block
        self.state.copy_(torch.stack([sinks + to_sinks, begin + packed, total - packed, blocks + flushed]))

    @property
    def full_message(self) -> str:
        return (
            f"capacity={self.room.capacity}: a row of the cache would exceed it (or the {self.room.blocks} blocks that "
            "it makes room for, where crops have cut blocks short); make the cache with a larger capacity"
        )

    def _flush(self, streams: dict[str, torch.Tensor], blocks, flushed, length: int) -> None:
        """Quantize the first blocks of the streams `[B, tokens, C]`, those that are due into the rows' next slots."""
        candidates, block = self.room.due(length), self.room.block_length
        nth = self._arange(candidates)
        due = nth < flushed[:, None]
        if due.device.type == "cpu" and not torch.compiler.is_compiling() and not due.any():
            return
        states = {
            side: x[:, : candidates * block].unflatten(1, (candidates, block)).where(due[..., None, None], 0)
            for side, x in streams.items()
        }
        encoded = self.pool.encode({side: x.flatten(0, 1) for side, x in states.items()})
        following = (blocks[:, None] + nth).clamp(max=self.room.blocks - 1).long()
        slots = torch.where(due, self.table[0].gather(1, following), self.batch * self.room.blocks).flatten().long()
        for side, fields in encoded.items():
            for name, tensor in fields.items():
                self.pool.storage[side][name].index_copy_(0, slots, tensor)

    def _arange(self, length: int) -> torch.Tensor:
        return torch.arange(length, dtype=torch.int32, device=self.state.device)

    # ---- reading

    def packed(self, *new: Tile) -> PackedCache:
        """As `KIVILatentLayer.packed`. Tokens beyond the counts are finite in the tiles, and anything in the blocks."""
        tiles = []
        for name, length, start, count in (
            ("sink", self.room.sink_length, self._origin, self.state[0]),
            ("window", self.room.window, self.state[1, :, None], self.state[2]),
        ):
            states = (self.exact[f"{name}_{side}"][:, None, :length] for side in SIDES)
            tiles.append((Tile(*states, start, count[:, None]),) if length else ())
        return PackedCache(tiles[0], tiles[1] + new, *self.pool.sides(), self.room.block_length, self.table)

    def read_rows(self) -> list[tuple[int, int, list[int], list[int]]]:
        """Of each row the tokens in its sinks and window, the slots of its blocks and their tokens; waits."""
        table = self.table.tolist()
        return [
            (sinks, window, table[0][i][:blocks], table[2][i][:blocks])
            for i, (sinks, _, window, blocks) in enumerate(zip(*self.state.tolist(), strict=True))
        ]

    # ---- editing

    def crop(self, removed: torch.Tensor) -> None:
        """Remove the last `removed` `[B]` tokens of each row."""
        sinks, start, window, blocks = self.state
        left = start + window - removed.to(self.state)
        require((left >= 0).all(), "tokens_to_remove: must be no more tokens than the rows hold")
        window = (left - start).clamp(min=0)
        counts = (left[:, None] - self.table[1]).clamp(min=0).minimum(self.table[2])
        self.table[1:].copy_(torch.stack([torch.where(counts > 0, self.table[1], 0), counts]))
        self.state.copy_(torch.stack([sinks.minimum(left), start.minimum(left), window, (counts > 0).sum(1)]))
        for name, count in (("sink", self.state[0]), ("window", self.state[2])):
            for side in SIDES:
                exact = self.exact[f"{name}_{side}"]
                exact.masked_fill_((self._arange(exact.shape[1]) >= count[:, None])[..., None], 0)

    def select(self, indices: torch.Tensor) -> None:
        """Make row i a copy of row `indices[i]`; its packed bytes too, for every row owns its slots."""
        indices = indices.to(self.state.device)
        by_row = [x.unflatten(0, (self.batch, -1)) for x in (s[:-1] for s in self._stored())]
        rows = [self.state.T, self.table[1], self.table[2], *self.exact.values(), *by_row]
        for tensor in rows:
            tensor.copy_(tensor.index_select(0, indices))

    def _stored(self) -> list[torch.Tensor]:
        return [t for fields in self.pool.storage.values() for t in fields.values()]

    def clear(self) -> None:
        """Forget every token; what is allocated stays."""
        for tensor in (self.state, self.table[1:], *self.exact.values()):
            tensor.zero_()


__all__ = ["FixedStore", "Room", "check_fixed", "leaves"]
