"""Parts of the latents of a block for a few tokens, by C++ (`latents.cpp`)."""

import ctypes
from functools import lru_cache

import torch

from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import TYPES, address, dense, ints, structure
from modules.svd_linear import MemberBLinear

# latents.cpp says what the fields mean.
_Parts = structure("""
    pointer outputs weight bias latents group_of
    int64 token_stride
    int32 tokens rows groups width
    int32 output_type weight_type threads
""")


@lru_cache(maxsize=64)
def _group_of(ranks: tuple[int, ...]) -> ctypes.Array:
    """The head group of each latent."""
    groups = []
    for group, rank in enumerate(ranks):
        groups += [group] * rank
    return ints(groups)


def add_latents(linear: MemberBLinear, outputs: torch.Tensor, latents: torch.Tensor) -> None:
    """Add `linear(outputs)` to `latents` `[B, L, Σ r]` float32; PyTorch would convert the weight each time."""
    outputs, weight, group_of = dense(outputs.flatten(0, 1)), linear.weight.contiguous(), _group_of(linear.ranks)
    parts = _Parts(
        address(outputs), weight.data_ptr(), linear.bias.data_ptr(), latents.data_ptr(), ctypes.addressof(group_of),
        outputs.stride(0), len(outputs), weight.shape[0], len(linear.ranks), weight.shape[1],
        TYPES[outputs.dtype], TYPES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip
    library().alrd_add_latents(ctypes.byref(parts))
