"""Tokens of a layer in full precision: the sinks at the start of its rows, the windows at their end."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from modules.cache.rows import Row, Step
from modules.cache.scheme import SIDES, SinkChannels
from modules.kernels.packed import Tile, counts_of_rows


@dataclass(eq=False)
class ExactTokens:
    """Sinks and windows of all rows; how many of their tokens are valid stands elsewhere (`Row`, `FixedStore.state`).

    Attributes:
        sinks: By side `[B, sink_length, C]`. Of a block, whose latents stand in the window: the keys (before RoPE) and
            the values of its layers as they are, side by side.
        window: By side `[B, N, C]`, "keys" alone where they hold the values too; where tokens are scored for
            protection, under "score" `[B, N]` float32.
    """

    sinks: dict[str, torch.Tensor]
    window: dict[str, torch.Tensor]

    @classmethod
    def zeros(
        cls,
        batch: int,
        lengths: tuple[int, int],
        channels: dict[str, int],
        dtype: torch.dtype,
        device: torch.device,
        sink_channels: SinkChannels | None = None,
    ) -> "ExactTokens":
        """Room for `lengths` tokens of sinks and of window; `sink_channels` default to the window's `channels`."""
        # Zeros, since attention may read beyond the tokens of a short row before it masks them.
        exact = cls({}, {})
        for side, width in (sink_channels or channels).items():
            exact.sinks[side] = torch.zeros((batch, lengths[0], width), dtype=dtype, device=device)
        for side, width in channels.items():
            exact.window[side] = torch.zeros((batch, lengths[1], width), dtype=dtype, device=device)
        return exact

    @classmethod
    def from_named(cls, tensors: dict[str, torch.Tensor]) -> "ExactTokens":
        """Inverse of `named`."""
        exact = cls({}, {})
        for name, tensor in tensors.items():
            place, _, field = name.partition("_")
            (exact.sinks if place == "sink" else exact.window)[field] = tensor
        return exact

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of a saved file: `sink_keys`, `window_score`, …"""
        named = {f"sink_{side}": self.sinks[side] for side in SIDES}
        return named | {f"window_{name}": tensor for name, tensor in self.window.items()}

    def tensors(self) -> list[torch.Tensor]:
        return [*self.sinks.values(), *self.window.values()]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ExactTokens":
        """Sinks and windows that are `function` of these."""
        sinks = {side: function(tensor) for side, tensor in self.sinks.items()}
        return ExactTokens(sinks, {name: function(tensor) for name, tensor in self.window.items()})

    def clone(self) -> "ExactTokens":
        return self.map(torch.Tensor.clone)

    def push(
        self, index: int, row: Row, step: Step, new: dict[str, torch.Tensor], first: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Put new tokens of row `index` into its sinks and behind its window.

        Args:
            index: Which row.
            row: The row before.
            step: `row.step` of the new tokens.
            new: `[L, C]` of each side of the window, and the score `[L]`.
            first: `[n, C]` of each side of the sinks: at least the tokens that become sinks.

        Returns:
            The tokens that leave the window, `[blocks, G, C]` of each side.
        """
        for side, sinks in self.sinks.items():
            sinks[index, row.sinks : row.sinks + step.to_sinks] = first[side][: step.to_sinks]
        leaving = {}
        for name, x in new.items():
            stream = torch.cat([self.window[name][index, : row.window], x[step.to_sinks :]])
            due, kept = stream.tensor_split([len(stream) - step.window])
            self.window[name][index, : step.window] = kept
            # Without a block due there is no block length to be found out.
            leaving[name] = due.unflatten(0, (step.blocks, len(due) // max(step.blocks, 1)))
        return leaving

    def push_one(self, ends: tuple[int, ...], new: dict[str, torch.Tensor]) -> None:
        """Put one new token of each row, `[B, 1, C]` of each side of the window, behind the rows' `ends`."""
        for name, x in new.items():
            window = self.window[name]
            # Rows of equal length are the rule, and a copy of a slice is cheaper than a scatter.
            if len(set(ends)) == 1:
                window.narrow(1, ends[0], 1).copy_(x)
                continue
            index = counts_of_rows(ends, window.device, torch.int64)
            if x.dim() == 3:
                index = index[..., None].expand_as(x)
            window.scatter_(1, index, x)

    def tiles(self, place: str, starts: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Tile, ...]:
        """`tile` of rows that are counted on the host; none if no row has a token."""
        longest = max(counts)
        if not longest:
            return ()
        device = self.window["keys"].device
        tile = self.tile(place, counts_of_rows(starts, device), counts_of_rows(counts, device), longest)
        # Shorter rows end in what an earlier token left there, which attention must not read.
        return (tile if min(counts) == longest else tile.masked(),)

    def tile(self, place: str, starts: torch.Tensor, counts: torch.Tensor, longest: int) -> Tile:
        """The first `longest` tokens of the sinks or of the window, as attention reads them.

        Args:
            place: "sinks" or "window".
            starts, counts: `[B, 1]` int32, position of the first token of each row and valid tokens.
        """
        states = getattr(self, place)
        keys = states["keys"][:, None, :longest]
        # One latent of keys and values stays one tensor, which attention then reads once.
        values = keys
        if "values" in states:
            values = states["values"][:, None, :longest]
        return Tile(keys, values, starts, counts)
