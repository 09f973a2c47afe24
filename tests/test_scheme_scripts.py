"""The scripts that compare quantization schemes, on little text."""

import json
from types import SimpleNamespace

import pytest
import torch

from configuration_alrd_llama import QuantScheme
from modules.kivi_cache import create_kivi_cache
from scripts import ablate_calibration, compare_schemes, measure_distortion
from scripts.ablate_calibration import AblationConfig
from scripts.benchmark_quantize import QuantizeBenchmarkConfig
from scripts.benchmark_quantize import main as benchmark
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model
from scripts.compare_schemes import ROTATIONS, CompareConfig
from scripts.measure_distortion import DistortionConfig, distortion


def test_distortion_of_every_scheme(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure_distortion, "latents", lambda config: {})
    output = tmp_path / "distortion.json"
    record = measure_distortion.main(DistortionConfig(tokens=256, channels=32, output=str(output)))
    assert json.loads(output.read_text()) == record
    assert {row["scheme"]["bits"] for row in record["rows"]} == {1, 1.5, 1.58, 2, 3, 4, 8}
    by_scheme = {QuantScheme(**row["scheme"]): row for row in record["rows"]}
    assert len(by_scheme) == len(record["rows"])
    two, ternary = by_scheme[QuantScheme()], by_scheme[QuantScheme(1.58)]
    clipped = by_scheme[QuantScheme(range_method="mse")]
    assert two["bits_per_element"] == clipped["bits_per_element"] == 2.25
    assert clipped["distortion"]["Gaussian"] < 0.8 * two["distortion"]["Gaussian"]
    assert ternary["distortion"]["Gaussian"] < two["distortion"]["Gaussian"]
    assert "| 1.58-bit per channel in groups of 128 | 1.875 | 0.189 |" in capsys.readouterr().out


def test_distortion_is_the_error_over_the_variance_of_each_channel():
    x = torch.randn(3, 128, 8) * torch.arange(1, 9) + 100 * torch.arange(8)
    found, bits = distortion(QuantScheme(8, static=True), [x])
    flat = x.flatten(0, 1).double()
    step = (flat.amax(0) - flat.amin(0)) / 255
    assert bits == 8
    assert found == pytest.approx((step.square().sum() / 12 / flat.var(0, correction=0).sum()).item(), rel=0.1)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two schemes and one drop-in cache on one window, measured once."""
    output = tmp_path_factory.mktemp("compare") / "schemes.json"
    small = {"windows": 1, "length": 1400, "prefill": 1380, "chunk": 10}
    # The `seeded` fixture of a test comes later: two threads on a busy core wait for each other.
    torch.set_num_threads(1)
    statistics = str(tmp_path_factory.mktemp("statistics"))
    calibration = calibrate_model(
        CalibrationConfig(
            share=0.5,
            objective="query_output",
            windows=2,
            length=256,
            statistics=statistics,
            text="stdlib:calibration",
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_schemes, "calibrate_model", lambda config: calibration)
        patch.setattr(compare_schemes, "SCHEMES", {n: compare_schemes.SCHEMES[n] for n in ("2", "4")})
        patch.setattr(compare_schemes, "drop_in_caches", lambda *_: {"4": lambda: create_kivi_cache(4, 4)})
        patch.setattr(compare_schemes, "ROTATIONS", {"both": (True, True)})
        record = compare_schemes.main(CompareConfig(**small, output=str(output)))
        with pytest.raises(ValueError, match="holds results of other options"):
            compare_schemes.main(CompareConfig(**{**small, "chunk": 5}, output=str(output)))
        patch.setattr(compare_schemes, "measure", lambda *_: pytest.fail("measured again"))
        assert compare_schemes.main(CompareConfig(**small, output=str(output))) == record
    return record


def test_schemes_are_measured_once_and_on_the_same_tokens(compared):
    both, drop_in = compared["results"]["both"], compared["results"]["drop-in"]
    assert list(both) == ["dense", "16", "2", "4"] and list(drop_in) == ["dense", "4"]
    assert len({r["tokens"] for r in (*both.values(), *drop_in.values())}) == 1
    assert both["2"]["kl_mean"] > both["4"]["kl_mean"] > both["16"]["kl_mean"] > 0
    assert both["2"]["bits_per_element"]["keys"] == 2.25
    assert compared["settings"]["both"]["4"]["k_bits"] == 4


def test_all_rotations_of_the_table():
    assert set(ROTATIONS.values()) == {(a, b) for a in (True, False) for b in (True, False)}


def test_benchmark_of_quantization(tmp_path, capsys):
    record = benchmark(
        QuantizeBenchmarkConfig(quick=True, device="cpu", bits=[1.58, 4], output=str(tmp_path / "b.json"))
    )
    assert record["gate"]["passed"] and len(record["results"]) == 12
    assert all(r["pack"]["states_gb_per_s"] > 0 and "target_gb_per_s" in r for r in record["results"])
    assert "target of packing on a CPU, 10 GB/s" in capsys.readouterr().out


def test_the_ablation_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Its record and table; the calibrations and the figures are made up."""
    calls = []

    def fit_budget(config, calibration, budget):
        if budget < 0.1:
            raise ValueError("budget: too small")
        return SimpleNamespace(split=lambda: torch.nn.Linear(1, 1))

    def measure(evaluation, tokenizer, dense, caches, others):
        calls.append(list(caches))
        assert others is None
        result = {"perplexity_increase": 0.1, "kl_mean": 0.2, "tokens": 100}
        results = {name: dict(result) for name in ("dense", *caches)}
        return {"results": results, "environment": {}, "text": {}, "dtype": "float32"}

    monkeypatch.setattr(ablate_calibration, "calibrate_model", lambda config: SimpleNamespace(tokenizer=None))
    monkeypatch.setattr(ablate_calibration, "fit_budget", fit_budget)
    monkeypatch.setattr(ablate_calibration, "measure", measure)
    monkeypatch.setattr(torch.nn.Linear, "create_kivi_cache", None, raising=False)
    output = str(tmp_path / "ablation.json")
    only = ["default", "objective: input"]
    ablate_calibration.main(AblationConfig(only=only[:1], output=output))
    record = ablate_calibration.main(AblationConfig(only=only, budgets=[0.5, 0.125, 0.05], output=output))
    assert calls == [["0.125"], ["0.5"], ["0.5", "0.125"]]
    assert json.loads((tmp_path / "ablation.json").read_text()) == record
    assert (
        "| objective: input |  |  | +10.00% | 0.2000 | does not fit |  | +10.00% | 0.2000 |" in capsys.readouterr().out
    )
    assert record["results"]["default"]["0.05"] == {"impossible": "budget: too small"}
    with pytest.raises(ValueError, match=r"holds results of other options \(windows\); name another file"):
        ablate_calibration.main(AblationConfig(windows=3, output=output))
    with pytest.raises(ValueError, match=r"only=\['layers: 1'\]: must be among default, objective: weight"):
        AblationConfig(only=["layers: 1"])


