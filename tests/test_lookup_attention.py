"""Attention by table look-up and by int8 dot products against float64 arithmetic on the stored codes."""

import json
from dataclasses import replace

import pytest
import torch

from configuration_alrd_llama import QuantScheme
from modules.formats.qlutattn import QLUTATTN
from modules.kernels.attention import latent_attention
from modules.kernels.cpu import library as cpp_library
from modules.kernels.cpu import lookup as kernels
from modules.kernels.cpu.lookup import FASTER, METHODS, lookup_attention
from modules.kernels.packed import LatentQuery, PackedCache, Rope, Tile
from modules.kivi_cache import CacheScheme, KIVILatentLayer
from modules.quant_utils import unpack_and_dequantize
from scripts import benchmark_lookup
from scripts.benchmark_lookup import (
    LookupBenchmarkConfig,
    dequantizing,
    error,
    lookup_table,
    main,
    multiply,
    unpack_exactly,
)

pytestmark = pytest.mark.usefixtures("poisoned_kernels")


@pytest.fixture(params=["native", "haswell"])
def instructions(request, monkeypatch):
    """The kernel as this machine runs it, and with AVX2 only."""
    monkeypatch.setenv(cpp_library.MARCH_VARIABLE, request.param)
    cpp_library._load.cache_clear()
    yield kernels.instructions()
    cpp_library._load.cache_clear()


def expected(query, cache: PackedCache, **how) -> torch.Tensor:
    """Attention in float64 on the stored codes."""
    exact = cache if cache.keys is None else dequantizing(cache, unpack_exactly, torch.float64)
    return latent_attention(LatentQuery(query.double(), **how), exact)[0]


def plain(query, cache: PackedCache, dtype: torch.dtype, **how) -> torch.Tensor:
    """Attention in plain bfloat16 or float16."""
    tiles = {
        name: tuple(replace(t, keys=t.keys.to(dtype), values=t.values.to(dtype)) for t in getattr(cache, name))
        for name in ("before", "after")
    }
    return multiply(query.to(dtype), cache=replace(dequantizing(cache, unpack_and_dequantize, dtype), **tiles), **how)


def new_layer(keys: QuantScheme, values: QuantScheme, heads: int, size: int, value_size: int | None = None, **window):
    widths = ((size,) * heads, (value_size or size,) * heads)
    return KIVILatentLayer(CacheScheme.of(keys, values, **window), widths, backend="reference")


def arguments(heads: int, size: int, positions, value_size: int | None = None) -> dict:
    how = {"expand_keys": None, "rope": None, "scaling": size**-0.5}
    return {"positions": torch.tensor(positions), "value_widths": (value_size or size,) * heads, **how}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (4, 4), (1, 4), (4, 2)], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(instructions, bits, dtype):
    """Flat and sharp weights: both methods beside plain bfloat16, the default one beside the queries' own type."""
    layer = new_layer(QLUTATTN[f"K{bits[0]}"], QLUTATTN[f"V{bits[1]}"], 2, 128)
    layer.append(*torch.randn(2, 1, 700, 256).to(dtype))
    for sharpness in (0.3, 1, 3):
        query = (torch.randn(1, 8, 1, 128) * sharpness).to(dtype)
        how = {"cache": layer.packed(), **arguments(2, 128, [[699]])}
        exact = expected(query, **how)
        for method, low in (("lookup", torch.bfloat16), ("dot", torch.float16), (None, dtype)):
            simple = error(plain(query, **how, dtype=low), exact)
            assert 0 < error(lookup_attention(query, **how, method=method), exact) <= 2 * simple


