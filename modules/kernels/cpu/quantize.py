"""C++ kernels of `modules/quant_utils.py`: quantize-and-pack, unpack-and-dequantize; the same bits come out.

Format, formulas and errors are those of the reference, whose functions have the same names here. The scales of tokens
are those that `TokenScaledCodec` in `modules/cache/codecs.py` chooses in PyTorch. The work is spread over
`torch.get_num_threads()` threads. Source: `quantize.cpp`; how it is built: `library.py`.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch

from modules.kernels.cpu.library import library
from modules.kernels.cpu.structures import TYPES, address, ints, starts, structure, width_code
from modules.quant_utils import RATIOS, check_scale, decode_token_scale, grid, packed_words, parameter_dtype

#: Elements that are worth a second thread.
_ELEMENTS_PER_THREAD = 1 << 13

# quantize.cpp says what the fields mean.
_Grid = structure("""
    int32 bits levels
    float spacing offset
    int32 symmetric
""")
_Quantizing = structure(
    """
    pointer x packed scale zero_point static_scale static_zero candidates table
    int64 n length channels groups words stride_n stride_t
    Grid grid
    int32 type parameter_type search threads
    float limit
    """,
    Grid=_Grid,
)
_Dequantizing = structure(
    """
    pointer packed scale zero_point states table
    int64 n length channels groups stride_n stride_w stride_scale
    Grid grid
    int32 type parameter_type threads
    float limit
    """,
    Grid=_Grid,
)
_TokenScaling = structure("""
    pointer x codes scaled middle step levels weight error_weight energy scale_of offsets table
    int64 n length channels groups stride_n stride_t
    int32 type coarse fine threads
