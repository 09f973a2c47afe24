r"""Rows of a cache layer with a fixed capacity, all of whose bookkeeping lives on the device.

Everything is allocated when the first tokens come: for each row the packed blocks that `capacity` tokens can fill, the
sinks and a window. What changes from step to step are the contents of these tensors, never their shapes or addresses,
and no operation waits for the device, so CUDA graphs and `torch.compile` can take a step.

    state   [4, B] int32        tokens in the sinks, position of the window's first token, tokens in the window, blocks
    table   [3, B, N] int32     of each block its slot (constant: row b owns the slots bN … bN + N - 1), the position of
                                its first token and its valid tokens; 0 and 0 for blocks yet to come

A step is the same operations whatever the rows hold: blocks that may fall due are always quantized, and what is not due
is written to a spare slot. (A CPU, which waits for nobody, only writes the tokens where no block is due; so do the
Triton kernels.) The bytes are those that `KIVILatentLayer` stores for the same tokens. In a compiled graph attention
and append of a layer are one node.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch.library import custom_op

from modules.cache.codecs import BlockCodec
from modules.cache.exact import ExactTokens
from modules.cache.pool import BlockPool
from modules.cache.rows import Row
from modules.cache.scheme import SinkChannels
from modules.kernels import MAX_QUERY_LENGTH, Backend
from modules.kernels.packed import LatentQuery, NewTokens, PackedCache, Rope, Tile
from modules.quant_utils import require
from modules.svd_linear import Expansion


@dataclass(frozen=True)
class RowLayout:
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
        layout: Sizes of a row.
        codecs: Quantizer of each side, `{"keys": …, "values": …}`.
    """

    layout: RowLayout
    codecs: dict[str, BlockCodec]

    def __deepcopy__(self, memo) -> "Plan":
        return self


#: Plans by the name under which a compiled graph refers to them.
_PLANS: WeakValueDictionary[str, Plan] = WeakValueDictionary()

_count = itertools.count()


def _shared_plan(codecs: dict[str, BlockCodec], layout: RowLayout, device: torch.device) -> tuple[str, Plan]:
    """The plan of such stores and its name: one for all that are alike, so that a graph serves the next cache too."""
    alike = [(c.scheme, c.widths, c.dtype, c.scale_dtype, c.backend.name) for c in codecs.values()]
    static = any(codec.scheme.static for codec in codecs.values())  # scales of their own
    name = f"{layout} {device} {alike} {next(_count) if static else ''}"
    return name, _PLANS.setdefault(name, Plan(layout, codecs))


# Nodes of a graph: a compiler that kept the casts of `quantize` in float32 would change the codes. The names are this
# module's own, since code from a hub may be loaded beside it, and the plans of one are unknown to the other.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@custom_op(f"{_NAMESPACE}::append_tokens", mutates_args=("tensors",))
def _append_in_graph(
    tensors: list[torch.Tensor], keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None, plan: str
) -> None:
    FixedStore.of(tensors, plan).append(keys, values, real)


def _lengths(state: torch.Tensor) -> torch.Tensor:
    return state[1] + state[2]


# A node too: Inductor would read the state again where a later layer asks, after the first one has changed it.
_lengths_in_graph = custom_op(f"{_NAMESPACE}::lengths", _lengths, mutates_args=())


@_lengths_in_graph.register_fake
def _(state: torch.Tensor) -> torch.Tensor:
    return state.new_empty(state.shape[1:])


@custom_op(f"{_NAMESPACE}::attend_and_append", mutates_args=("tensors",))
def _attend_in_graph(
    tensors: list[torch.Tensor],
    query: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    real: torch.Tensor | None,
    order: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    ranks: list[int],
    num_heads: int,
    value_widths: list[int],
    inv_freq: torch.Tensor,
    attention_scaling: float,
    scaling: float,
    sliding_window: int | None,
    plan: str,
) -> torch.Tensor:
    expand_keys = None if weight is None else Expansion(weight, bias, tuple(ranks), num_heads)
    rope = Rope(inv_freq, attention_scaling)
    return FixedStore.of(tensors, plan).attend_and_append(
        LatentQuery(query, positions, expand_keys, tuple(value_widths), rope, scaling, sliding_window),
        NewTokens(keys, values, start, count, real, order),
    )


