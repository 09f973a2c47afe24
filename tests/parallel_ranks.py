"""What two processes check together: `tests/test_parallel.py` runs it under torchrun.

    torchrun --standalone --nproc_per_node 2 tests/parallel_ranks.py FOLDER {gloo,nccl} SECONDS

Each rank writes `FOLDER/{rank}.json`: for every check "passed" or a traceback. A check that fails on one rank leaves
the other one waiting, so the first failure ends the run; so do SECONDS, with a traceback of every thread.
"""

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.distributed import DistributedConfig

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.kivi_cache import KIVILatentCache, create_kivi_cache
from modules.svd_linear import SVDLinear
from tests.helpers import TINY_LLAMA, all_ranks, randomize_vectors, tiny_blocks, tiny_dense

CHECKS: dict[str, Callable] = {}

TENSOR, PIPELINE = {"tp_size": 2}, {"pp_size": 2}
TWO_BITS = {"group_size": 32, "residual_length": 16}
LOSSLESS = {**TWO_BITS, "k_bits": 16, "v_bits": 16}
PADS = 37

MIXED = {
    "model.layers.0.self_attn.k_proj": 24,
    "model.layers.0.self_attn.v_proj": [5, 11, 9, 16],
    "model.layers.2.self_attn.v_proj": 33,
}
TIERS = {
    "k_proj": [[[4, 5], [8, 2]], [[2, 16], [3, 6], [5, 2]]],
    "v_proj": [[[12, 2]], [[1, 16], [2, 3], [7, 2]]],
}

