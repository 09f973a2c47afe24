"""A scale for each token beside calibrated ones: bits and bytes by hand, outliers, refusals, caches and models."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from configuration_alrd_llama import QuantScheme, side_scheme
from modules.cache.codecs import block_nbytes, make_codec
from modules.fit.allocation import refit_scales, static_scales, token_gains
from modules.kernels import get_backend
from modules.kivi_cache import CacheScheme, KIVILatentCache
from modules.quant_utils import decode_token_scale, encode_token_scale, grid, unpack_codes
from tests.helpers import tiny_dense
from tests.test_allocation import identity_factors
from tests.test_tiers import IDS, check_cache_of, static_model

SCALED = QuantScheme(2, static=True, symmetric=False, token_scale=True)
TIERS = (((3, 4), (4, 2)), ((1, 8), (4, 1)))
WIDTHS = (7, 5)


def calibrated(x: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of states `[N, T, C]` of `WIDTHS` for the scheme."""
    found = []
    for group, tiers in zip(x.flatten(0, 1).split(WIDTHS, -1), scheme.tiers or [((w, scheme.bits),) for w in WIDTHS]):
        gains = token_gains(group) if scheme.token_scale else None
        for piece, (_, bits) in zip(group.split([count for count, _ in tiers], -1), tiers, strict=True):
            found.append(torch.stack(static_scales(piece, bits, gains)))
    return tuple(torch.cat(found, dim=1))


def heavy_tailed(*shape: int) -> torch.Tensor:
    """Tokens of very different size around means of the channels."""
    size, mean = torch.linspace(0.1, 3, shape[-1]), torch.linspace(-5, 5, shape[-1])
    return torch.randn(shape) * torch.exp(torch.randn(*shape[:-1], 1)) * size + mean


# ---- bits and bytes


def test_a_byte_is_a_power_of_two_in_sixteenths():
    codes = torch.arange(256, dtype=torch.uint8)
    scales = decode_token_scale(codes)
    assert (scales[128], scales[144], scales[0]) == (1.0, 2.0, 2.0**-8)
    assert torch.equal(encode_token_scale(scales.double()), codes)
    # Within half a step, and at the ends of the range beyond it.
    assert encode_token_scale(torch.tensor([2.0 ** (0.4 / 16), 2.0 ** (0.6 / 16)]).double()).tolist() == [128, 129]
    assert encode_token_scale(torch.tensor([0.0, 1e9, math.inf]).double()).tolist() == [0, 255, 255]
    # Wherever a byte stands in a tensor, its scale has the same bits.
    assert torch.equal(torch.cat(list(map(decode_token_scale, codes.split(1)))), scales)


def test_one_token_by_hand():
    """Two head groups of two channels at 2 bits, steps 1; what is stored are whole levels times a power of two."""
    middle = torch.tensor([10.0, -10.0, 0.0, 3.0])
    codec = make_codec(SCALED, 1, (2, 2), torch.float32, static_scales=(torch.ones(4), middle - 1.5))
    # Levels are ±0.5 and ±1.5. The first group lies (6, -2) off its middles, four times (1.5, -0.5).
    x = middle + torch.tensor([6.0, -2.0, 0.125, -0.125])
    fields = codec.encode(x[None, None])
    assert fields["token_scale"].dtype == torch.uint8
    # The second lies (⅛, -⅛) off. Its guess is ⅛ of a Gaussian's step of 0.9957: byte 128 - 48. From there half octaves
    # are tried, and the second one up, 2^-2, times (0.5, -0.5) is what there is.
    assert fields["token_scale"][0, 0].tolist() == [128 + 32, 128 - 32]
    assert unpack_codes(fields["packed"], 2, 1).tolist() == [[[3, 1, 2, 1]]]
    assert torch.equal(codec.decode(fields)[0, 0], x)


def test_a_token_with_its_size_in_one_channel():
    """A channel of 8 bits far out of a token that is else near the mean is not clipped, as its step is small."""
    scheme = replace(SCALED, tiers=(((1, 8), (30, 2)),))
    scale, zero = torch.tensor([0.04, *[1.0] * 30]), torch.tensor([-5.1, *[-1.5] * 30])
    codec = make_codec(scheme, 1, (31,), torch.float32, static_scales=(scale, zero))
    x = torch.tensor([[[3.0, *[0.02] * 30]]])
    assert codec.decode(codec.encode(x))[0, 0, 0].item() == pytest.approx(3.0, abs=0.03)


