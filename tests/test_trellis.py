"""Trellis codes: windows and points by hand, best paths by trying all, the table, the codec, refusals, calibration."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from configuration_alrd_llama import QuantScheme
from modules import trellis
from modules.cache.codecs import block_nbytes, make_codec
from modules.fit.allocation import static_scales
from modules.fit.trellis import fit_points
from modules.kernels import get_backend
from modules.kivi_cache import CacheScheme, KIVILatentCache
from modules.quant_utils import unpack_codes
from modules.trellis_points import POINTS, UNITS

BITS = (1, 2, 3, 4, 5, 6)
TRELLIS = QuantScheme(2, static=True, symmetric=False, code="trellis")
#: Two tiers of 2 bits in the first head group, which are one chain, and none in the second.
TIERS = (((3, 2), (2, 5), (4, 2)), ((2, 3), (1, 8)))
WIDTHS = (9, 3)

#: Relative squared error for a Gaussian that `modules/trellis.py` states; of uniform codes of least error.
STATED = {1: 0.286, 2: 0.0798, 3: 0.0223, 4: 0.0062, 5: 0.0017, 6: 0.00056}
UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.01154, 5: 0.0035, 6: 0.00104}


def read(codes: list[int], bits: int) -> list[int]:
    """Points of the codes of a chain, one after the other."""
    window, points = 0, []
    for code in codes:
        window = (window << bits | code) % 128
        points.append(bytes.fromhex(POINTS[bits])[window])
    return points


def calibrated(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of points for channels of spread one around their means."""
    scale, mean = 0.025 * torch.linspace(0.5, 2, channels), torch.linspace(-3, 3, channels)
    return scale, mean - 127.5 * scale


# ---- codes


@pytest.mark.parametrize("bits", BITS)
def test_points_by_hand(bits):
    codes = torch.randint(0, 2**bits, (5, 30))
    for widths in ((30,), (1, 8, 21), (0, 30, 0)):
        expected = []
        for row in codes.tolist():
            ends = itertools.accumulate(widths)
            chains = [row[end - width : end] for end, width in zip(ends, widths)]
            expected.append(list(itertools.chain.from_iterable(read(chain, bits) for chain in chains)))
        assert trellis.decode(codes, bits, widths).tolist() == expected


