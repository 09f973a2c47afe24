r"""One layer of a packed KV cache: full-precision sinks, immutable quantized blocks, a full-precision window.

A row of a layer holds, in the order of its tokens: the first `sink_length` ones as they are; blocks of G tokens in a
pool (`pool.py`), reached through the row's block table; and a window of between `residual_length` and
`residual_length + G - 1` of the newest tokens. A block is written once, as soon as `residual_length` newer tokens
exist. Of a model's layer with a sliding window, a growing layer drops blocks that not even a query at the start of the
window in full precision would see.

The states of a token are a flat vector of channels. Latents `[B, 1, T, r]` are stored as they are; the `[B, H, T, D]`
states of any other model lose their heads to the channels, and each head keeps scales of its own.

`LatentLayer` is what the two kinds of layers have in common: `growing.py` and `fixed.py`.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import chain

import torch
from transformers.cache_utils import CacheLayerMixin

from configuration_alrd_llama import QuantScheme
from modules.cache.codecs import BlockCodec
from modules.cache.exact import ExactTokens
from modules.cache.pool import BlockPool
from modules.cache.rows import Row, chosen_rows, column, repeated_rows
from modules.cache.scheme import SIDES, TABLE_ENTRY_NBYTES, CacheScheme, LayerScales, LayerWidths, SinkChannels
from modules.kernels import FUSED_DTYPES, get_backend
from modules.kernels.packed import LatentQuery, NewTokens, PackedCache, Tile

#: Worth of new tokens `[B, L]`, from the layer's index and their `[B, L, C]` keys and values.
TokenScore = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

#: Distance of two levels below which a float16 scale has less than three bits: eight times the smallest
#: positive float16.
LEAST_STEP = 2.0**-21


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
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def flat_states(states: torch.Tensor) -> torch.Tensor:
    """`[B, H, L, D]` states as the cache stores them, `[B, L, H * D]`."""
    return states.transpose(1, 2).flatten(2)


def dense_channels(states: dict[str, torch.Tensor] | None) -> SinkChannels | None:
    """Channels of the states of a block's members, by side."""
    return states and {side: x.shape[2] for side, x in states.items()}


def warn_of_small_states(scheme: CacheScheme, states: dict[str, torch.Tensor]) -> None:
    """Warn of first states `[B, L, C]` of each side, so small that their scales have few digits in float16."""
    for side, x in states.items():
        side_scheme = getattr(scheme, side)
        bits = _widest_codes(side_scheme)
        # Scales of other types of states are bfloat16 or of the states' own type.
        has_float16_scales = x.dtype in (torch.float32, torch.float64) and not side_scheme.static
        if not has_float16_scales or bits == 16 or not x.numel() or torch.compiler.is_compiling():
            continue
        largest = x.abs().amax().item()
        if 0 < largest < (2**bits - 1) * LEAST_STEP / 2:
            warnings.warn(
                f"{side}: states of at most {largest:.1e} in {x.dtype} have scales in float16, which keep few "
                f"digits of steps below {LEAST_STEP:.1e}; load the model in bfloat16, whose scales are bfloat16, "
                "or take 16 bits",
                stacklevel=2,
            )


def _widest_codes(scheme: QuantScheme) -> float:
    """Bits of the widest codes of a scheme; 16: there are none."""
    bits = {scheme.bits}
    if scheme.tiers:
        bits = {width for _, width in chain.from_iterable(scheme.tiers)}
    return max(bits - {16}, default=16)


