"""Attention to a tile in bfloat16 by C++ (`fold.cpp`), for processors that multiply such numbers (AVX512_BF16)."""

import ctypes
from dataclasses import dataclass

import torch

from modules.kernels.attention import Attended
from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import address, structure

# fold.cpp says what the fields mean.
_Fold = structure("""
    pointer query keys values seen summed highest total
    int64 query_row query_head query_token key_row key_head key_token value_row value_head value_token
    int64 sum_row sum_head state_row state_head
    int32 batch heads shared length tokens size threads
    float scaling
""")


def folds() -> bool:
    """Whether this processor can."""
    return bool(library().alrd_fold(None))


@dataclass(eq=False)
class Folded:
    """What queries have attended to so far, tile by tile.

    Attributes:
        states: The queries `[B, H_q, L, d]` bfloat16, rotated.
        scaling: Factor on the logits.
    """

    states: torch.Tensor
    scaling: float

    def __post_init__(self):
        batch, heads, length, _ = self.states.shape
        self.states = self.states.contiguous()
        self.summed = torch.zeros(self.states.shape, dtype=torch.float32, device="cpu")
        self.highest = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device="cpu")
        self.total = torch.zeros((batch, heads, length), dtype=torch.float32, device="cpu")

    def add(self, piece: slice, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None) -> None:
        """Attend to a tile.

        Args:
            piece: Which of the L queries.
            keys, values: `[B, H_kv, n, d]` bfloat16, keys rotated; the channels of a head one after the other.
            seen: `[B, L of the piece, n]` bool; `None`: all queries see all tokens.
        """
        states, summed = self.states[:, :, piece], self.summed[:, :, piece]
        highest, total = self.highest[:, :, piece], self.total[:, :, piece]
        batch, query_heads, length, size = states.shape
        seen = None if seen is None else seen.contiguous()
        addresses = map(address, (states, keys, values, seen, summed, highest, total))
        strides = (*states.stride()[:3], *keys.stride()[:3], *values.stride()[:3])
        strides += (*summed.stride()[:2], *highest.stride()[:2])
        shape = (batch, keys.shape[1], query_heads // keys.shape[1], length, keys.shape[2], size)
        call = _Fold(*addresses, *strides, *shape, torch.get_num_threads(), self.scaling)
        library().alrd_fold(ctypes.byref(call))

    def attended(self) -> Attended:
        """The heads' outputs `[B, H_q, L, d]` and the log-sums."""
        summed = self.summed / self.total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return Attended(summed, self.highest + self.total.log())
