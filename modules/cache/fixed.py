"""The layer of a cache of fixed capacity; rows are counted on the device (`fixed_store.py`)."""

from collections.abc import Callable

import torch

from configuration_alrd_llama import check_count
from modules.cache.exact import ExactTokens
from modules.cache.fixed_store import FixedStore, RowLayout
from modules.cache.layer import LatentLayer, dense_channels, in_any_mode, warn_of_small_states
from modules.cache.rows import Pads, Row, column, count_pads, crop_pads, pad_ranges, sink_slots
from modules.cache.scheme import SIDES, CacheScheme, LayerWidths, SinkChannels, check_fixed
from modules.kernels.packed import LatentQuery, NewTokens, PackedCache, Tile


class FixedLatentLayer(LatentLayer):
    """A `LatentLayer` of fixed capacity: the bytes of one that grows, and no wait for the device in a step.

    A step appends any number of tokens; one of up to 16 without pads never waits for the device. `rows`, `slots`,
    `states()`, `update()`, the sizes and saving read the bookkeeping from the device, and so wait.

    Args:
        capacity: Tokens that a row can hold.
        arguments: As for `LatentLayer`.

    Raises:
        ValueError: A side is stored by a scheme that has no fixed size on the device (`check_fixed`).
    """

    counts_on_host = False

    def __init__(self, scheme: CacheScheme, *arguments, capacity: int):
        check_count("capacity", capacity)
        # A step on the device cannot choose channels or tokens by their values.
        for side in SIDES:
            check_fixed(side, getattr(scheme, side))
        self.layout = RowLayout(scheme.residual_length, scheme.block_length, scheme.sink_length, capacity)
        super().__init__(scheme, *arguments)

    def clear(self) -> None:
        self.is_initialized = self.is_fed = False
        self.store: FixedStore | None = None
        self.sink_channels = None
        self.exact = ExactTokens({}, {})
        self.pads: list[Pads] = []

    def reset(self) -> None:
        """Forget every token; the allocation stays, for as many rows."""
        if self.is_initialized:
            self.store.clear()
            self.is_fed, self.pads = False, [()] * self.store.batch

    @property
    def is_compileable(self) -> bool:
        """Whether a step of the model compiles: that of a model whose attention reads the cache where it lies."""
        return self.given_widths is not None

    @property
    def rows(self) -> list[Row]:
        """Bookkeeping of the rows, read from the device."""
        if not self.is_fed:
            return []
        return [row._replace(pads=pads) for row, pads in zip(self.store.read_rows(), self.pads, strict=True)]

    @property
    def slots(self) -> int:
        return max(column(self.rows, "slots"), default=0)

    def give_back(self) -> None:
        """Nothing: a sliding window only masks here, and every token keeps the room that it was given."""

    def row_lengths(self) -> list[int] | torch.Tensor:
        return self.store.lengths if self.is_fed else []

    def start(
        self, batch: int, widths: LayerWidths, like: torch.Tensor, sink_channels: SinkChannels | None = None
    ) -> None:
        codecs = self._settle(widths, like)
        self.sink_channels = sink_channels
        self.store = FixedStore(codecs, self.layout, batch, self.dtype, self.device, sink_channels)
        self.pool, self.exact, self.pads = self.store.pool, self.store.exact, [()] * batch
        self.is_initialized = True

    @in_any_mode
    def _append(self, keys, values, real, widths: LayerWidths, received=None, dense=None) -> None:
        states, fresh = {"keys": keys.detach()}, not self.is_initialized
        if values is not None:
            states["values"] = values.detach()
        try:
            if fresh:
                self.start(len(keys), widths, keys, dense_channels(dense))
            self.check_states(keys, values, real, dense)
            if fresh and keys.device.type == "cpu":  # elsewhere it would wait for the device
                warn_of_small_states(self.scheme, states)
            # Pads are counted on the host, before the store changes what the slots are counted from.
            pads = self._pads_after(real)
            self.store.append(states["keys"], states.get("values"), real, dense)
        except Exception:
            if fresh:
                self.clear()
            raise
        self.pads, self.is_fed = pads, True

    def attend_and_append(
        self, query: LatentQuery, new: NewTokens, expand_values: Callable | None = None
    ) -> torch.Tensor:
        self.check_states(new.keys, new.values, new.real)
        pads = self._pads_after(new.real)
        summed = self.store.attend_and_append(query, new, expand_values)
        self.pads = pads
        return summed

    def _pads_after(self, real: torch.Tensor | None) -> list[Pads]:
        """`pads` with those of new tokens."""
        if real is None:
            return self.pads
        slots = self.slots
        return [old + pad_ranges(new, slots) for old, new in zip(self.pads, real.tolist(), strict=True)]

    def savepoint(self) -> None:
        return None

    def rollback(self, savepoint: None) -> bool:
        # A step that was being captured has done nothing yet; any other one has changed what the device holds.
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def block_table(self) -> torch.Tensor:
        return self.store.table

    def packed(self, *new: Tile) -> PackedCache:
        return self.store.packed(*new) if self.is_fed else PackedCache(after=new)

    def sinks(self) -> tuple[Tile, ...]:
        return self.store.sink_tiles if self.is_fed else ()

    def sink_slots(self, real: torch.Tensor | None, new_slots: int) -> int:
        # The device alone knows the sinks that there are: as many as if there were none.
        return sink_slots([], self.scheme, real, new_slots)

    def selection(self, indices: torch.Tensor) -> Callable[[], None]:
        """As `LatentLayer.selection`; the edit copies packed bytes, of which a row here owns its own."""

        # No room for copies is taken before: the store moves its rows through one buffer.
        def edit() -> None:
            if self.is_fed:
                self.store.select(indices)
            if any(self.pads):
                self.pads = [self.pads[i] for i in indices.tolist()]

        return edit

    def repeated_rows(self, repeats: int) -> list[int]:
        raise ValueError("batch_repeat_interleave: a cache of fixed capacity keeps its rows; repeat the prompt's rows")

    def chosen_rows(self, indices: torch.Tensor) -> list[int]:
        raise ValueError("batch_select_indices: a cache of fixed capacity keeps its rows; use reorder_cache()")

    def cropping(self, tokens_to_remove: int) -> Callable[[], None]:
        """As `LatentLayer.cropping`; waits for the device only if rows have pads."""
        slots_to_remove = -int(tokens_to_remove)
        if slots_to_remove < 0:
            raise ValueError(f"tokens_to_remove={-slots_to_remove}: must be 0 or negative, the slots to remove")

        def edit() -> None:
            if not self.is_fed or not slots_to_remove:
                return
            int64 = {"dtype": torch.int64, "device": self.device}
            removed, pads_left = torch.full((self.store.batch,), slots_to_remove, **int64), self.pads
            if any(self.pads):
                left = self.slots - slots_to_remove
                pads_left = [crop_pads(pads, left) for pads in self.pads]
                # Of the slots that go, those of pads held no token.
                cut = [count_pads(old) - count_pads(new) for old, new in zip(self.pads, pads_left, strict=True)]
                removed -= torch.tensor(cut, **int64)
            self.store.crop(removed)
            self.pads = pads_left

        return edit

    def removal(self, removed: torch.Tensor, kept: torch.Tensor) -> Callable[[], None]:
        def edit() -> None:
            self.store.crop(removed)
            self.pads = list(map(pad_ranges, kept.tolist()))

        return edit

    def fork(self) -> "FixedLatentLayer":
        raise ValueError("fork: a row of a cache of fixed capacity owns its blocks; copy.deepcopy() copies them")

    def get_max_length(self) -> int:
        return self.layout.capacity

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), self.store.state] if self.is_initialized else []
