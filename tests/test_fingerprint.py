"""A prefix goes on with the model that computed it alone, however a model was changed; any model has a fingerprint."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from modules.cache.fingerprint import SAMPLE, model_fingerprint
from modules.kivi_cache import KIVILatentCache, create_kivi_cache
from tests.helpers import tiny_dense, tiny_split

SMALL = {"group_size": 16, "residual_length": 5}
IDS = torch.arange(1, 61)[None]


class Adapted(nn.Module):
    """A low-rank adapter beside a layer, with the attributes of PEFT's."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down, self.up = (nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features))
        self.scaling, self.disable_adapters, self.merged_adapters = {"default": 2.0}, False, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.disable_adapters or self.merged_adapters:
            return y
        return y + self.scaling["default"] * self.up(self.down(x))

    def merge(self) -> None:
        self.base_layer.weight.data += self.scaling["default"] * self.up.weight.data @ self.down.weight.data
        self.merged_adapters = ["default"]


def prefix_of(model, path, **how) -> None:
    cache = model.create_kivi_cache(**SMALL) if hasattr(model, "create_kivi_cache") else create_kivi_cache(**SMALL)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    cache.save(path, model=model, **how)


def train(model, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    model.eval()


def one_element(model, write) -> None:
    """Change an element that a sample does not look at, as an outlier that is cut."""
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.numel() > 2 * SAMPLE
    write(weight)


def other_factors(model) -> None:
    """The same product of other factors."""
    projection = model.model.layers[1].self_attn.k_proj
    projection.BLinear.weight.data *= 2
    projection.ALinear.weight.data /= 2


def attribute(module_of, name: str, value):
    return lambda model: setattr(module_of(model), name, value)


def adapter(model) -> Adapted:
    return model.model.layers[0].self_attn.q_proj


CHANGES = {
    "a step of AdamW": lambda model: train(model, fused=False),
    "a step of fused AdamW": lambda model: train(model, fused=True),
    "data": lambda model: one_element(model, lambda w: w.data[0, 1].add_(1)),
    "numpy": lambda model: one_element(model, lambda w: w.detach().numpy().__setitem__((0, 1), 3)),
    "another storage": lambda model: one_element(model, lambda w: setattr(w, "data", w.data.roll(1))),
    "inference mode": lambda model: torch.inference_mode()(lambda: one_element(model, lambda w: w[0, 1].add_(1)))(),
    "frequencies": lambda model: model.model.rotary_emb.inv_freq.data.mul_(1.01),
    "other factors": other_factors,
    "scaling of scores": attribute(lambda m: m.model.layers[1].self_attn, "scaling", 0.3),
    "epsilon": attribute(lambda m: m.model.layers[1].input_layernorm, "variance_epsilon", 0.1),
    "adapter off": attribute(adapter, "disable_adapters", True),
    "adapter merged": lambda model: adapter(model).merge(),
    "adapter trained": lambda model: adapter(model).up.weight.data.add_(0.01),
    "adapter rescaled": attribute(adapter, "scaling", {"default": 1.0}),
    "adapter removed": attribute(lambda m: m.model.layers[0].self_attn, "q_proj", nn.Linear(64, 128, bias=False)),
}


@pytest.fixture
def model(tmp_path):
    model = tiny_split(tmp_path, 32)
    model.model.layers[0].self_attn.q_proj = Adapted(adapter(model))
    return model


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_refused(model, change, tmp_path):
    path = tmp_path / "prefix.safetensors"
    model_fingerprint(model)
    prefix_of(model, path)
    KIVILatentCache.load(path, model=model)
    change(model)
    with pytest.raises(ValueError, match="of another model: weights differs"):
        KIVILatentCache.load(path, model=model)
    with pytest.raises(ValueError, match="filled by another model than this one: weights differs"):
        model(IDS[:, :1], past_key_values=KIVILatentCache.load(path))


def test_what_changes_no_state_of_the_cache_is_taken(model, tmp_path):
    path = tmp_path / "prefix.safetensors"
    prefix_of(model, path)
    model.lm_head.weight.data.mul_(2)
    model.train().requires_grad_(False).eval()
    again = copy.deepcopy(model)
    for weight in again.parameters():
        weight.data = weight.data.clone()
    for same in (model, again):
        KIVILatentCache.load(path, model=same)


def test_a_sample_is_asked_for_by_name(model, tmp_path):
    """It tells other checkpoints, but not a change of one element."""
    path = tmp_path / "prefix.safetensors"
    prefix_of(model, path, digest="sample")
    CHANGES["data"](model)
    KIVILatentCache.load(path, model=model)
    CHANGES["a step of fused AdamW"](model)
    with pytest.raises(ValueError, match="of another model: weights differs"):
        KIVILatentCache.load(path, model=model)
    with pytest.raises(ValueError, match="digest='fast': must be one of 'all', 'sample'"):
        prefix_of(model, path, digest="fast")


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


class Int8Weight(torch.Tensor):
    """A weight of int8 codes and a scale per row, without a storage of its own, as those of torchao are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return function(*tree_map_only(cls, lambda w: w.codes * w.scale, args), **(kwargs or {}))


def wrapped(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Weight(codes, scale), requires_grad=False)
    return model


def repacked(model) -> None:
    """Change what `quantize_dynamic` has made of a weight."""
    projection = model.model.layers[1].self_attn.v_proj
    weight = projection.weight()
    changed = torch.quantize_per_tensor(
        weight.dequantize() * 1.5, weight.q_scale(), weight.q_zero_point(), weight.dtype
    )
    projection.set_weight_bias(changed, projection.bias())


UNUSUAL = {
    "quantize_dynamic": (quantized, repacked),
    "int8 codes": (wrapped, lambda m: m.model.layers[1].self_attn.v_proj.weight.codes[0, 1].add_(1)),
}


@pytest.mark.parametrize("split", [True, False], ids=["split", "drop-in"])
@pytest.mark.parametrize(("wrap", "change"), UNUSUAL.values(), ids=UNUSUAL)
@torch.no_grad()
def test_caches_of_quantized_weights_are_forked_copied_and_saved(wrap, change, split, tmp_path):
    dense = tiny_dense()
    keys = {f"model.layers.{i}.self_attn.k_proj": 32 for i in range(3)}
    model = wrap(tiny_split(tmp_path, keys, dense=dense) if split else dense)
    cache = model.create_kivi_cache(**SMALL) if split else create_kivi_cache(**SMALL)
    model(IDS, past_key_values=cache)
    cache.save(tmp_path / "prefix.safetensors", model=model)
    copies = (
        cache.fork(),
        copy.copy(cache),
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        KIVILatentCache.load(tmp_path / "prefix.safetensors", model=model),
    )
    expected = model(IDS, past_key_values=copies[2].fork()).logits
    for copied in copies:
        assert torch.equal(model(IDS, past_key_values=copied).logits, expected)
    change(model)
    with pytest.raises(ValueError, match="of another model: weights differs"):
        KIVILatentCache.load(tmp_path / "prefix.safetensors", model=model)


def test_copies_in_a_process_compute_no_digest(model, monkeypatch):
    """A fork is made for every request."""
    cache = model.create_kivi_cache(**SMALL)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    monkeypatch.setattr("modules.kivi_cache.model_fingerprint", None)
    for copied in (cache.fork(), copy.copy(cache), copy.deepcopy(cache)):
        assert copied.is_bound_to(model.model)
