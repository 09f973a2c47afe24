"""The quantizers of packed blocks: their stored bytes against a reader of its own, and the cache with each of them.

`read_block` is written from the documentation in numpy and float64, word by word and digit by digit. The `check_*`
functions are tests of the production code as it stands when they are called; `test_mutations.py` calls them on broken
code.
"""

import copy
import itertools
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from simulated_cache import round_parameter, round_trip_block
from test_kivi_cache import assert_same_rows, chunks_of, feed, padded_masks, raw_row, row_states

from configuration_alrd_llama import SUPPORTED_BITS, QuantScheme
from modules import quant_utils
from modules.cache import codecs
from modules.cache.codecs import QUANTIZERS, block_nbytes, make_codec, register_quantizer
from modules.hadamard_utils import hadamard_matrix, rotate, rotate_back
from modules.kivi_cache import CacheScheme, KIVILatentCache, KIVILatentLayer, create_kivi_cache

ODD = (13, 7)
HEADS = (16, 16)
SIDES = ("keys", "values")


def scheme_of(bits=2, group_size=20, **fields) -> QuantScheme:
    return QuantScheme(bits, group_size=group_size, **fields)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(*(x.flatten().contiguous().view(torch.uint8) for x in (a, b)))


# ---- a reader of its own


def read_codes(words: np.ndarray, bits: float, length: int) -> np.ndarray:
    """`[length, C]` codes of `[W, C]` int32 words, element by element."""
    words = words.astype(np.int64) & 0xFFFFFFFF
    codes = np.zeros((length, words.shape[1]), dtype=np.int64)
    if bits == 1.58:
        for i in range(length):
            byte = words[i // 20] >> 8 * (i % 20 // 5) & 255
            codes[i] = byte * 243 // 256 // 3 ** (4 - i % 5) % 3
        return codes
    planes = [(bits, 0, 0)]
    if bits in (3, 5, 6):
        low = 2 if bits == 3 else 4
        planes = [(low, 0, 0), (bits - low, low, -(-length * low // 32))]
    for width, position, first in planes:
        per_word = 32 // width
        for i in range(length):
            codes[i] += (words[first + i // per_word] >> i % per_word * width & (2**width - 1)) << position
    return codes


def levels(bits: float, scale: np.ndarray, zero_point: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Step and lowest level, from the table of the documentation."""
    if bits == 1:
        return 2 * scale, -scale if zero_point is None else zero_point
    if bits == 1.58:
        return scale, -scale
    return scale, -scale * 2 ** (bits - 1) if zero_point is None else zero_point


def runs_of(length: int, group_size: int) -> list[int]:
    return [min(group_size or length, length - start) for start in range(0, length, group_size or length)]


def words_of(length: int, bits: float) -> int:
    if bits in (3, 5, 6):
        return math.ceil(length / (16 if bits == 3 else 8)) + math.ceil(length / (16 if bits == 6 else 32))
    return math.ceil(length / (20 if bits == 1.58 else 32 // bits))


def read_bits(mask: torch.Tensor, length: int) -> np.ndarray:
    return np.unpackbits(mask.numpy(), bitorder="little")[:length].astype(bool)


def rotation(widths) -> np.ndarray:
    """`[C, C]`: block-diagonal, a Hadamard matrix for each head group."""
    matrix = np.zeros((sum(widths), sum(widths)))
    for start, width in zip(np.cumsum([0, *widths]), widths, strict=False):
        if width:
            matrix[start : start + width, start : start + width] = hadamard_matrix(width).numpy()
    return matrix


def part_of(fields: dict, part: str) -> dict:
    return {name.removeprefix(f"{part}."): t for name, t in fields.items() if name.startswith(f"{part}.")}


def protected_parts(scheme: QuantScheme, length: int) -> tuple[int, QuantScheme, QuantScheme]:
    """Protected tokens of a block, and the schemes of the high and of the low part."""
    methods = {"symmetric": None, "range_method": None if scheme.range_method == "minmax" else "mse"}
    high = replace(scheme, bits=scheme.protected_bits, protected=0.0, **methods)
    return max(1, round(scheme.protected * length)), high, replace(scheme, protected=0.0)


def read_block(fields: dict[str, torch.Tensor], scheme: QuantScheme, length: int, widths) -> np.ndarray:
    """`[length, C]` float64 states of one block's fields, by the documentation."""
    channels = sum(widths)
    if scheme.bits == 16:
        return fields["states"].double().numpy()
    if scheme.protected:
        count, high, low = protected_parts(scheme, length)
        mask = read_bits(fields["is_protected"], length)
        assert mask.sum() == count
        states = np.zeros((length, channels))
        states[mask] = read_block(part_of(fields, "high"), high, count, widths)
        states[~mask] = read_block(part_of(fields, "low"), low, length - count, widths)
        return states
    if scheme.rotation:
        return read_block(fields, replace(scheme, rotation=False), length, widths) @ rotation(widths)
    if scheme.bits == 1.5:
        wide_widths = [math.ceil(width / 2) for width in widths]
        narrow_widths = [width // 2 for width in widths]
        mask = read_bits(fields["is_wide"], channels)
        states = np.zeros((length, channels))
        states[:, mask] = read_block(part_of(fields, "wide"), replace(scheme, bits=2), length, wide_widths)
        if sum(narrow_widths):
            low = QuantScheme(1, group_size=scheme.group_size)
            narrow = read_block(part_of(fields, "narrow"), low, length, narrow_widths)
            states[:, ~mask] = narrow @ rotation(narrow_widths)
        return states

    words, scale = fields["packed"].numpy(), fields["scale"].double().numpy()
    zero_point = fields["zero_point"].double().numpy() if "zero_point" in fields else None
    assert (zero_point is None) == scheme.symmetric
    step, zero = levels(scheme.bits, scale, zero_point)
    if scheme.per_channel:
        pieces, row = [], 0
        for i, run in enumerate(runs_of(length, scheme.group_size)):
            count = words_of(run, scheme.bits)
            pieces.append(read_codes(words[row : row + count], scheme.bits, run) * step[i] + zero[i])
            row += count
        assert row == len(words)
        return np.concatenate(pieces)
    groups = [run for width in widths for run in runs_of(width, scheme.group_size)]
    assert step.shape == (length, len(groups))
    step, zero = np.repeat(step, groups, axis=1), np.repeat(zero, groups, axis=1)
    return read_codes(words, scheme.bits, length) * step + zero


def expected_nbytes(scheme: QuantScheme, length: int, widths, itemsize: int) -> int:
    """Bytes of one block, from the documentation."""
    channels = sum(widths)
    if scheme.bits == 16:
        return length * channels * itemsize
    if scheme.quantizer:
        return length * channels
    if scheme.static:
        return 4 * words_of(length, scheme.bits) * channels + length * len(widths) * scheme.token_scale
    if scheme.protected:
        count, high, low = protected_parts(scheme, length)
        parts = ((high, count), (low, length - count))
        return math.ceil(length / 8) + sum(expected_nbytes(part, n, widths, itemsize) for part, n in parts)
    if scheme.bits == 1.5:
        wide, narrow = [math.ceil(width / 2) for width in widths], [width // 2 for width in widths]
        low = QuantScheme(1, group_size=scheme.group_size)
        return (
            math.ceil(channels / 8)
            + expected_nbytes(replace(scheme, bits=2), length, wide, itemsize)
            + (expected_nbytes(low, length, narrow, itemsize) if sum(narrow) else 0)
        )
    runs = runs_of(length, scheme.group_size) if scheme.per_channel else [length]
    groups = (
        len(runs) * channels if scheme.per_channel else length * sum(len(runs_of(w, scheme.group_size)) for w in widths)
    )
    parameters = 2 * groups * (1 if scheme.symmetric else 2)
    return 4 * channels * sum(words_of(run, scheme.bits) for run in runs) + parameters


# ---- schemes that cover everything


def every_scheme(group_sizes=(20, 8, 0)) -> list[QuantScheme]:
    """All widths in all orientations, ranges, symmetries; rotation, group sizes and protection take turns."""
    schemes, turn, turns = [], 0, random.Random(12)
    options = (SUPPORTED_BITS, ("per_channel", "per_token"), ("minmax", "mse"), (False, True))
    for bits, orientation, method, symmetric in itertools.product(*options):
        fields = {"orientation": orientation, "range_method": method, "symmetric": symmetric}
        if bits == 16 and (symmetric or method == "mse"):
            continue
        try:
            scheme = scheme_of(bits, group_sizes[turn % len(group_sizes)], **fields, rotation=turns.random() < 0.3)
        except ValueError:
            continue
        schemes.append(scheme)
        if turns.random() < 0.4 and bits < 8:
            schemes.append(replace(scheme, protected=(0.2, 0.05, 0.5)[turn % 7 % 3], protected_bits=(8, 16)[turn % 2]))
        turn += 1
    return schemes


SCHEMES = every_scheme()
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s}-{s.group_size}")


def test_the_list_covers_all_features():
    assert {scheme.bits for scheme in SCHEMES} == set(SUPPORTED_BITS)
    for bits in (1, 1.58, 2, 3, 4, 5, 6, 8):
        assert {s.orientation for s in SCHEMES if s.bits == bits} == {"per_channel", "per_token"}
    assert {s.bits for s in SCHEMES if s.protected} >= {1, 1.5, 1.58, 2, 3}
    assert {s.bits for s in SCHEMES if s.rotation} >= {1, 1.58, 2, 3, 4}


def example(length: int, channels: int, dtype=torch.float32, blocks: int = 2) -> torch.Tensor:
    """`[N, T, C]`: channels of unequal size with offsets, a constant one and one of zeros."""
    x = torch.randn(blocks, length, channels) * 3.0 ** torch.randn(channels) + 2 * torch.randn(channels)
    x[..., 1], x[..., 4] = 0.75, 0.0
    return x.to(dtype)


def check_stored_block(scheme: QuantScheme, dtype=torch.float32, length: int = 45, widths=ODD) -> None:
    """Shapes and bytes are those of the documentation, and `decode` says what the reader reads."""
    if scheme.protected:
        length = 128 + 5
    x = example(length, sum(widths), dtype)
    codec = make_codec(scheme, length, widths, dtype)
    fields = codec.encode(x)
    assert {n: (t.shape[1:], t.dtype) for n, t in fields.items()} == {
        n: (torch.Size(shape), kind) for n, (shape, kind) in codec.fields().items()
    }
    assert block_nbytes(codec) == expected_nbytes(scheme, length, widths, dtype.itemsize)
    assert sum(t[0].nbytes for t in fields.values()) == block_nbytes(codec)
    parameters = {n: t.dtype for n, t in fields.items() if n.endswith(("scale", "zero_point"))}
    assert set(parameters.values()) <= {quant_utils.parameter_dtype(dtype)}

    back = codec.decode(fields)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    for n in range(2):
        read = read_block({name: t[n] for name, t in fields.items()}, scheme, length, widths)
        size = np.abs(read).max()
        tolerance = size * (torch.finfo(dtype).eps + 2e-6)
        np.testing.assert_allclose(back[n].double().numpy(), read, rtol=0, atol=tolerance)
        # One block by itself is stored as it is among others; any leading dimensions are read.
        alone = codec.encode(x[n : n + 1])
        assert all(same_bits(alone[name][0], fields[name][n]) for name in fields)
    stacked = codec.decode({name: t.expand(3, *t.shape) for name, t in fields.items()})
    assert same_bits(stacked, back.expand(3, *back.shape))
    # An error that shows that states, scales and channels belong together: never more than that of storing one number.
    if (scheme.bits, scheme.symmetric, scheme.range_method) != (1, False, "minmax"):
        error = (back.double() - x.double()).square().sum()
        assert error <= (x.double() - x.double().mean()).square().sum()


@by_scheme
def test_stored_block(scheme):
    check_stored_block(scheme)


@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=lambda s: f"{s}-{s.group_size}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_block_of_other_types(scheme, dtype):
    check_stored_block(scheme, dtype, length=64, widths=(5, 1, 16))


# ---- each quantizer against its definition


@pytest.mark.parametrize("orientation", ["per_channel", "per_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_is_the_mean_magnitude(orientation, dtype):
    x = example(128, 24, dtype) + 1e-3
    dim = 1 if orientation == "per_channel" else 2
    codec = make_codec(QuantScheme(1, orientation), 128, (24,), dtype)
    fields = codec.encode(x)
    scale = fields["scale"].double()
    mean = x.double().abs().mean(dim)
    scale = scale.reshape(mean.shape)
    assert ((scale - mean).abs() <= mean * torch.finfo(fields["scale"].dtype).eps * 0.51 + 1e-7).all()
    back = codec.decode(fields)
    expected = torch.where(x >= 0, 1, -1) * scale.unsqueeze(dim)
    assert torch.equal(back, expected.to(dtype))


@pytest.mark.parametrize("orientation", ["per_channel", "per_token"])
@pytest.mark.parametrize("bits", [1, 1.58])
def test_zeros_come_back_as_zeros(bits, orientation):
    """`A group of one value has scale 0`, and the error is at most that of storing zeros."""
    x = torch.randn(1, 64, 6)
    x[:, :, 2], x[:, 5] = 0, 0
    codec = make_codec(QuantScheme(bits, orientation), 64, (6,), torch.float32)
    fields = codec.encode(x)
    zero = fields["scale"][0, 0, 2] if orientation == "per_channel" else fields["scale"][0, 5, 0]
    assert zero == 0
    back = codec.decode(fields)[0]
    assert (back[:, 2] if orientation == "per_channel" else back[5]).count_nonzero() == 0


def test_one_bit_with_a_zero_point_has_two_levels_of_its_own():
    """Asymmetric and min-max, the levels are the extremes; with `mse` the means of the halves."""
    x = torch.randn(1, 64, 5) + 10
    ends = make_codec(QuantScheme(1, symmetric=False, range_method="minmax"), 64, (5,), torch.float32)
    back = ends.decode(ends.encode(x))
    assert (back.amin(1) - x.amin(1)).abs().max() <= 0.01
    assert (back.amax(1) - x.amax(1)).abs().max() <= 0.02
    best = make_codec(QuantScheme(1, symmetric=False), 64, (5,), torch.float32)
    back = best.decode(best.encode(x))
    for channel in range(5):
        values = back[0, :, channel].unique()
        assert len(values) == 2
        for value in values:
            assert x[0, back[0, :, channel] == value, channel].mean() == pytest.approx(value.item(), abs=0.2)


def twn_error(x: np.ndarray) -> float:
    """Squared error of ternary weight networks (arXiv:1605.04711): threshold 0.7 mean|x|, groups are rows."""
    kept = np.abs(x) > 0.7 * np.abs(x).mean(1, keepdims=True)
    scale = (np.abs(x) * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True)
    return np.square(x - np.sign(x) * kept * scale).sum()


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
@pytest.mark.parametrize("group", [32, 128])
def test_ternary_is_as_good_as_its_paper(name, group):
    x = torch.randn(2000, group) if name == "gaussian" else torch.distributions.Laplace(0.0, 1.0).sample((2000, group))
    codes, scale, zero_point = quant_utils.quantize(x, 1.58, (group,), symmetric=True, range_method="mse")
    assert zero_point is None
    assert codes.max() == 2
    back = (codes.double() - 1) * scale.double()
    error = (back - x.double()).square().sum().item()
    assert error <= twn_error(x.double().numpy())
    if name == "gaussian":
        assert error / x.numel() <= {32: 0.182, 128: 0.189}[group] * 1.01
    assert quant_utils.packed_words(128, 1.58) * 32 / 128 == 1.75
    assert quant_utils.packed_words(20 * 64, 1.58) * 32 / (20 * 64) == 1.6
    assert quant_utils.packed_words(32, 1.58) * 32 / 32 == 2


def best_squared_error(x: np.ndarray, bits: int) -> float:
    """Least squared error of one group on any uniform grid, by search: all clippings of both ends in 2% steps."""
    low, high, best = x.min(), x.max(), np.inf
    for a, b in itertools.product(np.linspace(0, 0.5, 26), repeat=2):
        zero, top = low + a * (high - low), high - b * (high - low)
        if top <= zero:
            continue
        step = (top - zero) / (2**bits - 1)
        back = np.clip(np.round((x - zero) / step), 0, 2**bits - 1) * step + zero
        best = min(best, np.square(x - back).sum())
    return best


def test_the_clipped_range_is_near_the_best_one():
    x = torch.randn(60, 128)
    found = {}
    for method in ("minmax", "mse"):
        codes, scale, zero = quant_utils.quantize(x, 2, (128,), range_method=method)
        found[method] = (codes * scale.double() + zero.double() - x.double()).square().sum(1)
    best = sum(best_squared_error(row, 2) for row in x.double().numpy())
    assert found["mse"].sum() <= 0.8 * found["minmax"].sum()
    assert best <= found["mse"].sum() * 1.001
    assert found["mse"].sum() <= 1.08 * best


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipped_is_never_worse_in_any_group(bits, symmetric):
    x = torch.cat([torch.randn(50, 37), torch.randn(50, 37) ** 3, torch.rand(50, 37), 1e3 + torch.randn(50, 37)])
    errors = {}
    for method in ("minmax", "mse"):
        codes, scale, zero = quant_utils.quantize(x, bits, (30, 7), symmetric, method)
        scale, zero = (
            None if p is None else p.double().repeat_interleave(torch.tensor((30, 7)), 1) for p in (scale, zero)
        )
        zero = -scale * 2 ** (bits - 1) if zero is None else zero
        square = (codes * scale + zero - x.double()).square()
        errors[method] = torch.stack([g.sum(1) for g in square.split((30, 7), 1)], 1)
    # The sums that are compared are of squares cut to 2^-30 of the unit's, of float32 differences.
    unit = torch.stack([(g.abs().amax(1) if symmetric else g.amax(1) - g.amin(1)) for g in x.split((30, 7), 1)], 1)
    slack = 37 * unit.double().square() * 2.0**-29 + errors["minmax"] * 1e-4
    assert (errors["mse"] <= errors["minmax"] + slack).all()
    if bits == 2:
        assert (errors["mse"] < errors["minmax"] * 0.999).float().mean() > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_codes_are_signed_integers_times_scale(bits):
    x = example(64, 11)
    codec = make_codec(QuantScheme(bits, symmetric=True), 64, (11,), torch.float32)
    fields = codec.encode(x)
    assert set(fields) == {"packed", "scale"}
    half = 2 ** (bits - 1)
    scale = fields["scale"].double()
    signed = codec.decode(fields).double() / scale.clamp(min=1e-30)
    assert torch.allclose(signed, signed.round(), atol=1e-4)
    assert (signed.round() >= -half).all()
    assert (signed.round() <= half - 1).all()
    # The least scale, rounded up, whose levels reach both extremes.
    needed = torch.maximum(-x.amin(1) / half, x.amax(1) / (half - 1)).numpy()
    assert np.array_equal(scale[:, 0].numpy(), round_parameter(needed, torch.float32, up=True))
    assert ((codec.decode(fields) - x).abs() <= 0.501 * scale + 1e-7).all()


@pytest.mark.parametrize("widths", [(12,), (13, 7), (1, 4, 1), (1,)])
def test_mixed_channels_keep_the_widest_at_two_bits(widths):
    channels, length = sum(widths), 64
    x = torch.randn(3, length, channels) * (1 + torch.rand(3, 1, channels) * 5) + torch.randn(channels)
    codec = make_codec(QuantScheme(1.5, group_size=32), length, widths, torch.float32)
    fields = codec.encode(x)
    span = (x.amax(1) - x.amin(1)).numpy()
    for n in range(3):
        mask = read_bits(fields["is_wide"][n], channels)
        start = 0
        for width in widths:
            group, chosen = span[n, start : start + width], mask[start : start + width]
            assert chosen.sum() == math.ceil(width / 2)
            assert width == 1 or group[chosen].min() >= group[~chosen].max()
            start += width
        wide = make_codec(QuantScheme(2, group_size=32, range_method="mse"), length, (mask.sum(),), torch.float32)
        alone = wide.encode(x[n : n + 1, :, mask])
        assert all(same_bits(alone[name][0], fields[f"wide.{name}"][n]) for name in alone)
        narrow_widths = [width // 2 for width in widths if width > 1]
        if not narrow_widths:
            continue
        narrow = x[n, :, ~mask].double().numpy() @ rotation(narrow_widths).T
        scale = np.abs(narrow.reshape(2, 32, -1)).mean(1)
        np.testing.assert_allclose(fields["narrow.scale"][n].double().numpy(), scale, rtol=2**-10)
        codes = np.concatenate([read_codes(w, 1, 32) for w in fields["narrow.packed"][n].numpy().reshape(2, 1, -1)])
        clear = np.abs(narrow) > 1e-4
        assert np.array_equal(codes[clear], (narrow >= 0)[clear])


def test_mixed_channels_cost_one_and_a_half_bits():
    codec = make_codec(QuantScheme(1.5, group_size=128), 128, (64,), torch.float16)
    # Codes 1.5; a scale and a zero point for each of the 32 wide channels, a scale for each narrow one; a mask.
    assert block_nbytes(codec) * 8 == 128 * 64 * 1.5 + 32 * 32 + 32 * 16 + 64


TRUE_BITS = {1: 1.125, 1.58: 1.875, 2: 2.25, 3: 3.25, 4: 4.25, 8: 8.25, 16: 16}


@pytest.mark.parametrize("orientation", ["per_channel", "per_token"])
@pytest.mark.parametrize("bits", TRUE_BITS)
def test_true_bits_per_element(bits, orientation):
    codec = make_codec(QuantScheme(bits, orientation), 128, (128,), torch.float16)
    assert block_nbytes(codec) * 8 / (128 * 128) == TRUE_BITS[bits]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 24, 35, 100, 128])
def test_rotation_is_the_product_with_the_matrix(n):
    x = torch.randn(5, 7, n)
    expected = x.double() @ hadamard_matrix(n).T
    assert torch.allclose(rotate(x).double(), expected, rtol=0, atol=2e-6 * n**0.5)
    assert torch.allclose(rotate_back(rotate(x)), x, rtol=0, atol=4e-6 * n**0.5)
    assert same_bits(rotate(x)[2:3, 3:4].clone(), rotate(x[2:3, 3:4]))


def test_rotation_helps_where_channels_are_unequal():
    x = torch.randn(4, 128, 64) * torch.ones(64).index_fill(0, torch.tensor([3, 40]), 30.0)
    errors = []
    for rotated in (False, True):
        codec = make_codec(QuantScheme(2, "per_token", rotation=rotated), 128, (32, 32), torch.float32)
        errors.append((codec.decode(codec.encode(x)) - x).square().mean().item())
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_static_codes_go_by_given_scales(bits):
    x = example(50, 9, torch.float16)
    scale, zero = torch.rand(9) + 0.05, torch.randn(9) - 2
    codec = make_codec(QuantScheme(bits, static=True), 50, (9,), torch.float16, static_scales=(scale, zero))
    fields = codec.encode(x)
    assert set(fields) == {"packed"}
    codes = ((x.double() - zero) / scale + 0.5).floor().clamp(0, 2**bits - 1).numpy()
    for n in range(2):
        difference = read_codes(fields["packed"][n].numpy(), bits, 50) - codes[n]
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.01
    read = torch.stack([torch.from_numpy(read_codes(w.numpy(), bits, 50)) for w in fields["packed"]]) * scale + zero
    assert torch.allclose(codec.decode(fields).float(), read.float(), rtol=1e-3, atol=1e-3)
    assert block_nbytes(codec) == 4 * 9 * words_of(50, bits)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite"):
            codec.encode(x.index_fill(1, torch.tensor([3]), bad))


# ---- protected tokens


@pytest.mark.parametrize("share, length", [(0.2, 128), (0.2, 130), (0.5, 131), (0.01, 128), (0.9, 144)])
def test_protected_tokens_are_those_of_the_highest_score(share, length):
    x, score = torch.randn(3, length, 12), torch.randn(3, length)
    scheme = QuantScheme(1, "per_token", protected=share, protected_bits=4)
    codec = make_codec(scheme, length, (12,), torch.float32)
    fields = codec.encode(x, score)
    count = round(share * length)
    for n in range(3):
        mask = read_bits(fields["is_protected"][n], length)
        assert set(mask.nonzero()[0]) == set(score[n].argsort(descending=True)[:count].tolist())
        for part, tokens, bits in (("high", mask, 4), ("low", ~mask, 1)):
            # One bit has no min-max, so the protected tokens have none either.
            its_scheme = QuantScheme(bits, "per_token", range_method="mse")
            alone = make_codec(its_scheme, int(tokens.sum()), (12,), torch.float32)
            for name, tensor in alone.encode(x[n : n + 1, tokens]).items():
                assert same_bits(tensor[0], fields[f"{part}.{name}"][n])
    high = 4 * words_of(count, 4) * 12 + 4 * count
    low = 4 * words_of(length - count, 1) * 12 + 2 * (length - count)
    assert block_nbytes(codec) == math.ceil(length / 8) + high + low


@pytest.mark.parametrize("orientation", ["per_channel", "per_token"])
def test_without_scores_the_tokens_that_would_suffer_most_are_protected(orientation):
    x = torch.randn(2, 128, 20) * (1 + 4 * torch.rand(2, 128, 1))
    codec = make_codec(QuantScheme(2, orientation, 64, protected=0.25), 128, (13, 7), torch.float32)
    fields = codec.encode(x)
    for n in range(2):
        halves = [x[n, :64], x[n, 64:]] if orientation == "per_channel" else [x[n]]
        low = torch.cat([round_trip_block(half, 2, orientation == "per_channel", (13, 7), 64) for half in halves])
        error = (low.double() - x[n].double()).square().sum(1)
        mask = torch.from_numpy(read_bits(fields["is_protected"][n], 128))
        assert mask.sum() == 32
        assert error[mask].min() >= error[~mask].max() * (1 - 1e-5)


def test_equal_scores_protect_the_first_tokens():
    codec = make_codec(QuantScheme(2, protected=0.1), 128, (4,), torch.float32)
    mask = read_bits(codec.encode(torch.randn(1, 128, 4), torch.zeros(1, 128))["is_protected"][0], 128)
    assert mask.nonzero()[0].tolist() == list(range(13))


def test_protected_tokens_of_sixteen_bits_are_untouched():
    x = torch.randn(2, 128, 5).half()
    codec = make_codec(QuantScheme(1.58, "per_token", protected=0.2, protected_bits=16), 128, (5,), torch.float16)
    fields = codec.encode(x)
    back = codec.decode(fields)
    for n in range(2):
        mask = torch.from_numpy(read_bits(fields["is_protected"][n], 128))
        assert same_bits(back[n, mask], x[n, mask])
        assert not torch.equal(back[n, ~mask], x[n, ~mask])


@pytest.mark.parametrize("share", [0.997, 0.9999])
def test_a_share_that_leaves_no_token_is_refused(share):
    with pytest.raises(ValueError, match=rf"protected={share}: must leave tokens of a block of 128 unprotected"):
        make_codec(QuantScheme(2, protected=share), 128, (4,), torch.float32)


# ---- quantizers of users


class PowersOfTwo(codecs.BlockCodec):
    """Sign and exponent, a byte per element: a quantizer that a user might write."""

    def fields(self):
        return {"code": ((self.length, sum(self.widths)), torch.uint8)}

    def encode(self, states, score=None):
        x = states.float()
        exponent = x.abs().clamp(min=2.0**-32).log2().round().clamp(-32, 31) + 32
        return {"code": (exponent + 64 * (x < 0)).to(torch.uint8)}

    def decode(self, fields):
        code = fields["code"].float()
        size = 2.0 ** (code % 64 - 32)
        return torch.where(code >= 64, -size, size).to(self.dtype)


@pytest.fixture
def powers_of_two(monkeypatch):
    monkeypatch.setattr(codecs, "QUANTIZERS", QUANTIZERS)
    register_quantizer("powers of two")(PowersOfTwo)
    yield "powers of two"
    del QUANTIZERS["powers of two"]


def test_a_quantizer_of_ones_own_works_in_the_cache(powers_of_two):
    own = scheme_of(8, 20, quantizer=powers_of_two)
    case = Case(own, scheme_of(2, 20, orientation="per_token"))
    check_case(case)
    keys, values = case.states(2, 80)
    layer = feed(case.layer(), keys, values, [80])
    assert layer.pool.storage["keys"]["code"].dtype == torch.uint8
    found, packed = layer.states()[0][:, 4:64], keys[:, 4:64]
    assert (found.abs().log2() - packed.abs().clamp(min=2.0**-32).log2()).abs().max() <= 0.51
    assert ((found < 0) == (packed < 0)).all()
    # It goes together with rotation and protection, and through a model's configuration by name.
    for fields in ({"rotation": True}, {"protected": 0.2, "protected_bits": 16}):
        codec = make_codec(replace(own, **fields), 128, (16,), torch.float32)
        x = torch.randn(2, 128, 16)
        assert (codec.decode(codec.encode(x)) - x).square().mean() < 0.1
    assert create_kivi_cache(k_scheme={"quantizer": powers_of_two}).scheme.keys.quantizer == powers_of_two


def test_a_quantizer_that_inherits_nothing_gets_the_defaults(monkeypatch):
    monkeypatch.setattr(codecs, "QUANTIZERS", {})

    @register_quantizer("plain")
    class Plain:
        fields, encode, decode = PowersOfTwo.fields, PowersOfTwo.encode, PowersOfTwo.decode

    assert {"plain": Plain} == codecs.QUANTIZERS
    assert Plain.stored_channels is None and Plain().parts({}) is None and Plain().records() is None


def test_an_unknown_quantizer_is_refused():
    with pytest.raises(ValueError, match=r"quantizer='nobody': must be registered \(registered are: none\)"):
        make_codec(scheme_of(quantizer="nobody"), 20, (4,), torch.float32)


def test_an_unknown_quantizer_is_refused_at_any_width():
    with pytest.raises(ValueError, match="quantizer"):
        make_codec(QuantScheme(16, quantizer="nobody"), 20, (4,), torch.float32)


# ---- the cache with every scheme


@dataclass(frozen=True)
class Case:
    """A cache of two schemes."""

    keys: QuantScheme
    values: QuantScheme
    residual_length: int = 5
    sink_length: int = 4
    widths: tuple = (ODD, (9, 9, 2))
    dtype: torch.dtype = torch.float32
    scored: bool = False

    @property
    def scheme(self) -> CacheScheme:
        return CacheScheme.of(
            self.keys, self.values, residual_length=self.residual_length, sink_length=self.sink_length
        )

    @property
    def static_scales(self) -> dict:
        pairs = ((side, s, sum(w)) for side, s, w in zip(SIDES, (self.keys, self.values), self.widths, strict=True))
        return {side: (torch.linspace(0.1, 0.3, n), torch.linspace(-2, -1, n)) for side, s, n in pairs if s.static}

    def score(self, layer_idx: int, keys, values) -> torch.Tensor:
        return (keys[..., 0] + layer_idx).sin() + values[..., 2].cos()

    def cache(self) -> KIVILatentCache:
        scales = {0: self.static_scales} if self.static_scales else None
        score = self.score if self.scored else None
        return KIVILatentCache(self.scheme, [self.widths], static_scales=scales, token_score=score)

    def layer(self) -> KIVILatentLayer:
        return self.cache().layers[0]

    def states(self, batch: int, length: int):
        return tuple(example(length, sum(w), self.dtype, batch) for w in self.widths)

    def row_nbytes(self, tokens: int) -> int:
        block = self.scheme.block_length
        blocks = max(0, (tokens - min(tokens, self.sink_length) - self.residual_length) // block)
        exact = tokens - blocks * block
        window = exact - min(tokens, self.sink_length)
        packed = sum(
            expected_nbytes(s, block, w, self.dtype.itemsize)
            for s, w in zip((self.keys, self.values), self.widths, strict=True)
        )
        scores = 4 * window if self.has_scores else 0
        return blocks * (packed + 12) + exact * sum(map(sum, self.widths)) * self.dtype.itemsize + scores

    @property
    def has_scores(self) -> bool:
        return self.scored and bool(self.keys.protected or self.values.protected)

    def __str__(self) -> str:
        scored = "-scored" if self.scored else ""
        return (
            f"{self.keys}-{self.keys.group_size}-{self.values}-{self.values.group_size}-{str(self.dtype)[6:]}{scored}"
        )


def every_case() -> list[Case]:
    """Every scheme on one side, with another one of its neighbourhood on the other."""
    plain = [s for s in SCHEMES if not s.protected]
    protected = [s for s in SCHEMES if s.protected]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    cases = []
    for schemes in (plain, protected):
        others = schemes[1:] + schemes[:1]
        for i in range(0, len(schemes), 2):
            window = ((5, 4), (0, 0), (3, 2))[i // 2 % 3]
            widths = ((ODD, (9, 9, 2)), ((5,), HEADS))[i // 2 % 2]
            scored = schemes is protected and i // 2 % 2 == 0
            cases.append(Case(schemes[i], others[i], *window, widths, dtypes[i // 2 % 3], scored))
    cases.append(Case(QuantScheme(8, static=True, group_size=20), QuantScheme(4, static=True, group_size=8)))
    scaled = QuantScheme(8, static=True, group_size=20, token_scale=True)
    cases.append(Case(scaled, replace(scaled, bits=2, group_size=8), dtype=torch.bfloat16))
    # VidKV's own: one side protected by a score, the other of two widths; groups of three sizes in blocks of 144.
    high = QuantScheme(1.58, "per_channel", 48, protected=0.2, protected_bits=2)
    cases.append(Case(QuantScheme(1.5, group_size=32, rotation=True), high, scored=True))
    return cases


CASES = every_case()
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def raw(layer: KIVILatentLayer, i: int) -> dict[str, torch.Tensor]:
    """Everything stored of a row, scores included."""
    scores = layer.exact.window.get("score", torch.zeros(len(layer.rows), 0))
    return raw_row(layer, i) | {"window_score": scores[i, : layer.rows[i].window].clone()}


def assert_same(found: KIVILatentLayer, i: int, expected: KIVILatentLayer, j: int) -> None:
    assert_same_rows(found, i, expected, j)
    if found.score is not None and expected.score is not None:
        assert same_bits(raw(found, i)["window_score"], raw(expected, j)["window_score"])


def check_sizes(case: Case, layer: KIVILatentLayer, tokens: list[int]) -> None:
    """`nbytes_used` is the formula's, of rows that share no block and were not cropped."""
    static = sum(8 * sum(w) for s, w in zip((case.keys, case.values), case.widths, strict=True) if s.static)
    assert layer.nbytes_used == sum(case.row_nbytes(n) for n in tokens) + static
    extra = 4 * sum(row.window for row in layer.rows) if case.has_scores else 0
    formula = sum(case.scheme.layer_nbytes(n, case.widths, case.dtype) for n in tokens)
    assert layer.nbytes_used == formula + extra + static
    held = [t for fields in layer.pool.storage.values() for t in fields.values()]
    held += [*layer.exact.tensors(), layer.block_table()]
    held += [t for pair in (layer.static_scales or {}).values() for t in pair]
    assert layer.nbytes == sum(t.untyped_storage().nbytes() for t in held)
    assert ("score" in layer.exact.window) == case.has_scores


def check_feeding_order(case: Case) -> None:
    """One piece, chunks, single tokens: the same bits; and every block is what the codec makes of its tokens."""
    block = case.scheme.block_length
    length = case.sink_length + case.residual_length + (2 if block > 100 else 4) * block + block // 2 + 1
    keys, values = case.states(2, length)
    whole = feed(case.layer(), keys, values, [length])
    others = [feed(case.layer(), keys, values, chunks_of(length, block + 7))]
    others.append(feed(case.layer(), keys, values, [block] + [1] * (length - block)))
    for other, i in itertools.product(others, range(2)):
        assert_same(other, i, whole, i)
    check_sizes(case, whole, [length] * 2)
    assert len(whole.rows[0].blocks) == (length - case.sink_length - case.residual_length) // block

    for i, j in itertools.product(range(2), range(len(whole.rows[0].blocks))):
        tokens = slice(case.sink_length + j * block, case.sink_length + (j + 1) * block)
        score = None
        if case.has_scores:
            score = case.score(0, keys, values)[i : i + 1, tokens]
        for side, states, scheme, widths in zip(
            SIDES, (keys, values), (case.keys, case.values), case.widths, strict=True
        ):
            scales = case.static_scales.get(side)
            codec = make_codec(scheme, block, widths, case.dtype, static_scales=scales)
            for name, tensor in codec.encode(states[i : i + 1, tokens], score).items():
                assert same_bits(raw(whole, i)[f"{side}.{name}"][j], tensor[0])
            back = codec.decode({n: t[None] for n, t in part_of_side(raw(whole, i), side, j).items()})
            assert same_bits(row_states(whole, i)[SIDES.index(side)][tokens], back[0])


def part_of_side(stored: dict, side: str, j: int) -> dict:
    return {name: tensor[j] for name, tensor in part_of(stored, side).items()}


def check_rows(case: Case) -> None:
    """Pads are not stored: a row of a padded batch holds what it holds alone."""
    block = case.scheme.block_length
    length = case.sink_length + case.residual_length + 2 * block + 60
    keys, values = case.states(3, length)
    real = padded_masks(3, length)
    real[1, -2 * (length // 3) :] = True
    layer = feed(case.layer(), keys, values, [20, 1, 1, length - 30, 1, 7], real)
    assert max(len(row.blocks) for row in layer.rows) >= 2
    check_sizes(case, layer, real.sum(1).tolist())
    for i in range(3):
        alone = feed(case.layer(), keys[i : i + 1, real[i]], values[i : i + 1, real[i]], [int(real[i].sum())])
        assert_same(layer, i, alone, 0)
        for found, expected in zip(row_states(layer, i), row_states(alone, 0), strict=True):
            assert same_bits(found, expected)


def check_edits(case: Case) -> None:
    """Reorder, repeat, select, then more tokens; a crop inside a block; nothing is quantized twice."""
    block = case.scheme.block_length
    length = case.sink_length + case.residual_length + 2 * block + 3
    keys, values = case.states(3, length)
    layer = feed(case.layer(), keys, values, [length])
    written = [raw(layer, i) for i in range(3)]
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([5, 0, 3]))
    sources = [0, 2, 0]
    for i, source in enumerate(sources):
        for name, tensor in raw(layer, i).items():
            assert same_bits(tensor, written[source][name]), name
    later = case.states(3, block)
    feed(layer, *later, [block - 1, 1])
    whole = [torch.cat([old[sources], new], 1) for old, new in zip((keys, values), later, strict=True)]
    expected = feed(case.layer(), *whole, [length + block])
    for i in range(3):
        assert_same(layer, i, expected, i)

    cut = layer.rows[0].window + block // 2
    before, seen = [raw(layer, i) for i in range(3)], [row_states(layer, i) for i in range(3)]
    layer.crop(-cut)
    kept = length + block - cut
    assert layer.rows[0].counts == (block, block, block - block // 2)
    for i in range(3):
        for name, tensor in raw(layer, i).items():
            if name != "counts":
                assert same_bits(tensor, before[i][name][: len(tensor)]), name
        for found, old in zip(row_states(layer, i), seen[i], strict=True):
            assert same_bits(found, old[:kept])
    more = case.states(3, block + case.residual_length)
    feed(layer, *more, [3, block + case.residual_length - 3])
    score = case.score(0, *(x[:, :block] for x in more)) if case.has_scores else None
    for side, states, scheme, widths in zip(SIDES, more, (case.keys, case.values), case.widths, strict=True):
        codec = make_codec(scheme, block, widths, case.dtype, static_scales=case.static_scales.get(side))
        for name, tensor in codec.encode(states[:, :block], score).items():
            for i in range(3):
                assert same_bits(raw(layer, i)[f"{side}.{name}"][3], tensor[i])


def check_case(case: Case) -> None:
    check_feeding_order(case)
    check_rows(case)
    check_edits(case)


@by_case
def test_feeding_order_does_not_matter(case):
    check_feeding_order(case)


@by_case
def test_rows_are_independent(case):
    check_rows(case)


@by_case
def test_edits(case):
    check_edits(case)


@by_case
def test_copies(case, tmp_path):
    block = case.scheme.block_length
    length = case.sink_length + case.residual_length + 2 * block + 80
    cache = case.cache()
    feed(cache.layers[0], *case.states(2, length), [length], padded_masks(2, length))
    cache.save(tmp_path / "cache")
    later = case.states(2, block)
    # Whether a saved cache knows its function of scores: tests/test_token_scores.py.
    others = [copy.deepcopy(cache), *([] if case.has_scores else [KIVILatentCache.load(tmp_path / "cache")])]
    for other in others:
        layer, copied = cache.layers[0], other.layers[0]
        assert (other.scheme, copied.slots, copied.rows != []) == (cache.scheme, length, True)
        for i in range(2):
            assert_same_rows(copied, i, layer, i)
            for found, expected in zip(row_states(copied, i), row_states(layer, i), strict=True):
                assert same_bits(found, expected)
        grown = feed(copy.deepcopy(layer), *later, [block])
        feed(copied, *later, [block])
        for i in range(2):
            assert_same(copied, i, grown, i)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_a_refused_append_leaves_everything_as_it_was(case):
    block = case.scheme.block_length
    length = case.sink_length + case.residual_length + 2 * block - 1
    for side, bad in itertools.product(range(2), (torch.nan, -torch.inf)):
        scheme = (case.keys, case.values)[side]
        if scheme.bits == 16 or (scheme.protected_bits == 16 and scheme.protected and case.scored):
            continue
        states = case.states(2, length + 1)
        states[side][1, case.sink_length + block + 3, 5] = bad
        layer = feed(case.layer(), *states, [length])
        before, sizes = [raw(layer, i) for i in range(2)], (layer.slots, layer.nbytes, layer.nbytes_used)
        with pytest.raises(ValueError, match="finite"):
            layer.append(*(x[:, length:] for x in states))
        assert (layer.slots, layer.nbytes, layer.nbytes_used) == sizes
        for i in range(2):
            assert all(same_bits(a, b) for a, b in zip(raw(layer, i).values(), before[i].values(), strict=True))


def test_static_without_scales_is_refused_and_the_cache_stays_empty():
    layer = KIVILatentLayer(CacheScheme.of(QuantScheme(8, static=True), QuantScheme()), ((4,), (4,)))
    with pytest.raises(ValueError, match=r"static=True of the keys: needs calibrated scales"):
        layer.append(torch.randn(3, 2, 4), torch.randn(3, 2, 4))
    assert not layer.is_initialized
    assert layer.get_seq_length() == layer.nbytes == 0


def test_layers_of_their_own_schemes():
    base = CacheScheme(2, 2, 20, 5, 4)
    other = CacheScheme(1.5, 1.58, 20, 5, 4)
    cache = KIVILatentCache(base, [((6,), (6,))] * 2, layer_schemes={1: other})
    states = [torch.randn(2, 100, 6) for _ in range(2)]
    for layer in cache.layers:
        layer.append(*states)
    assert cache.layers[0].pool.storage.keys() == {"keys", "values"}
    assert "is_wide" in cache.layers[1].pool.storage["keys"]
    expected = [2 * scheme.layer_nbytes(100, ((6,), (6,)), torch.float32) for scheme in (base, other)]
    assert [layer.nbytes_used for layer in cache.layers] == expected
    assert cache.nbytes_used == sum(expected)