def test_the_ablation_of_blocks(tmp_path, monkeypatch, capsys):
    """Each variant differs from the blocks of `make real` in what it names; all are scored on the same tokens."""
    asked, schemes = [], []

    def calibrate_model(config):
        asked.append(config)
        return SimpleNamespace(tokenizer=None)

    def measure(evaluation, tokenizer, dense, caches, others):
        schemes.append({(scheme.group_size, scheme.residual_length) for scheme in others})
        result = {"perplexity_increase": 0.1, "kl_mean": 0.2, "tokens": 100}
        result["domains"] = {"a": {"kl_mean": 0.1}, "b": {"kl_mean": 0.3}}
        results = {name: dict(result) for name in ("dense", *caches)}
        return {"results": results, "environment": {}, "text": {}, "dtype": "float32"}

    monkeypatch.setattr(ablate_calibration, "calibrate_model", calibrate_model)
    fitted = SimpleNamespace(split=lambda: torch.nn.Linear(1, 1))
    monkeypatch.setattr(ablate_calibration, "fit_budget", lambda *how: fitted)
    monkeypatch.setattr(ablate_calibration, "measure", measure)
    monkeypatch.setattr(torch.nn.Linear, "create_kivi_cache", None, raising=False)
    options = {"blocks": True, "budgets": [0.125], "text": ["stdlib:test", "stdlib:selection"]}
    options["calibration_text"] = ["mixture"]
    record = ablate_calibration.main(AblationConfig(**options, output=str(tmp_path / "ablation.json")))
    assert len(asked) == len(record["results"]) == len(ablate_calibration.BLOCK_VARIANTS)
    default = asked[0]
    assert (default.layer_group_size, default.joint_kv, default.code, default.keep_dense) == (3, True, "trellis", True)
    for config in asked[1:]:
        assert config != default
    # The window of every variant is no longer than that of the schemes, so that each could score the same tokens.
    longest = max(config.residual_length or 16 for config in asked)
    assert all(found == {(length, longest) for length in (32, 64, 128)} for found in schemes)
    shown = capsys.readouterr().out
    assert "KL mean (worst text) |" in shown and "| layers: 5 | +10.00% | 0.2000 (0.3000) |" in shown
