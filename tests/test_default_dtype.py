"""The default dtype and device of PyTorch are the user's: no tensor of ours is made by them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.cache.token_scores import QuerySimilarity
from modules.fit.allocation import TIER_BITS, allocate, load_costs, measure_costs, save_costs, tier_prices
from modules.fit.objectives import OBJECTIVES, probe_rates, projection_factors
from modules.fit.rank_search import (
    asvd_sensitivity,
    asvd_statistics,
    fisher_information,
    mean_absolute_inputs,
    water_fill,
)
from modules.fit.statistics import collect_statistics
from modules.formats.calibrated_int8 import calibrate, deploy_fake_quant
from modules.formats.qlutattn import QLUTATTN, layer_schemes_by_range
from modules.formats.vidkv import QuantizedTensorFunction
from modules.kernels import get_backend
from modules.kernels.cpu.lookup import METHODS, lookup_attention
from modules.kernels.packed import LatentQuery, Rope
from modules.kivi_cache import CacheScheme, KIVILatentCache, KIVILatentLayer, create_kivi_cache
from modules.quant_utils import kivi_quantize_per_channel, kivi_quantize_per_token
from tests.helpers import all_ranks, tiny_dense

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "modules").rglob("*.py"), *ROOT.glob("*.py")])

#: Functions of torch that make a tensor of the default type or on the default device.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    "zeros",
}

#: Dictionaries of both in our sources.
BOTH = {"float32", "float64", "int64"}


def made_by_default(source: str) -> list[str]:
    """Calls in a source that leave type or device to the default, but for what a module is made of.

    A parameter or buffer takes both from the context in which the library makes a model.
    """
    tree = ast.parse(source)
    of_modules = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("nn.Parameter", "self.register_buffer")
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or node in of_modules:
            continue
        place, _, name = ast.unparse(node.func).rpartition(".")
        given = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
        if place == "torch" and name in FACTORIES and not ({"dtype", "device"} <= given or given & BOTH):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        # Two numbers in place of tensors come back in the default type.
        if place == "torch" and name == "where" and len(node.args) == 3 and all(_is_number(x) for x in node.args[1:]):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def _is_number(node: ast.expr) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_a_type_and_a_device(path):
    assert made_by_default(path.read_text()) == []


# ---- the public functions, in a process of their own, for wrong memory aborts it


def run_everything(folder: Path, default: torch.dtype) -> dict[str, torch.Tensor | list]:
    """What the public functions give for fixed models and states, under a default dtype."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = {dtype: tiny_dense(dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    ids, states = torch.randint(1, 97, (2, 60)), torch.randn(2, 4, 90, 16)
    dense[torch.float32].save_pretrained(folder / "dense")
    small = {"group_size": 16, "residual_length": 5}
    config = ALRDLlamaConfig.from_llama(
        dense[torch.float32].config, truncation_ranks=all_ranks(3, [13, 21]), head_group_size=2, **small
    )
    torch.set_default_dtype(default)

    found = {}
    for dtype, model in dense.items():
        split = ALRDLlamaForCausalLM.from_dense(model, config)
        for backend, length, bits in (("cpu", 40, 2), ("cpu", 40, 16), ("reference", 40, 2), ("triton", 2, 2)):
            slow = backend == "triton"  # in its interpreter
            if not slow or dtype == torch.float32:
                cache = split.create_kivi_cache(backend=backend, k_bits=bits, v_scheme={"range_method": "mse"})
                text = split.generate(ids[:, : 29 if slow else 60], past_key_values=cache, max_new_tokens=length)
                found[f"text {dtype} {backend} {bits}"] = text
        for name, settings in DROP_IN.items():
            cache = create_kivi_cache(**small, **settings)
            found[f"drop-in {dtype} {name}"] = model.generate(ids, past_key_values=cache, max_new_tokens=30)
            found[f"states {dtype} {name}"] = cache.layers[1].states()
    model = ALRDLlamaForCausalLM.from_pretrained(folder / "dense", config=config)
    found["type"], found["loaded"] = str(model.dtype), dict(model.state_dict())
    fixed = model.create_kivi_cache(capacity=128)
    found["fixed"] = model.generate(ids, past_key_values=fixed, max_new_tokens=40)
    fixed.crop(-3)
    fixed.reorder_cache(torch.tensor([1, 0]))
    found["fixed states"] = fixed.layers[0].states()
    attention = model.create_kivi_cache(v_scheme={"protected": 0.1}, token_score="attention")
    model(ids.repeat(1, 4), past_key_values=attention)
    attention.save(folder / "prefix.safetensors")
    loaded = KIVILatentCache.load(folder / "prefix.safetensors", model=model)
    found["prefix"] = model(ids[:, :1], past_key_values=loaded, output_attentions=True).attentions[1]

    # The formats and kernels by themselves.
    for bits in (1, 1.58, 2, 3, 4, 5, 6, 8):
        for backend in ("cpu", "reference", "triton"):
            quantize = get_backend(backend, torch.device("cpu")).quantize_and_pack
            found[f"packed {bits} {backend}"] = quantize(states[0, :2, :20], bits, (5, 11), range_method="mse")
        found[f"per channel {bits}"] = kivi_quantize_per_channel(states[0], bits, 32)
        found[f"per token {bits}"] = kivi_quantize_per_token(states[0], bits, 8)
    for keys, values in (("K2", "V2"), ("K4", "V1")):
        layer = KIVILatentLayer(CacheScheme.of(QLUTATTN[keys], QLUTATTN[values]), ((16,) * 4,) * 2)
        layer.append(*[states.transpose(1, 2).flatten(2).repeat(1, 2, 1).bfloat16()] * 2)
        how = {"expand_keys": None, "rope": None, "scaling": 0.3, "value_widths": (16,) * 4}
        for method in METHODS:
            found[f"lookup {keys} {method}"] = lookup_attention(
                states[:, :, :1].bfloat16(), torch.tensor([[179], [179]]), layer.packed(), **how, method=method
            )
    found["schemes"] = {i: str(s.keys) for i, s in layer_schemes_by_range([layer.states()]).items()}
    vidkv = QuantizedTensorFunction({"backend": "QuantizedCacheVLM", "nbits": [1.5, 2], "q_group_size": 32})
    found["vidkv"] = vidkv._quantize_key(states[:, :, :64])

    # Calibration.
    model, tokens = dense[torch.float32], ids.reshape(5, 24)
    statistics = collect_statistics(model, tokens, sample=16, sinks=0, batch_size=2)
    found["statistics"] = [vars(side) for layer in statistics for side in (layer.k_proj, layer.v_proj)]
    side = statistics[0].k_proj
    for objective in OBJECTIVES:
        factors = projection_factors(model, config, statistics, objective)
        found[f"factors {objective}"] = {name: list(groups) for name, groups in factors.items()}
    name = "model.layers.0.self_attn.k_proj"
    found["rates"] = probe_rates(model, {name: factors[name]}, {name: [f.energy for f in factors[name]]}, tokens[:2])
    for keys in ({"static": True}, {"orientation": "per_token"}):
        scheme = CacheScheme(2, 2, 16, 0, 0, k_scheme=keys)
        costs = measure_costs(factors[name][0], side.sample[..., :32], scheme.keys, 16)
        prices = {side: tier_prices(scheme.keys, scheme, TIER_BITS, 512, torch.float32) for side in "kv"}
        save_costs(folder / "costs.safetensors", {name: [costs]})
        plan = allocate(load_costs(folder / "costs.safetensors"), {name: 1.0}, prices, TIER_BITS, 8192)
        found[f"plan {keys}"] = vars(plan)
    found["water"] = water_fill({n: [f.energy for f in groups] for n, groups in factors.items()}, 0.5, 4)
    inputs = mean_absolute_inputs(model, [tokens])
    found["fisher"] = fisher_information(model, [tokens], config)
    found["asvd"] = asvd_sensitivity(model, [tokens], config, asvd_statistics(model, inputs), (0.5,))
    scales = calibrate(model, [tokens], percentile=99.0)
    cache = scales.create_cache(group_size=16)
    found["int8"] = model.generate(ids, past_key_values=cache, max_new_tokens=20)
    with deploy_fake_quant(model, scales):
        found["fake"] = model(ids).logits
    return found