@pytest.mark.parametrize("tiers", [None, TIERS], ids=["one width", "tiers"])
@pytest.mark.parametrize("length", [1, 33, 128])
def test_fields_and_bytes(length, tiers):
    """A byte for each token and head group, whatever the tiers."""
    scaled = make_codec(replace(SCALED, tiers=tiers), length, WIDTHS, torch.float16)
    plain = make_codec(replace(SCALED, tiers=tiers, token_scale=False), length, WIDTHS, torch.float16)
    assert scaled.fields() == plain.fields() | {"token_scale": ((length, 2), torch.uint8)}
    assert block_nbytes(scaled) == block_nbytes(plain) + 2 * length


@pytest.mark.parametrize("tiers", [None, TIERS, (((7, 3),), ((2, 1), (3, 4)))], ids=str)
def test_the_formula(tiers):
    """States by the formula of `TokenScaledCodec`, from the codes of the calibrated codec."""
    scheme, x = replace(SCALED, tiers=tiers), heavy_tailed(3, 45, 12)
    scale, zero = calibrated(x, scheme)
    codec = make_codec(scheme, 45, WIDTHS, torch.float32, static_scales=(scale, zero))
    fields = codec.encode(x)
    bits = [b for g in tiers or (((7, 2),), ((5, 2),)) for n, b in g for _ in range(n)]
    step = scale * torch.tensor([grid(b).spacing for b in bits])
    middle = zero + step * (torch.tensor([grid(b).levels for b in bits]) - 1) / 2
    by_channel = decode_token_scale(fields["token_scale"]).repeat_interleave(torch.tensor(WIDTHS), -1)
    plain = make_codec(replace(scheme, token_scale=False), 45, WIDTHS, torch.float32, static_scales=(scale, zero))
    codes = (plain.decode({n: t for n, t in fields.items() if n != "token_scale"}) - middle) / step
    assert torch.allclose(codec.decode(fields), middle + by_channel * step * codes, atol=1e-4)
    # What was in reach of the codes is at most half a step of its token away.
    inside = ((x - middle) / by_channel / step).abs() <= (torch.tensor([grid(b).levels for b in bits]) - 1) / 2
    error = (codec.decode(fields) - x).abs() / (by_channel * step)
    assert inside.any() and error[inside].max() <= 0.501


@pytest.mark.parametrize("tiers", [None, TIERS], ids=["one width", "tiers"])
def test_the_scale_is_the_one_of_least_error(tiers):
    """All 256 bytes by hand: at most an eighth more error than the best one, and the best of those that are tried.

    The error of a channel counts in units of its step.
    """
    scheme, x = replace(SCALED, tiers=tiers), heavy_tailed(2, 30, 12)
    scale, zero = calibrated(x, scheme)
    codec = make_codec(scheme, 30, WIDTHS, torch.float32, static_scales=(scale, zero))
    bits = [b for g in tiers or (((7, 2),), ((5, 2),)) for n, b in g for _ in range(n)]
    step = scale * torch.tensor([grid(b).spacing for b in bits])
    chosen = codec.encode(x)["token_scale"]
    errors = []
    for byte in range(256):
        codes = torch.full_like(chosen, byte)
        by_channel = decode_token_scale(codes).repeat_interleave(torch.tensor(WIDTHS), -1)
        packed = codec.inner.encode((x - codec.middle) / by_channel + codec.middle)
        error = ((codec.decode(packed | {"token_scale": codes}) - x) / step).square()
        errors.append(torch.stack([group.sum(-1) for group in error.split(WIDTHS, -1)], -1))
    errors = torch.stack(errors)
    found = errors.gather(0, chosen[None].long())[0]
    assert found.sum() <= 1.125 * errors.amin(0).sum()
    for away in (-4, -2, 2, 4):
        others = errors.gather(0, (chosen.long() + away).clamp(0, 255)[None])[0]
        assert (found <= others * (1 + 1e-4)).float().mean() > 0.85


# ---- what it is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiers", [None, TIERS], ids=["one width", "tiers"])
def test_an_outlier_survives(tiers, dtype):
    """A token a hundred times as far from the mean as others, which a calibrated range clips."""
    calibration, x = torch.randn(8, 128, 12), torch.randn(1, 128, 12)
    x[0, 77] *= 100
    errors = []
    for token_scale in (False, True):
        scheme = replace(SCALED, tiers=tiers, token_scale=token_scale)
        codec = make_codec(scheme, 128, WIDTHS, dtype, static_scales=calibrated(calibration, scheme))
        back = codec.decode(codec.encode(x.to(dtype)))
        assert back.dtype == dtype
        errors.append(((back.float() - x)[0, 77].norm() / x[0, 77].norm()).item())
    assert errors[0] > 0.9 and errors[1] < 0.6


