"""Several devices: layers on other devices or on disk, heads over ranks, layers over ranks. Two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.svd_linear import SVDLinear
from tests.helpers import all_ranks, tiny_dense, tiny_split
from tests.parallel_ranks import CHECKS, LOSSLESS, MIXED, TIERS, TWO_BITS, with_static_scales

ROOT = Path(__file__).resolve().parent.parent

#: After this many seconds a run of two processes ends itself.
LIMIT = 240

NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def run_ranks(folder: Path, backend: str) -> dict[str, list[str]]:
    """What each of two ranks says of every check."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("ALRD_BACKEND", None)
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the library would put its ranks there
    else:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "parallel_ranks.py"), str(folder), backend, str(LIMIT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT + 60)
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    said = [json.loads(file.read_text()) for file in files]
    return {name: [one.get(name, f"not run\n{done.stderr}") for one in said] for name in CHECKS}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[str]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), "gloo")


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(two_ranks, name):
    for rank, said in enumerate(two_ranks[name]):
        assert said == "passed", f"rank {rank}: {said}"


@pytest.mark.gpu
@NEEDS_TWO_GPUS
def test_two_gpus(tmp_path):
    said = run_ranks(tmp_path, "nccl")
    assert said == {name: ["passed", "passed"] for name in CHECKS}


# ---- device_map


def split_model(folder: Path, name: str):
    """A split model on one device, and the checkpoint that it is loaded from."""
    if name == "calibrated":
        dense, ranks = tiny_dense(), all_ranks(3, {"k_proj": [12, 10], "v_proj": [12, 10]})
        fields = {"truncation_ranks": ranks, "head_group_size": 2, "width_tiers": all_ranks(3, TIERS)}
        expected = with_static_scales(
            dense, ALRDLlamaConfig.from_llama(dense.config, k_scheme={"static": True}, **fields)
        )
        expected.save_pretrained(folder / "split")
        return expected, folder / "split"
    if name == "MHA":
        return tiny_split(folder, 40, 2, tiny_dense(num_key_value_heads=8)), folder / "dense"
    return tiny_split(folder, MIXED, 1, tiny_dense(attention_bias=True)), folder / "dense"


def assert_same_tokens(model, expected, settings: dict) -> None:
    """Greedy tokens of a padded batch, with blocks packed on the way; a layer's cache lives where the layer runs."""
    ids = torch.randint(1, 97, (2, 150))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    cache = model.create_kivi_cache(**settings)
    how = {"max_new_tokens": 8, "do_sample": False}
    one = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), past_key_values=cache, **how)
    how["past_key_values"] = expected.create_kivi_cache(**settings)
    other = expected.generate(ids.to(expected.device), attention_mask=mask.to(expected.device), **how)
    assert one.tolist() == other.tolist()
    for i, layer in enumerate(cache.layers):
        assert [len(row.blocks) for row in layer.rows] == [3, 4]
        placed = model.hf_device_map.get("model.layers", model.hf_device_map.get(f"model.layers.{i}"))
        running = torch.device(
            placed if isinstance(placed, int) else "cuda" if expected.device.type == "cuda" else "cpu"
        )
        stored = [*layer.exact.tensors(), *(t for side in layer.pool.storage.values() for t in side.values())]
        assert {t.device.type for t in stored} == {running.type}
        assert running.index is None or {t.device for t in stored} == {running}


def half_of(model) -> int:
    return sum(p.nbytes for p in model.parameters()) * 2 // 3


@pytest.mark.parametrize(
    ("name", "offload_buffers"), [("mixed", False), ("MHA", False), ("calibrated", False), ("calibrated", True)]
)
def test_layers_on_the_cpu_and_on_disk(tmp_path, name, offload_buffers):
    expected, checkpoint = split_model(tmp_path, name)
    model = ALRDLlamaForCausalLM.from_pretrained(
        checkpoint,
        config=expected.config,
        device_map="auto",
        max_memory={"cpu": half_of(expected)},
        offload_folder=str(tmp_path / "offloaded"),
        offload_buffers=offload_buffers,
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}, model.hf_device_map
    assert any(m.ALinear.weight.is_meta for m in model.modules() if isinstance(m, SVDLinear))
    for settings in (LOSSLESS, TWO_BITS):
        assert_same_tokens(model, expected, settings)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mixed", "MHA", "calibrated"])
@pytest.mark.parametrize("places", [{0, "cpu"}, pytest.param({0, 1}, marks=NEEDS_TWO_GPUS)])
def test_layers_on_gpus_and_the_cpu(tmp_path, name, places):
    expected, checkpoint = split_model(tmp_path, name)
    model = ALRDLlamaForCausalLM.from_pretrained(
        checkpoint, config=expected.config, device_map="auto", max_memory=dict.fromkeys(places, half_of(expected))
    )
    assert set(model.hf_device_map.values()) == places, model.hf_device_map
    for settings in (LOSSLESS, TWO_BITS):
        assert_same_tokens(model, expected.to("cuda"), settings)
