"""The memory estimator, the generation script and the cache benchmark: small models, in process."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.files import write_json
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_widths
from scripts import benchmark_cache, common, estimate_memory, generate
from scripts.benchmark_cache import CacheBenchmarkConfig, allocated_bytes
from scripts.common import ROOT, human_bytes
from scripts.estimate_memory import EstimateConfig, layer_breakdown, layer_room
from scripts.generate import GenerateConfig
from tests.helpers import save_byte_tokenizer, tiny_blocks

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory) -> str:
    """A random dense Llama and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, bos_token_id=0, eos_token_id=None)).save_pretrained(path)
    save_byte_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def split_path(dense_path, tmp_path_factory) -> str:
    """The same model, split into two head groups of unequal rank."""
    path = tmp_path_factory.mktemp("split")
    config, _ = common.latent_config(dense_path, 10, head_group_size=1)
    config.k_bits, config.group_size = 4, 32
    config.truncation_ranks["model.layers.1.self_attn.v_proj"] = [3, 8]
    model, tokenizer = common.load_model(dense_path, config=config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# ---- estimate


@pytest.mark.parametrize(("length", "at_least"), [(4096, 11.4), (32768, 13.5)])
def test_llama_2_7b(tmp_path, length, at_least):
    LlamaConfig().save_pretrained(tmp_path)  # its defaults are those of Llama-2-7B: 32 layers of 32 heads of 128
    result = estimate_memory.main(EstimateConfig(model=str(tmp_path), dtype="float16", length=[length], rank=0.5))
    (estimate,) = result["estimates"]
    assert estimate["dense_per_token"] == 2**19
    assert estimate["dense"] == 2**19 * length
    assert estimate["ratio"] == estimate["dense"] / estimate["packed"] >= at_least


SCHEMES = [
    CacheScheme(),
    CacheScheme(k_bits=3, v_bits=4, group_size=32, residual_length=0, sink_length=0),
    CacheScheme(k_bits=16, v_bits=8, group_size=0, residual_length=7, sink_length=5),
    CacheScheme(k_bits=2, v_bits=16, group_size=48, residual_length=50),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("length", [0, 1, 4, 5, 131, 160, 300, 1111])
def test_breakdown_is_the_formula_and_the_cache(scheme, length):
    widths = ((5, 6), (33, 8))
    parts = layer_breakdown(scheme, length, widths, torch.float16)
    assert sum(parts.values()) == scheme.layer_nbytes(length, widths, torch.float16)

    cache = KIVILatentCache(scheme, [widths])
    layer = cache.layers[0]
    for piece in (length // 3, length - length // 3):
        layer.append(torch.randn(2, piece, 11).half(), torch.randn(2, piece, 41).half())
    held = [layer.pool.used * f[n].nbytes // max(len(f[n]), 1) for f in layer.pool.storage.values() for n in f]
    assert cache.nbytes_used == 2 * sum(parts.values())
    assert sum(held) == 2 * (parts["codes"] + parts["parameters"])
    assert parts["table"] == 12 * len(layer.rows[0].blocks)
    assert parts["exact"] == 2 * 52 * (layer.rows[0].sinks + layer.rows[0].window)
    assert cache.nbytes <= layer_room(scheme, length, widths, torch.float16, 2)


def test_estimate_equals_a_filled_cache(split_path):
    result = estimate_memory.main(EstimateConfig(model=split_path, length=[45, 333], batch_size=3, dtype="bfloat16"))
    config = ALRDLlamaConfig.from_pretrained(split_path)
    assert result["cache"]["k_bits"] == 4
    for estimate in result["estimates"]:
        cache = ALRDLlamaForCausalLM(config).create_kivi_cache()
        for layer, (k, v) in zip(cache.layers, config_widths(config)):
            layer.append(*(torch.randn(3, estimate["length"], sum(side)).bfloat16() for side in (k, v)))
        assert estimate["packed"] == sum(estimate["breakdown"].values()) == cache.nbytes_used
        assert estimate["allocated_at_most"] >= cache.nbytes
        assert estimate["dense"] == 2 * 2 * 2 * 16 * 2 * 3 * estimate["length"]


def test_estimate_of_one_latent_for_keys_and_values(tmp_path, capsys):
    tiny_blocks(share=0.5, layer_group_size=2, joint_kv=True, group_size=8).save_pretrained(tmp_path)
    (estimate,) = estimate_memory.main(EstimateConfig(model=str(tmp_path), length=[45]))["estimates"]
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path)
    cache = model.create_kivi_cache()
    model(torch.ones(1, 45, dtype=torch.int64), past_key_values=cache)
    assert estimate["packed"] == cache.nbytes_used
    assert "keys and values 2-bit per channel in groups of 8, residual_length" in capsys.readouterr().out
    with pytest.raises(ValueError, match="v_bits=8: must be k_bits or left out with joint_kv=True"):
        estimate_memory.main(EstimateConfig(model=str(tmp_path), v_bits=8))


def test_estimate_output(dense_path, split_path, tmp_path, capsys):
    output = tmp_path / "new" / "folder" / "estimate.json"
    result = estimate_memory.main(
        EstimateConfig(model=dense_path, rank=12, k_bits=3.0, length=[777], output=str(output))
    )
    assert json.loads(output.read_text()) == result
    assert set(result["truncation_ranks"].values()) == {12}
    assert result["dtype"] == "float32"  # what the checkpoint names
    assert result["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for text in ("rank 12", "keys 3-bit per channel", "777", human_bytes(result["estimates"][0]["packed"])):
        assert text in printed
    estimate_memory.main(EstimateConfig(model=split_path, rank=0.9))
    assert "--rank is not used: k 10, v 10–11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_bits": 7}, "k_bits=7: must be one of"),
        ({"group_size": -1}, "group_size=-1: must be an integer of at least 0"),
        ({"length": [1024, 0]}, "length=0: must be above 0"),
        ({"batch_size": 0}, "batch_size=0: must be above 0"),
        ({"rank": 0}, r"rank=0: must be a share in \(0, 1\]"),
        ({"rank": 2.5}, "rank=2.5: must be a share"),
        ({"rank": 33}, "rank=33: .* to the full rank 32"),
        ({"head_group_size": 3}, "head_group_size=3: must divide num_key_value_heads=2"),
        ({"model": "no/such/folder"}, "model='no/such/folder': must be an existing folder"),
        ({"model": "tests"}, "model='tests': must be a checkpoint folder"),
    ],
)
def test_estimate_refuses(dense_path, fields, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        estimate_memory.main(EstimateConfig(**{"model": dense_path, **fields}))


def test_split_checkpoint_keeps_its_groups(split_path):
    assert common.latent_config(split_path, 0.5, head_group_size=1)[1]
    with pytest.raises(ValueError, match="head_group_size=2: the checkpoint is stored with 1 heads per group"):
        common.latent_config(split_path, 0.5, head_group_size=2)


def test_human_bytes():
    sizes = {0: "0 B", 1023: "1023 B", 524288: "512 KiB", 3 * 2**29: "1.50 GiB", 2**44: "16 TiB", 12.25: "12.2 B"}
    assert {size: human_bytes(size) for size in sizes} == sizes


def test_write_json_keeps_the_old_record(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---- generate


def test_generate_full_rank_16_bits_is_the_dense_model(dense_path, tmp_path, capsys):
    prompt, output = tmp_path / "prompt.txt", tmp_path / "out.json"
    prompt.write_text("def f(x):\n")
    config = GenerateConfig(
        model=dense_path,
        prompt_file=str(prompt),
        max_new_tokens=40,
        rank=1.0,
        k_bits=16,
        v_bits=16,
        group_size=16,
        residual_length=8,
        compare_dense=True,
        output=str(output),
    )
    result = generate.main(config)
    assert json.loads(output.read_text()) == result
    assert result["packed"]["prompt_tokens"] == 10
    assert result["packed"]["new_tokens"] == result["dense"]["new_tokens"] == result["same_tokens"] == 40
    assert result["packed"]["text"].startswith("def f(x):\n")
    cache = result["cache"]
    assert cache["length"] == 49  # the last token is not fed back
    assert cache["dense_nbytes"] == 2 * 2 * 2 * 16 * 4 * 49
    assert cache["dense_nbytes"] < cache["nbytes_used"] < 1.02 * cache["dense_nbytes"]
    printed = capsys.readouterr().out
    assert result["packed"]["text"] in printed
    assert cache["description"] in printed


def test_generate_from_a_split_checkpoint(split_path):
    options = {"model": split_path, "prompt": "x" * 100, "max_new_tokens": 5, "do_sample": True, "residual_length": 0}
    first, second = (generate.main(GenerateConfig(**options, seed=seed)) for seed in (1, 1))
    assert first["packed"]["token_ids"] == second["packed"]["token_ids"]
    assert first["cache"]["description"].startswith(
        "KIVILatentCache(keys 4-bit per channel in groups of 32, values 2-bit per token"
    )
    config = ALRDLlamaConfig.from_pretrained(split_path)
    scheme = CacheScheme(k_bits=4, group_size=32, residual_length=0)
    expected = sum(scheme.layer_nbytes(104, layer, torch.float32) for layer in config_widths(config))
    assert first["cache"]["nbytes_used"] == expected
    with pytest.raises(ValueError, match="compare_dense=True: must be False for a checkpoint that is split"):
        generate.main(GenerateConfig(**options, compare_dense=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "prompt_file": "b"}, "prompt_file='b': must not be given together with prompt"),
        ({"prompt_file": "/no/such.txt"}, "prompt_file='/no/such.txt': must be an existing file"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be above 0"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"v_bits": 7}, "v_bits=7: must be one of"),
        ({"prompt": ""}, "prompt: must hold at least one token"),
        ({"rank": -1}, "rank=-1: must be a share"),
    ],
)
def test_generate_refuses(dense_path, fields, message):
    with pytest.raises(ValueError, match=message):
        generate.main(GenerateConfig(**{"model": dense_path, **fields}))


# ---- benchmark


def test_benchmark_quick(tmp_path):
    threads = torch.get_num_threads()
    try:
        output = tmp_path / "benchmark.json"
        result = benchmark_cache.main(CacheBenchmarkConfig(quick=True, output=str(output)))
    finally:
        torch.set_num_threads(threads)
    assert json.loads(output.read_text()) == result
    assert result["gate"] == {"passed": True, "packed_tokens_compared": 384}
    assert [r["length"] for r in result["appends"]] == [256, 512]
    for record in result["appends"]:
        for figures in (record["packed_us"], record["dense_us"]):
            assert 0 < figures["p20"] <= figures["p50"] <= figures["p80"] <= figures["max"]
    ordinary, dearest = result["decode_step_memory"]["steps"]
    assert ordinary["packed_blocks"] == ordinary["pool_growth_bytes"] == 0
    assert dearest["packed_blocks"] == 1
    assert dearest["pool_growth_bytes"] > 0
    # What stays after the step is the pool's growth and the table, which is made when it is next read.
    assert dearest["pool_growth_bytes"] - 200 < dearest["kept_bytes"] <= dearest["pool_growth_bytes"]
    for step in (ordinary, dearest):
        assert step["dense_layer_bytes"] == 2 * 4 * 32 * 2 * step["cached_tokens"]
        assert step["under_a_twentieth"] == (step["temporary_share"] < 0.05)


def test_decode_step_holds_nothing_of_the_size_of_the_context():
    """What a step allocates does not depend on the length."""
    peaks = []
    for length in (1024, 4096):
        options = CacheBenchmarkConfig(quick=True)
        options.lengths = [length]
        config = options.layer_config()
        latents = benchmark_cache.Latents(config, torch.bfloat16)
        peaks.append(benchmark_cache.measure_steps(config, options, latents)["steps"][0]["peak_bytes"])
    assert peaks[1] < 1.02 * peaks[0]


@pytest.mark.parametrize("settings", [{"k_bits": 16, "v_bits": 3}, {"group_size": 0, "k_bits": 8}, {"sink_length": 0}])
def test_gate_passes(settings):
    config = CacheBenchmarkConfig(quick=True, head_group_size=2, **settings).layer_config()
    assert benchmark_cache.check_cache(config, benchmark_cache.Latents(config, torch.float16)) == 384


@pytest.mark.parametrize("side", ["keys", "values"])
def test_red_gate_reports_nothing(monkeypatch, tmp_path, side):
    quantizer = benchmark_cache.KIVIQuantizer

    def broken(n_bits, group_size, per_channel, *how):
        return quantizer(n_bits, group_size if per_channel != (side == "keys") else 32, per_channel, *how)

    monkeypatch.setattr(benchmark_cache, "KIVIQuantizer", broken)
    output = tmp_path / "benchmark.json"
    with pytest.raises(RuntimeError, match=f"correctness gate: the packed {side} are not"):
        benchmark_cache.main(CacheBenchmarkConfig(quick=True, threads=torch.get_num_threads(), output=str(output)))
    assert not output.exists()


def test_benchmark_refuses():
    with pytest.raises(ValueError, match=r"lengths=\[1024, 1100\]: must rise by at least appends=256"):
        CacheBenchmarkConfig(lengths=[1024, 1100])
    with pytest.raises(ValueError, match="appends=100: must be at least two blocks, 256"):
        benchmark_cache.main(CacheBenchmarkConfig(lengths=[1024], appends=100, threads=torch.get_num_threads()))


def test_allocated_bytes():
    kept = {}

    def before():
        kept["old"] = torch.zeros(50_000)

    def step():
        temporary = torch.zeros(100_000)
        del temporary, kept["old"]
        kept["new"] = torch.zeros(60_000)

    assert allocated_bytes(before) == (200_000, 200_000)
    assert allocated_bytes(step) == (400_000, 40_000)


# ---- command line


@pytest.mark.parametrize(
    ("program", "config_class"),
    [
        (["scripts/estimate_memory.py"], EstimateConfig),
        (["scripts/benchmark_cache.py"], CacheBenchmarkConfig),
        (["-m", "scripts.generate"], GenerateConfig),
    ],
)
def test_help(program, config_class):
    """As a file and as a module, the help names every option and the defaults."""
    command = [sys.executable, *program, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(f"--{option}" in done.stdout for option in config_class.__dataclass_fields__)
    assert "(default: " in done.stdout


def test_a_bad_value_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["estimate_memory.py", "--v_bits", "7"])
    with pytest.raises(SystemExit, match="2"):
        common.parse_config(EstimateConfig, "What it does.")
    assert "error: v_bits=7: must be one of 1, 1.5, 1.58, 2, 3, 4, 5, 6, 8, 16 bits" in capsys.readouterr().err
