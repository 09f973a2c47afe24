"""The C++ kernels of the quantization against their reference, bit for bit."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import quant_utils as reference
from modules.kernels.cpu import library as cpp_library
from modules.kernels.cpu import quantize as kernels
from tests.helpers import assert_same, magnitudes

pytestmark = pytest.mark.usefixtures("poisoned_kernels")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: (n_bits, symmetric, range_method), all there are.
SETTINGS = [
    (n_bits, symmetric, method)
    for n_bits, symmetric, method in itertools.product((1, 1.58, 2, 3, 4, 5, 6, 8), (False, True), ("minmax", "mse"))
    if (symmetric or n_bits != 1.58) and (method == "mse" or n_bits >= 2 or not symmetric)
]

#: Blocks, tokens and groups of channels: fewer than a vector, more than a tile, sizes that divide nothing, one value.
SHAPES = [
    (1, 63, (7, 1, 5)),
    (2, 111, (13,)),
    (1, 130, (3, 37)),
    (2, 1, (1,)),
    (2, 33, (16, 64)),
    (1, 35, (140, 8)),
    (1, 160, (64,)),
]


def compare(x, n_bits, widths, symmetric, method, scale_dtype=None, states_dtype=None) -> None:
    """All functions on `x`, by the kernels and by the reference."""
    arguments = (n_bits, widths, symmetric, method, scale_dtype)
    expected = reference.quantize_and_pack(x, *arguments)
    assert_same(kernels.quantize_and_pack(x, *arguments), expected)
    rest = (n_bits, x.shape[1], states_dtype or x.dtype, widths)
    assert_same([kernels.unpack_and_dequantize(*expected, *rest)], [reference.unpack_and_dequantize(*expected, *rest)])


# ---- the same bits


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("n_bits", "symmetric", "method"), SETTINGS)
def test_same_bits(n_bits, symmetric, method, per_channel):
    for i, (n, length, widths) in enumerate(SHAPES):
        dtype, scale_dtype = DTYPES[i % 3], (None, torch.float16, torch.bfloat16)[i // 2 % 3]
        x = (3 * torch.randn(n, length, sum(widths)) + torch.randn(sum(widths))).to(dtype)
        compare(x, n_bits, None if per_channel else widths, symmetric, method, scale_dtype)


@settings(max_examples=150, deadline=None)
@given(
    setting=st.sampled_from(SETTINGS),
    length=st.integers(1, 100),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4).map(tuple),
    per_channel=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-12, 3),
    heavy=st.booleans(),
)
def test_same_bits_of_any_shape(setting, length, widths, per_channel, dtype, scale_dtype, seed, exponent, heavy):
    x = torch.randn(2, length, sum(widths), generator=torch.Generator().manual_seed(seed))
    x = (x**3 if heavy else x) * 10.0**exponent
    n_bits, symmetric, method = setting
    compare(x.clamp(-6e4, 6e4).to(dtype), n_bits, None if per_channel else widths, symmetric, method, scale_dtype)


def test_threads_share_the_work():
    x = torch.randn(3, 200, 300, dtype=torch.bfloat16)
    torch.set_num_threads(3)
    assert kernels._threads(x) == 3 and kernels._threads(x[:, :1, :1]) == 1
    for widths, method in itertools.product((None, (100, 200)), ("minmax", "mse")):
        compare(x, 3, widths, False, method)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("n_bits", "symmetric", "method"), SETTINGS)
def test_magnitudes(n_bits, symmetric, method, per_channel, dtype):
    # A range of twice the limit does not fit a scale of bfloat16, whose limit is that of float32.
    x = magnitudes(20, 5, dtype) / (1 if dtype == torch.float16 else 4)
    compare(x, n_bits, None if per_channel else (4, 1), symmetric, method)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_and_rounding(dtype):
    """Values half-way between two codes, and ranges that the stored types cannot hold exactly."""
    slope, offset = torch.tensor([1.0, 0.5, 1 / 3, 1e-3]), torch.tensor([0, 1e3, -1e3, 0.1])
    x = (torch.arange(64.0)[:, None] * slope + offset).to(dtype)[None]
    for n_bits, symmetric in itertools.product((2, 4, 8), (True, False)):
        compare(x, n_bits, None, symmetric, "minmax")
        compare(x, n_bits, (4,), symmetric, "minmax", torch.bfloat16)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("n_bits", "symmetric"), [(1, False), (1, True), (1.58, True), (4, False), (4, True)])
def test_ranges_finer_than_the_stored_types(n_bits, symmetric, per_channel):
    # The steps of float16 near the third and fourth offset are 7,000 of these spreads: errors that the sums clamp.
    offset = torch.tensor([1000.3, -1000.3, 1.3018e-6, 1.43584e-5, 0, 0])
    spread = torch.tensor([1e-3, 1e-2, 8.4e-12, 5.4e-12, 1e-12, 1e-40])
    x = offset + spread * torch.rand(200, 6)
    compare((x if per_channel else x.T)[None], n_bits, None if per_channel else (200,), symmetric, "mse")


@pytest.mark.parametrize(("n_bits", "symmetric"), [(1, True), (1.58, True), (3, False), (8, True), (8, False)])
def test_long_groups(n_bits, symmetric):
    """Longer than what the 32-bit sums hold."""
    x = torch.rand(1, 40_000, 2).sign() * torch.rand(1, 40_000, 2)
    compare(x, n_bits, None, symmetric, "mse")
    compare(x.transpose(1, 2).contiguous(), n_bits, (39_999, 1), symmetric, "mse")


#: Counts the significands whose quotient by `step` the two fused products of `candidate_error` do not give.
QUOTIENTS = """
#include <cstdint>
extern "C" int64_t wrong_quotients(float step, int64_t refined) {
    const float inverse = 1 / step;
    int64_t wrong = 0;
    for (int32_t i = 1 << 23; i < 1 << 24; i++) {
        float x = i, quotient = x * inverse;
        if (refined) quotient = __builtin_fmaf(__builtin_fmaf(-quotient, step, x), inverse, quotient);
        wrong += quotient != x / step;
    }
    return wrong;
}
"""


def test_codes_of_the_first_ranges_are_exact(tmp_path, monkeypatch):
    """Powers of two change no quotient, so that the significands of one binade stand for all values."""
    monkeypatch.setattr(cpp_library, "SOURCES", {"quotients.cpp": QUOTIENTS})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpp_library._build(cpp_library._path())
    wrong = ctypes.CDLL(str(cpp_library._path())).wrong_quotients
    wrong.restype = ctypes.c_int64
    ranges = {(n_bits, symmetric) for n_bits, symmetric, _ in SETTINGS}
    steps = {step for which in ranges for step in kernels._candidates(*which)[0].tolist()}
    assert not [step for step in steps if wrong(ctypes.c_float(step), ctypes.c_int64(1))]
    assert all(wrong(ctypes.c_float(step), ctypes.c_int64(0)) for step in steps if step.hex()[:5] != "0x1.0")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 5, 6, 8])
def test_static_scales_clip(n_bits, symmetric):
    x, scale = torch.randn(2, 70, 9), torch.rand(9)
    scale[3] = 0
    zero_point = None if symmetric else torch.randn(9)
    expected = reference.quantize_and_pack(x, n_bits, static=(scale, zero_point))
    assert_same(kernels.quantize_and_pack(x, n_bits, static=(scale, zero_point)), expected)
    for rows in (1, 2):  # one for all blocks, or one each
        parameters = [None if t is None else t.expand(rows, 9) for t in (scale, zero_point)]
        rest = (*parameters, n_bits, 70, torch.bfloat16)
        states = kernels.unpack_and_dequantize(expected[0], *rest)
        assert_same([states], [reference.unpack_and_dequantize(expected[0], *rest)])


@pytest.mark.parametrize("per_channel", [True, False])
def test_states_of_every_type_stay_finite(per_channel):
    widths = None if per_channel else (3,)
    for dtype, scale_dtype in itertools.product((*DTYPES, torch.float64), DTYPES[1:]):
        x = torch.tensor([-1.0, 0.3, 1.0])[:, None] * torch.tensor([torch.finfo(scale_dtype).max / 3, 2.0, 1e-6])
        compare(x[None].to(torch.float64), 4, widths, False, "minmax", scale_dtype, dtype)


@pytest.mark.parametrize("per_channel", [True, False])
def test_views_are_read_in_place(per_channel):
    widths = None if per_channel else (5, 4)
    x = torch.randn(4, 66, 27).to(torch.bfloat16)
    views = [
        x[1::2, 3:, 9:18],
        x[:2, ::3, :9],
        x[:2, :9].transpose(1, 2),
        x[:2, :, ::3],
        x[:1, :1, :9].expand(2, 40, 9),
    ]
    for view in views:
        assert view.stride(-1) != 1 or kernels._readable(view).data_ptr() == view.data_ptr()
        compare(view[..., : sum(widths or (9,))], 2, widths, False, "minmax")


@pytest.mark.parametrize("n_bits", [2, 3, 1.58])
def test_packed_views_and_no_blocks(n_bits):
    x = torch.randn(3, 45, 12)
    symmetric = n_bits == 1.58
    packed, scale, zero_point = reference.quantize_and_pack(x, n_bits, None, symmetric, "mse")
    for blocks, channels in ((slice(0, 3, 2), slice(4, 9)), (slice(0, 0), slice(None))):
        stored = (packed[blocks, :, channels], scale[blocks, channels], symmetric or zero_point[blocks, channels])
        rest = [*(None if t is True else t for t in stored), n_bits, 45, torch.float16]
        assert_same([kernels.unpack_and_dequantize(*rest)], [reference.unpack_and_dequantize(*rest)])
    assert_same(kernels.quantize_and_pack(x[:0], 2), reference.quantize_and_pack(x[:0], 2))


# ---- errors


def messages(*arguments, **others) -> list[str]:
    """What the reference and the kernels say when they refuse."""
    said = []
    for module in (reference, kernels):
        with pytest.raises(ValueError, match="must be finite") as error:
            module.quantize_and_pack(*arguments, **others)
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 65505.0, -1e9])
@pytest.mark.parametrize(("n_bits", "symmetric", "method"), SETTINGS)
def test_values_that_do_not_fit_are_refused(n_bits, symmetric, method, value):
    x = torch.randn(2, 40, 70)
    x[1, 39, 69] = value
    for widths in (None, (65, 5)):
        expected, actual = messages(x, n_bits, widths, symmetric, method)
        assert actual == expected


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_range_that_does_not_fit_is_refused(method):
    x = torch.randn(1, 40, 6, dtype=torch.bfloat16)
    x[0, 3, 2], x[0, 39, 2] = 3e38, -3e38
    expected, actual = messages(x, 2, range_method=method)
    assert actual == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_static_scales_refuse_what_is_not_finite(value):
    x = torch.randn(2, 70, 6)
    x[1, 69, 5] = value
    expected, actual = messages(x, 8, static=(torch.ones(6), torch.zeros(6)))
    assert actual == expected
    x[1, 69, 5] = 0
    expected, actual = messages(x, 8, static=(torch.full((6,), value), torch.zeros(6)))
    assert actual == expected


# ---- other processors


@pytest.mark.slow
def test_avx2_has_the_same_bits():
    """All of the above as compiled for a processor without AVX-512."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__]
    environment = os.environ | {"ALRD_CPU_MARCH": "haswell"}
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
