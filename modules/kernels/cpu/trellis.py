"""The C++ encoder of trellis codes (`trellis.cpp`): the bits of `modules/trellis.py`."""

import ctypes

import torch

from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import address, ints, structure
from modules.trellis import points_of

#: Tokens that are worth a second thread.
_TOKENS_PER_THREAD = 64

# trellis.cpp says what the fields mean.
_Encoding = structure("""
    pointer x points codes widths
    int64 tokens channels stride
    int32 chains bits threads
""")


def encode(x: torch.Tensor, bits: int, widths: tuple[int, ...], points: torch.Tensor | None = None) -> torch.Tensor:
    """As `encode` in `modules/trellis.py`."""
    # Everything that the arguments point to has a name here, and so lives until the kernel is done.
    if points is None:
        points = points_of(bits, x.device)
    x, points, chains = x.float().contiguous(), points.float().contiguous(), ints(widths)
    codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    tokens, channels = x.shape
    threads = max(1, min(torch.get_num_threads(), tokens // _TOKENS_PER_THREAD))
    addresses = (address(x), address(points), address(codes), ctypes.addressof(chains))
    call = _Encoding(*addresses, tokens, channels, channels, len(widths), bits, threads)
    library().alrd_trellis_encode(ctypes.byref(call))
    return codes