""")


def _threads(x: torch.Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _ELEMENTS_PER_THREAD))


def _readable(x: torch.Tensor) -> torch.Tensor:
    """`x` in a type that kernels read, its last dimension without gaps."""
    if x.dtype not in TYPES and x.dtype != torch.int32:
        x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x


@lru_cache
def _group_table(widths: tuple[int, ...] | None) -> torch.Tensor | None:
    """First channel and width of each group, `[2, len(widths)]` int64; `None` for parameters per channel."""
    if widths is None:
        return None
    return torch.tensor([starts(widths)[:-1], widths], dtype=torch.int64, device="cpu")


@lru_cache
def _grid(n_bits: float, symmetric: bool) -> ctypes.Structure:
    return _Grid(width_code(n_bits), *grid(n_bits), symmetric)


@lru_cache
def _candidates(n_bits: float, symmetric: bool) -> torch.Tensor:
    """Steps and zero points that the search tries first, in units of the range, `[2, len(RATIOS)]` float32."""
    levels, spacing, offset = grid(n_bits)
    middle = offset / spacing
    # Computed in float64 and rounded once, as the reference does it.
    ratios = torch.tensor(RATIOS, dtype=torch.float64, device="cpu")
    if symmetric:
        steps = (ratios * (1 / (levels - 1 - middle))).float()
        return torch.stack([steps, steps * -middle])
    return torch.stack([ratios * (1 / (levels - 1)), (1 - ratios) / 2]).float()


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
    dtype, x = scale_dtype or parameter_dtype(x.dtype), _readable(x)
    packed = torch.empty((n, packed_words(length, n_bits), channels), dtype=torch.int32, device="cpu")
    static_scale = static_zero = None
    if static is not None:
        # Calibrated parameters are read, not measured.
        widths, (scale, zero_point) = None, static
        static_scale = scale.float().contiguous()
        if zero_point is not None:
            static_zero = zero_point.float().contiguous()
        symmetric = zero_point is None
    else:
        shape = (n, channels)
        if widths is not None:
            shape = (n, length, len(widths))
        scale, zero_point = torch.empty(shape, dtype=dtype, device="cpu"), None
        if not symmetric:
            zero_point = torch.empty(shape, dtype=dtype, device="cpu")
    table, candidates = _group_table(widths), _candidates(n_bits, symmetric)
    arguments = _Quantizing(
        x=address(x), packed=address(packed), scale=address(scale), zero_point=address(zero_point),
        static_scale=address(static_scale), static_zero=address(static_zero), candidates=address(candidates),
        table=address(table), n=n, length=length, channels=channels, groups=len(widths or ()), words=packed.shape[1],
        stride_n=x.stride(0), stride_t=x.stride(1), grid=_grid(n_bits, symmetric), type=TYPES[x.dtype],
        parameter_type=TYPES[dtype], search=range_method == "mse" or (symmetric and n_bits < 2), threads=_threads(x),
        limit=torch.finfo(dtype).max,
    )  # fmt: skip
    good = library().alrd_quantize(ctypes.byref(arguments))
    # NaN and Inf are found on the way: to look for them first would be another pass over the states.
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
    packed, scale = _readable(packed), scale.contiguous()
    if zero_point is not None:
        zero_point = zero_point.contiguous()
    # Other types are written as float32 and cast.
    written = torch.float32
    if dtype in TYPES:
        written = dtype
    states = torch.empty((n, length, channels), dtype=written, device="cpu")
    table = _group_table(widths)
    arguments = _Dequantizing(
        packed=address(packed), scale=address(scale), zero_point=address(zero_point), states=address(states),
        table=address(table), n=n, length=length, channels=channels, groups=len(widths or ()),
        stride_n=packed.stride(0), stride_w=packed.stride(1), stride_scale=channels,
        grid=_grid(n_bits, zero_point is None), type=TYPES[written], parameter_type=TYPES[scale.dtype],
        threads=_threads(states), limit=min(torch.finfo(dtype).max, torch.finfo(torch.float32).max),
    )  # fmt: skip
    # Calibrated scales are the same in all blocks.
    if scale.shape[0] == 1:
        arguments.stride_scale = 0
    library().alrd_dequantize(ctypes.byref(arguments))
    return states.to(dtype)


@lru_cache
def _token_scale_of() -> torch.Tensor:
    """The scale of each byte, `[256]` float32."""
    return decode_token_scale(torch.arange(256, dtype=torch.uint8, device="cpu"))


def scale_tokens(
    x: torch.Tensor,
    widths: tuple[int, ...],
    channels: tuple[torch.Tensor, ...],
    energy: torch.Tensor,
    rounds: tuple[Sequence[int], Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the scale of each token and head group, as `TokenScaledCodec` does.

    Args:
        x: `[N, T, C]` states, any floating type.
        widths: Channels of each head group.
        channels: Middle, step, levels, weight and error weight of each channel, `[C]` float32 each.
        energy: `[head groups]` float64, of a token of scale 1.
        rounds: Bytes beside the guess that are tried, then beside the best of these.

    Returns:
        `[N, T, head groups]` uint8, the bytes of the scales; `[N, T, C]` float32, the states with their distances from
        the middles divided by the scales. Where `x` is not finite, neither is the second.
    """
    x, table, scale_of = _readable(x), _group_table(tuple(widths)), _token_scale_of()
    n, length, count = x.shape
    codes = torch.empty((n, length, len(widths)), dtype=torch.uint8, device="cpu")
    scaled = torch.empty((n, length, count), dtype=torch.float32, device="cpu")
    middle, step, levels, weight, error_weight = [channel.float().contiguous() for channel in channels]
    offsets = ints([*rounds[0], *rounds[1]])
    arguments = _TokenScaling(
        x=address(x), codes=address(codes), scaled=address(scaled), middle=address(middle), step=address(step),
        levels=address(levels), weight=address(weight), error_weight=address(error_weight), energy=address(energy),
        scale_of=address(scale_of), offsets=ctypes.addressof(offsets), table=address(table), n=n, length=length,
        channels=count, groups=len(widths), stride_n=x.stride(0), stride_t=x.stride(1), type=TYPES[x.dtype],
        coarse=len(rounds[0]), fine=len(rounds[1]), threads=_threads(x),
    )  # fmt: skip
    library().alrd_scale_tokens(ctypes.byref(arguments))
    return codes, scaled