@_attend_in_graph.register_fake
def _(tensors: list[torch.Tensor], query: torch.Tensor, *arguments) -> torch.Tensor:
    value_widths = arguments[11]
    shape = (*query.shape[:3], max(value_widths))
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _beyond(count: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`[B, N, 1]` bool: places of `[B, N, C]` tokens beyond the row's count `[B]`."""
    place = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    return (place >= count[:, None])[..., None]


def _tokens_first(states: dict[str, torch.Tensor], real: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """States `[B, L, C]` by side with the pads, false in `real`, behind the tokens of each row, and zero."""
    if real is None:
        return states
    ordered = {}
    for side, x in states.items():
        # Pads may be NaN, and nothing that is not finite stays beyond a count.
        own = real[:, : x.shape[1]].to(x.device)
        order = (~own).to(torch.int8).argsort(dim=1, stable=True)[..., None]
        kept = torch.arange(x.shape[1], dtype=torch.int64, device=x.device) < own.sum(1, keepdim=True)
        ordered[side] = x.gather(1, order.expand_as(x)).where(kept[..., None], 0)
    return ordered


def append_tokens(
    plan: Plan,
    tensors: dict[str, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor | None,
    real: torch.Tensor | None,
    dense: dict[str, torch.Tensor] | None = None,
) -> None:
    """`FixedStore.append` in plain PyTorch, on the tensors of a store."""
    layout, length, block = plan.layout, keys.shape[1], plan.layout.block_length
    state, table = tensors["state"], tensors["table"]
    place = partial(torch.arange, dtype=torch.int32, device=keys.device)
    new, count = {"keys": keys}, torch.full_like(state[0], length)
    if values is not None:
        new["values"] = values
    if real is not None:
        count = real.to(keys.device).sum(1, dtype=torch.int32)
    new = _tokens_first(new, real)
    first = new if dense is None else _tokens_first(dense, real)

    # Each row counts for itself: what becomes sinks, what the window grows to, which blocks leave it.
    sinks, start, window, blocks = state
    to_sinks = torch.where((window == 0) & (blocks == 0), (layout.sink_length - sinks).minimum(count), 0)
    total = window + count - to_sinks
    flushed = (total - layout.residual_length).clamp(min=0) // block
    fits = (start + to_sinks + total <= layout.capacity) & (blocks + flushed <= layout.blocks)
    require(fits.all(), layout.full_message)
    # Where the counts are known at no cost, a step without a block due only writes its tokens.
    if keys.device.type == "cpu" and real is None and not torch.logical_or(flushed, to_sinks).any():
        at = (window[:, None] + place(length)).long()[..., None]
        for side, x in new.items():
            tensors[f"window_{side}"].scatter_(1, at.expand_as(x), x)
        state[2] += length
        return

    # The window and the new tokens behind it, without gaps.
    source = place(layout.window + length)
    source = torch.where(source < window[:, None], source, source + (layout.window - window + to_sinks)[:, None])
    source = source.clamp(max=layout.window + length - 1).long()[..., None]
    streams = {}
    for side, x in new.items():
        stream = torch.cat([tensors[f"window_{side}"][:, : layout.window], x], dim=1)
        streams[side] = stream.gather(1, source.expand(-1, -1, x.shape[2]))
    _flush(plan, tensors, streams, flushed, layout.due(length))

    # What is left of the stream behind the flushed blocks moves to the front of the window.
    kept = (place(layout.window) + (flushed * block)[:, None]).clamp(max=layout.window + length - 1).long()[..., None]
    # The i-th place of the sinks takes new token i minus the sinks held, if there is such a one.
    index = place(layout.sink_length) - sinks[:, None]
    taken = ((index >= 0) & (index < to_sinks[:, None]))[..., None]
    exact = {}
    for side, x in new.items():
        exact[f"window_{side}"] = streams[side].gather(1, kept.expand(-1, -1, x.shape[2]))
    for side, x in first.items():
        sink = tensors[f"sink_{side}"]
        # Of pads alone there is no slot to take a sink from.
        if x.shape[1]:
            chosen = index.clamp(0, x.shape[1] - 1).long()[..., None].expand_as(sink)
            exact[f"sink_{side}"] = torch.where(taken, x.gather(1, chosen), sink)
    # Table entries of the blocks that were written: a block's position follows from those before it.
    begin, nth = start + to_sinks, place(layout.blocks) - blocks[:, None]
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
    layout, table, blocks = plan.layout, tensors["table"], tensors["state"][3]
    # As many blocks as can fall due at most, in every step, so that shapes do not depend on the counts.
    nth = torch.arange(candidates, dtype=torch.int32, device=flushed.device)
    due = nth < flushed[:, None]
    following = (blocks[:, None] + nth).clamp(max=layout.blocks - 1).long()
    # What is not due goes to the spare slot at the end.
    slots = torch.where(due, table[0].gather(1, following), table[0].numel()).flatten().long()
    encoded = {}
    for side, x in streams.items():
        states = x[:, : candidates * layout.block_length].unflatten(1, (candidates, -1)).where(due[..., None, None], 0)
        fields = plan.codecs[side].encode(states.flatten(0, 1))
        encoded |= {f"{side}.{name}": tensor for name, tensor in fields.items()}
    # All blocks are encoded before the first one is written: an error leaves the store as it was.
    for name, tensor in encoded.items():
        tensors[name].index_copy_(0, slots, tensor)


#: Names of the tokens in full precision, in the order of a store's tensors.
_EXACT_NAMES = ("sink_keys", "sink_values", "window_keys", "window_values")

#: Stores by the address of their `state`.
_STORES: WeakValueDictionary[int, "FixedStore"] = WeakValueDictionary()


class FixedStore:
    """The tokens of one layer. After the constructor no method waits for the device but `read_rows`.

    Args:
        codecs: Quantizer of each side, `{"keys": …, "values": …}`.
        layout: Sizes of a row.
        batch: Rows, B.
        dtype, device: Of the states.
        sink_channels: As `LatentLayer.sink_channels`.
    """

    def __init__(
        self,
        codecs: dict[str, BlockCodec],
        layout: RowLayout,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        sink_channels: SinkChannels | None = None,
    ):
        self.layout, self.batch, self.has_dense_sinks = layout, batch, sink_channels is not None
        self.pool = BlockPool(codecs, device, batch * layout.blocks + 1)
        self.state = torch.zeros((4, batch), dtype=torch.int32, device=device)
        self.table = torch.zeros((3, batch, layout.blocks), dtype=torch.int32, device=device)
        self.table[0] = torch.arange(batch * layout.blocks, dtype=torch.int32, device=device).view(batch, -1)
        self._origin = torch.zeros((batch, 1), dtype=torch.int32, device=device)
        # The kernels put the new tokens of a step behind the window before they take blocks from its front.
        lengths = (layout.sink_length, layout.window + MAX_QUERY_LENGTH)
        channels = {side: sum(codec.widths) for side, codec in codecs.items()}
        self.exact = ExactTokens.zeros(batch, lengths, channels, dtype, device, sink_channels)
        #: For the kernels: whether all values could be quantized and no row has exceeded its capacity.
        self.ok = torch.ones((), dtype=torch.bool, device=device)
        self.plan_name, self.plan = _shared_plan(codecs, layout, device)
        self._name_tensors()
        self._register()

    def _name_tensors(self) -> None:
        self.stored = {}
        for side, fields in self.pool.storage.items():
            self.stored |= {f"{side}.{name}": tensor for name, tensor in fields.items()}
        exact = self.exact.named()
        self.tensors = {"state": self.state, "table": self.table, "ok": self.ok} | exact | self.stored
        sinks, start, held, _ = self.state.unsqueeze(-1)
        #: Sinks and window as attention reads them: views, which every step changes.
        self.sink_tiles: tuple[Tile, ...] = ()
        if self.layout.sink_length:
            self.sink_tiles = (self.exact.tile("sinks", self._origin, sinks, self.layout.sink_length),)
        self._window_tiles: tuple[Tile, ...] = ()
        if self.layout.window:
            self._window_tiles = (self.exact.tile("window", start, held, self.layout.window),)
        #: The kernels of an append, prepared at the first one.
        self._fused: Callable | None = None

    def _register(self) -> None:
        """Be found by a compiled graph, which knows tensors only."""
        if not torch.compiler.is_compiling():
            _STORES[self.state.data_ptr()] = self
            for tensor in (self._origin, *self.tensors.values()):
                torch._dynamo.mark_static_address(tensor)

    def __getstate__(self) -> dict:
        made = ("stored", "tensors", "sink_tiles", "_window_tiles", "_fused")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if _PLANS.get(self.plan_name) is not self.plan:  # unpickled, maybe where the name is that of another plan
            self.plan_name, self.plan = _shared_plan(self.plan.codecs, self.layout, self.state.device)
        self._name_tensors()
        self._register()

    @classmethod
    def of(cls, tensors: list[torch.Tensor], plan_name: str) -> "FixedStore":
        """The store that has these tensors, in the order of `tensors`.

        A compiler may have copied them, to write the changes back later: then a store of the copies.
        """
        known = _STORES.get(tensors[0].data_ptr())
        if known is not None and all(a.data_ptr() == b.data_ptr() for a, b in zip(tensors, known.tensors.values())):
            return known
        plan, store = _PLANS[plan_name], cls.__new__(cls)
        store.plan_name, store.plan, store.layout, store.batch = plan_name, plan, plan.layout, tensors[0].shape[1]
        store.has_dense_sinks = False  # no graph has a step of blocks
        store.state, store.table, store.ok, *rest = tensors
        store._origin = torch.zeros((store.batch, 1), dtype=torch.int32, device=store.state.device)
        storage = {}
        store.exact = ExactTokens.from_named(dict(zip(_EXACT_NAMES, rest)))
        stored = iter(rest[len(_EXACT_NAMES) :])
        for side, codec in plan.codecs.items():
            storage[side] = dict(zip(codec.fields(), stored))
        store.pool = BlockPool(plan.codecs, store.state.device, storage=storage)
        store._name_tensors()
        return store

    @property
    def lengths(self) -> torch.Tensor:
        """`[B]` int32, tokens of each row."""
        return _lengths_in_graph(self.state) if torch.compiler.is_compiling() else _lengths(self.state)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        real: torch.Tensor | None = None,
        dense: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Store new tokens and pack the blocks that fall due; arguments as for `LatentLayer.append`.

        Raises:
            ValueError: A row would exceed the capacity, or a block that is due holds what cannot be quantized (see
                `check_scale`). On a CPU the rows are then as they were before; on an accelerator the error surfaces
                at a later call (`require`), and the rows are not usable.
        """
        if torch.compiler.is_compiling():
            _append_in_graph(list(self.tensors.values()), keys, values, real, self.plan_name)
        elif self._takes_fused_append and real is None and dense is None and keys.shape[1] <= MAX_QUERY_LENGTH:
            self._fused = self._fused or self._fused_append()
            self._fused(keys, values)
        else:
            append_tokens(self.plan, self.tensors, keys, values, real, dense)

    @property
    def _backend(self) -> Backend:
        return self.plan.codecs["keys"].backend

    @property
    def _takes_fused_append(self) -> bool:
        """Whether the back end has a kernel that writes such blocks; none writes scales of tokens or trellis codes."""
        schemes = [codec.scheme for codec in self.plan.codecs.values()]
        unknown = any(scheme.token_scale or scheme.code == "trellis" for scheme in schemes)
        return self._backend.fused_append is not None and not unknown

    def _fused_append(self) -> Callable:
        records = {side: codec.records() for side, codec in self.plan.codecs.items()}
        return self._backend.fused_append(self.layout, records, self.tensors)

    def attend_and_append(
        self, query: LatentQuery, new: NewTokens, expand_values: Callable | None = None
    ) -> torch.Tensor:
        """`KIVILatentLayer.attend_and_append`, which in a graph is one node."""
        if not torch.compiler.is_compiling():
            summed = self._backend.attend_values(query, self.packed(new.tile()), expand_values).summed
            self.append(new.keys.detach(), new.values.detach(), new.real)
            return summed
        rope, expand_keys, expansion = query.rope, query.expand_keys, (None, None, [], 0)
        if expand_keys is not None:
            expansion = (expand_keys.weight, expand_keys.bias, list(expand_keys.ranks), expand_keys.num_heads)
        summed = _attend_in_graph(
            list(self.tensors.values()),
            query.states,
            query.positions,
            *new,
            *expansion,
            list(query.value_widths),
            rope.inv_freq,
            rope.attention_scaling,
            query.scaling,
            query.sliding_window,
            self.plan_name,
        )
        return summed if expand_values is None else expand_values(summed.to(query.states.dtype), per_head=True)

    def packed(self, *new: Tile) -> PackedCache:
        """As `KIVILatentLayer.packed`. Tokens beyond the counts are finite in the tiles, and anything in the blocks."""
        sides, length = self.pool.sides(), self.layout.block_length
        sinks = () if self.has_dense_sinks else self.sink_tiles
        return PackedCache(sinks, self._window_tiles + new, sides[0], sides[-1], length, self.table)

    def read_rows(self) -> list[Row]:
        """The rows without their pads, read from the device; waits."""
        slots, _, counts = self.table.tolist()
        rows = []
        for i, (sinks, _, window, blocks) in enumerate(self.state.T.tolist()):
            rows.append(Row(sinks, window, tuple(slots[i][:blocks]), tuple(counts[i][:blocks])))
        return rows

    def crop(self, removed: torch.Tensor) -> None:
        """Remove the last `removed` `[B]` tokens of each row."""
        sinks, start = self.state[:2]
        left = start + self.state[2] - removed.to(self.state)
        require((left >= 0).all(), "tokens_to_remove: must be no more tokens than the rows hold")
        window = (left - start).clamp(min=0)
        counts = (left[:, None] - self.table[1]).clamp(min=0).minimum(self.table[2])
        table = torch.stack([torch.where(counts > 0, self.table[1], 0), counts])
        state = torch.stack([sinks.minimum(left), start.minimum(left), window, (counts > 0).sum(1)])
        sinks_left, window_left = state[0], state[2]
        empty = [(x, _beyond(sinks_left, x)) for x in self.exact.sinks.values()]
        empty += [(x, _beyond(window_left, x)) for x in self.exact.window.values()]
        # As in `append_tokens`: what takes memory is done.
        self.table[1:].copy_(table)
        self.state.copy_(state)
        for tensor, mask in empty:
            tensor.masked_fill_(mask, 0)

    def select(self, indices: torch.Tensor) -> None:
        """Make row i a copy of row `indices[i]`; its packed bytes too, for every row owns its slots."""
        indices = indices.to(self.state.device)
        by_row = [t[:-1].unflatten(0, (self.batch, -1)) for t in self.stored.values()]
        tensors = (self.state.T, *self.table[1:], *self.exact.tensors(), *by_row)
        # The one piece of memory that it takes.
        room = torch.empty(max(t.nbytes for t in tensors), dtype=torch.uint8, device=self.state.device)
        for tensor in tensors:
            selected = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensor.copy_(torch.index_select(tensor, 0, indices, out=selected))

    def clear(self) -> None:
        """Forget every token; what is allocated stays."""
        for tensor in (self.state, self.table[1:], *self.exact.tensors()):
            tensor.zero_()
        self.ok.fill_(True)
