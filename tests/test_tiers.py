"""Widths by channel: scheme, quantizer, cache, configuration and model, each against its definition.

What a tier stores is compared with the plain quantizer of its width on its channels alone; the model with a forward
pass that rounds latents by hand.
"""

import copy
import itertools
import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_codecs import Case, check_edits, check_feeding_order, check_rows, example, expected_nbytes, same_bits
from test_kivi_cache import assert_same_rows, feed, padded_masks, row_states
from transformers import AutoConfig, AutoModelForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig, Projection, QuantScheme, side_scheme
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.cache.codecs import StaticScales, block_nbytes, make_codec
from modules.fit.allocation import static_scales
from modules.hadamard_utils import hadamard_matrix
from modules.kernels import get_backend
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_widths, create_kivi_cache
from modules.svd_linear import factor_groups
from tests.helpers import TINY_LLAMA, all_ranks, tiny_dense, tiny_split
from tests.simulated_cache import SimulatedCache, round_trip_block
from tests.simulated_model import ExactRotaryEmbedding, simulated_forward

K0, V0, V1 = (f"model.layers.{name}_proj" for name in ("0.self_attn.k", "0.self_attn.v", "1.self_attn.v"))
CPU = torch.device("cpu")

#: Three head groups of unequal tiers: one without the widest, one of a single channel.
TIERS = (((2, 16), (5, 3), (6, 1)), ((1, 8), (4, 3)), ((1, 4),))
WIDTHS = (13, 5, 1)


def scheme_of(tiers=TIERS, **fields) -> QuantScheme:
    return QuantScheme(**{"group_size": 20, "tiers": tiers, **fields})


# ---- scheme


FORM = r"must be for each head group a list of \[channels, bits\]"
BAD_TIERS = {
    "number": (4, rf"tiers=4: {FORM}"),
    "text": ("42", rf"tiers='42': {FORM}"),
    "dictionary": ({"a": 1}, rf"tiers=\{{'a': 1\}}: {FORM}"),
    "no group": ([], rf"tiers=\[\]: {FORM}"),
    "a group without tiers": ([[[1, 2]], []], rf"tiers=.*: {FORM}"),
    "a tier in place of a group": ([[1, 2]], rf"tiers=\[\[1, 2\]\]: {FORM}"),
    "no width": ([[[3]]], rf"tiers=\[\[\[3\]\]\]: {FORM}"),
    "three numbers": ([[[3, 2, 1]]], rf"tiers=.*: {FORM}"),
    "no channel": ([[[1, 2], [0, 4]]], r"tiers=\[\[\[1, 2\], \[0, 4\]\]\]: a tier must have a channel"),
    "negative channels": ([[[-1, 2]]], r"tiers: channels=-1: must be an integer of at least 0"),
    "float channels": ([[[1.0, 2]]], r"tiers: channels=1\.0: must be an integer"),
    "bool channels": ([[[True, 2]]], r"tiers: channels=True: must be an integer"),
    "seven bits": ([[[1, 7]]], r"tiers: bits=7: must be one of 1, 1\.5, 1\.58, 2, 3, 4, 5, 6, 8, 16 bits"),
    "zero bits": ([[[1, 0]]], r"tiers: bits=0: must be one of"),
    "text bits": ([[[1, "2"]]], r"tiers: bits='2': must be one of"),
    "bool bits": ([[[1, True]]], r"tiers: bits=True: must be one of"),
    "no bits": ([[[1, None]]], r"tiers: bits=None: must be one of"),
    "the second group is bad": ([[[1, 2]], [[1, 7]]], r"tiers: bits=7: must be one of"),
}