@pytest.mark.parametrize(("bits", "channels"), [(1, 9), (2, 5), (3, 3), (4, 2), (5, 2), (6, 2)])
def test_the_path_is_the_best_of_all(bits, channels):
    x = 127.5 + 45 * torch.randn(20, channels)
    found = torch.tensor([read(row, bits) for row in trellis.encode(x, bits, (channels,)).tolist()])
    every = torch.tensor([read(list(row), bits) for row in itertools.product(range(2**bits), repeat=channels)])
    least = (every[None] - x[:, None]).square().sum(-1).amin(1)
    assert torch.allclose((found - x).square().sum(-1), least, rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_finds_the_same_codes(bits):
    encode = get_backend("cpu", torch.device("cpu")).trellis_codes
    # Far beyond the points too, and as many tokens as fill no vector.
    for x in (
        127.5 + 45 * torch.randn(70, 45),
        1e6 * torch.randn(3, 45),
        torch.full((17, 45), 127.5),
        torch.zeros(0, 45),
    ):
        for widths in ((45,), (1, 7, 0, 37)):
            assert torch.equal(encode(x, bits, widths), trellis.encode(x, bits, widths))


@pytest.mark.parametrize("bits", BITS)
def test_the_table_is_as_good_as_stated(bits):
    x = torch.randn(400, 256)
    codes = get_backend("cpu", torch.device("cpu")).trellis_codes(x / UNITS[bits] + 127.5, bits, (256,))
    error = ((trellis.decode(codes, bits, (256,)) - 127.5) * UNITS[bits] - x).square().mean().item()
    assert error == pytest.approx(STATED[bits], rel=0.08) and error < 0.8 * UNIFORM[bits]


def test_points_are_fitted():
    """A few rounds come near what the table has; more starts are not worse."""
    errors = []
    for starts in (1, 3):
        points, unit = fit_points(2, starts=starts, rounds=8, tokens=128)
        points = (points.float() - 127.5) * unit
        assert points.shape == (128,) and points.abs().max() <= 3.6 + unit
        x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
        codes = get_backend("cpu", torch.device("cpu")).trellis_codes(x, 2, (256,), points)
        errors.append((points[trellis.windows(codes, 2, (256,)).long()] - x).square().mean().item())
    assert errors[1] <= errors[0] * 1.02 and 0.98 * STATED[2] < errors[1] < 0.09


# ---- the quantizer


@pytest.mark.parametrize("tiers", [None, TIERS], ids=["one width", "tiers"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_stored_block(tiers, backend):
    """States by the formula from the codes, read token by token; as many bytes as uniform codes."""
    scheme, x = replace(TRELLIS, tiers=tiers), torch.randn(3, 45, 12) + torch.linspace(-3, 3, 12)
    scale, zero_point = calibrated(12)
    how = (45, WIDTHS, torch.float32, get_backend(backend, torch.device("cpu")))
    codec = make_codec(scheme, *how, static_scales=(scale, zero_point))
    fields = codec.encode(x)
    assert block_nbytes(codec) == block_nbytes(make_codec(replace(scheme, code="uniform"), *how))
    # Chains: of each width the channels of a head group.
    chains = {"2bit": [0, 1, 2, 5, 6, 7, 8], "5bit": [3, 4], "3bit": [9, 10]}
    if tiers is None:
        chains = {"": list(range(9)), " ": list(range(9, 12))}
    expected = np.full((3, 45, 12), np.nan)
    for name, channels in chains.items():
        bits = int(name[:1].strip() or 2)
        packed = fields["packed"][..., channels] if tiers is None else fields[f"{name}.packed"]
        codes = unpack_codes(packed, bits, 45)
        for n, t in np.ndindex(3, 45):
            expected[n, t, channels] = read(codes[n, t].tolist(), bits)
    expected = expected * scale.numpy() + zero_point.numpy()
    eight = np.isnan(expected)
    assert eight.any() == (tiers is not None)
    found = codec.decode(fields).numpy()
    assert np.allclose(found[~eight], expected[~eight], atol=1e-5)
    # A token is written by itself.
    alone = codec.encode(x[1:2, 7:8].expand(1, 45, -1))
    assert np.allclose(codec.decode(alone)[0, 0].numpy(), found[1, 7], atol=1e-6)


def test_constant_channels_come_back():
    scale, zero_point = calibrated(12)
    scale[4] = 0
    codec = make_codec(TRELLIS, 20, WIDTHS, torch.float32, static_scales=(scale, zero_point))
    back = codec.decode(codec.encode(torch.randn(1, 20, 12)))
    assert torch.equal(back[..., 4], zero_point[4].expand(1, 20))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    codec = make_codec(TRELLIS, 20, WIDTHS, torch.float32, static_scales=calibrated(12))
    x = torch.zeros(1, 20, 12)
    x[0, 3, 4] = bad
    with pytest.raises(ValueError, match="x: values to quantize must be finite"):
        codec.encode(x)


def test_the_kernels_attend():
    scales = {"keys": calibrated(12), "values": calibrated(12)}
    cache = KIVILatentCache(CacheScheme.of(TRELLIS, TRELLIS), [(WIDTHS, WIDTHS)], static_scales={0: scales})
    cache.layers[0].append(torch.randn(1, 300, 12), torch.randn(1, 300, 12))
    side = cache.layers[0].packed().keys
    assert side.parts[0].trellis and get_backend("cpu", torch.device("cpu")).attends_to(side)


# ---- settings


def test_schemes():
    assert str(TRELLIS) == "2-bit per channel in groups of 128 (static, trellis)"
    assert str(replace(TRELLIS, tiers=TIERS, token_scale=True)) == (
        "8/5/3/2-bit tiers per channel (static, token scale, trellis)"
    )
    assert QuantScheme(**TRELLIS.to_dict()) == TRELLIS and QuantScheme().code == "uniform"
    assert TRELLIS.at_width(16).code == "uniform" and TRELLIS.at_width(1).code == "trellis"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code": "lattice"}, "code='lattice'"),
        ({"code": "trellis"}, "code='trellis': must go with static=True"),
        (
            {"code": "trellis", "static": True, "symmetric": True},
            "code='trellis': must go with static=True and symmetric",
        ),
    ],
)
def test_other_schemes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme(2, **fields)


# ---- calibration


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_those_of_the_source(bits):
    """Gaussian tokens times a size: points in units of the channels' spreads; a constant channel has its own value."""
    spread, mean = torch.tensor([0.1, 1.0, 5.0, 0.0] * 4), torch.tensor([3.0, 0.0, -9.0, 7.0] * 4)
    gains = torch.exp(0.4 * torch.randn(4000, 1))
    x = torch.randn(4000, 16) * gains * spread + mean
    scale, zero_point = static_scales(x, bits, gains, TRELLIS)
    # The first channels of a chain have fewer paths, and so other scales.
    assert torch.allclose((scale / UNITS[bits])[4:], spread[4:], rtol=0.2)
    # The mean of tokens of different size is known less well.
    assert torch.allclose(zero_point + 127.5 * scale, mean, atol=0.4)
    assert torch.equal(zero_point[3::4], mean[3::4])