def test_a_mean_is_not_scaled():
    """A channel that carries a mean keeps it in a token of any size, as `k_mean_split` asks for."""
    x = heavy_tailed(8, 128, 12)
    x[..., 0] = 1000 + 0.1 * torch.randn(8, 128)
    x[0, 5, 1:] *= 100
    codec = make_codec(SCALED, 128, WIDTHS, torch.float32, static_scales=calibrated(x, SCALED))
    fields = codec.encode(x)
    assert len(fields["token_scale"][..., 0].unique()) > 10
    assert (codec.decode(fields)[..., 0] - 1000).abs().median() < 1


def test_tokens_of_different_size_lose_less():
    fit, x = heavy_tailed(16, 128, 12), heavy_tailed(4, 128, 12)
    errors = []
    for token_scale in (False, True):
        scheme = replace(SCALED, tiers=TIERS, token_scale=token_scale)
        codec = make_codec(scheme, 128, WIDTHS, torch.float32, static_scales=calibrated(fit, scheme))
        errors.append((codec.decode(codec.encode(x)) - x).square().mean().item())
    assert errors[1] < 0.6 * errors[0]


def test_a_token_in_the_middle_and_constant_channels():
    """No token divides by zero, and a channel of one value gives it back."""
    scale = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0])
    codec = make_codec(SCALED, 2, (3, 2), torch.float32, static_scales=(scale, torch.arange(5.0)))
    middle = torch.tensor([0.75, 1.0, 2.75, 3.0, 4.0])
    back = codec.decode(codec.encode(middle.expand(1, 2, 5)))
    assert torch.allclose(back, middle.expand(1, 2, 5), atol=2e-3)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_channels_of_mere_rounding_take_no_part(backend):
    """Of directions that the calibration text has not a model's own rounding is many of their steps."""
    x = heavy_tailed(2, 32, sum(WIDTHS))
    scale, zero = calibrated(x, SCALED)
    for channel in (2, 9):
        x[..., channel], zero[channel] = 0.0, 0.0
    constant, rounding = scale.clone(), scale.clone()
    constant[[2, 9]], rounding[[2, 9]] = 0.0, 1e-8
    how = {"backend": get_backend(backend, torch.device("cpu"))}
    expected = make_codec(SCALED, 32, WIDTHS, torch.float32, static_scales=(constant, zero), **how).encode(x)
    x[..., [2, 9]] += 1e-4 * torch.randn(2, 32, 2)
    found = make_codec(SCALED, 32, WIDTHS, torch.float32, static_scales=(rounding, zero), **how).encode(x)
    assert torch.equal(found["token_scale"], expected["token_scale"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_refused(bad):
    codec = make_codec(SCALED, 4, (3,), torch.float32, static_scales=(torch.ones(3), torch.zeros(3)))
    with pytest.raises(ValueError, match="finite"):
        codec.encode(torch.full((1, 4, 3), bad))


# ---- caches


def scaled_cache(backend: str | None = None, capacity: int | None = None) -> tuple[KIVILatentCache, list]:
    """A cache of one layer, and states beyond its window."""
    torch.manual_seed(1)
    scheme = CacheScheme.of(*[replace(SCALED, tiers=TIERS, group_size=32)] * 2, residual_length=16, sink_length=4)
    states = [heavy_tailed(2, 150, 12) for _ in range(2)]
    scales = {0: {side: calibrated(x, scheme.keys) for side, x in zip(("keys", "values"), states)}}
    cache = KIVILatentCache(scheme, [(WIDTHS, WIDTHS)], None, scales, backend, capacity=capacity)
    return cache, states


def test_a_cache_of_fixed_capacity_holds_the_same():
    found = []
    for capacity in (None, 200):
        cache, states = scaled_cache(capacity=capacity)
        for start in (0, 90, 91, 92):
            stop = 150 if start == 92 else {0: 90}.get(start, start + 1)
            cache.layers[0].append(*[x[:, start:stop] for x in states])
        found.append(cache.layers[0].states())
    for grown, fixed in zip(*found, strict=True):
        assert torch.equal(grown, fixed)


def test_back_ends_hold_the_same_bits_and_say_who_attends():
    found = {}
    for name in ("reference", "cpu"):
        cache, states = scaled_cache(name)
        cache.layers[0].append(*states)
        found[name] = cache.layers[0].pool.storage
        assert cache.layers[0].backend_note == name
    for side, fields in found["reference"].items():
        for name, tensor in fields.items():
            assert torch.equal(tensor, found["cpu"][side][name]), name


@pytest.mark.interpreter
def test_triton_holds_the_same_bits_and_attends_itself():
    stored = []
    for name in ("reference", "triton"):
        cache, states = scaled_cache(name)
        cache.layers[0].append(*states)
        assert cache.layers[0].backend_note == name
        stored.append(cache.layers[0].pool.tensors())
    for reference, triton in zip(*stored, strict=True):
        assert torch.equal(reference, triton)


# ---- models


TOKEN_SCALE = {"orientation": "per_channel", "static": True, "token_scale": True}


@pytest.mark.parametrize("heads", [2, 4], ids=["GQA", "MHA"])
@pytest.mark.parametrize("group", [None, 1], ids=["joint", "heads"])
@pytest.mark.parametrize("code", ["uniform", "trellis"])
def test_a_model_generates_and_continues_from_a_file(tmp_path, heads, group, code):
    dense = tiny_dense(num_attention_heads=4, num_key_value_heads=heads)
    groups = 1 if group is None else heads
    ranks = {"k": (7,) * groups, "v": (6,) * groups}
    model = static_model(dense, group, **ranks, k_scheme=TOKEN_SCALE | {"code": code}, v_scheme=TOKEN_SCALE)
    cache = model.create_kivi_cache()
    text = model.generate(IDS, past_key_values=cache, max_new_tokens=12, do_sample=False)
    check_cache_of(model, cache)
    assert "token_scale" in cache.layers[0].pool.storage["keys"]
    # The model and the cache come back from their folders and go on alike.
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    cache.save(tmp_path / "cache")
    loaded, forked = KIVILatentCache.load(tmp_path / "cache"), copy.deepcopy(cache)
    following = text[:, cache.get_seq_length() :]
    with torch.no_grad():
        expected = model(following, past_key_values=cache).logits
        for other, its_cache in ((again, loaded), (model, forked)):
            assert torch.allclose(other(following, past_key_values=its_cache).logits, expected, atol=1e-5)
    for mine, *others in zip(*[c.layers[1].pool.tensors() for c in (cache, loaded, forked)], strict=True):
        for its_blocks in others:
            blocks = cache.layers[1].pool.used
            assert torch.equal(mine[:blocks], its_blocks[:blocks])


# ---- calibration


def test_gains_are_the_sizes_of_the_tokens():
    x = heavy_tailed(1, 500, 12)[0]
    norm = ((x - x.mean(0)) / x.std(0)).norm(dim=1)
    expected = norm / norm.square().mean().sqrt()
    assert torch.allclose(token_gains(x)[:, 0], expected, rtol=2 ** (1 / 32) - 1 + 1e-4)
    assert torch.equal(token_gains(torch.ones(5, 3)), torch.full((5, 1), 2.0**-8))


def test_steps_are_fitted_to_what_the_codes_hold():
    """Gaussian tokens times a size: with the sizes as gains the steps are those of a Gaussian."""
    gains = torch.exp(0.4 * torch.randn(20_000, 1))
    x = torch.randn(20_000, 3) * gains * torch.tensor([0.1, 1.0, 5.0]) + torch.tensor([3.0, 0.0, -9.0])
    for bits, step in ((1, 1.5958), (2, 0.9957), (3, 0.5860)):
        scale, zero = static_scales(x, bits, gains)
        levels, spacing, _ = grid(bits)
        assert torch.allclose(scale * spacing, step * torch.tensor([0.1, 1.0, 5.0]), rtol=0.08)
        assert torch.allclose(zero + (levels - 1) / 2 * scale * spacing, x.mean(0), atol=1e-4)


@pytest.mark.parametrize("code", ["uniform", "trellis"])
def test_the_refit_measures_what_the_cache_loses(code):
    sample = heavy_tailed(8, 128, 6)
    factors, scheme = identity_factors(6, 2.0), side_scheme("k", 2, 128, TOKEN_SCALE | {"code": code})
    channels, tiers = torch.tensor([5, 3, 0]), [(1, 4), (2, 2)]
    (scale, zero), cost = refit_scales(factors, sample, scheme, channels, tiers)
    codec = make_codec(replace(scheme, tiers=(tiers,)), 128, (3,), torch.float32, static_scales=(scale, zero))
    back = torch.zeros_like(sample)
    back[..., channels] = codec.decode(codec.encode(sample[..., channels]))
    assert cost == pytest.approx(2.0 * (back - sample).square().mean((0, 1)).sum().item(), rel=1e-4)
