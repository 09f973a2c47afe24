r"""Rows of a cache layer with a fixed capacity, all of whose bookkeeping lives on the device.

Everything is allocated when the first tokens come: for each row the packed blocks that `capacity` tokens can fill, the
sinks and a window. What changes from step to step are the contents of these tensors, never their shapes or addresses,
and no operation waits for the device, so CUDA graphs and `torch.compile` can take a step.

    state   [4, B] int32        tokens in the sinks, position of the window's first token, tokens in the window, blocks
    table   [3, B, N] int32     of each block its slot (constant: row b owns the slots bN … bN + N - 1), the position of
                                its first token and its valid tokens; 0 and 0 for blocks yet to come

A step is the same operations whatever the rows hold: blocks that may fall due are always quantized, and what is not due
is written to a spare slot. (A CPU, which waits for nobody, only writes the tokens where no block is due; so do the
Triton kernels.) The bytes are those that `KIVILatentLayer` stores for the same tokens. In a compiled graph the append
is one node.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch.library import custom_op

from configuration_alrd_llama import QuantScheme
from modules.block_pool import BlockPool
from modules.codecs import BlockCodec
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

    @property
    def full_message(self) -> str:
        return (
            f"capacity={self.capacity}: a row of the cache would exceed it (or the {self.blocks} blocks that it makes "
            "room for, where crops have cut blocks short); make the cache with a larger capacity"
        )

    def due(self, new_tokens: int) -> int:
        """Blocks of a row that fall due at most when this many tokens come."""
        return (self.block_length - 1 + new_tokens) // self.block_length


@dataclass(frozen=True, eq=False)
class Plan:
    """What a step must know besides the tensors of a `FixedStore`; shared by its copies.

    Attributes:
        room: Sizes of a row.
        codecs: Quantizer of each side, `{"keys": …, "values": …}`.
        names: Names of the store's tensors, in the order in which a compiled graph passes them.
        fused: As `append_tokens`, by kernels: for at most `MAX_QUERY_LENGTH` tokens per row, none of them a pad.
    """

    room: Room
    codecs: dict[str, BlockCodec]
    names: tuple[str, ...]
    fused: Callable | None = None

    def __deepcopy__(self, memo) -> "Plan":
        return self

    def append(self, tensors: dict[str, torch.Tensor], keys, values, real: torch.Tensor | None) -> None:
        if self.fused is not None and real is None and keys.shape[1] <= MAX_QUERY_LENGTH:
            self.fused(tensors, keys, values)
        else:
            append_tokens(self, tensors, keys, values, real)


#: Plans by the name under which a compiled graph refers to them.
_PLANS: WeakValueDictionary[str, Plan] = WeakValueDictionary()

_count = itertools.count()


def _shared_plan(codecs: dict[str, BlockCodec], room: Room, device: torch.device, names) -> tuple[str, Plan]:
    """The plan of such stores and its name: one for all that are alike, so that a graph serves the next cache too."""
    alike = [(c.scheme, c.widths, c.dtype, c.scale_dtype, c.backend.name) for c in codecs.values()]
    static = any(codec.scheme.static for codec in codecs.values())  # scales of their own
    name = f"{room} {device} {alike} {next(_count) if static else ''}"
    plan = _PLANS.get(name)
    if plan is None:
        fused = None
        if codecs["keys"].backend.name == "triton":
            from modules.kernels.append_triton import FusedAppend

            fused = FusedAppend(room, codecs, device)
        plan = _PLANS[name] = Plan(room, codecs, names, fused)
    return name, plan


# One node of a graph: a compiler that kept the casts of `quantize` in float32 would change the codes. The name is this
# module's own, since code from a hub may be loaded beside it, and the plans of one are unknown to the other.
@custom_op(re.sub(r"\W", "_", __name__) + "::append_tokens", mutates_args=("tensors",))
def _append_in_graph(
    tensors: list[torch.Tensor], keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None, plan: str
) -> None:
    known = _PLANS[plan]
    known.append(dict(zip(known.names, tensors, strict=True)), keys, values, real)


def append_tokens(
    plan: Plan, tensors: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None
) -> None:
    """`FixedStore.append` in plain PyTorch, on the tensors of a store."""
    room, length, block = plan.room, keys.shape[1], plan.room.block_length
    state, table = tensors["state"], tensors["table"]
    place = partial(torch.arange, dtype=torch.int32, device=keys.device)
    new, count = {"keys": keys, "values": values}, torch.full_like(state[0], length)
    if real is not None:
        # Pads go behind the row's tokens; they may be NaN, and nothing that is not finite stays beyond a count.
        real = real.to(keys.device)
        count = real.sum(1, dtype=torch.int32)
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)[..., None]
        kept = (place(length) < count[:, None])[..., None]
        new = {side: x.gather(1, order.expand_as(x)).where(kept, 0) for side, x in new.items()}

    sinks, start, window, blocks = state
    to_sinks = torch.where((window == 0) & (blocks == 0), (room.sink_length - sinks).minimum(count), 0)
    total = window + count - to_sinks
    flushed = (total - room.residual_length).clamp(min=0) // block
    fits = (start + to_sinks + total <= room.capacity) & (blocks + flushed <= room.blocks)
    require(fits.all(), room.full_message)
    if keys.device.type == "cpu" and real is None and not torch.logical_or(flushed, to_sinks).any():
        at = (window[:, None] + place(length)).long()[..., None]
        for side, x in new.items():
            tensors[f"window_{side}"].scatter_(1, at.expand_as(x), x)
        state[2] += length
        return

    # The window and the new tokens behind it, without gaps.
    source = place(room.window + length)
    source = torch.where(source < window[:, None], source, source + (room.window - window + to_sinks)[:, None])
    source = source.clamp(max=room.window + length - 1).long()[..., None]
    streams = {}
    for side, x in new.items():
        stream = torch.cat([tensors[f"window_{side}"][:, : room.window], x], dim=1)
        streams[side] = stream.gather(1, source.expand(-1, -1, x.shape[2]))
    _flush(plan, tensors, streams, flushed, room.due(length))

    kept = (place(room.window) + (flushed * block)[:, None]).clamp(max=room.window + length - 1).long()[..., None]
    index = place(room.sink_length) - sinks[:, None]
    taken = ((index >= 0) & (index < to_sinks[:, None]))[..., None]
    exact = {}
    for side, x in new.items():
        exact[f"window_{side}"] = streams[side].gather(1, kept.expand(-1, -1, x.shape[2]))
        sink = tensors[f"sink_{side}"]
        first = x.gather(1, index.clamp(0, length - 1).long()[..., None].expand_as(sink))
        exact[f"sink_{side}"] = torch.where(taken, first, sink)
    begin, nth = start + to_sinks, place(room.blocks) - blocks[:, None]
    written = (nth >= 0) & (nth < flushed[:, None])
    starts = torch.where(written, begin[:, None] + nth * block, table[1])
    counts = torch.where(written, block, table[2])
    packed = flushed * block
    counters = torch.stack([sinks + to_sinks, begin + packed, total - packed, blocks + flushed])
    # Nothing that is read has changed so far, and from here on nothing takes memory: all of it is done, or none.
    for name, x in exact.items():
        tensors[name][:, : x.shape[1]] = x
    table[1], table[2] = starts, counts
    state.copy_(counters)


def _flush(plan: Plan, tensors, streams: dict[str, torch.Tensor], flushed: torch.Tensor, candidates: int) -> None:
    """Quantize the first blocks of the streams `[B, tokens, C]`, those that are due into the rows' next slots."""
    room, table, blocks = plan.room, tensors["table"], tensors["state"][3]
    nth = torch.arange(candidates, dtype=torch.int32, device=flushed.device)
    due = nth < flushed[:, None]
    following = (blocks[:, None] + nth).clamp(max=room.blocks - 1).long()
    slots = torch.where(due, table[0].gather(1, following), table[0].numel()).flatten().long()
    encoded = {}
    for side, x in streams.items():
        states = x[:, : candidates * room.block_length].unflatten(1, (candidates, -1)).where(due[..., None, None], 0)
        fields = plan.codecs[side].encode(states.flatten(0, 1))
        encoded |= {f"{side}.{name}": tensor for name, tensor in fields.items()}
    for name, tensor in encoded.items():
        tensors[name].index_copy_(0, slots, tensor)