#: Name: what `checkpoint` saves, and how it is split.
CASES = {
    "joint": ({"attention_bias": True}, 40, {}),
    "groups of one, layers mixed": ({"attention_bias": True}, MIXED, {"head_group_size": 1}),
    "groups of two, MHA": (
        {"num_key_value_heads": 8},
        {"k_proj": 40, "v_proj": [3, 9, 7, 13]},
        {"head_group_size": 2},
    ),
    "qwen2": ({"qwen2": True}, {"k_proj": 20, "v_proj": [7, 12]}, {"head_group_size": 2}),
    "calibrated": (
        {"calibrated": True},
        {"k_proj": [12, 10], "v_proj": [12, 10]},
        {"head_group_size": 2, "k_scheme": {"static": True}, "width_tiers": all_ranks(3, TIERS)},
    ),
    "six heads": ({"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}, 40, {}),
    "three heads": ({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}, 40, {}),
}
SPLITS = tuple(CASES)[:5]

#: Blocks of projections of a model of four layers.
BLOCKS = {
    "blocks of all heads": {"layer_group_size": 3, "joint_kv": True},
    "blocks of two heads": {"layer_group_size": 2, "head_group_size": 2},
    "blocks of a qwen3": {"layer_group_size": 2, "joint_kv": True},
    "blocks of a smollm3": {"head_group_size": 2},
    # Their plans give every rank the outputs of all heads.
    "blocks of an olmo2": {"layer_group_size": 2, "joint_kv": True},
    "blocks of a phi3": {"head_group_size": 2},
}


def check(function: Callable) -> Callable:
    CHECKS[function.__name__] = function
    return function


def checkpoint(folder: Path, name: str) -> tuple[Path, ALRDLlamaConfig | None]:
    """The first rank saves the model of a case, once; where it lies, and the config to load it with."""
    overrides, ranks, fields = CASES[name]
    # Before transformers 5.23 the ranks must divide the vocabulary.
    overrides, path = {"vocab_size": 98, **overrides}, folder / name.replace(" ", "_")
    calibrated = overrides.pop("calibrated", False)
    if overrides.pop("qwen2", False):
        torch.manual_seed(0)
        dense = Qwen2ForCausalLM(Qwen2Config(**{**TINY_LLAMA, **overrides})).double().eval()
        randomize_vectors(dense)
    else:
        dense = tiny_dense(dtype=torch.float64, **overrides)
    config = ALRDLlamaConfig.from_llama(
        dense.config, truncation_ranks=ranks if ranks is MIXED else all_ranks(3, ranks), **fields
    )
    if dist.get_rank() == 0 and not path.exists():
        (with_static_scales(dense, config) if calibrated else dense).save_pretrained(path)
    dist.barrier()
    return path, None if calibrated else config


def with_static_scales(dense, config: ALRDLlamaConfig) -> ALRDLlamaForCausalLM:
    """A split model with scales for its keys, which are not those of any text: another one for every channel."""
    scale = 0.5 + torch.rand(22, dtype=dense.dtype, generator=torch.Generator().manual_seed(1))
    splits = [{"k_proj": {"static_scales": (scale, -1.5 * scale)}, "v_proj": {}}] * 3
    return ALRDLlamaForCausalLM.from_dense(dense, config, splits)


def load(folder: Path, name: str, sizes: dict | None = None, dtype=torch.float64, **config_fields):
    """The model of a case, this rank's part of it or, without `sizes`, all."""
    path, config = checkpoint(folder, name)
    if config_fields:
        config = ALRDLlamaConfig.from_llama(config, **config_fields)
    return ALRDLlamaForCausalLM.from_pretrained(path, config=config, dtype=dtype, **where(sizes)).eval()


def where(sizes: dict | None) -> dict:
    return {"distributed_config": DistributedConfig(**sizes)} if sizes else {"device_map": str(device())}


def device() -> torch.device:
    gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")


def batch(rows: int = 2, length: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask; the first row is padded on its left."""
    ids = torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    return ids.to(device()), mask.to(device())


@torch.no_grad()
def steps(model, cache, ids, mask) -> torch.Tensor:
    """Logits of a prompt, a chunk of it, and single tokens."""
    length = ids.shape[1]
    cuts, logits = [0, length - 49, length - 4, *range(length - 3, length + 1)], []
    for start, stop in pairwise(cuts):
        logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def assert_same(
    model, reference, settings: dict, tolerance: float = 1e-9, length: int = 150
) -> tuple[KIVILatentCache, KIVILatentCache]:
    """Logits and greedy tokens of a padded batch are those of the model on one device; returns both caches."""
    ids, mask = batch(length=length)
    caches = model.create_kivi_cache(**settings), reference.create_kivi_cache(**settings)
    got, expected = (steps(m, cache, ids, mask) for m, cache in zip((model, reference), caches))
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=tolerance, rtol=tolerance)
    assert all(len(row.blocks) >= 2 for row in caches[0].layers[caches[0].first_layer].rows), caches[0]
    assert caches[0].row_tokens() == caches[1].row_tokens() == [length - PADS, length]
    assert_same_tokens(model, reference, settings, ids=ids, mask=mask)
    assert_goes_on_from_a_file(model, caches[0], ids, mask)
    return caches


@torch.no_grad()
def assert_goes_on_from_a_file(model, cache: KIVILatentCache, ids, mask) -> None:
    """Each rank saves its part of the cache and goes on with it."""
    with TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache.safetensors")
        loaded = KIVILatentCache.load(Path(folder) / "cache.safetensors", device=device())
    assert loaded.nbytes_used == cache.nbytes_used
    fed, length = cache.row_tokens(), ids.shape[1]
    mask = torch.cat([mask, mask[:, -1:]], dim=1)
    one, other = (model(ids[:, -1:], attention_mask=mask, past_key_values=c).logits for c in (loaded, cache))
    assert torch.equal(one, other)
    cache.crop(-1)
    assert cache.row_tokens() == fed and cache.get_seq_length() == length


def assert_same_tokens(model, reference, settings: dict, ids=None, mask=None, **how) -> None:
    """Generated tokens are those of the model on one device; a block is packed on the way."""
    if ids is None:
        ids, mask = batch()
    how = {"max_new_tokens": 8, "do_sample": False, **how}
    one, other = (
        m.generate(ids, attention_mask=mask, past_key_values=m.create_kivi_cache(**settings), **how)
        for m in (model, reference)
    )
    assert one.tolist() == other.tolist() and one.shape[1] > ids.shape[1]


def total(number: int) -> int:
    """The sum over the ranks."""
    counts = torch.tensor(number, device=device())
    dist.all_reduce(counts)
    return int(counts)


# ---- tensor parallel


def shard_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    half = dist.get_rank()
    return widths if len(widths) == 1 else widths[half * len(widths) // 2 : (half + 1) * len(widths) // 2]


def assert_cache_is_sharded(model, cache: KIVILatentCache, whole: KIVILatentCache) -> None:
    """Each rank has the bytes that the formula says for its own head groups; together they have all."""
    rows, expected, table = cache.layers[0].rows, 0, 0
    for i, layer in enumerate(cache.layers):
        widths = tuple(map(shard_widths, model.config.layer_widths(i)))
        assert layer.widths == widths == model.model.layers[i].self_attn.widths
        expected += sum(layer.scheme.layer_nbytes(row.tokens, widths, torch.float64) for row in rows)
        expected += layer.scheme.static_nbytes(widths)
        table += sum(12 * len(row.blocks) for row in rows)
    assert cache.nbytes_used == expected
    config = model.config
    joint = 0
    for i, layer in enumerate(whole.layers):
        for widths, side in zip(config.layer_widths(i), ("keys", "values")):
            if len(widths) == 1:
                joint += side_nbytes(layer, side)
    assert total(cache.nbytes_used - table - joint) == whole.nbytes_used - table - joint
    if joint == 0:
        assert total(cache.nbytes_used) < 1.05 * whole.nbytes_used


def load_blocks(folder: Path, name: str, sizes: dict | None = None, dtype=torch.float64) -> ALRDLlamaForCausalLM:
    """The model of a case of `BLOCKS`, this rank's part of it or, without `sizes`, all; the first rank saves it."""
    path = folder / name.replace(" ", "_")
    if dist.get_rank() == 0 and not path.exists():
        fields = {"num_hidden_layers": 4, "attention_bias": True, "vocab_size": 98}
        torch.manual_seed(0)
        kind = name.split()[-1] if name[-1].isdigit() else "llama"
        dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY_LLAMA, **fields})).double().eval()
        randomize_vectors(dense)
        tiny_blocks(dense, 0.5, **BLOCKS[name]).save_pretrained(path)
    dist.barrier()
    return ALRDLlamaForCausalLM.from_pretrained(path, dtype=dtype, **where(sizes)).eval()


