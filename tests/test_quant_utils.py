"""Quantization as functions: shapes, the error bound, the packed layout, the quantizers, the rotation.

The `check_*` functions are tests of the production code as it stands when they are called; `test_mutations.py` calls
them on broken code.
"""

import pytest
import torch

from modules import hadamard_utils, quant_utils
from modules.hadamard_utils import fuse_rotation, hadamard_matrix
from modules.quant_utils import KIVIMixedQuantizer, KIVIQuantizer, quantize_latent, quantize_latent_mixed

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARAMETER = {torch.float32: torch.float16, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}


def round_trip(x, n_bits, group_size, per_channel):
    name = "kivi_quantize_per_channel" if per_channel else "kivi_quantize_per_token"
    return getattr(quant_utils, name)(x, n_bits, group_size)


def spread(parameter: torch.Tensor, x: torch.Tensor, group_size: int, per_channel: bool) -> torch.Tensor:
    """The parameter of every element of `x` `[B, L, r]`, float64."""
    dim = 1 if per_channel else 2
    size = group_size or x.shape[dim]
    return parameter.double().repeat_interleave(size, dim).narrow(dim, 0, x.shape[dim])


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbouring numbers of `dtype` around float64 `x`."""
    info = torch.finfo(dtype)
    return 2.0 ** torch.floor(torch.log2(x.abs().clamp(min=info.tiny))) * info.eps / 2


# ---- shapes and types


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 13), (1, 128, 64), (3, 130, 7)])
@pytest.mark.parametrize("group_size", [0, 1, 32, 128])
def test_shapes_and_types(dtype, shape, group_size):
    x = torch.randn(shape).to(dtype)
    batch, length, rank = shape
    kept = x.clone()
    for per_channel in (True, False):
        states, scale, zero_point = round_trip(x, 4, group_size, per_channel)
        cut = length if per_channel else rank
        groups = -(-cut // (group_size or cut))
        expected = (batch, groups, rank) if per_channel else (batch, length, groups)
        assert (states.shape, states.dtype) == (x.shape, dtype)
        assert (scale.shape, scale.dtype) == (expected, PARAMETER[dtype])
        assert (zero_point.shape, zero_point.dtype) == (expected, PARAMETER[dtype])
    assert torch.equal(x, kept)


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_group_sees_nothing_beyond_itself(n_bits, per_channel):
    x = torch.randn(2, 70, 70)
    whole = round_trip(x, n_bits, 32, per_channel)
    for start, stop, j in ((0, 32, 0), (32, 64, 1), (64, 70, 2)):
        piece = x[:, start:stop] if per_channel else x[:, :, start:stop]
        dim = 1 if per_channel else 2
        alone = round_trip(piece.contiguous(), n_bits, 0, per_channel)
        assert torch.equal(alone[0], whole[0].narrow(dim, start, stop - start))
        for parameter, of_whole in zip(alone[1:], whole[1:], strict=True):
            assert torch.equal(parameter, of_whole.narrow(dim, j, 1))


@pytest.mark.parametrize("per_channel", [True, False])
def test_no_tokens(per_channel):
    states, scale, zero_point = round_trip(torch.zeros(2, 0, 5), 2, 32, per_channel)
    assert states.shape == (2, 0, 5)
    assert scale.numel() == zero_point.numel() == 0


@pytest.mark.parametrize("n_bits", [1.5, 7, 16, True, "2"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_widths_without_codes_are_refused(n_bits, per_channel):
    with pytest.raises(ValueError, match=f"n_bits={n_bits!r}: "):
        round_trip(torch.zeros(1, 4, 4), n_bits, 2, per_channel)


@pytest.mark.parametrize("group_size", [-1, True, 2.0, None])
def test_group_sizes_that_do_not_exist_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size!r}: must be an integer of at least 0"):
        round_trip(torch.zeros(1, 4, 4), 2, group_size, True)


# ---- error

INPUTS = {
    "gaussian": lambda: torch.randn(2, 67, 33),
    "wide": lambda: torch.randn(2, 67, 33) * 10.0 ** torch.linspace(-4, 4, 33),
    "offset": lambda: torch.randn(2, 67, 33) + 100.0,
    "big offset, tiny range": lambda: 1000.0 + 1e-2 * torch.rand(2, 67, 33),
    "representable offset, tiny range": lambda: 1024.0 + torch.randint(0, 9, (2, 67, 33)) * 2.0**-13,
    "offset of a few steps": lambda: 1024.0 + torch.randint(0, 9, (2, 67, 33)),
    "negative offset": lambda: -40000.0 + torch.randn(2, 67, 33),
    "extremes": lambda: torch.where(torch.rand(2, 67, 33) < 0.5, -65504.0, 65504.0),
    "near the extremes": lambda: (torch.rand(2, 67, 33) * 2 - 1) * 65504.0,
    "subnormal": lambda: torch.randn(2, 67, 33) * 3e-7,
    "below subnormal": lambda: torch.randn(2, 67, 33) * 1e-9,
    "subnormal range on an offset": lambda: 0.5 + torch.randn(2, 67, 33) * 1e-6,
    "one outlier": lambda: torch.randn(2, 67, 33).index_fill(1, torch.tensor([5]), 3e4),
    "constant": lambda: torch.full((2, 67, 33), 0.1),
    "zeros": lambda: torch.zeros(2, 67, 33),
    "two values": lambda: torch.where(torch.rand(2, 67, 33) < 0.5, 0.1, 0.3),
    "integers": lambda: torch.randint(-300, 300, (2, 67, 33)),
}


def check_error_bound(name: str, dtype: torch.dtype, n_bits: int, group_size: int, per_channel: bool) -> None:
    """|x - x̂| is at most 0.501 stored scales, plus the rounding of x̂ to the type of the states."""
    x = INPUTS[name]().to(dtype)
    states, scale, zero_point = round_trip(x, n_bits, group_size, per_channel)
    for tensor in (states, scale, zero_point):
        assert torch.isfinite(tensor).all()
    step = spread(scale, x, group_size, per_channel)
    assert (step >= 0).all()
    error = (x.double() - states.double()).abs()
    rounding = 1.01 * half_ulp(torch.maximum(x.double().abs(), states.double().abs()), dtype)
    rounding = torch.where(step > 0, rounding, 0.0)
    assert (error <= 0.501 * step + rounding).all()

    # The nearest of the values that codes can mean is as near as that without any rounding.
    codes = ((x.double() - spread(zero_point, x, group_size, per_channel)) / step.clamp(min=1e-300)).round()
    meant = codes.clamp(0, 2**n_bits - 1) * step + spread(zero_point, x, group_size, per_channel)
    assert ((x.double() - meant).abs() <= 0.501 * step).all()
    # The zero point is the minimum, rounded down by less than one unit in its last place.
    dim = 1 if per_channel else 2
    pieces = x.double().split(group_size or x.shape[dim], dim)
    low = torch.cat([piece.amin(dim, keepdim=True) for piece in pieces], dim)
    below = low - zero_point.double()
    assert (below >= 0).all()
    assert (below <= 2.001 * half_ulp(zero_point.double(), zero_point.dtype)).all()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bits", BITS)
def test_error_bound(name, dtype, n_bits):
    for group_size in (0, 16):
        for per_channel in (True, False):
            check_error_bound(name, dtype, n_bits, group_size, per_channel)


@pytest.mark.parametrize("n_bits", BITS)
def test_error_bound_for_the_range_of_bfloat16(n_bits):
    for scale in (1e-38, 1e-20, 1e30, 4e37):
        x = (torch.randn(1, 40, 8) * scale).bfloat16()
        states, step, _ = round_trip(x, n_bits, 0, True)
        error = (x.double() - states.double()).abs()
        rounding = 1.01 * half_ulp(torch.maximum(x.double().abs(), states.double().abs()), torch.bfloat16)
        assert torch.isfinite(states).all()
        assert (error <= 0.501 * step.double() + rounding).all()


def test_a_range_beyond_float32_is_refused_not_infinite():
    x = torch.tensor([-3e38, 3e38, 0.0, 1.0], dtype=torch.bfloat16).view(1, 4, 1)
    with pytest.raises(ValueError, match="finite"):
        round_trip(x, 2, 0, True)


def check_constant_groups(n_bits: int, dtype: torch.dtype) -> None:
    """A group of one value has scale 0, and its zero point, which comes back, is the value itself."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.125, -65504.0, 65504.0, 6.1e-5, 1000.0, -3.0], dtype=dtype)
    values = values.to(PARAMETER[dtype]).to(dtype)
    values = values[torch.isfinite(values)]
    constant_in_time = values.expand(2, 37, -1).contiguous()
    for per_channel, x in ((True, constant_in_time), (False, constant_in_time.transpose(1, 2).contiguous())):
        for group_size in (0, 16):
            states, scale, zero_point = round_trip(x, n_bits, group_size, per_channel)
            assert torch.equal(states, x)
            assert torch.equal(scale, torch.zeros_like(scale))
            assert torch.equal(spread(zero_point, x, group_size, per_channel), x.double())


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups(n_bits, dtype):
    check_constant_groups(n_bits, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
def test_nan_and_inf_are_refused(bad, dtype, per_channel, everywhere):
    x = torch.randn(2, 33, 5).to(dtype)
    x[(...,) if everywhere else (1, 32, 4)] = bad
    with pytest.raises(ValueError, match=r"finite.*NaN, Inf"):
        round_trip(x, 3, 16, per_channel)


@pytest.mark.parametrize(
    "values", [(-7e4, -7e4), (7e4, 7e4), (-7e4, 0), (0, 7e4), (-7e4, 7e4), (65521, 65521), (0, 1e6)]
)
@pytest.mark.parametrize("n_bits", BITS)
def test_float32_values_beyond_float16_are_refused(values, n_bits):
    x = torch.tensor(values, dtype=torch.float32).repeat(8).view(1, 16, 1)
    for per_channel, states in ((True, x), (False, x.transpose(1, 2))):
        with pytest.raises(ValueError, match="float16"):
            round_trip(states, n_bits, 0, per_channel)


#: DESIGN, section 3: MSE / σ² of a unit Gaussian, by width and group size.
DISTORTION = {(2, 32): 0.154, (2, 128): 0.251, (3, 32): 0.028, (3, 128): 0.046, (4, 32): 0.0061, (4, 128): 0.0099}
DISTORTION |= {(1, 32): 0.352, (1, 128): 0.361, (1.58, 32): 0.182, (1.58, 128): 0.189}


@pytest.mark.parametrize("n_bits, group_size", DISTORTION)
@pytest.mark.parametrize("per_channel", [True, False])
def test_distortion_of_a_gaussian(n_bits, group_size, per_channel):
    x = torch.randn(1, 1024, 512)
    error = (round_trip(x, n_bits, group_size, per_channel)[0] - x).square().mean().item()
    assert error == pytest.approx(DISTORTION[n_bits, group_size], rel=0.03)


# ---- packing


def reference_ternary_words(codes: list[int]) -> list[int]:
    """The words of one channel of ternary codes, digit by digit, from the module's documentation; unsigned."""
    words = []
    for start in range(0, len(codes), 20):
        digits = [*codes[start : start + 20], *[0] * 20][:20]
        word = 0
        for j in range(4):
            c = digits[5 * j : 5 * j + 5]
            value = c[0] * 81 + c[1] * 27 + c[2] * 9 + c[3] * 3 + c[4]
            word += -(-value * 256 // 243) * 256**j
        words.append(word)
    return words


def reference_words(codes: list[int], n_bits: float) -> list[int]:
    """The words of one channel, bit by bit, from the module's documentation; unsigned."""
    if n_bits == 1.58:
        return reference_ternary_words(codes)
    planes = [[(code, n_bits) for code in codes]]
    if n_bits in (3, 5, 6):
        low = 2 if n_bits == 3 else 4
        planes = [[(code % 2**low, low) for code in codes], [(code >> low, n_bits - low) for code in codes]]
    words = []
    for plane in planes:
        room = 32
        for value, bits in plane:
            if room + bits > 32:
                words.append(0)
                room = 0
            for bit in range(bits):
                if value >> bit & 1:
                    words[-1] |= 1 << (room + bit)
            room += bits
    return words


def check_packed_layout(n_bits: float, length: int, channels: int) -> None:
    """Words as the reference makes them, and codes back."""
    codes = torch.randint(0, 3 if n_bits == 1.58 else 2**n_bits, (2, length, channels), dtype=torch.uint8)
    packed = quant_utils.pack_codes(codes, n_bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (2, quant_utils.packed_words(length, n_bits), channels)
    for row in range(2):
        for channel in range(channels):
            expected = reference_words(codes[row, :, channel].tolist(), n_bits)
            assert [word & 0xFFFFFFFF for word in packed[row, :, channel].tolist()] == expected
    unpacked = quant_utils.unpack_codes(packed, n_bits, length)
    assert not unpacked.is_floating_point()
    assert torch.equal(unpacked.long(), codes.long())


@pytest.mark.parametrize("n_bits", [1, 1.58, *BITS])
@pytest.mark.parametrize("length", [1, 20, 31, 32, 100, 128])
@pytest.mark.parametrize("channels", [1, 5])
def test_packed_layout(n_bits, length, channels):
    check_packed_layout(n_bits, length, channels)


@pytest.mark.parametrize("n_bits", [1, 1.58, *BITS])
@pytest.mark.parametrize("length", [1, 31, 100])
def test_extreme_codes_survive_packing(n_bits, length):
    for value in (0, 2 if n_bits == 1.58 else 2**n_bits - 1):
        codes = torch.full((length, 3), value, dtype=torch.uint8)
        unpacked = quant_utils.unpack_codes(quant_utils.pack_codes(codes, n_bits), n_bits, length)
        assert torch.equal(unpacked.long(), codes.long())


@pytest.mark.parametrize("n_bits, words", [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24), (8, 32)])
def test_full_blocks_cost_their_width_exactly(n_bits, words):
    assert quant_utils.packed_words(128, n_bits) == words == 128 * n_bits / 32
    packed = quant_utils.pack_codes(torch.zeros(128, 7, dtype=torch.uint8), n_bits)
    assert packed.untyped_storage().nbytes() * 8 == 128 * 7 * n_bits


def test_worked_example_of_the_documentation():
    assert quant_utils.pack_codes(torch.tensor([[3], [0], [2], [1]]), 2).tolist() == [[0x63]]
    assert quant_utils.pack_codes(torch.tensor([[5], [2], [7], [4]]), 3).tolist() == [[0x39], [0x0D]]
    assert quant_utils.pack_codes(torch.tensor([[2], [0], [1], [1], [2]]), 1.58).tolist() == [[0xBA]]


def test_ternary_digits_are_read_without_a_division():
    """All 243 bytes: digit k is `((byte * 3^k mod 256) * 3) >> 8`, and no byte is used twice."""
    values = range(243)
    packed = {-(-value * 256 // 243) for value in values}
    assert len(packed) == 243
    for value in values:
        byte, digits = -(-value * 256 // 243), [value // 3 ** (4 - k) % 3 for k in range(5)]
        assert [(byte * 3**k % 256) * 3 >> 8 for k in range(5)] == digits
        word = quant_utils.pack_codes(torch.tensor(digits)[:, None], 1.58)
        assert word.tolist() == [[byte]]
        assert quant_utils.unpack_codes(word, 1.58, 5).flatten().tolist() == digits


def test_full_ternary_blocks_cost_seven_words():
    assert quant_utils.packed_words(128, 1.58) == 7
    assert 7 * 32 / 128 == 1.75
    assert [quant_utils.packed_words(n, 1.58) for n in (1, 20, 21, 40, 100)] == [1, 1, 2, 2, 5]


# ---- quantizers


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("length", [0, 1, 31, 128, 300])
@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 5, 6, 8, 16, 2.0])
def test_quantizer_keeps_shape_and_type(per_channel, length, group_size, n_bits):
    for dtype in DTYPES:
        x = torch.randn(2, length, 9).to(dtype)
        y = KIVIQuantizer(n_bits=n_bits, group_size=group_size, per_channel=per_channel)(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        if n_bits == 16 or length == 0:
            assert torch.equal(y, x)
        else:
            assert torch.equal(y, round_trip(x, int(n_bits), group_size, per_channel)[0])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("residual", [0, 5, 32, 400])
@pytest.mark.parametrize("length", [0, 1, 32, 33, 300])
def test_mixed_quantizer_leaves_the_newest_tokens_alone(per_channel, residual, length):
    x = torch.randn(2, length, 9)
    y = KIVIMixedQuantizer(n_bits=2, group_size=32, residual_length=residual, per_channel=per_channel)(x)
    old = max(length - residual, 0)
    assert y.shape == x.shape
    assert torch.equal(y[:, old:], x[:, old:])
    if old:
        assert torch.equal(y[:, :old], round_trip(x[:, :old], 2, 32, per_channel)[0])
    if old > 1:
        assert not torch.equal(y[:, :old], x[:, :old])


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("n_bits", [2, 8, 16])
def test_quantize_latent_rounds_every_token_by_itself(group_size, n_bits):
    x = torch.randn(2, 50, 11)
    y = quantize_latent(x, n_bits, group_size)
    assert torch.equal(y, x if n_bits == 16 else round_trip(x, n_bits, group_size, False)[0])
    assert torch.equal(y[:, 17:18], quantize_latent(x[:, 17:18], n_bits, group_size))
    mixed = quantize_latent_mixed(x, n_bits, residual_length=20, group_size=group_size)
    assert torch.equal(mixed[:, :30], y[:, :30])
    assert torch.equal(mixed[:, 30:], x[:, 30:])
    assert torch.equal(quantize_latent_mixed(x, n_bits, residual_length=50, group_size=group_size), x)


@pytest.mark.parametrize("n_bits", [1.5, 7, True])
def test_quantizers_refuse_widths_that_do_not_exist(n_bits):
    x = torch.zeros(1, 4, 4)
    for make in (
        lambda: KIVIQuantizer(n_bits=n_bits),
        lambda: KIVIMixedQuantizer(n_bits=n_bits),
        lambda: quantize_latent(x, n_bits),
        lambda: quantize_latent_mixed(x, n_bits, 2),
    ):
        with pytest.raises(ValueError, match=f"n_bits={n_bits!r}: m"):
            make()
    with pytest.raises(ValueError, match="residual_length=-1: must be"):
        KIVIMixedQuantizer(residual_length=-1)
    with pytest.raises(ValueError, match="group_size=-1: must be"):
        KIVIQuantizer(group_size=-1)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    "n_bits, symmetric, method", [(1, None, None), (1.58, None, None), (2, True, "mse"), (3, None, "mse")]
)
def test_quantizer_passes_on_symmetry_and_range(per_channel, n_bits, symmetric, method):
    x = torch.randn(2, 50, 9) ** 3
    name = "kivi_quantize_per_channel" if per_channel else "kivi_quantize_per_token"
    expected, scale, zero_point = getattr(quant_utils, name)(x, n_bits, 16, symmetric, method)
    found = KIVIQuantizer(n_bits, 16, per_channel, symmetric, method)(x)
    assert torch.equal(found, expected)
    assert (zero_point is None) == (symmetric or n_bits < 2)
    if n_bits >= 2:
        plain = KIVIQuantizer(n_bits, 16, per_channel)(x)
        assert not torch.equal(found, plain)
        assert (found - x).square().sum() < (plain - x).square().sum()
    else:
        spread_scale = spread(scale, x, 16, per_channel)
        signed = expected.double() / spread_scale
        assert torch.allclose(signed, signed.round(), atol=1e-6)
        assert set(signed.round().unique().tolist()) == ({-1, 1} if n_bits == 1 else {-1, 0, 1})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_bits": 1.58, "symmetric": False}, "symmetric=False: ternary"),
        ({"n_bits": 1, "range_method": "minmax"}, "range_method='minmax'"),
        ({"range_method": "max"}, "range_method='max': must be"),
        ({"symmetric": 1}, "symmetric=1: must be"),
    ],
)
def test_quantizers_refuse_what_schemes_refuse(fields, message):
    with pytest.raises(ValueError, match=message):
        KIVIQuantizer(**fields)


# ---- rotation


@pytest.mark.parametrize("n", [1, 2, 7, 12, 100, 128])
def test_rotation_is_orthogonal_and_spread(n):
    h = hadamard_matrix(n)
    assert (h.shape, h.dtype) == ((n, n), torch.float64)
    assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    # The Hadamard factor has entries of one size, those of the Hartley factor exceed it by √2 at most.
    assert h.abs().max() <= 2**0.5 / n**0.5 + 1e-12
    assert torch.equal(h, hadamard_matrix(n))
    if n > 2:
        assert not torch.equal(h, hadamard_matrix(n, seed=1))


@pytest.mark.parametrize("n", [1, 3, 5, 7, 25])
def test_hartley_is_its_own_inverse(n):
    h = torch.from_numpy(hadamard_utils.hartley(n))
    assert torch.equal(h, h.T) or torch.allclose(h, h.T, atol=1e-14)
    assert torch.allclose(h @ h, torch.eye(n, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 7, 12, 100])
def test_fused_rotation_keeps_the_product(rank):
    a, b = torch.randn(20, rank, dtype=torch.float64), torch.randn(rank, 30, dtype=torch.float64)
    rotated_a, rotated_b = fuse_rotation(a, b)
    assert torch.allclose(rotated_a @ rotated_b, a @ b, atol=1e-11)
    assert torch.allclose(rotated_b, hadamard_matrix(rank) @ b)


@pytest.mark.parametrize("per_channel", [True, False])
def test_rotation_lowers_the_error_with_outlier_channels(per_channel):
    x = torch.randn(1, 512, 100) * torch.ones(100).index_fill(0, torch.arange(0, 100, 25), 30.0)
    h = hadamard_matrix(100).float()
    plain = round_trip(x, 2, 0 if not per_channel else 128, per_channel)[0]
    rotated = round_trip(x @ h.T, 2, 0 if not per_channel else 128, per_channel)[0] @ h
    plain_error, rotated_error = ((y - x).square().mean().item() for y in (plain, rotated))
    if per_channel:
        # Per channel every range is its own: rotation can only even them out, it must not cost much.
        assert rotated_error < 1.1 * plain_error
    else:
        assert rotated_error < 0.5 * plain_error
