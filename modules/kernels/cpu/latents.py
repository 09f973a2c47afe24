"""Parts of the latents of a block for a few tokens, by C++ (`latents.cpp`)."""

import ctypes
from functools import lru_cache

import torch

from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import TYPES, dense, ints, structure
from modules.svd_linear import MemberBLinear

# latents.cpp says what the fields mean.
_Parts = structure("""
    pointer outputs weight bias latents group_of
    int64 token_stride
    int32 tokens rows groups width
    int32 output_type weight_type
""")


@lru_cache(maxsize=64)
def _group_of(ranks: tuple[int, ...]) -> ctypes.Array:
    """The head group of each latent."""
    groups = []
    for group, rank in enumerate(ranks):
        groups += [group] * rank
    return ints(groups)


def add_latents(linears: tuple[MemberBLinear, ...], outputs: tuple, latents: tuple) -> None:
    """Add each `linear(x)` of outputs to its `[B, L, Σ r]` float32; PyTorch would convert the weights each time.

    Those that are added to the same latents have as many ranks.
    """
    parts, kept = (_Parts * len(linears))(), []
    for made, linear, x, latent in zip(parts, linears, outputs, latents, strict=True):
        x, weight, group_of = dense(x.flatten(0, 1)), linear.weight.contiguous(), _group_of(linear.ranks)
        kept += [x, weight, group_of]
        rows, width = weight.shape
        made.__init__(
            x.data_ptr(), weight.data_ptr(), linear.bias.data_ptr(), latent.data_ptr(), ctypes.addressof(group_of),
            x.stride(0), len(x), rows, len(linear.ranks), width, TYPES[x.dtype], TYPES[weight.dtype],
        )  # fmt: skip
    library().alrd_add_latents(parts, len(linears), torch.get_num_threads())