class LayerStorage(ABC):
    """Interface of what holds the tokens of a layer: the two kinds of layers fill it in.

    Attributes:
        rows: Bookkeeping of each row (`rows.py`).
        slots: Tokens and pads fed, of the longest row.
        exact: Sinks and windows.
        pool: The packed blocks.
        sliding_window: Positions that a query of the model's layer sees at most, its own included; `None`: all.
        counts_on_host: Whether rows are counted on the host, so that their edits take indices there.
    """

    rows: list[Row]
    slots: int
    exact: ExactTokens
    pool: BlockPool | None = None
    sliding_window: int | None = None
    counts_on_host = True

    @abstractmethod
    def clear(self) -> None:
        """Forget every token and free the memory."""

    @abstractmethod
    def start(
        self, batch: int, widths: LayerWidths, like: torch.Tensor, sink_channels: SinkChannels | None = None
    ) -> None:
        """Allocate for the batch, for `widths` and `sink_channels`, and for the type and device of `like`."""

    @abstractmethod
    def _append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        real: torch.Tensor | None,
        widths: LayerWidths,
        received: torch.Tensor | None = None,
        dense: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """`append` to a layer that may have to be started first, with `widths`."""

    @abstractmethod
    def attend_and_append(
        self, query: LatentQuery, new: NewTokens, expand_values: Callable | None = None
    ) -> torch.Tensor:
        """Attention of new tokens to all that is cached and to themselves, who are cached then.

        Args:
            query: Queries of the new tokens.
            new: The new tokens.
            expand_values: An `ALinear` of the values.

        Returns:
            `[B, H_q, L, d]`, the heads' outputs; without `expand_values` `[B, H_q, L, max(value_widths)]` float32, the
            weighted sums of what is cached of the values.

        Raises:
            ValueError: As for `append`.
        """

    @abstractmethod
    def packed(self, *new: Tile) -> PackedCache:
        """What new tokens attend to: all that is cached, and the `new` tokens themselves."""

    @abstractmethod
    def sinks(self) -> tuple[Tile, ...]:
        """The sinks as attention reads them; none if there are none."""

    @abstractmethod
    def sink_slots(self, real: torch.Tensor | None, new_slots: int) -> int:
        """Of the new slots, so many at the front hold all new tokens that become sinks; `real` as for `append`."""

    @abstractmethod
    def block_table(self) -> torch.Tensor:
        """`[3, B, blocks]` int32: slot in the pool, first position, valid tokens; rows with fewer blocks end in 0."""

    @abstractmethod
    def row_lengths(self) -> list[int] | torch.Tensor:
        """Tokens of each row, or `[B]` int32 on the device, unread; empty before the first one."""

    @abstractmethod
    def savepoint(self) -> object:
        """What `rollback` takes to forget the appends that are still to come; nothing else may come between."""

    @abstractmethod
    def rollback(self, savepoint: object) -> bool:
        """Forget what was appended since the savepoint; returns whether that could be done."""

    @abstractmethod
    def give_back(self) -> None:
        """Give back the room of blocks that a sliding window has left behind, if that has come to be much."""

    @abstractmethod
    def selection(self, indices: list[int] | torch.Tensor) -> Callable[[], None]:
        """An edit that makes row i a copy of row `indices[i]`, when it is called.

        Edits of several layers are prepared first, since preparing one may fail.
        """

    @abstractmethod
    def cropping(self, tokens_to_remove: int) -> Callable[[], None]:
        """`crop`, when what is returned is called."""

    @abstractmethod
    def removal(self, removed: torch.Tensor, kept: torch.Tensor) -> Callable[[], None]:
        """An edit that makes pads of the last `removed` `[B]` tokens of each row; `kept` marks those that are left.

        Args:
            removed: int on the CPU.
            kept: `[B, slots]` bool on the CPU.
        """