ONES = torch.ones(2, 64)

#: Drop-in caches, among them every quantizer.
DROP_IN = {
    "2": {},
    "8, 3": {"k_bits": 8, "v_bits": 3},
    "1.5, ternary": {"k_bits": 1.5, "v_bits": 1.58},
    "1, 4": {"k_bits": 1, "v_bits": 4, "k_scheme": {"range_method": "mse"}},
    "rotated, protected": {"k_scheme": {"rotation": True}, "v_scheme": {"protected": 0.1}},
    "similarity": {"v_scheme": {"protected": 0.1}, "token_score": QuerySimilarity({i: ONES for i in range(3)})},
    "tiers": {"k_scheme": {"tiers": (((5, 4), (11, 2)),) * 4}},
}


def differing(a, b, place: str = "") -> list[str]:
    """Where two results differ in type, shape or any bit."""
    if type(a) is not type(b):
        return [place]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, (dict, list, tuple)):
        keys = a if isinstance(a, dict) else range(len(a))
        if len(a) != len(b):
            return [place]
        return [found for key in keys for found in differing(a[key], b[key], f"{place}[{key}]")]
    return [] if a == b else [place]


def results(folder: Path, default: str) -> dict:
    """`run_everything` in a new process."""
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, __file__, str(folder), default],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"exit {run.returncode}: {run.stderr[-3000:]}"
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return results(tmp_path_factory.mktemp("default") / "float32", "float32")


