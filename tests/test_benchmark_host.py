"""The benchmark of the host's time: that nothing is launched, that all is prepared, and that nothing stays replaced."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modules.kernels import get_backend
from modules.kernels.triton import append as append_triton
from modules.kernels.triton import attention as attention_triton
from modules.kernels.triton import quantize as quantize_triton
from scripts import benchmark_host
from scripts.benchmark_host import HostBenchmarkConfig, NoLaunch
from scripts.common import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_record_is_complete_and_nothing_stays_replaced(tmp_path):
    modules = (quantize_triton, attention_triton, append_triton)
    before = [dict(vars(module)) for module in modules]
    output = tmp_path / "host.json"
    record = benchmark_host.main(HostBenchmarkConfig(quick=True, output=str(output)))
    assert json.loads(output.read_text()) == record
    assert [dict(vars(module)) for module in modules] == before
    (case,) = record["cases"]
    assert set(case["contenders"]) == {"dense", "growing, prepared", "fixed, prepared"}
    assert set(case["launches_per_step"]) == {"growing, prepared", "fixed, prepared"}
    assert all(count >= 2 for count in case["launches_per_step"].values())
    for contender in case["contenders"].values():
        assert 0 < contender["seconds"]["p20"] <= contender["seconds"]["p50"] <= contender["seconds"]["p80"]
    assert case["contenders"]["dense"]["over_dense"] == {"p20": 1, "p50": 1, "p80": 1}
    assert benchmark_host.host_table(record).count("| 64 × 1 |") == 3


def test_kernels_that_are_left_out_do_nothing():
    states = torch.full((1, 128, 16), torch.nan)
    with benchmark_host.without_launches(launcher=False):
        backend, before = get_backend("triton", torch.device("cpu")), NoLaunch.launches
        backend.quantize_and_pack(states, 2)
    assert NoLaunch.launches == before + 1
    with pytest.raises(ValueError, match="values to quantize must be finite"):
        backend.quantize_and_pack(states, 2)


def test_the_gate_sees_that_the_kernels_are_not_reached(monkeypatch):
    monkeypatch.setattr(NoLaunch, "_skip", staticmethod(lambda **arguments: None))
    with pytest.raises(RuntimeError, match="gate: 0 launches of 2 layers in growing, prepared; no figures"):
        benchmark_host.main(HostBenchmarkConfig(quick=True))


def test_launches_go_through_tritons_launcher(tmp_path):
    """In a process of its own: here the kernels are those of the interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = tmp_path / "host.json"
    sizes = ["--contexts", "64", "--batches", "1", "--layers", "1", "--steps", "2", "--rounds", "2"]
    command = [sys.executable, "scripts/benchmark_host.py", *sizes, "--output", str(output)]
    subprocess.run(command, cwd=ROOT, env=variables | {"PYTHONPATH": "."}, check=True, capture_output=True)
    (case,) = json.loads(output.read_text())["cases"]
    assert {"growing, launched", "fixed, launched"} < set(case["contenders"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "launcher=True: must be False with TRITON_INTERPRET=1"),
        ({"steps": 127}, "steps=127: must be at most 126"),
        ({"batches": [0]}, "batches=0: must be above 0"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        HostBenchmarkConfig(**fields)
