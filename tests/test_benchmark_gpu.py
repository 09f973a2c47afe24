"""The benchmark of a lent GPU, tried out on a CPU: its rows, its gates, what it does when time or a row fails it."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from configuration_alrd_llama import Projection
from scripts import benchmark_decode, benchmark_gpu, results_tables
from scripts.benchmark_attention import LatentLayer
from scripts.benchmark_gpu import WAYS, GpuBenchmarkConfig, check_tokens, rows
from scripts.common import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


def options(**fields) -> GpuBenchmarkConfig:
    return GpuBenchmarkConfig(**{"quick": True, "device": "cpu", "threads": 1, **fields})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[GpuBenchmarkConfig, dict]:
    asked = options(output=str(tmp_path_factory.mktemp("gpu") / "record.json"))
    return asked, benchmark_gpu.main(asked)


@pytest.fixture
def measured_rows(monkeypatch) -> list[str]:
    """Rows that are made up and measured at once; those that were asked for."""
    asked_for = []

    def quickly(options):
        for row in rows(options):
            yield row._replace(measure=lambda name=row.name: asked_for.append(name) or {"kind": "made up"})

    monkeypatch.setattr(benchmark_gpu, "rows", quickly)
    return asked_for


def test_the_record_is_complete(run):
    asked, record = run
    with open(asked.output) as file:
        assert json.load(file) == record
    assert record["key"]["device"] == record["environment"]["device"] == "cpu"
    cases = record["cases"]
    models = [f"model, 192, {way}" for way in ("ours", "ours, eager", "ours, tiers", "DynamicCache", "StaticCache")]
    layers = ["attention, 512x1", "attention, 512x2"]
    assert list(cases) == [models[0], *layers, *models[1:4], "append, 512x2", "pack", models[4]]
    for name in layers:
        case = cases[name]
        assert case["rank"] == 0.5 and case["bits"] == 2 and case["gate"]["ratio"] <= 2
        assert case["peers"]["by hand"]["speedup"] > 0 and case["machine"]["bytes_per_s"] > 0
    for name in models:
        case = cases[name]
        assert case["new_tokens"] == [2, 6] and case["first_call_s"] > 0
        assert 0 < case["first_token"]["p20"] <= case["first_token"]["p80"] and "p50" in case["step"]
        assert ("gate" in case) == ("ours" in name) and ("equal_tokens" in case) == name.endswith("ours")
    assert cases[models[0]]["equal_tokens"] == 6 and cases[models[0]]["gate"]["ratio"] <= 2
    append = cases["append, 512x2"]
    for cache in ("growing", "fixed capacity"):
        assert append[cache]["tokens"] == 128 and append[cache]["blocks_packed"] == 1
        assert 0 < append[cache]["host_p50_s"] <= append[cache]["max_s"]
    pack = cases["pack"]
    assert [r["name"][:1] for r in pack["results"]] == ["2", "2", "4", "4"] and pack["copy"]["gb_per_s"] > 0


def test_rows_are_not_measured_again(run, tmp_path, measured_rows):
    asked, record = run
    output = tmp_path / "part.json"
    held = dict(list(record["cases"].items())[:-2])
    output.write_text(json.dumps(record | {"cases": held}))
    again = benchmark_gpu.main(replace(asked, output=str(output)))
    assert measured_rows == list(record["cases"])[-2:] == ["pack", "model, 192, StaticCache"]
    assert again["cases"].keys() == record["cases"].keys()
    assert {name: again["cases"][name] for name in held} == held


@pytest.mark.parametrize("field", ["device", "torch", "triton", "commit", "seed"])
def test_rows_of_another_machine_commit_or_seed_are_refused(run, tmp_path, field):
    asked, record = run
    output = tmp_path / "other.json"
    output.write_text(json.dumps(record | {"key": record["key"] | {field: "another"}}))
    with pytest.raises(
        ValueError, match=rf"other\.json'?: holds cases of other options \({field}\); name another file"
    ):
        benchmark_gpu.main(replace(asked, output=str(output)))


def test_no_row_begins_that_the_budget_does_not_hold(tmp_path, measured_rows, capsys):
    asked = options(output=str(tmp_path / "record.json"), budget_s=25)
    asked.quick = False  # whose rows have their real needs
    record = benchmark_gpu.main(asked)
    assert measured_rows == list(record["cases"])
    assert measured_rows == [
        "attention, 512x1",
        "attention, 512x2",
        "model, 192, DynamicCache",
        "append, 512x2",
        "pack",
    ]
    said = "not measured: model, 192, ours; model, 192, ours, eager; model, 192, ours, tiers; model, 192, StaticCache"
    assert f"budget_s=25: reached; {said}" in capsys.readouterr().out


def test_each_row_is_written_when_it_is_done_and_a_failed_one_stops_no_other(tmp_path, monkeypatch, capsys):
    output, found = tmp_path / "record.json", []

    def measure(name: str) -> dict:
        found.append(list(json.loads(output.read_text())["cases"]) if output.exists() else [])
        if name == "b":
            raise RuntimeError("correctness gate: red")
        return {"kind": "made up"}

    made_up = [benchmark_gpu.Row(name, 0, lambda name=name: measure(name)) for name in "abc"]
    monkeypatch.setattr(benchmark_gpu, "rows", lambda options: made_up)
    with pytest.raises(RuntimeError, match="no figures of b: see above"):
        benchmark_gpu.main(options(output=str(output)))
    assert found == [[], ["a"], ["a"]] and list(json.loads(output.read_text())["cases"]) == ["a", "c"]
    assert "correctness gate: red" in capsys.readouterr().err


# ---- gates


def test_the_gate_of_generate():
    """The second token may be another one where two logits are as good as equal, and nowhere else."""
    eager, other = torch.tensor([3, 1, 0]), torch.tensor([3, 2, 2])
    eps = torch.finfo(torch.bfloat16).eps
    logits = torch.full((3, 1, 4), -1.0)
    logits[0, 0, 3] = logits[2, 0, 0] = 8.0
    logits[1, 0, 1:3] = torch.tensor([8.0, 8 - 16 * eps])
    assert check_tokens(eager, eager, tuple(logits), eps) == 3
    assert check_tokens(other, eager, tuple(logits), eps) == 1
    for worse in (8 - 17 * eps, torch.nan):
        logits[1, 0, 2] = worse
        with pytest.raises(RuntimeError, match=r"token 1 of generate\(\) is not that of eager steps.*no figures"):
            check_tokens(other, eager, tuple(logits), eps)


def test_a_model_that_generates_something_else_has_no_row(monkeypatch):
    generate = benchmark_gpu.Models.generate

    def wrong(self, *args, **how):
        generated = generate(self, *args, **how)
        return generated if "output_logits" in how else generated.roll(1, 1)

    monkeypatch.setattr(benchmark_gpu.Models, "generate", wrong)
    with pytest.raises(RuntimeError, match=r"token 0 of generate\(\) is not that of eager steps"):
        benchmark_gpu.Models(options()).measure("ours", 64)


def test_the_compilers_find_nothing_and_leave_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    with benchmark_gpu.empty_compiler_caches():
        places = [Path(os.environ[name]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
        assert not any(place.exists() for place in places) and Path(triton.knobs.cache.dir) == places[0]
        places[0].mkdir()
    assert not places[0].parent.exists() and triton.knobs.cache.dir == "before"


def test_a_machine_without_the_device_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda': this machine has none; --quick --device cpu tries"):
        benchmark_gpu.main(GpuBenchmarkConfig())


@pytest.mark.parametrize("way", WAYS)
def test_only_rows_of_ours_need_the_gate_of_our_attention(way, monkeypatch):
    def red(subject):
        raise RuntimeError("correctness gate: red")

    monkeypatch.setattr(benchmark_decode, "check", red)
    if way.startswith("ours"):
        with pytest.raises(RuntimeError, match="gate: red"):
            benchmark_gpu.Models(options()).measure(way, 64)
    else:
        assert benchmark_gpu.Models(options()).measure(way, 64)["way"] == way


def test_appends_that_store_something_else_have_no_row(monkeypatch):
    stored = LatentLayer.stored

    def other(self, row):
        keys, values = stored(self, row)
        return keys, values + float(self.cache.capacity is not None)

    monkeypatch.setattr(LatentLayer, "check", lambda self: {})
    monkeypatch.setattr(LatentLayer, "stored", other)
    with pytest.raises(RuntimeError, match="a fixed capacity stores other bits than a growing cache"):
        benchmark_gpu.measure_append(options())


def test_generate_makes_as_many_tokens_as_are_asked_for():
    models = benchmark_gpu.Models(options())
    for way, (which, how, _) in WAYS.items():
        for tokens in (1, 2, 6):
            ids = models.generate(models.model(which), 64, tokens, **how)
            assert ids.shape == (1, 64 + tokens), way


def test_the_models_are_those_of_llama_3_8b():
    """Eight layers of 218 M parameters, embedding and head; shapes only, nothing is allocated."""
    subject = GpuBenchmarkConfig(device="meta").subject()
    layer, table = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096, 128256 * 4096
    assert subject.dense.num_parameters() == 8 * layer + 2 * table + 4096
    assert subject.latent.num_parameters() < subject.dense.num_parameters()
    assert subject.latent.config.group_ranks(Projection(7, "k")) == (64,) * 8
    assert subject.dense.config.max_position_embeddings >= 32768 + 144


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ["4096"]}, "sizes='4096': must be tokens x rows, like 4096x1"),
        ({"append": "ax1"}, "append='ax1': must be tokens x rows"),
        ({"new_tokens": [16, 16]}, r"new_tokens=\[16, 16\]: must be two rising numbers above 1"),
        ({"budget_s": 0}, "budget_s=0: must be above 0"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        GpuBenchmarkConfig(**fields)


def test_make_gpu_needs_no_venv(tmp_path):
    """The tests come first; the benchmark gets what they have left of the time."""
    command = ["make", "-n", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "gpu", "PYTHON=its_python"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert plain.index("its_python -m pytest -q -m gpu") < plain.index("its_python scripts/benchmark_gpu.py --budget_s")
    assert "--output scripts/results/benchmark_gpu.json" in plain and ".venv" not in plain
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert ".venv/bin/python -m pytest -q -m gpu" in subprocess.run(command, capture_output=True, text=True).stdout


# ---- tables


def test_the_table_of_made_up_figures():
    """No figure here was measured."""
    spread = {"p20": 0.9e-3, "p50": 1e-3, "p80": 1.1e-3}
    rounds = {"p20": 2.4, "p50": 2.5, "p80": 2.6}
    peer = {"ours_seconds": spread, "seconds": spread, "speedup": 2.5, "speedup_rounds": rounds}
    model = {"kind": "model", "step": spread, "first_token": spread, "first_call_s": 12.34}
    times = {"p50_s": 1e-5, "mean_s": 2e-5, "host_p50_s": 3e-5}
    cases = {
        "attention": {"kind": "attention", "length": 65536, "batch": 8, "peers": {"flash": peer}},
        "late": model | {"context": 32768, "way": "ours"},
        "static": model | {"context": 4096, "way": "StaticCache"},
        "ours": model | {"context": 4096, "way": "ours"},
        "append": {"kind": "append", "length": 65536, "batch": 1, "growing": times, "fixed capacity": times},
        "pack": {
            "kind": "pack",
            "copy": {"gb_per_s": 4000.0},
            "results": [{"name": "2-bit", "pack": {"gb_per_s": 2000.0}}],
        },
    }
    environment = {"device": "made-up GPU", "python": "3", "torch": "2", "triton": "3", "transformers": "5"}
    config = {"new_tokens": [16, 144], "rank": 0.5, "bits": 2, "dtype": "bfloat16"}
    text = results_tables.gpu({"cases": cases, "environment": environment, "config": config})
    assert [line for line in text.splitlines() if line.startswith("|") and "---" not in line] == [
        "| attention, tokens × rows | ours, µs | peer, µs | times faster |",
        "| 65,536 × 8 | 1,000 [900–1,100] | flash: 1,000 [900–1,100] | 2.50× [2.40–2.60] |",
        "| prompt | `generate` with | ms per step | first token, ms | first call, s |",
        "| 4,096 | ours | 1.00 [0.90–1.10] | 1.00 [0.90–1.10] | 12.3 |",
        "| 4,096 | StaticCache | 1.00 [0.90–1.10] | 1.00 [0.90–1.10] | 12.3 |",
        "| 32,768 | ours | 1.00 [0.90–1.10] | 1.00 [0.90–1.10] | 12.3 |",
        "| append, tokens × rows | cache | median, µs | mean, packing in it, µs | host, µs |",
        "| 65,536 × 1 | growing | 10 | 20 | 30 |",
        "| 65,536 × 1 | fixed capacity | 10 | 20 | 30 |",
        "| quantize and pack | GB/s | of a copy |",
        "| 2-bit | 2,000 | 0.50 |",
    ]
    assert "over 128. In brackets: 20th and 80th percentile. made-up GPU, bfloat16" in text