class RowEdits(LayerStorage):
    """Edits of the rows of a layer by the names of the library, from those that the storage prepares."""

    def repeated_rows(self, repeats: int) -> list[int]:
        """Indices, for `selection`, of `repeats` copies of each row side by side."""
        return repeated_rows(len(self.rows), repeats)

    def chosen_rows(self, indices: torch.Tensor) -> list[int]:
        """Indices, for `selection`, of the rows that a tensor of indices or a mask `[B]` names."""
        return chosen_rows(len(self.rows), indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`."""
        self.selection(beam_idx)()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row side by side."""
        self.selection(self.repeated_rows(repeats))()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these indices, or those where a mask is true."""
        self.selection(self.chosen_rows(indices))()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last slots; `tokens_to_remove` is 0 or negative, as for `DynamicCache`.

        A cut inside a packed block lowers the block's count of valid tokens: nothing is quantized again, and the next
        block starts after it.

        Raises:
            ValueError: `tokens_to_remove` is positive or exceeds the slots held.
        """
        self.cropping(tokens_to_remove)()


class LatentLayer(RowEdits, CacheLayerMixin):
    """The cache of one layer. States enter as `[B, H, L, D]` through `update`, or flat as `[B, L, C]` by `append`.

    Attributes:
        sink_channels: Of the layer of a block: channels of its sinks, by side. `None`: those of the window.

    Args:
        scheme: Bits, group sizes, window and sinks.
        widths: Channels of each head group of keys and values; `None` takes one group per head of the first states.
        static_scales: Calibrated scales of each side that the scheme calls static.
        backend: Name of the back end (`modules/kernels`); `None`: chosen by the device.
        score: Worth `[B, L]` of new tokens from their keys and values, for protected tokens; "attention": the model
            passes it to `append`; `None`: the quantizer goes by its own error.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    sink_channels: SinkChannels | None = None

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
        self.static_scales: LayerScales = {}
        for side, pair in (static_scales or {}).items():
            if getattr(scheme, side).static:
                # As the kernels read them, whatever the default type was when they were made.
                self.static_scales[side] = tuple(map(torch.Tensor.float, pair))
        self.backend_name = backend
        self.score = score if scheme.keys.protected or scheme.values.protected else None
        self.clear()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the batch, type and device of `[B, H, L, D]` states."""
        self.start(len(key_states), self._head_widths(key_states, value_states), key_states)

    def _head_widths(self, *states: torch.Tensor) -> LayerWidths:
        return self.given_widths or tuple((x.shape[3],) * x.shape[1] for x in states)

    def _settle(self, widths: LayerWidths, like: torch.Tensor) -> dict[str, BlockCodec]:
        """Settle widths, type, device and back end; returns the quantizers."""
        # All of it is known with the first states only: a drop-in cache has not seen the model before.
        scheme, self.widths, self.dtype, self.device = self.scheme, widths, like.dtype, like.device
        self.channels = dict(zip(SIDES, map(sum, widths)))
        for side in self.channels:
            if getattr(scheme, side).static and side not in self.static_scales:
                raise ValueError(
                    f"static=True of the {side}: needs calibrated scales (of a budget, or "
                    "modules/formats/calibrated_int8.py)"
                )
        for side, (scale, zero_point) in self.static_scales.items():
            self.static_scales[side] = (scale.to(self.device), zero_point.to(self.device))
        self.backend = get_backend(self.backend_name, self.device)
        return scheme.codecs(widths, self.dtype, self.backend, self.static_scales)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
        dense: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Store new tokens, then pack every block that has become old enough.

        Args:
            keys, values: `[B, L, C_k]` and `[B, L, C_v]` states in full precision; `values` is `None` where one latent
                of both stands in `keys`.
            real: `[B, L]` bool on the CPU, false for the pads, which are not stored; `None`: no pads.
            received: `[B, P]`, attention that the tokens at positions 0 … P - 1 of each row, the new ones included,
                have received in this step; for `score="attention"`.
            dense: Of the layer of a block, by "keys" and "values": the members' own states `[B, n, C]` of the first n
                slots, among them all that become sinks (`sink_slots`).

        Raises:
            ValueError: The states do not fit the cache, or a block that is due holds NaN, Inf or values beyond the
                range of its scales; the cache is then as it was before.
        """
        widths = self.given_widths
        if widths is None:
            widths = tuple((x.shape[2],) for x in (keys, values) if x is not None)
        self._append(keys, values, real, widths, received, dense)

    def check_states(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        dense: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Raise a `ValueError` unless states `[B, L, C]` are of the rows, channels and type of those held."""
        batch = self.exact.window["keys"].shape[0]
        given = {"keys": keys}
        if values is not None:
            given["values"] = values
        if set(given) != set(self.channels):
            raise ValueError(f"values: the layer holds {' and '.join(self.channels)}, got {' and '.join(given)}")
        for side, states in given.items():
            expected = (batch, keys.shape[1], self.channels[side])
            if states.shape != expected or states.dtype != self.dtype:
                raise ValueError(
                    f"{side}: [batch, tokens, channels] of {list(states.shape)} in {states.dtype} must be "
                    f"{list(expected)} in {self.dtype}, as the cache was started"
                )
        if dense_channels(dense) != self.sink_channels:
            raise ValueError(f"dense: states of {dense_channels(dense)} channels must be of {self.sink_channels}")
        if dense is not None and self.score is not None:
            raise ValueError("token_score: must be None for the latents of a block, which are those of several layers")
        if real is not None and (real.dtype != torch.bool or real.shape != keys.shape[:2]):
            raise ValueError(
                f"real: {list(real.shape)} of {real.dtype} must be a bool for each of {list(keys.shape[:2])}"
            )

    def check_type(self, states: torch.Tensor) -> None:
        """Raise a `ValueError` unless states are of the type of those held."""
        if states.dtype != self.dtype:
            raise ValueError(f"states in {states.dtype}: must be in {self.dtype}, as the cache was started")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `[B, H, L, D]` states; returns what their attention sees, `[B, H, T, D]` keys and values.

        The new tokens and the window are in full precision, older ones as they are stored; blocks that have become
        old enough are packed before the call returns. Every token counts: a model that passes no mask has its pads
        treated as tokens.
        """
        # What is seen is read before the append, so that new tokens are seen as they came, not as they are packed.
        new = seen = (flat_states(key_states), flat_states(value_states))
        if self.is_initialized:
            self.check_states(*new)
            seen = [torch.cat(pair, dim=1) for pair in zip(self.states(), new, strict=True)]
        self._append(*new, None, self._head_widths(key_states, value_states))
        heads = (key_states.shape[1], value_states.shape[1])
        return tuple(x.unflatten(2, (h, -1)).transpose(1, 2) for x, h in zip(seen, heads, strict=True))

    def tiles(self, tokens: int = 256) -> Iterator[Tile]:
        """The cached tokens in order, dequantized; packed ones about `tokens` at a time."""
        return self.packed().tiles(tokens)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All states that are held, dequantized: `[B, T, C_k]` and `[B, T, C_v]`; of a block, whose sinks have no
        latents, those of the tokens behind the sinks, the same twice where one latent holds both.

        Raises:
            ValueError: The rows hold different numbers of tokens, or hold them in different blocks.
        """
        rows = self.rows
        # Rows of equal length may still hold their tokens in blocks of other lengths, after a crop of one of them.
        counts = column(rows, "counts")
        if len(set(zip(column(rows, "sinks"), column(rows, "dropped"), counts, column(rows, "window")))) > 1:
            raise ValueError(
                f"rows of {list(column(rows, 'tokens'))} tokens, blocks of {list(counts)}, cannot be read as one tensor"
            )
        # Pieces of no tokens come first, so that an empty layer has states too.
        keys = [self.exact.window["keys"][:, :0]]
        values = [self.exact.window.get("values", keys[0])[:, :0]]
        for tile in self.tiles():
            for run, count in enumerate(tile.count[0].tolist()):
                keys.append(tile.keys[:, run, :count])
                values.append(tile.values[:, run, :count])
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

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

    def reset(self) -> None:
        """Forget every token."""
        self.clear()

    @property
    def backend_note(self) -> str:
        """The back end, and whether the reference attends to the blocks in its place."""
        # A quantizer of a user's own, or float64 states, are read by plain PyTorch whatever the back end.
        fused = self.backend.attends_to(*self.pool.sides()) and self.dtype in FUSED_DTYPES
        if fused or self.backend.fused_attention is None:
            return self.backend.name
        return f"{self.backend} (attention: reference)"

    def tensors(self) -> list[torch.Tensor]:
        """All that is allocated."""
        if not self.is_initialized:
            return []
        tensors = [*self.pool.tensors(), *self.exact.tensors(), self.block_table()]
        for pair in self.static_scales.values():
            tensors += pair
        return tensors

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
        exact = entries = 0
        token = sum(self.channels.values()) * self.dtype.itemsize
        sink = sum((self.sink_channels or self.channels).values()) * self.dtype.itemsize
        # Rows of one prompt share the blocks of its prefix.
        blocks: set[int] = set()
        for row in self.rows:
            exact += row.sinks * sink + row.window * token
            if self.score is not None:
                exact += row.window * 4
            entries += len(row.blocks)
            blocks.update(row.blocks)
        packed = len(blocks) * self.pool.slot_nbytes + entries * TABLE_ENTRY_NBYTES
        return packed + exact + self.scheme.static_nbytes(self.widths)


def settle_model(layer_idx: int, layer: LatentLayer, widths: LayerWidths, sliding_window: int | None) -> None:
    """Note the widths and the sliding window of the model's layer that asks for a layer of a cache.

    Raises:
        ValueError: The layer holds tokens of another one.
    """
    expected = layer.widths if layer.is_initialized else layer.given_widths
    if expected not in (None, widths):
        raise ValueError(
            f"past_key_values: layer {layer_idx} is for keys and values of {expected} channels by head group; must be "
            f"of {widths}, this model's, whose create_kivi_cache() makes one"
        )
    layer.given_widths = layer.given_widths or widths
    if layer.sliding_window == sliding_window:
        return
    # Before it is known all tokens are kept.
    if layer.is_initialized and layer.sliding_window is not None:
        raise ValueError(
            f"layer {layer_idx}: holds what a sliding window of {layer.sliding_window} tokens sees, the model's is "
            f"{sliding_window}"
        )
    layer.sliding_window = sliding_window