class FixedStore:
    """The tokens of one layer. After the constructor no method waits for the device but `read_rows`.

    Args:
        codecs: Quantizer of each side, `{"keys": …, "values": …}`.
        room: Sizes of a row.
        batch: Rows, B.
        dtype, device: Of the states.
    """

    def __init__(self, codecs: dict[str, BlockCodec], room: Room, batch: int, dtype: torch.dtype, device: torch.device):
        self.room, self.batch = room, batch
        self.pool = BlockPool(codecs, device, batch * room.blocks + 1)
        self.pool.sides()  # now, so that a compiled step finds them made
        self.state = torch.zeros((4, batch), dtype=torch.int32, device=device)
        self.table = torch.zeros((3, batch, room.blocks), dtype=torch.int32, device=device)
        self.table[0] = torch.arange(batch * room.blocks, dtype=torch.int32, device=device).view(batch, -1)
        self._origin = torch.zeros((batch, 1), dtype=torch.int32, device=device)
        # The kernels put the new tokens of a step behind the window before they take blocks from its front.
        rooms = {"sink": room.sink_length, "window": room.window + MAX_QUERY_LENGTH}
        self.exact = {
            f"{name}_{side}": torch.zeros((batch, length, sum(codecs[side].widths)), dtype=dtype, device=device)
            for name, length in rooms.items()
            for side in SIDES
        }
        self.stored = {f"{side}.{n}": t for side, fields in self.pool.storage.items() for n, t in fields.items()}
        #: For the kernels: whether all values could be quantized, and no row has exceeded its capacity.
        self.ok = torch.ones(2, dtype=torch.bool, device=device)
        self.tensors = {"state": self.state, "table": self.table, "ok": self.ok} | self.exact | self.stored
        self.plan_name, self.plan = _shared_plan(codecs, room, device, tuple(self.tensors))
        if not torch.compiler.is_compiling():
            for tensor in (self._origin, *self.tensors.values()):
                torch._dynamo.mark_static_address(tensor)

    @property
    def lengths(self) -> torch.Tensor:
        """`[B]` int32, tokens of each row."""
        return self.state[1] + self.state[2]

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Store new tokens `[B, L, C]` and pack the blocks that fall due; `real` `[B, L]` bool: false for pads.

        Raises:
            ValueError: A row would exceed the capacity, or a block that is due holds what cannot be quantized (see
                `check_scale`). On a CPU the rows are then as they were before; on an accelerator the error surfaces
                at a later call (`require`), and the rows are not usable.
        """
        if torch.compiler.is_compiling():
            _append_in_graph(list(self.tensors.values()), keys, values, real, self.plan_name)
        else:
            self.plan.append(self.tensors, keys, values, real)

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
        sinks, start = self.state[:2]
        left = start + self.state[2] - removed.to(self.state)
        require((left >= 0).all(), "tokens_to_remove: must be no more tokens than the rows hold")
        window = (left - start).clamp(min=0)
        counts = (left[:, None] - self.table[1]).clamp(min=0).minimum(self.table[2])
        table = torch.stack([torch.where(counts > 0, self.table[1], 0), counts])
        state = torch.stack([sinks.minimum(left), start.minimum(left), window, (counts > 0).sum(1)])
        empty = {}
        for name, exact in self.exact.items():
            count = state[0 if name.startswith("sink") else 2]
            place = torch.arange(exact.shape[1], dtype=torch.int32, device=exact.device)
            empty[name] = (place >= count[:, None])[..., None]
        # As in `append_tokens`: what takes memory is done.
        self.table[1:].copy_(table)
        self.state.copy_(state)
        for name, exact in self.exact.items():
            exact.masked_fill_(empty[name], 0)

    def select(self, indices: torch.Tensor) -> None:
        """Make row i a copy of row `indices[i]`; its packed bytes too, for every row owns its slots."""
        indices = indices.to(self.state.device)
        by_row = [t[:-1].unflatten(0, (self.batch, -1)) for t in self.stored.values()]
        tensors = (self.state.T, *self.table[1:], *self.exact.values(), *by_row)
        # The one piece of memory that it takes.
        room = torch.empty(max(t.nbytes for t in tensors), dtype=torch.uint8, device=self.state.device)
        for tensor in tensors:
            selected = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensor.copy_(torch.index_select(tensor, 0, indices, out=selected))

    def clear(self) -> None:
        """Forget every token; what is allocated stays."""
        for tensor in (self.state, self.table[1:], *self.exact.values()):
            tensor.zero_()
        self.ok.fill_(True)


__all__ = ["FixedStore", "Room", "append_tokens", "check_fixed"]
