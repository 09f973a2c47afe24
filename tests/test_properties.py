"""Properties of the quantizers for any shape, width, group and value (hypothesis)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_codecs import CASES, SCHEMES, assert_same, raw, same_bits
from test_kivi_cache import feed

from modules import quant_utils
from modules.cache.codecs import make_codec
from modules.quant_utils import group_widths, pack_codes, packed_words, parameter_dtype, quantize, unpack_codes

settings.register_profile(
    "stable",
    deadline=None,
    derandomize=True,
    max_examples=120,
    # The seed and the poisoned allocations are the same for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
stable = settings(settings.get_profile("stable"))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Largest magnitude whose codes float32 can hold at every width; beyond it see the last tests.
LIMIT = {torch.float32: 65504.0, torch.float16: 65504.0, torch.bfloat16: 1e38}
SPECIAL = (0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 6e-8, -6e-8, 6.1e-5, 5.9e-5, 1e-45, -1e-39, 0.1, 1e-3, 3.0)


@st.composite
def states(draw, dtypes=DTYPES, most=12):
    """`[n, length]` states of one type: any floats, few special ones, or noise of any size on any offset."""
    dtype = draw(st.sampled_from(dtypes))
    count, length = draw(st.integers(1, 4)), draw(st.integers(1, most))
    kind = draw(st.sampled_from(("any", "special", "noise", "rows")))
    limit = LIMIT[dtype]
    if kind == "any":
        element = st.floats(-limit, limit, width=16 if dtype != torch.bfloat16 else 64, allow_subnormal=True)
        values = draw(st.lists(element, min_size=count * length, max_size=count * length))
    elif kind == "special":
        values = draw(st.lists(st.sampled_from(SPECIAL), min_size=count * length, max_size=count * length))
    else:
        exponent = draw(st.integers(-45, 4 if dtype != torch.bfloat16 else 37))
        offset = draw(st.sampled_from((0.0, 1.0, -3e4, 1e3)))
        noise = np.random.default_rng(draw(st.integers(0, 2**16))).standard_normal(count * length)
        values = np.clip(noise * 10.0**exponent + offset, -limit, limit)
    x = torch.tensor(np.asarray(values, dtype=np.float64)).clamp(-limit, limit).to(dtype).view(count, length)
    if kind == "rows":
        x[: draw(st.integers(0, count))] = x[0, 0]
    return x


group_sizes = st.sampled_from((0, 1, 2, 3, 5, 8))


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    return 2.0 ** torch.floor(torch.log2(x.abs().clamp(min=info.tiny))) * info.eps / 2


def by_group(x: torch.Tensor, widths) -> torch.Tensor:
    return torch.stack([group.sum(-1) for group in x.split(widths, -1)], -1)


def meant(codes, scale, zero_point, n_bits: float, widths) -> torch.Tensor:
    """Float64 states of codes, from the table of the documentation."""
    scale = scale.double().repeat_interleave(torch.tensor(widths), -1)
    if zero_point is None:
        zero = -scale * {1: 1, 1.58: 1}.get(n_bits, 2 ** (n_bits - 1))
    else:
        zero = zero_point.double().repeat_interleave(torch.tensor(widths), -1)
    return codes.double() * scale * (2 if n_bits == 1 else 1) + zero


# ---- rounding


@stable
@given(states(), st.sampled_from((1, 2, 3, 4, 5, 6, 8)), group_sizes, st.booleans(), st.booleans())
@example(torch.full((2, 5), 65504.0).half(), 2, 0, False, True)
@example(torch.tensor([[-65504.0, 65504.0]]), 8, 0, True, False)
@example(torch.tensor([[1e-45, 0.0, 3.0]]), 2, 0, False, False)
def test_minmax_rounds_to_half_a_step(x, n_bits, group_size, symmetric, per_channel):
    if n_bits == 1:
        symmetric = False
    kept, dtype = x.clone(), x.dtype
    name = "kivi_quantize_per_channel" if per_channel else "kivi_quantize_per_token"
    given_states = (x.T if per_channel else x)[None]
    found = getattr(quant_utils, name)(given_states, n_bits, group_size, symmetric, "minmax")
    back, scale, zero_point = (None if t is None else (t[0].T if per_channel else t[0]) for t in found)
    assert same_bits(x, kept)
    assert (back.dtype, back.shape) == (dtype, x.shape)
    assert (zero_point is None) == symmetric
    for tensor in (back, scale, zero_point):
        assert tensor is None or torch.isfinite(tensor).all()
    assert (scale >= 0).all()
    widths = group_widths(x.shape[1], group_size)
    step = scale.double().repeat_interleave(torch.tensor(widths), -1) * (2 if n_bits == 1 else 1)
    error = (back.double() - x.double()).abs()
    rounding = 1.01 * half_ulp(torch.maximum(x.double().abs(), back.double().abs()), dtype)
    # The scale is computed in float32, whose smallest number over 255 is nothing.
    assert (error <= 0.501 * step + torch.where(step > 0, rounding, 0) + 1e-42).all()
    # The step is no larger than it must be: the range over the number of steps, rounded up once.
    pieces = x.double().split(widths, -1)
    low, high = (torch.stack([reduce(p, -1) for p in pieces], -1) for reduce in (torch.amin, torch.amax))
    parameter = parameter_dtype(dtype)
    if symmetric:
        needed = torch.maximum(-low / 2 ** (n_bits - 1), high / (2 ** (n_bits - 1) - 1))
    else:
        needed = (high - low + 2.001 * half_ulp(low, parameter)) / (2**n_bits - 1) / (2 if n_bits == 1 else 1)
    assert (scale.double() <= needed.clamp(min=0) * (1 + torch.finfo(parameter).eps * 1.01) + tiniest(parameter)).all()


def tiniest(dtype: torch.dtype) -> float:
    return torch.tensor(1, dtype=torch.int16).view(dtype).double().item()


@stable
@given(states(), st.sampled_from((1, 2, 3, 4, 5, 6, 8)), group_sizes, st.booleans())
@example(torch.tensor([[1e3, 1e3 + 0.1, 1e3 + 0.2, 1e3]]), 2, 0, False)
def test_mse_is_never_worse_than_minmax(x, n_bits, group_size, symmetric):
    if n_bits == 1:
        symmetric = False
    widths, errors = group_widths(x.shape[1], group_size), {}
    for method in ("minmax", "mse"):
        codes, scale, zero_point = quantize(x, n_bits, widths, symmetric, method)
        assert torch.isfinite(scale).all()
        assert int(codes.max()) < 2**n_bits
        difference = meant(codes, scale, zero_point, n_bits, widths) - x.double()
        errors[method] = by_group(difference.square(), widths).sqrt()
    # What is compared are sums of squares cut to 2^-30 of a unit's square, of differences in float32: by the triangle
    # inequality the norms differ by √n times 2^-15 of a unit and twice the rounding of a state.
    pieces = x.double().split(widths, -1)
    size = torch.stack([piece.abs().amax(-1) for piece in pieces], -1)
    unit = size if symmetric else torch.stack([p.amax(-1) - p.amin(-1) for p in pieces], -1)
    root = torch.tensor(widths).sqrt()
    slack = root * (2.0**-15 * unit + 4 * half_ulp(size + errors["minmax"], torch.float32))
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6) + slack).all()


@stable
@given(states(), st.sampled_from((1, 1.58)), group_sizes)
def test_one_bit_and_ternary_are_never_worse_than_zeros(x, n_bits, group_size):
    widths = group_widths(x.shape[1], group_size)
    codes, scale, zero_point = quantize(x, n_bits, widths, True, "mse")
    assert zero_point is None
    assert torch.isfinite(scale).all()
    assert (scale >= 0).all()
    assert codes.max() <= (1 if n_bits == 1 else 2)
    error = by_group((meant(codes, scale, None, n_bits, widths) - x.double()).square(), widths)
    zeros = by_group(x.double().square(), widths)
    assert (error <= zeros * (1 + 1e-5)).all()
    if n_bits == 1:
        mean = by_group(x.double().abs(), widths) / torch.tensor(widths)
        parameter = parameter_dtype(x.dtype)
        rounding = torch.maximum(half_ulp(mean, parameter), torch.tensor(tiniest(parameter) / 2)).double()
        size = torch.stack([piece.double().abs().amax(-1) for piece in x.split(widths, -1)], -1)
        assert ((scale.double() - mean).abs() <= rounding * 1.01 + 2.0**-20 * size).all()


@stable
@given(
    states(),
    st.sampled_from((1, 1.58, 2, 3, 4, 5, 6, 8)),
    group_sizes,
    st.booleans(),
    st.sampled_from((torch.nan, torch.inf, -torch.inf)),
    st.integers(0, 2**20),
)
def test_nan_and_inf_are_refused(x, n_bits, group_size, mse, bad, place):
    x.view(-1)[place % x.numel()] = bad
    kept, method = x.clone(), "mse" if mse or n_bits < 2 else "minmax"
    for call in (quant_utils.kivi_quantize_per_token, quant_utils.kivi_quantize_per_channel):
        with pytest.raises(ValueError, match="finite"):
            call(x[None], n_bits, group_size, None, method)
    assert same_bits(x, kept)


@stable
@given(st.floats(65520, 3e38), st.booleans(), st.sampled_from((1, 1.58, 2, 3, 4, 5, 6, 8)), st.integers(1, 9))
def test_what_float16_cannot_hold_is_refused(size, negative, n_bits, length):
    x = torch.zeros(1, 1, length)
    x[..., -1] = -size if negative else size
    with pytest.raises(ValueError, match="float16"):
        quant_utils.kivi_quantize_per_token(x, n_bits, 0)


# ---- packing


@stable
@given(st.sampled_from((1, 1.58, 2, 3, 4, 5, 6, 8)), st.integers(1, 140), st.integers(1, 3), st.integers(0, 2**16))
def test_packing_is_reversible(n_bits, length, channels, seed):
    levels = 3 if n_bits == 1.58 else 2**n_bits
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (2, length, channels), dtype=np.uint8))
    packed = pack_codes(codes, n_bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (2, packed_words(length, n_bits), channels))
    assert torch.equal(unpack_codes(packed, n_bits, length), codes.int())
    # The rest of the last word is zeros, and nothing is larger than it must be.
    whole = unpack_codes(packed, n_bits, length + 1) if packed_words(length + 1, n_bits) == packed.shape[1] else None
    assert whole is None or (whole[:, length] == 0).all()
    bits = {1.58: 1.6}.get(n_bits, n_bits)
    assert math.ceil(length * bits / 32) <= packed.shape[1] <= math.ceil(length * bits / 32) + (n_bits in (3, 5, 6))


@stable
@given(st.sampled_from((1, 2, 3, 4, 5, 6, 8)), st.integers(1, 4), st.integers(0, 2**16))
def test_every_word_means_other_codes(n_bits, words, seed):
    """The way back: any words are what their codes are packed into, so that no two texts of codes share one."""
    length = 32 * words // n_bits if n_bits not in (3, 5, 6) else 32 * words
    count = packed_words(length, n_bits)
    packed = np.random.default_rng(seed).integers(-(2**31), 2**31, (count, 2)).astype(np.int32)
    again = pack_codes(unpack_codes(torch.from_numpy(packed), n_bits, length), n_bits)
    assert np.array_equal(again.numpy(), packed)


@stable
@given(st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_ternary_bytes_are_different(digits):
    (word,) = pack_codes(torch.tensor(digits)[:, None], 1.58).flatten().tolist()
    value = sum(digit * 3 ** (4 - i) for i, digit in enumerate(digits))
    assert word == -(-value * 256 // 243)
    assert 0 <= word < 256


# ---- whole blocks


@stable
@given(st.sampled_from(SCHEMES), states(most=9), st.integers(0, 2**16))
def test_blocks_stay_finite(scheme, seed_states, seed):
    """Any scheme, values of any size: finite states come out, in type and shape, and the input is left alone."""
    dtype, rng = seed_states.dtype, np.random.default_rng(seed)
    length, channels = (140, 9) if scheme.protected else (23, 9)
    # The rotation of a group may be larger than its elements, and must fit the scales too.
    pool = seed_states.flatten()[torch.isfinite(seed_states.flatten())] / (
        3 if scheme.rotation or scheme.bits == 1.5 else 1
    )
    x = pool[torch.from_numpy(rng.integers(0, len(pool), (1, length, channels)))]
    kept = x.clone()
    codec = make_codec(scheme, length, (5, 4), dtype)
    fields = codec.encode(x)
    assert same_bits(x, kept)
    back = codec.decode(fields)
    assert (back.dtype, back.shape) == (dtype, x.shape)
    assert torch.isfinite(back).all()
    for name, tensor in fields.items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    if scheme.bits == 16:
        assert same_bits(back, x)


@settings(stable, max_examples=40)
@given(st.sampled_from([case for case in CASES if case.scheme.block_length <= 20]), st.data())
def test_any_feeding_order_stores_the_same(case, data):
    length = case.sink_length + case.residual_length + 2 * case.scheme.block_length + 3
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(data.draw(st.integers(1, 30)), length - sum(sizes)))
    keys, values = case.states(1, length)
    assert_same(feed(case.layer(), keys, values, sizes), 0, feed(case.layer(), keys, values, [length]), 0)


@settings(stable, max_examples=40)
@given(st.sampled_from(CASES), st.data())
def test_a_bad_token_mid_stream_changes_nothing(case, data):
    """A chunk with a NaN or Inf that is to be packed is refused, with and without scores; later chunks go on."""
    side = data.draw(st.integers(0, 1))
    scheme = (case.keys, case.values)[side]
    assume(scheme.bits != 16 and not (scheme.protected and scheme.protected_bits == 16))
    block, residual = case.scheme.block_length, case.residual_length
    first = data.draw(st.integers(1, case.sink_length + residual + block))
    chunk = case.sink_length + residual + 2 * block - first + data.draw(st.integers(0, 5))
    keys, values = case.states(2, first + chunk)
    layer = feed(case.layer(), keys, values, [first])
    before, sizes = [raw(layer, i) for i in range(2)], (layer.slots, layer.nbytes, layer.nbytes_used)
    states = [keys[:, first:].clone(), values[:, first:].clone()]
    # A token of the chunk that is neither a sink nor left in the window.
    place = data.draw(st.integers(max(case.sink_length - first, 0), case.sink_length + 2 * block - first - 1))
    states[side][data.draw(st.integers(0, 1)), place, 3] = data.draw(st.sampled_from((torch.nan, torch.inf)))
    with pytest.raises(ValueError, match="finite"):
        layer.append(*states)
    assert (layer.slots, layer.nbytes, layer.nbytes_used) == sizes
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw(layer, i).values(), before[i].values(), strict=True))
    feed(layer, keys[:, first:], values[:, first:], [chunk])
    whole = feed(case.layer(), keys, values, [first + chunk])
    for i in range(2):
        assert_same(layer, i, whole, i)


# ---- the end of bfloat16's range


@pytest.mark.parametrize(
    "values, n_bits, symmetric",
    [
        ((3e38, -3e38), 1, True),
        ((1.8e38, 1.8e38), 1.58, True),
        ((3e38, 1.0, 2.0, -2.0), 8, True),
        ((1.7e38, -1e38), 2, True),
        ((-1.694e38, 1.7e38), 2, False),
    ],
)
def test_levels_beyond_float32_are_refused_or_right(values, n_bits, symmetric):
    x = torch.tensor(values).bfloat16()[None, None]
    try:
        back, scale, _ = quant_utils.kivi_quantize_per_token(x, n_bits, 0, symmetric)
    except ValueError:
        return
    assert ((back.double() - x.double()).abs() <= 0.52 * scale.double()).all()
