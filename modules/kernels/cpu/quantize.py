"""C++ kernels of `modules/quant_utils.py`: quantize-and-pack, unpack-and-dequantize; the same bits come out.

Format, formulas and errors are those of the reference, whose functions have the same names here. The work is spread
over `torch.get_num_threads()` threads. Source: `quantize.cpp`; how it is built: `library.py`.
"""

from functools import lru_cache

import torch

from modules.kernels.cpu.library import call
from modules.quant_utils import RATIOS, check_scale, grid, packed_words, parameter_dtype

#: Types that the kernels read and write, in the order of their numbers there; others pass through float32.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Elements that are worth a second thread.
_ELEMENTS_PER_THREAD = 1 << 13


def _threads(x: torch.Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _ELEMENTS_PER_THREAD))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` in a type that kernels read, its last dimension without gaps."""
    x = x if x.dtype in (*_DTYPES, torch.int32) else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def _group_table(widths: tuple[int, ...] | None) -> torch.Tensor | None:
    """First channel and width of each group, `[2, len(widths)]` int64."""
    if widths is None:
        return None
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return torch.tensor([starts, widths], dtype=torch.int64, device="cpu")


@lru_cache
def _candidates(n_bits: float, symmetric: bool) -> torch.Tensor:
    """Steps and zero points that the search tries first, in units of the range, `[2, len(RATIOS)]` float32."""
    levels, spacing, offset = grid(n_bits)
    middle = offset / spacing
    full = 1 / (levels - 1 - middle) if symmetric else 1 / (levels - 1)
    float32 = {"dtype": torch.float32, "device": "cpu"}
    steps = torch.tensor([ratio * full for ratio in RATIOS], **float32)
    zeros = steps * -middle if symmetric else torch.tensor([(1 - ratio) / 2 for ratio in RATIOS], **float32)
    return torch.stack([steps, zeros])


def _bits(n_bits: float) -> int:
    """The kernels' `bits`."""
    return 0 if n_bits == 1.58 else int(n_bits)


def quantize_and_pack(
    x: torch.Tensor,
    n_bits: float,
    widths: tuple[int, ...] | None = None,
    symmetric: bool = False,
    range_method: str = "minmax",
    scale_dtype: torch.dtype | None = None,
    static: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    """As `quantize_and_pack` in `modules/quant_utils.py`."""
    n, length, channels = x.shape
    dtype, x = scale_dtype or parameter_dtype(x.dtype), _rows(x)
    packed = torch.empty((n, packed_words(length, n_bits), channels), dtype=torch.int32, device="cpu")
    if static is None:
        fixed_scale = fixed_zero = None
        groups = 0 if widths is None else len(widths)
        shape = (n, channels) if widths is None else (n, length, groups)
        scale = torch.empty(shape, dtype=dtype, device="cpu")
        zero_point = None if symmetric else torch.empty(shape, dtype=dtype, device="cpu")
    else:
        widths, groups, (scale, zero_point) = None, 0, static
        symmetric = zero_point is None
        fixed_scale, fixed_zero = (None if t is None else t.float().contiguous() for t in static)
    good = call(
        "alrd_quantize",
        x,
        _DTYPES.index(x.dtype),
        packed,
        scale,
        zero_point,
        _DTYPES.index(dtype),
        fixed_scale,
        fixed_zero,
        _candidates(n_bits, symmetric),
        _group_table(widths),
        *(n, length, channels, groups, packed.shape[1], x.stride(0), x.stride(1)),
        _bits(n_bits),
        symmetric,
        range_method == "mse" or (symmetric and n_bits < 2),
        torch.finfo(dtype).max,
        _threads(x),
    )
    if static is not None and not good:
        raise ValueError("x: values to quantize must be finite; NaN or Inf were found")
    if static is not None or not good:
        check_scale(scale)
    return packed, scale, zero_point


def unpack_and_dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    n_bits: float,
    length: int,
    dtype: torch.dtype,
    widths: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """As `unpack_and_dequantize` in `modules/quant_utils.py`."""
    n, _, channels = packed.shape
    packed, scale = _rows(packed), scale.contiguous()
    written = dtype if dtype in _DTYPES else torch.float32
    states = torch.empty((n, length, channels), dtype=written, device="cpu")
    call(
        "alrd_dequantize",
        packed,
        scale,
        None if zero_point is None else zero_point.contiguous(),
        _DTYPES.index(scale.dtype),
        states,
        _DTYPES.index(states.dtype),
        _group_table(widths),
        *(n, length, channels, 0 if widths is None else len(widths), packed.stride(0), packed.stride(1)),
        0 if scale.shape[0] == 1 else channels,
        _bits(n_bits),
        zero_point is None,
        min(torch.finfo(dtype).max, torch.finfo(torch.float32).max),
        _threads(states),
    )
    return states.to(dtype)