def side_nbytes(layer, side: str) -> int:
    """Bytes of one side of a layer, without the table."""
    blocks = {slot for row in layer.rows for slot in row.blocks}
    packed = sum(t[:1].nbytes for t in layer.pool.storage[side].values()) * len(blocks)
    exact = sum(row.sinks + row.window for row in layer.rows) * layer.channels[side] * layer.dtype.itemsize
    return packed + exact + sum(t.nbytes for t in (layer.static_scales or {}).get(side, ()))


def assert_tensor_parallel(folder: Path, name: str) -> None:
    model, reference = load(folder, name, TENSOR), load(folder, name)
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 64
    for settings in (LOSSLESS, TWO_BITS):
        cache, whole = assert_same(model, reference, settings)
        assert_cache_is_sharded(model, cache, whole)
    # What a rank has packed is its part of what one process packs.
    ids, _ = batch()
    caches = [m.create_kivi_cache(**TWO_BITS) for m in (model, reference)]
    with torch.no_grad():
        for m, cache in zip((model, reference), caches):
            m(ids, past_key_values=cache)
    for i in range(3):
        for mine, all_of, widths in zip(
            *(cache.layers[i].states() for cache in caches), reference.config.layer_widths(i)
        ):
            own = shard_widths(widths)
            first = 0 if dist.get_rank() == 0 or own == widths else sum(widths[: len(own)])
            torch.testing.assert_close(mine, all_of[..., first : first + sum(own)], atol=1e-9, rtol=1e-9)


@check
def tensor_joint(folder: Path) -> None:
    assert_tensor_parallel(folder, "joint")


@check
def tensor_groups_of_one_and_mixed_layers(folder: Path) -> None:
    assert_tensor_parallel(folder, "groups of one, layers mixed")


@check
def tensor_groups_of_two_mha(folder: Path) -> None:
    assert_tensor_parallel(folder, "groups of two, MHA")


@check
def tensor_qwen2(folder: Path) -> None:
    assert_tensor_parallel(folder, "qwen2")


@check
def tensor_calibrated(folder: Path) -> None:
    """Width tiers and static scales of head groups, from a split checkpoint."""
    assert_tensor_parallel(folder, "calibrated")
    mine, whole = (load(folder, "calibrated", sizes).create_kivi_cache().layers[0] for sizes in (TENSOR, None))
    group, channels = dist.get_rank(), (slice(12), slice(12, 22))[dist.get_rank()]
    for side in ("keys", "values"):
        assert getattr(mine.scheme, side).tiers == (getattr(whole.scheme, side).tiers[group],)
    for mine_too, of_all in zip(mine.static_scales["keys"], whole.static_scales["keys"]):
        assert torch.equal(mine_too, of_all[channels])


@check
def tensor_blocks(folder: Path) -> None:
    """Head groups are dealt out; a latent of all heads is the sum over the ranks, which each hold it."""
    for name in BLOCKS:
        model, reference = load_blocks(folder, name, TENSOR), load_blocks(folder, name)
        for settings in (LOSSLESS, TWO_BITS):
            cache, whole = assert_same(model, reference, settings)
            for mine, all_of in zip(cache.layers, whole.layers, strict=True):
                assert mine.widths == tuple(map(shard_widths, all_of.widths))
                assert mine.sink_channels["keys"] == all_of.sink_channels["keys"] // 2
        model.save_pretrained(folder / "saved" / name)
        dist.barrier()
        saved = ALRDLlamaForCausalLM.from_pretrained(folder / "saved" / name, dtype=torch.float64).state_dict()
        for key, tensor in reference.state_dict().items():
            assert torch.equal(saved[key], tensor.cpu()), key