#: Query heads, heads, channels of a key and of a value; groups of channels of the keys, tokens of a block.
SHAPES = [
    (4, 2, 80, 80, 0, 128),
    (3, 3, 128, 128, 48, 48),
    (6, 2, 20, 37, 7, 63),
    (2, 1, 4, 130, 3, 96),
    (4, 1, 256, 1, 128, 130),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_any_shape(instructions, method, shape):
    """Several rows of different length, some pads, new tokens that see each other in part, all widths."""
    heads, kv_heads, size, value_size, group, block = shape
    for k, v in ((1, 2), (2, 4), (4, 1)):
        values = QuantScheme(v, "per_channel", group_size=block, symmetric=v == 2 or None)
        layer = new_layer(
            QuantScheme(k, "per_token", group, symmetric=k == 4 or None), values, kv_heads, size, value_size,
            residual_length=5, sink_length=3,
        )  # fmt: skip
        real = torch.ones(3, 3 * block + 41, dtype=torch.bool)
        real[0, : block + 7], real[2, : real.shape[1] - 6] = False, False
        layer.append(
            torch.randn(3, real.shape[1], kv_heads * size), torch.randn(3, *real.shape[1:], kv_heads * value_size), real
        )
        layer.append(torch.randn(3, block + 9, kv_heads * size), torch.randn(3, block + 9, kv_heads * value_size))
        held = torch.tensor([row.tokens for row in layer.rows])
        assert len({len(row.blocks) for row in layer.rows}) > 1
        new = Tile(
            torch.randn(3, 1, 3, kv_heads * size), torch.randn(3, 1, 3, kv_heads * value_size),
            held[:, None].int(), torch.full((3, 1), 3, dtype=torch.int32),
        )  # fmt: skip
        how = arguments(kv_heads, size, [], value_size) | {"positions": held[:, None] + torch.arange(3)}
        query, cache = torch.randn(3, heads, 3, size), layer.packed(new)
        exact = expected(query, cache, **how)
        assert error(lookup_attention(query, cache=cache, **how, method=method), exact) < 6e-3 * exact.std().item()


@pytest.mark.parametrize("method", METHODS)
def test_queries_see_the_tokens_before_them(instructions, method):
    """Queries in the sinks, in blocks, at their edges and in the window; a crop has cut a block."""
    layer = new_layer(QLUTATTN["K2"], QLUTATTN["V2"], 2, 32, residual_length=8)
    layer.append(*torch.randn(2, 1, 560, 64))
    layer.crop(-260)
    layer.append(*torch.randn(2, 1, 250, 64))
    assert 0 < min(layer.rows[0].counts) < 128
    how = arguments(2, 32, [[0, 3, 4, 5, 131, 132, 200, 299, 300, 301, 427, 428, 500, 549, 549]])
    query, cache = torch.randn(1, 4, 15, 32), layer.packed()
    exact = expected(query, cache, **how)
    assert torch.allclose(lookup_attention(query, cache=cache, **how, method=method), exact.float(), atol=5e-3)
    first = lookup_attention(query[:, :, :1], cache=cache, **how | {"positions": torch.tensor([[0]])}, method=method)
    assert torch.allclose(first[0, :, 0].view(2, 2, 32), cache.before[0].values[0, 0, 0].view(2, 1, 32), atol=1e-6)


def test_a_query_that_sees_nothing_and_a_cache_without_blocks(instructions):
    layer = new_layer(QLUTATTN["K1"], QLUTATTN["V1"], 2, 16)
    layer.append(*torch.randn(2, 2, 100, 32))
    query, cache = torch.randn(2, 2, 2, 16), layer.packed()
    assert cache.keys is None
    how = arguments(2, 16, [[-1, 50], [99, 3]])
    result = lookup_attention(query, cache=cache, **how)
    assert torch.equal(result[0, :, 0], torch.zeros(2, 16))
    assert torch.allclose(result, expected(query, cache, **how).float(), atol=1e-5)


def test_pieces_of_the_sequence_add_up():
    """Threads split the blocks; a row's result does not depend on how."""
    layer = new_layer(QLUTATTN["K2"], QLUTATTN["V4"], 1, 64)
    layer.append(*torch.randn(2, 1, 128 * 40, 64))
    query, how = torch.randn(1, 2, 1, 64), {"cache": layer.packed(), **arguments(1, 64, [[128 * 40]])}
    one = lookup_attention(query, **how)
    torch.set_num_threads(3)
    three = lookup_attention(query, **how)
    assert not torch.equal(one, three)
    assert torch.allclose(one, three, atol=1e-6)


def test_drop_in_cache_after_rope(instructions):
    """What `update` of a drop-in cache has stored; rows that share blocks."""
    layer = KIVILatentLayer(CacheScheme.of(QLUTATTN["K4"], QLUTATTN["V2"]), backend="reference")
    layer.update(*torch.randn(2, 1, 2, 300, 64).bfloat16())
    layer.batch_repeat_interleave(3)
    layer.update(*torch.randn(2, 3, 2, 9, 64).bfloat16())
    query, how = torch.randn(3, 8, 1, 64).bfloat16(), {"cache": layer.packed(), **arguments(2, 64, [[308]] * 3)}
    exact = expected(query, **how)
    assert error(lookup_attention(query, **how), exact) <= 1e-2 * exact.std().item()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_faster_method_is_the_default(instructions, bits):
    layer = new_layer(QLUTATTN[f"K{bits}"], QLUTATTN[f"V{bits}"], 1, 64)
    layer.append(*torch.randn(2, 1, 300, 64))
    query, how = torch.randn(1, 2, 1, 64).bfloat16(), {"cache": layer.packed(), **arguments(1, 64, [[300]])}
    results = {method: lookup_attention(query, **how, method=method) for method in METHODS}
    assert not torch.equal(*results.values())
    assert torch.equal(lookup_attention(query, **how), results[FASTER[bits]])
    assert torch.equal(lookup_attention(query.float(), **how), results["dot"])


PER_TOKEN, PER_CHANNEL = QLUTATTN["K2"], QLUTATTN["V2"]


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (PER_CHANNEL, PER_CHANNEL, "keys: must be quantized per token"),
        (PER_TOKEN, PER_TOKEN, "values: must be quantized per channel, a scale for each 128 tokens"),
        (
            PER_TOKEN,
            QuantScheme(2, "per_channel", 32),
            "values: must be quantized per channel, a scale for each 128 tokens",
        ),
        (
            QuantScheme(2, "per_token", 96),
            PER_CHANNEL,
            "keys: must have groups of channels within heads of 64 channels",
        ),
        (replace(PER_TOKEN, bits=3), PER_CHANNEL, "keys: must be stored at one width of 1, 2 or 4 bits"),
        (PER_TOKEN, replace(PER_CHANNEL, bits=1.5), "values: must be stored at one width of 1, 2 or 4 bits"),
        (PER_TOKEN, QuantScheme(16), "values: must be stored at one width of 1, 2 or 4 bits"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_read_is_refused(keys, values, message):
    widths = (128,) if keys.group_size == 96 else (64, 64)
    layer = KIVILatentLayer(CacheScheme.of(keys, values), (widths, widths), backend="reference")
    layer.append(*torch.randn(2, 1, 400, 128))
    query, how = torch.randn(1, 2, 1, 64), {"cache": layer.packed(), **arguments(2, 64, [[400]])}
    with pytest.raises(ValueError, match=f"^{message}$"):
        lookup_attention(query, **how)


def test_arguments_are_refused():
    query, how = torch.randn(1, 2, 1, 4), {"cache": PackedCache(), **arguments(2, 4, [[0]])}
    for changed, message in (
        ({"rope": Rope(torch.ones(2))}, "expand_keys, rope: must be None"),
        ({"value_widths": (4, 3)}, r"value_widths=\(4, 3\): must be equal"),
        ({"method": "tables"}, "method='tables': must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            lookup_attention(query, **{**how, **changed})
    with pytest.raises(ValueError, match=r"query: must be float32, bfloat16 or float16 on the CPU, not torch\.float64"):
        lookup_attention(query.double(), **how)


# ---- the benchmark


def test_benchmark_quick(tmp_path):
    path = tmp_path / "record.json"
    record = main(LookupBenchmarkConfig(quick=True, threads=1, output=str(path)))
    assert json.loads(path.read_text()) == record
    assert [(r["length"], r["bits"]) for r in record["results"]] == [(256, 1), (256, 2), (256, 4)]
    for r in record["results"]:
        assert set(r["ms"]) == {"lookup", "dot", "dequantize"} and set(r["over_lookup"]) == {"dot", "dequantize"}
        assert all(0 < f["p20"] <= f["p50"] <= f["p80"] for f in (*r["ms"].values(), *r["over_lookup"].values()))
        assert r["error_over_bfloat16"]["dot"] < r["error_over_bfloat16"]["lookup"] < 1
        assert r["packed_bytes"] < r["dense_bytes"]
    lines = lookup_table(record).splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {9}


def test_red_gate_reports_nothing(monkeypatch, tmp_path):
    wrong = lambda query, **how: torch.zeros_like(query)  # noqa: E731
    monkeypatch.setattr(benchmark_lookup, "lookup_attention", wrong)
    with pytest.raises(RuntimeError, match=r"correctness gate: lookup: .* above 2; no figures"):
        main(LookupBenchmarkConfig(quick=True, output=str(tmp_path / "record.json")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": [3]}, "bits=3: must be 1, 2 or 4"),
        ({"lengths": [100]}, r"lengths=\[100\]: must be multiples of 128"),
        ({"kv_heads": 5}, "heads=32: must be a multiple of kv_heads=5"),
        ({"rounds": 1}, "rounds"),
    ],
)
def test_benchmark_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        LookupBenchmarkConfig(**fields)
