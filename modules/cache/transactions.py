"""Appends and edits of all layers of a cache, or of none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import Cache

from modules.cache.layer import LatentLayer
from modules.cache.rows import column


class TransactionalCache(Cache):
    """A `transformers` cache of `LatentLayer`s, which hold the same tokens at any time."""

    layers: list[LatentLayer]
    #: Whether an error may have left layers, which could not be rolled back, with different tokens.
    _inconsistent = False
    #: Transactions that are open, one inside the other.
    _open = 0

    @property
    def first_layer(self) -> int:
        """Index of the first layer that holds tokens: a stage of a pipeline feeds only its own. 0 before."""
        return next((i for i, layer in enumerate(self.layers) if layer.is_initialized), 0)

    def row_tokens(self) -> list[int]:
        """Tokens that each row holds, pads not counted; empty before the first one."""
        return list(column(self.layers[self.first_layer].rows, "tokens")) if self.layers else []

    def row_lengths(self) -> list[int] | torch.Tensor:
        """As `row_tokens`; with a fixed capacity `[B]` int32 on the device, without waiting for it."""
        return self.layers[self.first_layer].row_lengths() if self.layers else []

    def held_slots(self) -> torch.Tensor:
        """`[B, slots]` bool on the CPU: true for tokens, false for pads."""
        layer = self.layers[self.first_layer]
        held = torch.ones((len(layer.rows), layer.slots), dtype=torch.bool, device="cpu")
        for row_held, row in zip(held, layer.rows):
            for start, stop in row.pads:
                row_held[start:stop] = False
        return held

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is appended inside is appended to all layers or, if an error comes through, to none.

        A cache of fixed capacity cannot take an append back: it is refused from then on, until it is reset.

        Raises:
            ValueError: An error has come through before.
        """
        self.check_consistent()
        savepoints = [layer.savepoint() for layer in self.layers]
        self._open += 1
        try:
            yield
        except BaseException:
            # Layers that were added inside have no savepoint: they held nothing.
            savepoints += [None] * (len(self.layers) - len(savepoints))
            undone = [layer.rollback(old) for layer, old in zip(self.layers, savepoints, strict=True)]
            self._inconsistent = not all(undone)
            raise
        finally:
            self._open -= 1
        # Blocks that were dropped and could have come back are free now.
        del savepoints
        if not self._open:
            for layer in self.layers:
                layer.give_back()

    def check_consistent(self) -> None:
        """Raise a `ValueError` if an error has left the layers with different tokens."""
        if self._inconsistent:
            raise ValueError(
                f"capacity={self.capacity}: an error came in the middle of a step or an edit, after which the layers "
                "of a cache of fixed capacity may differ; reset() it"
            )

    def _edit(self, prepare: Callable[[LatentLayer], Callable[[], None]]) -> None:
        """Edit the layers that hold tokens. What may fail is prepared for all of them first, where it can be."""
        self.check_consistent()
        # An empty cache still refuses what its layers refuse.
        layers = [layer for layer in self.layers if layer.is_initialized] or self.layers
        edits = [prepare(layer) for layer in layers]
        for i, edit in enumerate(edits):
            try:
                edit()
            except BaseException:
                self._inconsistent = i > 0
                raise

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`."""
        if self.layers and self.layers[0].counts_on_host:
            beam_idx = beam_idx.cpu()  # one wait for the device, not one a layer
        self._edit(lambda layer: layer.selection(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row side by side."""
        self._edit(lambda layer: layer.selection(layer.repeated_rows(repeats)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these indices, or those where a mask is true."""
        self._edit(lambda layer: layer.selection(layer.chosen_rows(indices)))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last slots of the layers that hold tokens; see `LatentLayer.crop`."""
        self._edit(lambda layer: layer.cropping(tokens_to_remove))

    def take_out(self, attention_mask: torch.Tensor) -> None:
        """Make pads of the tokens at the end of rows that a mask calls pads, as `crop` would: `generate` feeds pads as
        tokens to rows that have ended before the others.

        Args:
            attention_mask: `[B, slots]` or longer, 0 for pads.

        Raises:
            ValueError: The mask has another shape, calls a pad a token, or a token that others follow a pad.
        """
        # A mask may only take back tokens: those at the end of a row, which no other one has seen.
        held = self.held_slots()
        if attention_mask.dim() != 2 or len(attention_mask) != len(held) or attention_mask.shape[1] < held.shape[1]:
            raise ValueError(f"attention_mask: {list(attention_mask.shape)} must be {list(held.shape)} or longer")
        kept = attention_mask[:, : held.shape[1]].cpu() != 0
        if torch.equal(kept, held):
            return
        removed = held & ~kept
        if (kept & (~held | removed.cumsum(1).bool())).any():
            raise ValueError(
                f"attention_mask: rows of {self.row_tokens()} tokens can lose their last ones only, but the mask hides "
                "a token before others, or calls a pad a token; crop() or reset() the cache"
            )
        self._edit(lambda layer: layer.removal(removed.sum(1), kept))

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._inconsistent = False