@check
def tensor_kernels_read_local_weights(folder: Path) -> None:
    """In float32, where the back ends have kernels of their own."""
    for name in ("joint", "groups of two, MHA"):
        model, reference = load(folder, name, TENSOR, torch.float32), load(folder, name, dtype=torch.float32)
        cache, _ = assert_same(model, reference, LOSSLESS, 1e-3)
        assert cache.layers[0].backend_note in ("cpu", "triton"), cache
        # Rounding may turn a code over; at eight bits that decides no token.
        assert_same_tokens(model, reference, {**TWO_BITS, "k_bits": 8, "v_bits": 8, "capacity": 256})


@check
def tensor_generation(folder: Path) -> None:
    """Beams, and caches of other kinds."""
    name = "groups of two, MHA"
    model, reference = load(folder, name, {"tp_plan": "auto"}), load(folder, name)
    assert_same_tokens(model, reference, TWO_BITS, num_beams=3)
    ids, mask = batch()
    for implementation in ("dynamic", "static"):
        how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": implementation}
        one, other = (m.generate(ids, **how) for m in (model, reference))
        assert one.tolist() == other.tolist()


@check
def tensor_of_a_stock_llama(folder: Path) -> None:
    """Our cache as a drop-in: each rank has the heads that the library's plan gives it."""
    caches = assert_same_stock_llama(folder, TENSOR)
    assert [len(cache.layers[0].widths[0]) for cache in caches] == [2, 4]


def assert_same_stock_llama(folder: Path, sizes: dict) -> list[KIVILatentCache]:
    path, _ = checkpoint(folder, "joint")
    results, (ids, mask) = [], batch()
    for its_sizes in (sizes, None):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **where(its_sizes)).eval()
        caches = [create_kivi_cache(**settings) for settings in (LOSSLESS, TWO_BITS)]
        for cache in caches:
            how = {"past_key_values": cache, "max_new_tokens": 8, "do_sample": False}
            results.append((model.generate(ids, attention_mask=mask, **how).tolist(), cache))
            assert all(len(row.blocks) >= 4 for row in cache.layers[cache.first_layer].rows)
    assert [tokens for tokens, _ in results[:2]] == [tokens for tokens, _ in results[2:]]
    return [results[1][1], results[3][1]]


@check
def tensor_tokens_protected_by_attention(folder: Path) -> None:
    model, reference = load(folder, "joint", TENSOR), load(folder, "joint")
    settings = {**TWO_BITS, "k_scheme": {"protected": 0.25}, "token_score": "attention"}
    assert_same(model, reference, settings, length=330)


@check
def tensor_simple_scheme(folder: Path) -> None:
    model, reference = (load(folder, "joint", sizes, use_kivi=False) for sizes in (TENSOR, None))
    ids, mask = batch()
    one, other = (m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (model, reference))
    assert one.tolist() == other.tolist()


@check
def tensor_gradients(folder: Path) -> None:
    ids, _ = batch(2, 40)
    for name in SPLITS:
        model, reference = load(folder, name, TENSOR).train(), load(folder, name).train()
        for m in (model, reference):
            m(ids, labels=ids, use_cache=False).loss.backward()
        expected, checked = dict(reference.named_parameters()), 0
        for parameter_name, parameter in model.named_parameters():
            whole = expected[parameter_name].grad
            if isinstance(parameter.grad, DTensor):
                gradient = parameter.grad.full_tensor()
            elif parameter.shape == whole.shape:
                gradient = parameter.grad
            else:
                continue
            torch.testing.assert_close(
                gradient, whole, atol=1e-9, rtol=1e-6, msg=lambda m, n=parameter_name: f"{n}: {m}"
            )
            checked += 1
        assert checked > 20
        for module_name, module in model.named_modules():
            if isinstance(module, SVDLinear):
                for weight in module.parameters():
                    weight.data = weight.grad
                gathered = module.gathered_state()
                for weight_name, _ in module.named_parameters():
                    whole = expected[f"{module_name}.{weight_name}"].grad
                    if weight_name == "ALinear.weight":  # beyond a group's rank there is nothing to learn
                        whole = whole * (expected[f"{module_name}.{weight_name}"] != 0)
                        gathered[weight_name] = gathered[weight_name] * (whole != 0)
                    torch.testing.assert_close(gathered[weight_name], whole, atol=1e-9, rtol=1e-6)