@pytest.mark.parametrize("default", ["float64", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_everything_is_the_same_under_any_default_dtype(default, expected, tmp_path):
    assert differing(results(tmp_path / default, default), expected) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_tensors_that_users_give_may_have_another_type(dtype, tmp_path):
    pair, states = (torch.rand(16).half() / 4 + 0.1, torch.randn(16).half() - 2), torch.randn(1, 200, 16)
    received = torch.rand(1, 200).half()
    static, protected = {"static": True, "orientation": "per_channel"}, {"protected": 0.1}
    found = []
    for given in (dtype, torch.float32):
        scales = {0: {"values": tuple(t.to(given) for t in pair)}}
        calibrated = KIVILatentCache(CacheScheme(4, 4, 16, 5, 0, v_scheme=static), static_scales=scales)
        calibrated.save(tmp_path / "empty.safetensors")
        cache = KIVILatentCache.load(tmp_path / "empty.safetensors", backend="cpu")
        cache.layer(0, ((8, 8), (8, 8))).append(states, states)
        how = {"expand_keys": None, "value_widths": (8, 8), "rope": None, "scaling": 0.3}
        attend, query = cache.layers[0].backend.attend, torch.ones(1, 2, 1, 8)
        found.append(attend(LatentQuery(query, torch.tensor([[200]]), **how), cache.layers[0].packed())[0])
        scored = KIVILatentCache(CacheScheme(2, 2, 16, 5, 0, v_scheme=protected), token_score="attention")
        scored.layer(0).append(states, states, received=received.to(given))
        found.append(scored.layers[0].states())
    assert torch.equal(found[0], found[2]) and differing(found[1], found[3]) == []


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [name for name in DROP_IN if name != "similarity"])
def test_no_tensor_of_a_cache_is_made_on_the_default_device(name, backend):
    """On one without memory nothing would come out."""
    states, query = torch.randn(2, 4, 180, 16), torch.randn(2, 8, 1, 16)
    positions, beams = torch.tensor([[170], [170]]), torch.tensor([1, 0])
    how = {"expand_keys": None, "value_widths": (16,) * 4, "rope": Rope(torch.rand(8)), "scaling": 0.3}
    found = []
    for place in ("cpu", "meta"):
        cache = create_kivi_cache(group_size=16, residual_length=5, backend=backend, **DROP_IN[name])
        with torch.device(place):
            cache.update(states[:, :, :160], states[:, :, :160], 0)
            for i in range(160, 180):
                cache.update(states[:, :, i : i + 1], states[:, :, i : i + 1], 0)
            cache.crop(-9)
            cache.reorder_cache(beams)
            layer = cache.fork().layers[0]
            attended = layer.backend.attend(LatentQuery(query, positions, **how), layer.packed())[0]
        found.append([*layer.states(), attended])
    assert differing(*found) == []


if __name__ == "__main__":
    torch.save(run_everything(Path(sys.argv[1]), getattr(torch, sys.argv[2])), Path(sys.argv[1]) / "results.pt")