@pytest.mark.parametrize(("tiers", "message"), BAD_TIERS.values(), ids=BAD_TIERS)
def test_bad_tiers_are_refused(tiers, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme(tiers=tiers)


BAD_TOGETHER = {
    "rotation": ({"rotation": True}, r"tiers: .*rotation.*must not be set; got rotation=True"),
    "protected": ({"protected": 0.25}, r"tiers: .*must not be set; got .*protected=0\.25"),
    "quantizer": ({"quantizer": "mine"}, r"tiers: .*must not be set; got .*quantizer='mine'"),
    "per-token mixture": ({"orientation": "per_token", "tiers": [[[2, 1.5]]]}, r"bits=1\.5: .*must be per_channel"),
    "static per token": ({"orientation": "per_token", "static": True}, r"static=True: .*per_channel"),
    "token scale of 16 bits": (
        {"static": True, "token_scale": True},
        r"token_scale=True: multiplies calibrated steps, which a tier of 16 bits",
    ),
    "static ternary": ({"static": True, "tiers": [[[2, 1.58]]]}, r"ternary codes \(bits=1\.58\) are symmetric"),
    "static mixture": ({"static": True, "tiers": [[[2, 1.5]]]}, r"static=True: calibrated scales are .* 1\.5 bits"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_TOGETHER.values(), ids=BAD_TOGETHER)
def test_what_does_not_go_with_tiers_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        scheme_of(**fields)


@pytest.mark.parametrize(
    "fields",
    [{}, {"static": True}, {"orientation": "per_token"}, {"range_method": "mse", "group_size": 0}, {"bits": 16}],
    ids=str,
)
def test_json_round_trip(fields):
    scheme = scheme_of([[[2, 16], (3, 4.0)], [[5, 1]]], **fields)
    assert scheme.tiers == (((2, 16), (3, 4)), ((5, 1),))
    again = QuantScheme(**json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme and str(again) == str(scheme)
    assert hash(again) == hash(scheme)
    assert scheme != replace(scheme, tiers=(((5, 4),), ((5, 1),)))


def test_the_name_of_a_tiered_scheme():
    assert str(scheme_of()) == "16/8/4/3/1-bit tiers per channel"
    assert str(scheme_of(static=True, group_size=0)) == "16/8/4/3/1-bit tiers per channel (static)"
    assert str(scheme_of([[[3, 2], [1, 1.58]]], orientation="per_token")) == "2/1.58-bit tiers per token"


def test_at_width_of_dynamic_scales():
    for fields in ({}, {"orientation": "per_token", "group_size": 0}, {"group_size": 5}):
        scheme = scheme_of(**fields)
        for bits in (1, 1.58, 2, 3, 4, 5, 6, 8, 16):
            assert scheme.at_width(bits) == QuantScheme(bits, **{"group_size": 20, **fields})
    assert scheme_of().at_width(1.5) == QuantScheme(1.5, group_size=20)


def test_at_width_of_the_least_error_range():
    scheme = scheme_of(range_method="mse")
    assert [scheme.at_width(bits).range_method for bits in (1, 1.5, 1.58, 2)] == ["mse"] * 4
    assert scheme.at_width(2) == QuantScheme(2, group_size=20, range_method="mse")
    assert [scheme.at_width(bits).range_method for bits in (3, 5, 8, 16)] == ["minmax"] * 4


def test_at_width_of_static_scales():
    scheme = scheme_of(static=True)
    for bits in (1, 2, 3, 4, 5, 6, 8):
        at_width = scheme.at_width(bits)
        assert (at_width.bits, at_width.static, at_width.symmetric, at_width.tiers) == (bits, True, False, None)
    assert scheme.at_width(16) == QuantScheme(16, group_size=20)


@pytest.mark.parametrize("bits", [1, 16])
def test_bits_say_nothing_beside_tiers(bits):
    tiers = (((3, 4), (3, 2)),)
    assert scheme_of(tiers, bits=bits).at_width(2) == scheme_of(tiers).at_width(2)
    assert str(scheme_of(tiers, bits=bits)) == str(scheme_of(tiers))


def test_the_way_a_width_is_written_does_not_matter():
    one, other = (make_codec(scheme_of([[[3, b], [2, 4]]]), 20, (5,), torch.float32) for b in (2, 2.0))
    assert one.fields() == other.fields()


def test_tiers_must_fill_the_head_groups():
    for widths in ((13, 5), (13, 5, 2), (5, 13, 1), (19,)):
        with pytest.raises(
            ValueError, match=rf"tiers: of \[13, 5, 1\] channels must fill .*{re.escape(str([*widths]))}"
        ):
            make_codec(scheme_of(), 20, widths, torch.float32)


# ---- quantizer


def plain_scheme(scheme: QuantScheme, bits: float) -> QuantScheme:
    """What one tier is stored as, from the documentation."""
    if bits == 16:
        return QuantScheme(16)
    where = {"orientation": scheme.orientation, "group_size": scheme.group_size}
    if scheme.static:
        return QuantScheme(bits, **where, static=True, symmetric=False)
    return QuantScheme(bits, **where, range_method=scheme.range_method if bits <= 2 and bits >= 2 else None)


def tier_channels(tiers) -> list[tuple[float, list[int]]]:
    """Bits and channels of every tier of every head group."""
    found, start = [], 0
    for n, bits in itertools.chain(*tiers):
        found.append((bits, list(range(start, start + n))))
        start += n
    return found


def codec_of(scheme, length, widths, dtype, backend="reference", scales=None):
    return make_codec(scheme, length, widths, dtype, get_backend(backend, CPU), scales)


def scales_for(x: torch.Tensor, tiers) -> StaticScales:
    """Scales that clip a little, `[C]`, by channel."""
    low, high = x.float().flatten(0, 1).quantile(torch.tensor([0.05, 0.95]), dim=0)
    steps = torch.cat([torch.full((n,), 2.0 if b == 1 else 2.0 ** min(b, 8) - 1) for n, b in itertools.chain(*tiers)])
    return (high - low) / steps, low


def check_against_the_tiers_alone(scheme, length, widths, dtype, backend="reference") -> None:
    x = example(length, max(sum(widths), 5), dtype)[..., : sum(widths)].contiguous()
    scales = scales_for(x, scheme.tiers) if scheme.static else None
    codec = codec_of(scheme, length, widths, dtype, backend, scales)
    fields = codec.encode(x)
    back = codec.decode(fields)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    shapes = {name: (t.shape[1:], t.dtype) for name, t in fields.items()}
    assert shapes == {name: (torch.Size(shape), kind) for name, (shape, kind) in codec.fields().items()}

    expected, nbytes = {}, 0
    tiers = tier_channels(scheme.tiers)
    for bits in {bits for bits, _ in tiers}:
        # One quantizer for each width: the tiers of all head groups side by side, each a head group of its own.
        mine = [channels for b, channels in tiers if b == bits]
        index = list(itertools.chain(*mine))
        its_scheme = plain_scheme(scheme, bits)
        its_scales = tuple(s[index] for s in scales) if its_scheme.static else None
        alone = codec_of(its_scheme, length, tuple(map(len, mine)), dtype, scales=its_scales)
        stored = alone.encode(x[..., index])
        expected |= {f"{bits}bit.{name}": tensor for name, tensor in stored.items()}
        assert same_bits(back[..., index], alone.decode(stored))
        nbytes += block_nbytes(alone)
        for channels in mine:
            # And no tier knows of another one, nor of another group's.
            its_scales = tuple(s[channels] for s in scales) if its_scheme.static else None
            single = codec_of(its_scheme, length, (len(channels),), dtype, scales=its_scales)
            assert same_bits(back[..., channels], single.decode(single.encode(x[..., channels])))
            if bits == 16:
                assert same_bits(back[..., channels], x[..., channels])
    assert fields.keys() == expected.keys()
    assert all(same_bits(fields[name], expected[name]) for name in fields)
    assert block_nbytes(codec) == nbytes == sum(t[0].nbytes for t in fields.values())
    stacked = codec.decode({name: t.expand(3, *t.shape) for name, t in fields.items()})
    assert same_bits(stacked, back.expand(3, *back.shape))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODEC_CASES = [
    # tiers, fields, length, dtype
    (TIERS, {}, 45, torch.float32),
    (TIERS, {"orientation": "per_token"}, 45, torch.float32),
    (TIERS, {"orientation": "per_token", "group_size": 4}, 33, torch.bfloat16),
    (TIERS, {"orientation": "per_token", "group_size": 0}, 20, torch.float16),
    (TIERS, {"range_method": "mse", "group_size": 0}, 45, torch.bfloat16),
    (TIERS, {"range_method": "mse", "orientation": "per_token"}, 7, torch.float16),
    (TIERS, {"static": True}, 45, torch.float32),
    (TIERS, {"static": True}, 33, torch.bfloat16),
    ((((3, 2), (2, 1.58), (4, 1)), ((5, 1.58),)), {}, 45, torch.float16),
    ((((3, 2), (2, 1.58), (4, 1)), ((5, 2),)), {"range_method": "mse"}, 128, torch.bfloat16),
    ((((3, 2), (2, 1.58), (4, 1)), ((5, 1),)), {"orientation": "per_token"}, 21, torch.float32),
    ((((2, 4), (5, 1.5), (1, 1)), ((1, 1.5),)), {}, 40, torch.float32),
    ((((2, 1), (3, 2), (4, 8), (1, 16)), ((3, 8), (2, 1))), {"static": True}, 45, torch.float16),  # rising widths
    ((((2, 4), (3, 2), (4, 4)),), {}, 45, torch.float32),  # a width twice
    ((((2, 6), (3, 5), (4, 3)), ((3, 6), (2, 1))), {"static": True}, 45, torch.bfloat16),
    ((((9, 16),), ((2, 16),)), {}, 20, torch.bfloat16),
    ((((1, 3),),), {"orientation": "per_token"}, 1, torch.float32),
]
codec_cases = pytest.mark.parametrize(
    ("tiers", "fields", "length", "dtype"), CODEC_CASES, ids=[str(i) for i in range(len(CODEC_CASES))]
)


def widths_of(tiers) -> tuple[int, ...]:
    return tuple(sum(n for n, _ in group) for group in tiers)


@codec_cases
def test_tiers_store_what_the_plain_quantizers_store(tiers, fields, length, dtype):
    check_against_the_tiers_alone(scheme_of(tiers, **fields), length, widths_of(tiers), dtype)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", [2, 7, 8], ids=str)
def test_kernels_store_the_same_bits(case):
    pytest.importorskip("triton")
    tiers, fields, _, dtype = CODEC_CASES[case]
    check_against_the_tiers_alone(scheme_of(tiers, **fields), 33, widths_of(tiers), dtype, "triton")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_static_codes_are_the_nearest_levels(bits):
    """Of `zero_point + code * step`; one bit steps by twice the scale, and is not symmetric."""
    x = torch.randn(2, 45, 5) + 3
    scale, zero = torch.tensor([0.5, 0.1, 0.0, 0.3, 0.02]), torch.tensor([2.0, 2.5, 3.0, 1.0, 2.9])
    codec = codec_of(scheme_of((((2, bits), (3, 16)),), static=True), 45, (5,), torch.float32, scales=(scale, zero))
    back = codec.decode(codec.encode(x)).double()
    assert same_bits(back[..., 2:].float(), x[..., 2:])
    step = scale.double() * (2 if bits == 1 else 1)
    levels = zero.double()[:, None] + step[:, None] * torch.arange(2**bits)
    for c in range(2):
        nearest = (x[..., c, None].double() - levels[c]).abs().amin(-1)
        assert torch.allclose((x[..., c].double() - back[..., c]).abs(), nearest, atol=1e-6)
        assert len(back[..., c].unique()) <= 2**bits


def test_a_static_channel_of_scale_zero_gives_its_zero_point():
    codec = codec_of(
        scheme_of((((2, 1), (1, 4)),), static=True), 20, (3,), torch.float32, scales=(torch.zeros(3), torch.arange(3.0))
    )
    back = codec.decode(codec.encode(torch.randn(1, 20, 3)))
    assert torch.equal(back, torch.arange(3.0).expand(1, 20, 3))


# ---- cache


@dataclass(frozen=True)
class TieredCase(Case):
    """A cache of two schemes, tiered or not."""

    widths: tuple = (WIDTHS, (9, 9, 2))

    def row_nbytes(self, tokens: int) -> int:
        block = self.scheme.block_length
        blocks = max(0, (tokens - min(tokens, self.sink_length) - self.residual_length) // block)
        packed = 0
        for scheme, widths in zip((self.keys, self.values), self.widths, strict=True):
            if scheme.tiers is None:
                packed += expected_nbytes(scheme, block, widths, self.dtype.itemsize)
                continue
            tiers = tier_channels(scheme.tiers)
            for bits in {bits for bits, _ in tiers}:
                mine = [len(channels) for b, channels in tiers if b == bits]
                packed += expected_nbytes(plain_scheme(scheme, bits), block, mine, self.dtype.itemsize)
            packed += block * len(widths) * scheme.token_scale
        exact = tokens - blocks * block
        return blocks * (packed + 12) + exact * sum(map(sum, self.widths)) * self.dtype.itemsize


VALUE_TIERS = (((4, 4), (5, 2)), ((1, 16), (8, 1.58)), ((2, 3),))
CASES = {
    "keys per channel, values per token": TieredCase(
        scheme_of(), scheme_of(VALUE_TIERS, orientation="per_token"), dtype=torch.bfloat16
    ),
    "keys per token, values per channel, mse": TieredCase(
        scheme_of(orientation="per_token", group_size=8),
        scheme_of(VALUE_TIERS, range_method="mse"),
        0,
        0,
        dtype=torch.float16,
    ),
    "static keys, plain values": TieredCase(
        scheme_of(static=True), QuantScheme(2, "per_token", 20), dtype=torch.float32
    ),
    "plain keys, static values": TieredCase(
        QuantScheme(3, group_size=8), scheme_of((((9, 1),), ((2, 4), (7, 2)), ((2, 3),)), static=True), 3, 2
    ),
    "both static": TieredCase(
        scheme_of(static=True, group_size=32),
        scheme_of((((9, 1),), ((2, 4), (7, 2)), ((2, 3),)), static=True, group_size=32),
        dtype=torch.bfloat16,
    ),
    "scales of tokens": TieredCase(
        scheme_of((((9, 1),), ((2, 4), (7, 2)), ((2, 3),)), static=True, group_size=32, token_scale=True),
        scheme_of((((9, 8),), ((2, 4), (7, 1)), ((2, 3),)), static=True, group_size=32, token_scale=True),
        dtype=torch.float16,
        widths=((9, 9, 2),) * 2,
    ),
    "trellis": TieredCase(
        scheme_of((((9, 1),), ((2, 4), (7, 2)), ((2, 3),)), static=True, group_size=32, code="trellis"),
        scheme_of(
            (((3, 2), (2, 5), (4, 2)), ((2, 6), (7, 1)), ((2, 8),)),
            static=True,
            group_size=32,
            token_scale=True,
            code="trellis",
        ),
        dtype=torch.bfloat16,
        widths=((9, 9, 2),) * 2,
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@by_case
@pytest.mark.parametrize("check", [check_feeding_order, check_rows, check_edits], ids=lambda c: c.__name__)
def test_invariants_of_the_cache(case, check):
    check(case)


@by_case
def test_copies(case, tmp_path):
    """As a layer of its own in a cache whose other layer is plain: deep copies, saved and loaded ones go on alike."""
    block = case.scheme.block_length
    length = case.sink_length + case.residual_length + 2 * block + 80
    plain = CacheScheme.of(
        QuantScheme(4, group_size=block), QuantScheme(group_size=block), residual_length=case.residual_length,
        sink_length=case.sink_length,
    )  # fmt: skip
    scales = {1: case.static_scales} if case.static_scales else None
    cache = KIVILatentCache(plain, [case.widths] * 2, {1: case.scheme}, scales)
    states, real = case.states(2, length), padded_masks(2, length)
    for layer in cache.layers:
        feed(layer, *states, [length], real)
    cache.save(tmp_path / "cache")
    later = case.states(2, block)
    loaded = KIVILatentCache.load(tmp_path / "cache")
    assert (loaded.layer_schemes[1].keys, loaded.layer_schemes[1].values) == (case.keys, case.values)
    for other, i in itertools.product((copy.deepcopy(cache), loaded), range(2)):
        layer, copied = cache.layers[i], other.layers[i]
        assert copied.nbytes_used == layer.nbytes_used
        for row in range(2):
            assert_same_rows(copied, row, layer, row)
            for found, expected in zip(row_states(copied, row), row_states(layer, row), strict=True):
                assert same_bits(found, expected)
        grown = feed(copy.deepcopy(layer), *later, [block])
        feed(copied, *later, [block])
        for row in range(2):
            assert_same_rows(copied, row, grown, row)


def test_scales_are_counted_once_for_all_rows():
    case = CASES["both static"]
    one, four = (feed(case.layer(), *case.states(n, 100), [100]) for n in (1, 4))
    static = case.scheme.static_nbytes(case.widths)
    assert static == 8 * (sum(WIDTHS) + 20)
    assert four.nbytes_used - static == 4 * (one.nbytes_used - static)
    assert CASES["static keys, plain values"].scheme.static_nbytes(case.widths) == 8 * sum(WIDTHS)
    assert CASES["keys per channel, values per token"].scheme.static_nbytes(case.widths) == 0


def test_static_tiers_need_their_scales():
    case = CASES["both static"]
    for scales in ({}, {"keys": case.static_scales["keys"]}):
        layer = KIVILatentCache(case.scheme, [case.widths], static_scales={0: scales}).layers[0]
        with pytest.raises(ValueError, match=r"static=True of the (keys|values): needs calibrated scales"):
            feed(layer, *case.states(1, 5), [5])
        assert not layer.is_initialized


@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_refused(side):
    for case in CASES.values():
        states = case.states(1, 80)
        states[side][0, case.sink_length + 3, sum(case.widths[side]) - 1] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            feed(case.layer(), *states, [80])


# ---- configuration


def tiny_config(**fields) -> ALRDLlamaConfig:
    return ALRDLlamaConfig(**{**TINY_LLAMA, "truncation_ranks": {K0: 24, V0: [5, 9], V1: 12}, **fields})


GOOD = {K0: [[[2, 16], [10, 2]], [[12, 2]]], V0: [[[5, 4]], [[9, 2]]]}


def test_width_tiers_are_kept(tmp_path):
    config = tiny_config(head_group_size=2, width_tiers=GOOD, k_mean_split=True, v_scheme={"group_size": 32})
    config.save_pretrained(tmp_path)
    for loaded in (ALRDLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), config):
        assert type(loaded) is ALRDLlamaConfig
        assert loaded.width_tiers == GOOD
        assert (loaded.k_mean_split, loaded.v_mean_split) == (True, False)
        keys, values = loaded.tiered_scheme(Projection(0, "k")), loaded.tiered_scheme(Projection(0, "v"))
        assert keys == QuantScheme(tiers=GOOD[K0])
        assert values == QuantScheme(tiers=GOOD[V0], orientation="per_token", group_size=32)
        assert loaded.tiered_scheme(Projection(1, "v")) is None
    other = ALRDLlamaConfig.from_llama(config, residual_length=3)
    assert (other.width_tiers, other.residual_length) == (GOOD, 3)
    assert ALRDLlamaConfig.from_llama(config, width_tiers={}).width_tiers == {}
    assert ALRDLlamaConfig.from_llama(tiny_dense().config, truncation_ranks={K0: 3}, width_tiers={K0: [[[3, 4]]]})
    assert "width_tiers" not in config.to_dense().to_dict()


def test_configs_do_not_share_their_tiers():
    first, second = ALRDLlamaConfig(), ALRDLlamaConfig()
    first.width_tiers[K0] = []
    assert second.width_tiers == {}
    config = tiny_config(head_group_size=2, width_tiers=copy.deepcopy(GOOD))
    ALRDLlamaConfig.from_llama(config).width_tiers[K0][0][0][0] = 7
    assert config.width_tiers == GOOD


NAMED = re.escape(f"width_tiers[{K0!r}]")
BAD_CONFIGS = {
    "not a dictionary": ({"width_tiers": [1]}, r"width_tiers=\[1\]: must map projection names to tiers"),
    "a projection that stays dense": (
        {"width_tiers": {"model.layers.1.self_attn.k_proj": [[[64, 2]]]}},
        r"width_tiers\['model.layers.1.self_attn.k_proj'\]: must be a projection that truncation_ranks names",
    ),
    "no projection": ({"width_tiers": {"k_proj": [[[24, 2]]]}}, r"width_tiers\['k_proj'\]: must be a projection that"),
    "a number for a name": ({"width_tiers": {0: [[[24, 2]]]}}, r"width_tiers\[0\]: must be a projection that"),
    "too few channels": ({"width_tiers": {K0: [[[11, 2]], [[12, 2]]]}}, rf"{NAMED}: tiers of \[11, 12\] .*\[12, 12\]"),
    "too few groups": (
        {"width_tiers": {K0: [[[24, 2]]]}},
        rf"{NAMED}: tiers of \[24\] channels must fill .*\[12, 12\]",
    ),
    "channels in the wrong group": (
        {"width_tiers": {V0: [[[9, 2]], [[5, 2]]]}},
        r"v_proj'\]: tiers of \[9, 5\] channels must fill the group ranks \[5, 9\]",
    ),
    "another form": ({"width_tiers": {K0: [[12, 2], [12, 2]]}}, rf"{NAMED}: .*{FORM}"),
    "nothing": ({"width_tiers": {K0: []}}, rf"{NAMED}: .*{FORM}"),
    "none": ({"width_tiers": {K0: None}}, rf"{NAMED}.*{FORM}"),
    "a width that does not exist": ({"width_tiers": {K0: [[[12, 7]], [[12, 2]]]}}, rf"{NAMED}: .*bits=7: must be one"),
    "a scheme that does not go with tiers": (
        {"width_tiers": GOOD, "k_scheme": {"rotation": True}},
        rf"{NAMED}: .*must not be set; got rotation=True",
    ),
    "simple scheme": ({"width_tiers": GOOD, "use_kivi": False}, r"width_tiers: the simple scheme \(use_kivi=False\)"),
    "mean split": ({"k_mean_split": 1}, r"k_mean_split=1: must be True or False"),
    "mean split of values": ({"v_mean_split": None}, r"v_mean_split=None: must be True or False"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(head_group_size=2, **fields)
    config = tiny_config(head_group_size=2)
    for field, value in fields.items():
        setattr(config, field, value)
    for build in (ALRDLlamaForCausalLM, config_widths):
        with pytest.raises(ValueError, match=message):
            build(config)


# ---- model


def tiers_of(ranks: int | list[int], *bits: float) -> list[list[list]]:
    """Tiers of about equal size for each head group, a channel more for the narrower ones."""
    groups = []
    for rank in [ranks] if isinstance(ranks, int) else ranks:
        share, rest = divmod(rank, len(bits))
        groups.append([[share + (i >= len(bits) - rest), b] for i, b in enumerate(bits)])
    return groups


def full_tiers(ranks: dict, k_bits=(16, 4, 2), v_bits=(8, 3, 2)) -> dict[str, list]:
    """Tiers for every projection that `ranks` (lists of group ranks) names."""
    return {name: tiers_of(rank, *(k_bits if name.endswith("k_proj") else v_bits)) for name, rank in ranks.items()}


#: head_group_size, ranks of keys and values.
GROUPS = [(None, [29], [20]), (2, [13, 21], [32, 7]), (1, [9, 10, 4, 16], [5, 5, 12, 3])]
WINDOW = {"group_size": 20, "residual_length": 5, "sink_length": 3}


def tiered_model(tmp_path, group=None, k=(29,), v=(20,), dense=None, **fields) -> ALRDLlamaForCausalLM:
    """A dense model split while it is loaded, with tiers on both sides."""
    dense = tiny_dense() if dense is None else dense
    ranks = all_ranks(dense.config.num_hidden_layers, {"k_proj": list(k), "v_proj": list(v)})
    how = {"width_tiers": full_tiers(ranks), "k_hadamard": False, "v_hadamard": False, **WINDOW} | fields
    return tiny_split(tmp_path, ranks, group, dense, **how)


@torch.no_grad()
def static_model(dense=None, group=None, k=(29,), v=(20,), k_bits=(4, 2, 1), v_bits=(8, 3, 2), **fields):
    """A split model with calibrated scales of the latents of some random text."""
    dense = tiny_dense() if dense is None else dense
    ranks = all_ranks(dense.config.num_hidden_layers, {"k_proj": list(k), "v_proj": list(v)})
    static = {"orientation": "per_channel", "static": True}
    how = {"k_scheme": static, "v_scheme": static, "k_hadamard": False, "v_hadamard": False, **WINDOW} | fields
    config = ALRDLlamaConfig.from_llama(
        dense.config,
        truncation_ranks=ranks,
        head_group_size=group,
        width_tiers=full_tiers(ranks, k_bits, v_bits),
        **how,
    )
    ids = torch.randint(1, dense.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(1))
    hidden, hows = dense(ids, output_hidden_states=True).hidden_states, []
    for i, layer in enumerate(dense.model.layers):
        x, of_layer = layer.input_layernorm(hidden[i]).flatten(0, 1).double(), {}
        for p in ("k_proj", "v_proj"):
            name = f"model.layers.{i}.self_attn.{p}"
            of_layer[p] = {"factors": factor_groups(getattr(layer.self_attn, p).weight, tuple(ranks[name]))}
            if (getattr(config, f"{p[0]}_scheme") or {}).get("static"):
                latents = torch.cat([x @ f.b.T for f in of_layer[p]["factors"]], dim=1).float()
                tiers = tier_channels(config.width_tiers[name])
                scheme = side_scheme(p[0], 2, 128, getattr(config, f"{p[0]}_scheme"))
                pairs = [static_scales(latents[:, channels], bits, None, scheme) for bits, channels in tiers]
                of_layer[p]["static_scales"] = tuple(torch.cat(side) for side in zip(*pairs))
        hows.append(of_layer)
    return ALRDLlamaForCausalLM.from_dense(dense, config, hows)


def check_cache_of(model, cache) -> None:
    """Every layer stores the tiers that the configuration gives it, and its size is the formula's."""
    for i, layer in enumerate(cache.layers):
        for p, side in (("k_proj", layer.scheme.keys), ("v_proj", layer.scheme.values)):
            tiers = model.config.width_tiers.get(f"model.layers.{i}.self_attn.{p}")
            assert side.tiers == (tiers and tuple(tuple(map(tuple, group)) for group in tiers))
    check_size(cache)


def check_size(cache) -> None:
    for layer in cache.layers:
        assert layer.pool.used
        formula = sum(layer.scheme.layer_nbytes(row.tokens, layer.widths, layer.dtype) for row in layer.rows)
        assert layer.nbytes_used == formula + layer.scheme.static_nbytes(layer.widths)


IDS = torch.randint(1, 97, (1, 90), generator=torch.Generator().manual_seed(3))
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize(("group", "k", "v"), GROUPS, ids=["joint", "pairs", "heads"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_generate_through_tiers(tmp_path, group, k, v, static):
    model = static_model(group=group, k=k, v=v) if static else tiered_model(tmp_path, group, k, v)
    cache = model.create_kivi_cache()
    text = model.generate(IDS, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), text)  # it makes the same cache by itself
    check_cache_of(model, cache)
    assert cache.row_tokens() == [90 + 11]


def test_generate_with_multi_head_attention(tmp_path):
    model = tiered_model(tmp_path, 4, (20, 31), (18, 17), tiny_dense(num_key_value_heads=8, attention_bias=True))
    cache = model.create_kivi_cache()
    model.generate(IDS, past_key_values=cache, **GREEDY)
    check_cache_of(model, cache)


class TieredSimulation(SimulatedCache):
    """One layer that rounds every tier by hand. `tiers`: for each side its head groups'; `scales`: static ones."""

    def __init__(self, schemes: tuple, scales: tuple, residual_length: int, sink_length: int, block_length: int):
        self.schemes, self.scales, self.block_length = schemes, scales, block_length
        self.residual_length, self.sink_length, self.rows = residual_length, sink_length, []

    def rounded(self, states: torch.Tensor, side: int) -> torch.Tensor:
        scheme, back = self.schemes[side], states.clone()
        for bits, channels in tier_channels(scheme.tiers):
            x = states[:, channels]
            if scheme.static and bits != 16:
                scale, zero = (s[channels].numpy() for s in self.scales[side])
                step = scale * np.float32(2 if bits == 1 else 1)
                codes = np.floor(np.clip((x.float().numpy() - zero) / step, 0, 2**bits - 1) + np.float32(0.5))
                back[:, channels] = torch.from_numpy(codes * step + zero).to(x.dtype)
            else:
                back[:, channels] = round_trip_block(x, bits, scheme.per_channel, (len(channels),), scheme.group_size)
        return back


def simulations(model) -> list[TieredSimulation]:
    c, found = model.config, []
    for i, layer in enumerate(model.model.layers):
        schemes = tuple(c.tiered_scheme(Projection(i, side)) for side in "kv")
        projections = (layer.self_attn.k_proj, layer.self_attn.v_proj)
        scales = tuple(
            None if p.latent_scale is None else (p.latent_scale.float(), p.latent_zero_point.float())
            for p in projections
        )
        found.append(TieredSimulation(schemes, scales, c.residual_length, c.sink_length, c.group_size))
    return found


@pytest.mark.parametrize(
    ("kind", "group"),
    [("dynamic", 0), ("dynamic", 1), ("dynamic", 2), ("static", 0), ("static", 1), ("mixed", 1), ("per token", 1)],
)
def test_logits_are_those_of_latents_rounded_by_hand(tmp_path, kind, group):
    size, k, v = GROUPS[group]
    if kind == "dynamic":
        model = tiered_model(tmp_path, size, k, v)
    elif kind == "per token":
        model = tiered_model(tmp_path, size, k, v, k_scheme={"orientation": "per_token"}, v_hadamard=True)
    else:
        model = static_model(group=size, k=k, v=v, **({"v_scheme": None} if kind == "mixed" else {}))
    model = model.double()
    model.model.rotary_emb = ExactRotaryEmbedding(model.model.rotary_emb)
    ids = torch.randint(1, 97, (2, 120))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, :23] = False
    real[1, 70:75] = False
    cache, simulated, start = model.create_kivi_cache(), simulations(model), 0
    exact = model.create_kivi_cache(k_bits=16, v_bits=16)
    for cut in (70, 1, 30, 19):
        piece, mask = ids[:, start : start + cut], real[:, start : start + cut]
        with torch.no_grad():
            whole_mask = real[:, : start + cut].long()
            logits = model(piece, attention_mask=whole_mask, past_key_values=cache).logits
            lossless = model(piece, attention_mask=whole_mask, past_key_values=exact).logits
        expected = simulated_forward(model, piece, simulated, mask)
        assert (logits - expected)[mask].abs().max() < 1e-5
        start += cut
    assert (logits - lossless)[mask].abs().max() > 1e-3
    check_cache_of(model, cache)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_row_of_a_padded_batch_is_the_row_alone(tmp_path, static):
    model = (static_model() if static else tiered_model(tmp_path)).double()
    ids, mask = torch.randint(1, 97, (3, 90)), torch.ones(3, 90, dtype=torch.long)
    for row, pads in enumerate((17, 0, 41)):
        mask[row, :pads] = 0
    cache = model.create_kivi_cache()
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    for row, pads in enumerate((17, 0, 41)):
        own = model.create_kivi_cache()
        alone = model.generate(ids[row : row + 1, pads:], past_key_values=own, **GREEDY)
        assert torch.equal(together[row, pads:], alone[0])
        for layer, other in zip(cache.layers, own.layers, strict=True):
            found, expected = row_states(layer, row), row_states(other, 0)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    check_cache_of(model, cache)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {"dynamic": tiered_model(tmp_path_factory.mktemp("tiered")), "static": static_model()}
    torch.set_num_threads(threads)
    return made


class TestOverrides:
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_window_and_groups_keep_the_tiers(self, models, kind):
        model = models[kind]
        for settings in ({"residual_length": 9}, {"sink_length": 0}, {"group_size": 16}):
            cache = model.create_kivi_cache(**settings)
            model.generate(IDS, past_key_values=cache, **GREEDY)
            check_cache_of(model, cache)
            for layer in (cache, *cache.layers):
                assert {name: getattr(layer.scheme, name) for name in settings} == settings
            assert cache.layers[0].scheme.block_length == settings.get("group_size", 20)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("side", ["k", "v"])
    @pytest.mark.parametrize("setting", ["bits", "scheme"])
    def test_one_side_drops_its_own_tiers_only(self, models, kind, side, setting):
        model = models[kind]
        value = {"bits": 4, "scheme": {"range_method": "mse"}}[setting]
        cache = model.create_kivi_cache(**{f"{side}_{setting}": value})
        model.generate(IDS, past_key_values=cache, **GREEDY)
        default = CacheScheme(**WINDOW, **{f"{side}_{setting}": value})
        for i, layer in enumerate(cache.layers):
            mine, other = (layer.scheme.keys, layer.scheme.values)[:: 1 if side == "k" else -1]
            assert mine == (default.keys if side == "k" else default.values)
            tiers = model.config.width_tiers[f"model.layers.{i}.self_attn.{'v' if side == 'k' else 'k'}_proj"]
            assert other == replace(other, tiers=tiers) and other.static == (kind == "static")
        check_size(cache)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_both_sides(self, models, kind):
        model = models[kind]
        cache = model.create_kivi_cache(k_bits=16, v_bits=16)
        model.generate(IDS, past_key_values=cache, **GREEDY)
        assert {str(side) for x in cache.layers for side in (x.scheme.keys, x.scheme.values)} == {"16-bit"}
        assert not cache.layer_schemes
        check_size(cache)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_a_quantization_config_stands_for_all(self, models, kind):
        model = models[kind]
        how = {"backend": "QuantizedCacheLM", "nbits": 2, "residual_length": 8}
        cache = model.create_kivi_cache(quantization_config=how)
        assert not cache.layer_schemes
        model.generate(IDS, past_key_values=cache, **GREEDY)
        assert {str(x.scheme.keys) for x in cache.layers} == {"2-bit per channel in groups of 32"}
        check_size(cache)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_layer_schemes_given_by_hand_come_first(self, models, kind):
        """The layers that are not named keep the tiers that they are calibrated for."""
        model = models[kind]
        own = {1: CacheScheme(3, 3, **WINDOW)}
        cache = model.create_kivi_cache(layer_schemes=own)
        assert cache.layer_schemes == model.create_kivi_cache().layer_schemes | own
        assert cache.layer_schemes[0].keys.tiers

    def test_the_configuration_is_not_changed(self, models):
        model = models["static"]
        before = model.config.to_dict()
        model.create_kivi_cache(k_bits=4, residual_length=3)
        model.create_kivi_cache(k_scheme={"range_method": "mse"})
        assert model.config.to_dict() == before

    def test_by_hand_from_the_configuration_alone(self, models):
        """The function reads the ranks of a configuration, not its settings."""
        assert not create_kivi_cache(config=models["dynamic"].config).layer_schemes


def test_a_side_without_tiers_keeps_its_width(tmp_path):
    ranks = all_ranks(3, {"k_proj": [29], "v_proj": [20]})
    del ranks["model.layers.1.self_attn.k_proj"]
    tiers = {"model.layers.2.self_attn.k_proj": [[[9, 8], [20, 2]]]}
    model = tiny_split(
        tmp_path, ranks, k_bits=3, v_bits=4, k_scheme={"range_method": "mse"}, width_tiers=tiers, **WINDOW
    )
    cache = model.create_kivi_cache()
    model.generate(IDS, past_key_values=cache, **GREEDY)
    check_cache_of(model, cache)
    for i, layer in enumerate(cache.layers):
        assert layer.scheme.values == QuantScheme(4, "per_token", 20)
        if i < 2:
            assert layer.scheme.keys == QuantScheme(3, "per_channel", 20, range_method="mse")
    assert cache.layers[2].scheme.keys.range_method == "mse"


# ---- checkpoints


def same_scales(model, other, dtype=torch.float32) -> bool:
    pairs = zip(model.model.layers, other.model.layers, strict=True)
    return all(
        torch.equal(getattr(getattr(a.self_attn, p), name).to(dtype), getattr(getattr(b.self_attn, p), name).to(dtype))
        for a, b in pairs
        for p in ("k_proj", "v_proj")
        for name in ("latent_scale", "latent_zero_point")
    )


@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}], ids=str)
def test_a_checkpoint_brings_its_scales(tmp_path, how):
    model = static_model()
    model.save_pretrained(tmp_path)
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path, **how).eval()
    dtype = how.get("dtype", torch.float32)
    assert loaded.dtype == dtype
    assert same_scales(loaded, model, dtype)
    assert loaded.config.width_tiers == model.config.width_tiers
    assert not any(t.is_meta for t in loaded.state_dict().values())
    cache = loaded.create_kivi_cache()
    for i, layer in enumerate(loaded.model.layers):
        for side, p in (("keys", layer.self_attn.k_proj), ("values", layer.self_attn.v_proj)):
            scale, zero = cache.static_scales[i][side]
            assert scale.dtype == zero.dtype == torch.float32
            assert torch.equal(scale, p.latent_scale.float()) and torch.equal(zero, p.latent_zero_point.float())
            assert scale.count_nonzero()
    text = loaded.generate(IDS, past_key_values=cache, **GREEDY)
    check_cache_of(loaded, cache)
    if dtype == torch.float32:
        assert torch.equal(text, model.generate(IDS, **GREEDY))


def test_a_bfloat16_checkpoint_of_a_bfloat16_model(tmp_path):
    tiny_dense(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = static_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval())
    # Frequencies of RoPE in bfloat16 would turn distant tokens by whole radians.
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16 and same_scales(loaded, model)
    cache = loaded.create_kivi_cache()
    assert torch.equal(loaded.generate(IDS, past_key_values=cache, **GREEDY), model.generate(IDS, **GREEDY))
    check_cache_of(loaded, cache)


def test_a_dense_checkpoint_has_no_scales(tmp_path):
    dense = tiny_dense()
    dense.save_pretrained(tmp_path)
    static = {"orientation": "per_channel", "static": True}
    config = ALRDLlamaConfig.from_llama(dense.config, truncation_ranks=all_ranks(3, 8), k_scheme=static)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.latent_scale"):
        ALRDLlamaForCausalLM.from_pretrained(tmp_path, config=config)


def test_the_dense_model_comes_back(tmp_path):
    dense = tiny_dense()
    model = static_model(dense, k=(64,), v=(64,))
    state = model.to_dense().state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.allclose(state[name], tensor, atol=1e-5) for name, tensor in dense.state_dict().items())


# ---- rotation


@pytest.mark.parametrize("way", ["from_dense", "from_pretrained"])
@pytest.mark.parametrize(("group", "k", "v"), GROUPS[:2], ids=["joint", "pairs"])
def test_rotation_stays_inside_the_tiers(tmp_path, way, group, k, v):
    dense = tiny_dense()
    ranks = all_ranks(3, {"k_proj": list(k), "v_proj": list(v)})
    fields = {"truncation_ranks": ranks, "head_group_size": group, "width_tiers": full_tiers(ranks), **WINDOW}
    fields["k_scheme"] = {"orientation": "per_token"}
    models = []
    for rotate in (False, True):
        config = ALRDLlamaConfig.from_llama(dense.config, **fields, k_hadamard=rotate, v_hadamard=rotate)
        if way == "from_dense":
            models.append(ALRDLlamaForCausalLM.from_dense(dense, config))
        else:
            dense.save_pretrained(tmp_path)
            models.append(ALRDLlamaForCausalLM.from_pretrained(tmp_path, config=config).eval())
    plain, rotated = models
    for i, p in itertools.product(range(3), ("k_proj", "v_proj")):
        one, other = (getattr(m.model.layers[i].self_attn, p) for m in models)
        assert torch.allclose(one.dense_weight(), other.dense_weight(), atol=1e-5)
        for _, channels in tier_channels(config.width_tiers[f"model.layers.{i}.self_attn.{p}"]):
            expected = hadamard_matrix(len(channels)) @ one.BLinear.weight[channels].double()
            assert torch.allclose(other.BLinear.weight[channels].double(), expected, atol=1e-5)
    with torch.no_grad():
        found, expected = (m(IDS, use_cache=False).logits for m in (rotated, plain))
    assert torch.allclose(found, expected, atol=1e-3)