@check
def tensor_save(folder: Path) -> None:
    for name in SPLITS:
        model, reference = load(folder, name, TENSOR), load(folder, name)
        path = folder / "saved" / name.replace(" ", "_")
        model.save_pretrained(path)
        dist.barrier()
        state = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).state_dict()
        expected = reference.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key].cpu()) for key in state)


def assert_refused(message: str, call: Callable) -> None:
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


@check
def tensor_refusals(folder: Path) -> None:
    def refused(message: str, *arguments, **fields) -> None:
        assert_refused(message, lambda: load(folder, *arguments, **fields))

    refused("tp_size=2: must divide num_key_value_heads, 3", "three heads", TENSOR)
    refused("tp_size=2: must divide the head groups of head_group_size=2, 3", "six heads", TENSOR, head_group_size=2)
    refused("tp_size=2: the simple scheme", "joint", TENSOR, head_group_size=2, use_kivi=False)
    plan = {"model.layers.*.self_attn.q_proj": "colwise_gather_output"}
    refused("tp_plan: q_proj must be 'colwise'", "joint", {"tp_size": 2, "tp_plan": plan})
    model = load(folder, "joint", TENSOR)
    assert_refused("to_dense: a rank of 2", model.to_dense)
    assert_refused("distributed_checkpoint=True", lambda: model.save_pretrained(folder, distributed_checkpoint=True))


# ---- pipeline parallel


@check
def pipeline(folder: Path) -> None:
    for name in (SPLITS[0], SPLITS[1], SPLITS[4]):
        model, reference = load(folder, name, PIPELINE), load(folder, name)
        own = [[0], [1, 2]][dist.get_rank()]
        assert list(model.local_attentions()) == own
        cache, whole = assert_same(model, reference, TWO_BITS)
        for i, layer in enumerate(cache.layers):
            assert layer.is_initialized == (i in own)
            assert layer.nbytes_used == (whole.layers[i].nbytes_used if i in own else 0)
            assert i in own or layer.nbytes == 0
        assert cache.nbytes_used < whole.nbytes_used == total(cache.nbytes_used)


@check
def pipeline_blocks(folder: Path) -> None:
    model, reference = (load_blocks(folder, "blocks of two heads", sizes) for sizes in (PIPELINE, None))
    cache, whole = assert_same(model, reference, TWO_BITS)
    own = dist.get_rank()
    assert [layer.is_initialized for layer in cache.layers] == [own == 0, own == 1]
    assert cache.nbytes_used == whole.layers[own].nbytes_used
    # Stages of two layers cut a block of three.
    model = load_blocks(folder, "blocks of all heads", PIPELINE)
    assert_refused("layers 0 to 2 share their latents and must be on one device, in one stage", model.create_kivi_cache)


@check
def pipeline_generation(folder: Path) -> None:
    """Beams, a cache of the model's own making, a conversation, a crop, fixed capacity."""
    model, reference = load(folder, "joint", PIPELINE), load(folder, "joint")
    assert_same_tokens(model, reference, TWO_BITS, num_beams=3)
    assert_same_tokens(model, reference, {**TWO_BITS, "capacity": 256})
    assert_same_tokens(model, reference, LOSSLESS)
    ids, mask = batch()
    own, theirs = (m.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False) for m in (model, reference))
    assert own.tolist() == theirs.tolist()
    results = []
    for m in (model, reference):
        cache = m.create_kivi_cache(**TWO_BITS)
        steps(m, cache, ids, mask)
        cache.crop(-40)
        assert cache.get_seq_length() == 110
        how = {"past_key_values": cache, "max_new_tokens": 15, "do_sample": False}
        results.append(m.generate(ids, attention_mask=mask, **how))
    assert results[0].tolist() == results[1].tolist()


@check
def pipeline_of_a_stock_llama(folder: Path) -> None:
    """Our cache as a drop-in in the library's own pipeline."""
    caches = assert_same_stock_llama(folder, PIPELINE)
    assert total(caches[0].nbytes_used) == caches[1].nbytes_used


@check
def pipeline_refusals(folder: Path) -> None:
    model = load(folder, "joint", PIPELINE)
    assert_refused("save_pretrained: a stage of a pipeline", lambda: model.save_pretrained(folder))
    assert_refused("to_dense: a stage of a pipeline", model.to_dense)


def main(folder: Path, backend: str, seconds: int) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    results = {}
    for name, function in CHECKS.items():
        try:
            function(folder)
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
        if results[name] != "passed":
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
