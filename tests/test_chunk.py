"""Attention of many new tokens to a packed cache, beside the reference in float64."""

import copy

import pytest
import torch

from configuration_alrd_llama import QuantScheme
from modules.kernels import chunk, get_backend
from modules.kernels.attention import Attended
from modules.kernels.chunk import chunk_attention
from modules.kernels.cpu.fold import Folded, folds
from modules.svd_linear import ALinear
from scripts import benchmark_chunk
from scripts.benchmark_chunk import Allocations, ChunkBenchmarkConfig
from tests.helpers import attend, save_byte_tokenizer, tiny_blocks, tiny_dense
from tests.test_attention_cpu import Step, distance, exact, log_distance, make_step, plain, side

SIZE = 16


@pytest.fixture(autouse=True)
def setup(monkeypatch):
    torch.manual_seed(0)
    # Small tiles, so that texts of a few hundred tokens have several.
    monkeypatch.setattr(chunk, "TILE", 96)


def values_of(step: Step, heads: int, bias: bool = False) -> ALinear:
    widths = step.arguments["value_widths"]
    expand = ALinear(widths, heads * SIZE, heads, bias).requires_grad_(False)
    for i, rank in enumerate(widths):
        rows = slice(i * heads * SIZE // len(widths), (i + 1) * heads * SIZE // len(widths))
        expand.weight[rows] = torch.randn(expand.weight[rows].shape) / rank**0.5
        expand.weight[rows, rank:] = 0
    if bias:
        expand.bias.copy_(torch.randn(heads * SIZE))
    return expand.to(step.arguments["query"].dtype)


def expanded(summed: torch.Tensor, expand: ALinear | None) -> torch.Tensor:
    if expand is None:
        return summed
    return copy.deepcopy(expand).double()(summed.double(), per_head=True)


def check(step: Step, expand: ALinear | None, folded=None) -> Attended:
    """Within rounding of the reference in float64; in half precision at most twice as far from it as PyTorch is."""
    found = attend(chunk_attention, expand, folded, **step.arguments)
    reference = exact(step)
    expected = expanded(reference.summed, expand)
    # Queries that see nothing: the reference expands zeros to the bias.
    sees = (reference.log_sum > -torch.inf)[..., None]
    error = distance(found.summed.where(sees, 0.0), expected.where(sees, 0.0))
    if step.arguments["query"].dtype == torch.float32:
        assert error < 1e-5
        assert log_distance(found.log_sum, reference.log_sum) < 1e-5
    else:
        other = plain(step)
        if expand is not None:
            other = expand(other, per_head=True)
        assert error <= 2 * distance(other.where(sees, 0.0), expected.where(sees, 0.0))
    assert found.summed.dtype == torch.float32 and (found.summed.where(~sees, 0.0) == 0).all()
    return found


CASES = {
    "several tiles": {"tokens": (500,), "new": 40},
    "more queries than a tile": {"tokens": (300,), "new": 230},
    "no packed block": {"tokens": (15,), "new": 150},
    "rows of different lengths": {"tokens": (400, 90, 3), "new": 33},
    "pads": {"tokens": (300, 120), "new": 50, "real": torch.tensor([[True] * 50, [False, True] * 20 + [True] * 10])},
    "a row of pads": {"tokens": (300, 120), "new": 20, "real": torch.tensor([[True] * 20, [False] * 20])},
    "crop": {"tokens": (333,), "new": 40, "edit": lambda layer: layer.crop(-77)},
    "no sinks, no window": {"tokens": (320,), "new": 40, "sinks": 0, "residual": 0},
    "a latent of both heads": {"tokens": (300,), "new": 40, "ranks": ((24,), (20,))},
    "ranks that differ": {"tokens": (300,), "new": 40, "ranks": ((12, 7), (3, 12))},
    "no RoPE": {"tokens": (300,), "new": 40, "rope": None},
    "bias": {"tokens": (300,), "new": 40, "bias": True},
    "heads of their own": {"tokens": (300,), "new": 40, "heads": (2, 2)},
    "per token": {"tokens": (300,), "new": 40, "keys": side(4, "per_token"), "values": side(3, "per_token")},
    "tiers": {
        "tokens": (300,),
        "new": 40,
        "keys": QuantScheme(2, "per_channel", 32, tiers=(((4, 8), (8, 2)), ((12, 3),))),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name, dtype):
    case = CASES[name]
    step = make_step(size=SIZE, dtype=dtype, **case)
    check(step, values_of(step, step.arguments["expand_keys"].num_heads, case.get("bias", False)))


@pytest.mark.skipif(not folds(), reason="the processor multiplies no bfloat16")
@pytest.mark.parametrize("window", [None, 1, 64, 250])
@pytest.mark.parametrize("name", CASES)
def test_folded_by_the_kernel(name, window):
    case = CASES[name]
    step = make_step(size=SIZE, dtype=torch.bfloat16, **case).but(sliding_window=window)
    expand = values_of(step, step.arguments["expand_keys"].num_heads, case.get("bias", False))
    found = check(step, expand, Folded)
    assert log_distance(found.log_sum, exact(step).log_sum) < 0.02


@pytest.mark.parametrize("window", [1, 20, 64, 250, 10_000])
@pytest.mark.parametrize("tokens", [(300,), (280, 31)])
def test_within_a_window(tokens, window):
    step = make_step(size=SIZE, dtype=torch.float32, tokens=tokens, new=70).but(sliding_window=window)
    check(step, values_of(step, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_keys_and_values(dtype):
    check(make_step(size=SIZE, dtype=dtype, tokens=(300, 77), new=60, dense=True, ranks=((), (SIZE, SIZE))), None)


def test_without_the_flash_kernel(monkeypatch):
    """What other devices run."""
    step = make_step(size=SIZE, dtype=torch.float32, tokens=(300, 77), new=130)
    expand = values_of(step, 2)
    flash = attend(chunk_attention, expand, **step.arguments)
    monkeypatch.setattr(chunk, "_FLASH", {})
    found = check(step, expand)
    assert torch.allclose(found.summed, flash.summed, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_is_not_finite_shows(dtype):
    step = make_step(size=SIZE, dtype=dtype, tokens=(500,), new=40)
    query = step.arguments["query"].clone()
    query[:, 0, 3] = torch.nan
    found = attend(chunk_attention, values_of(step, 2), **step.but(query=query).arguments)
    assert found.summed[:, 0, 3].isnan().all()
    found.summed[:, 0, 3] = 0
    assert found.summed.isfinite().all()


def largest_tensor(tokens: int) -> int:
    """Bytes of the largest tensor that attention to so many tokens makes."""
    step = make_step(
        size=64, heads=(4, 4), dtype=torch.bfloat16, tokens=(tokens,), new=100, ranks=((128,), (128,)),
        keys=side(2, group_size=128), values=side(2, "per_token"),
    )  # fmt: skip
    expand = ALinear((128,), 4 * 64, 4, False).to(torch.bfloat16).requires_grad_(False)
    with Allocations() as allocations:
        attend(chunk_attention, expand, **step.arguments)
    return allocations.largest


def test_nothing_of_the_size_of_the_context_is_made():
    tokens = 16_384
    dense = 2 * 2 * 4 * 64 * tokens
    assert 0 < largest_tensor(tokens) == largest_tensor(tokens // 8) <= dense / 20


def test_who_asks_for_it(monkeypatch):
    """Steps of more tokens than the kernels take; with weights, and with gradients, the reference."""
    backend, flash = get_backend(None, torch.device("cpu")), chunk._FLASH["cpu"]
    calls = []
    monkeypatch.setitem(chunk._FLASH, "cpu", lambda *states, **how: calls.append(1) or flash(*states, **how))
    for new, flashed in ((16, False), (17, True)):
        step = make_step(size=SIZE, dtype=torch.float32, tokens=(300,), new=new)
        expand = values_of(step, 2)
        calls.clear()
        found = attend(backend.attend_values, expand, **step.arguments)
        assert bool(calls) == flashed
        weighted = attend(backend.attend_values, expand, 300 + new, **step.arguments)
        assert weighted.weights.shape[-1] == 300 + new
        assert torch.allclose(found.summed, weighted.summed.float(), atol=1e-5)
    step.arguments["query"].requires_grad_()
    attend(backend.attend_values, expand, **step.arguments).summed.sum().backward()
    assert step.arguments["query"].grad.abs().sum() > 0
    step.arguments["query"].requires_grad_(False)
    expand.requires_grad_(True)
    calls.clear()
    attend(backend.attend_values, expand, **step.arguments).summed.sum().backward()
    assert expand.weight.grad.abs().sum() > 0 and not calls


def test_the_benchmark(tmp_path, capsys, monkeypatch):
    dense = tiny_dense(num_key_value_heads=2, vocab_size=257)
    dense.save_pretrained(tmp_path / "dense")
    tiny_blocks(dense, share=0.5, layer_group_size=2, joint_kv=True).save_pretrained(tmp_path / "blocks")
    for name in ("dense", "blocks"):
        save_byte_tokenizer(tmp_path / name)
    options = {"model": str(tmp_path / "dense"), "checkpoints": [str(tmp_path / "blocks")], "dtype": "bfloat16"}
    options |= {"lengths": [300], "chunk": 40, "rounds": 2, "threads": 1, "output": str(tmp_path / "chunk.json")}
    record = benchmark_chunk.main(ChunkBenchmarkConfig(**options))
    case = record["cases"]["blocks, 300 + 40"]
    assert case["errors"]["ours"] < 0.02 and case["largest_tensor"] > 0 and case["over_tiles"]["p50"] > 0
    assert "| blocks | 300 + 40 |" in capsys.readouterr().out
    monkeypatch.setattr(benchmark_chunk, "measure_case", None)
    assert benchmark_chunk.main(ChunkBenchmarkConfig(**options)) == record
    monkeypatch.undo()
    monkeypatch.setattr(benchmark_chunk, "GATE", -1.0)
    with pytest.raises(RuntimeError, match="correctness gate: errors of blocks"):
        benchmark_chunk.main(ChunkBenchmarkConfig(**options | {"output": None}))
