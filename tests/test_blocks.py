"""Blocks of projections: one latent for keys and values, and for several layers (`keep_dense=True`)."""

import copy
import itertools
import weakref
from functools import partial

import pytest
import torch
from test_generation import DRAFTLESS, LOSSLESS, MODES, generated, looking_up, padded, text
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from configuration_alrd_llama import ALRDLlamaConfig, Block
from modeling_alrd_llama import ALRDLlamaForCausalLM, ALRDLlamaModel
from modules.cache.pool import BlockPool
from modules.cache.scheme import TABLE_ENTRY_NBYTES, CacheScheme
from modules.kivi_cache import KIVILatentCache, KIVILatentLayer, config_sink_channels, create_kivi_cache
from modules.loading import check_whole_blocks
from modules.svd_linear import BlockFactors, factor_block
from tests.helpers import TINY_LLAMA, randomize_vectors, tiny_blocks, tiny_dense

#: Two bits, small blocks.
TWO_BITS = {"k_bits": 2, "v_bits": 2, "group_size": 8, "residual_length": 5, "sink_length": 3}

#: Layers of a group, keys and values together, heads of a head group.
SHAPES = list(itertools.product([1, 2, 3], [False, True], [None, 1]))


def shape_fields(shape) -> dict:
    return dict(zip(("layer_group_size", "joint_kv", "head_group_size"), shape, strict=True))


def four_layers(**overrides) -> LlamaForCausalLM:
    """Groups of two and two, or three and one."""
    return tiny_dense(num_hidden_layers=4, pad_token_id=None, **overrides)


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    fields = {name: value for name, value in TINY_LLAMA.items() if name not in ("num_hidden_layers", "pad_token_id")}
    model = Qwen2ForCausalLM(Qwen2Config(**fields, num_hidden_layers=4, use_sliding_window=False))
    randomize_vectors(model)
    return model.eval()


@pytest.fixture(scope="module")
def dense():
    return four_layers()


@torch.no_grad()
def logits(model, ids: torch.Tensor, cache=None) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits


# Configuration


def test_blocks_of_a_configuration():
    config = ALRDLlamaConfig(num_hidden_layers=4, keep_dense=True, layer_group_size=3, num_key_value_heads=8)
    assert config.blocks() == [Block(0, 2, "k"), Block(0, 2, "v"), Block(3, 3, "k"), Block(3, 3, "v")]
    assert config.blocks()[2].name == "model.layers.3.self_attn.k_latent"
    assert [m.name for m in Block(3, 4, "kv").members()] == [
        f"model.layers.{i}.self_attn.{side}_proj" for i in (3, 4) for side in "kv"
    ]
    assert [config.full_rank(block) for block in config.blocks()] == [3 * 1024, 3 * 1024, 1024, 1024]
    assert [config.cache_layer(i) for i in range(4)] == [0, 0, 0, 1]
    joint = ALRDLlamaConfig(num_hidden_layers=4, keep_dense=True, layer_group_size=2, joint_kv=True)
    assert [block.name for block in joint.blocks()] == [
        "model.layers.0.self_attn.kv_latent",
        "model.layers.2.self_attn.kv_latent",
    ]


BLOCKS = {"keep_dense": True, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
KV = "model.layers.0.self_attn.kv_latent"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_dense": 1}, "keep_dense=1: must be True or False"),
        ({"keep_dense": False, "joint_kv": True}, "joint_kv=True: must be False without keep_dense=True"),
        ({"keep_dense": False, "layer_group_size": 2}, "layer_group_size=2: must be 1 without keep_dense=True"),
        ({"layer_group_size": 0}, "layer_group_size=0: must be an integer from 1 to num_hidden_layers=2"),
        ({"layer_group_size": 3}, "layer_group_size=3: must be an integer from 1 to num_hidden_layers=2"),
        ({"layer_group_size": True}, "layer_group_size=True: must be an integer"),
        ({"use_kivi": False}, "use_kivi=False: must be True with keep_dense=True"),
        ({"k_mean_split": True}, "k_mean_split=True: must be False with keep_dense=True"),
        ({"joint_kv": True, "v_scheme": {"group_size": 64}}, "v_scheme: must be None with joint_kv=True"),
        ({"joint_kv": True, "v_bits": 4}, "v_bits=4: must be k_bits or left out with joint_kv=True"),
        ({"truncation_ranks": {"model.layers.0.self_attn.k_proj": 4}}, "no such block with keep_dense=True"),
        ({"truncation_ranks": {"model.layers.0.self_attn.k_latent": 4}}, "must name all blocks .* 'model.layers.0"),
        ({"joint_kv": True, "layer_group_size": 2, "truncation_ranks": {KV: 257}}, "from 1 to the full rank 256"),
        (
            {"joint_kv": True, "layer_group_size": 2, "truncation_ranks": {KV: 8}, "width_tiers": {KV: [[[7, 2]]]}},
            "tiers of .7. channels must fill the group ranks .8.",
        ),
    ],
    ids=str,
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ALRDLlamaConfig(**{**BLOCKS, **fields})


def test_another_width_beside_the_tiers_of_a_joint_block_is_refused():
    fields = {"joint_kv": True, "layer_group_size": 2, "truncation_ranks": {KV: 8}, "width_tiers": {KV: [[[8, 4]]]}}
    config = ALRDLlamaConfig(**BLOCKS, **fields)
    with pytest.raises(ValueError, match="k_bits=4: must be 2 as stored"):
        ALRDLlamaConfig.from_llama(config, k_bits=4)


# Factors


@pytest.mark.parametrize("rotate", [False, True])
def test_factors_of_a_block_are_the_svd_of_the_stacked_weights(rotate, dense):
    fields = {"layer_group_size": 2, "joint_kv": True, "head_group_size": 2, "k_hadamard": rotate}
    model = tiny_blocks(dense, 0.4, **fields)
    assert model.config.truncation_ranks["model.layers.2.self_attn.kv_latent"] == [51, 51]
    members = [(layer, side) for layer in (2, 3) for side in "kv"]
    weights = [getattr(dense.model.layers[i].self_attn, f"{side}_proj").weight.double() for i, side in members]
    factors = [getattr(model.model.layers[i].self_attn, f"{side}_latent") for i, side in members]
    for group in range(2):
        rows = slice(32 * group, 32 * group + 32)
        stacked = torch.cat([w[rows] for w in weights])
        b = torch.cat([f.BLinear.weight[51 * group : 51 * group + 51] for f in factors], dim=1).double()
        a = torch.cat([f.ALinear.weight[rows] for f in factors]).double()
        u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
        assert torch.allclose(a @ b @ stacked, (u[:, :51] * s[:51]) @ vh[:51], atol=1e-5)
        assert torch.allclose(a.T @ a, torch.eye(51, dtype=torch.float64), atol=1e-5)


def test_a_block_can_have_more_channels_than_hidden_states():
    weights = [torch.randn(24, 16) for _ in range(3)]
    (factors,) = factor_block(weights, (72,))
    assert torch.allclose(torch.cat(factors.a) @ torch.cat(factors.project, dim=1), torch.eye(72).double())


def test_a_member_at_its_mean_has_no_latent_and_comes_back():
    dense = four_layers(attention_bias=True)
    shape = {"layer_group_size": 2, "joint_kv": True, "head_group_size": 1}
    model = tiny_blocks(dense, 0.2, block_splits(dense, shape, 0.2), **shape)
    means = block_splits(dense, shape, 0.2)[2]["kv_latent"]["factors"]
    for member, (layer, side) in enumerate([(2, "k"), (2, "v"), (3, "k"), (3, "v")]):
        attention = model.model.layers[layer].self_attn
        factors, projection = getattr(attention, f"{side}_latent"), getattr(attention, f"{side}_proj")
        y = torch.cat([group.mean[member] for group in means]).float() + projection.bias
        assert factors.BLinear(y).abs().max() < 1e-4
        assert torch.allclose(factors.ALinear(torch.zeros(sum(factors.ALinear.ranks))), y, atol=1e-6)


# Lossless: the dense model's text


def lossless(dense, shape, **fields):
    return tiny_blocks(dense, **shape_fields(shape), **LOSSLESS, **fields)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lossless_is_the_dense_model(dense, shape):
    model = lossless(dense, shape)
    found = generated(model, {}, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generated(dense, {}))
    cache = found.past_key_values
    assert isinstance(cache, KIVILatentCache) and len(cache.layers) == -(-4 // shape[0])
    assert ("keys and values 16-bit" if shape[1] else "keys 16-bit, values 16-bit") in repr(cache)
    assert all(len(row.blocks) >= 2 for layer in cache.layers for row in layer.rows)
    assert torch.equal(generated(model, {"prefill_chunk_size": 9}), found.sequences)


@pytest.fixture(scope="module")
def pair(dense):
    return dense, lossless(dense, (3, True, None))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_all_modes_are_the_dense_model(pair, mode):
    dense, model = pair
    assert torch.equal(generated(model, mode), generated(dense, mode))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_all_modes_with_a_fixed_capacity(pair, mode):
    dense, model = pair
    cache = model.create_kivi_cache(capacity=200)
    assert torch.equal(generated(model, mode, past_key_values=cache), generated(dense, mode))
    assert all(len(row.blocks) >= 2 for layer in cache.layers for row in layer.rows)


@pytest.mark.parametrize("ours", ["target", "assistant", "both"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=str)
def test_assisted_decoding(dense, sampling, ours, monkeypatch):
    model, other = lossless(dense, (2, True, None)), tiny_dense(1, num_hidden_layers=2, pad_token_id=None)
    target = dense if ours == "assistant" else model
    draft = {"target": other, "assistant": model, "both": model}[ours]
    monkeypatch.setattr(draft.generation_config, "num_assistant_tokens", 20)
    monkeypatch.setattr(draft.generation_config, "assistant_confidence_threshold", 0.0)
    # The dense model's own text with the same drafts: samples depend on them.
    expected = generated(dense, sampling, looking_up(), assistant_model=other if ours == "target" else dense)
    if sampling and ours != "target":
        monkeypatch.setattr(dense.generation_config, "num_assistant_tokens", 20)
        monkeypatch.setattr(dense.generation_config, "assistant_confidence_threshold", 0.0)
        expected = generated(dense, sampling, looking_up(), assistant_model=copy.deepcopy(dense))
    assert torch.equal(generated(target, sampling, looking_up(), assistant_model=draft), expected)


@pytest.mark.parametrize("mode", DRAFTLESS.values(), ids=DRAFTLESS)
def test_speculation_without_a_second_model(dense, mode):
    model = lossless(dense, (2, False, 1))
    if "assistant_early_exit" in mode:
        mode = {"assistant_early_exit": 2}
    assert torch.equal(generated(model, mode, looking_up()), generated(dense, mode, looking_up()))


@pytest.mark.parametrize("kind", ["mha", "qwen2", "biases", "pads within", "no sinks"])
@pytest.mark.parametrize("shape", [(3, True, None), (2, False, 1)], ids=str)
def test_kinds_of_models_and_prompts(kind, shape):
    fields, prompt = {}, padded()
    if kind == "qwen2":
        dense = tiny_qwen2()
    else:
        overrides = {"mha": {"num_key_value_heads": 8, "head_dim": 8}, "biases": {"attention_bias": True}}
        dense = four_layers(**overrides.get(kind, {}))
    if kind == "pads within":  # rows whose sinks are complete at different steps
        prompt["attention_mask"][0, :39] = 0
    if kind == "no sinks":
        fields["sink_length"] = 0
    model = tiny_blocks(dense, **shape_fields(shape), **(LOSSLESS | fields))
    assert torch.equal(generated(model, {}, prompt), generated(dense, {}, prompt))
    assert torch.equal(generated(model, {"num_beams": 3}, prompt), generated(dense, {"num_beams": 3}, prompt))


def test_without_a_packed_cache_it_is_the_dense_model(dense):
    model = tiny_blocks(dense, 0.1, layer_group_size=2, joint_kv=True)
    assert torch.equal(logits(model, text()), logits(dense, text()))
    assert torch.equal(generated(model, {}, use_cache=False), generated(dense, {}))


@pytest.mark.parametrize("shape", [(3, True, None), (2, False, 1)], ids=str)
def test_attention_weights(dense, shape):
    model, eager = lossless(dense, shape), copy.deepcopy(dense)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    cache, ids = model.create_kivi_cache(), text(2, 50)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        found = model(ids[:, 40:], past_key_values=cache, output_attentions=True).attentions
        expected = eager(ids, output_attentions=True).attentions
    assert len(found) == 4
    for x, y in zip(found, expected, strict=True):
        assert x.shape == (2, 8, 10, 50)
        assert torch.allclose(x, y[:, :, 40:], atol=1e-4)


# Quantized: what is stored, and what is attended to


def block_splits(dense, shape: dict, share: float, static: bool = False, tiers: dict | None = None) -> list[dict]:
    """Factors of random directions with means, as a calibration gives them, and scales of their latents."""
    config = tiny_blocks(dense, share, **shape).config
    generator, splits = torch.Generator().manual_seed(5), [{} for _ in range(4)]
    for block in config.blocks():
        groups, out = [], config.group_outputs
        for rank in config.group_ranks(block):
            whole = torch.randn(out * len(block.members()), out * len(block.members()), generator=generator).double()
            a = torch.linalg.qr(whole)[0][:, :rank] * torch.linspace(3, 0.3, rank)
            means = torch.randn(len(a), generator=generator).double().split(out)
            groups.append(BlockFactors(list(a.split(out)), list(torch.linalg.pinv(a).split(out, dim=1)), list(means)))
        splits[block.first][block.attribute] = {"factors": groups}
        if static:
            rank = sum(config.group_ranks(block))
            bits = torch.tensor([b for group in (tiers or {}).get(block.name, []) for n, b in group for _ in range(n)])
            step = 12.0 / (2.0 ** (bits if len(bits) else torch.full((rank,), 2.0)) - 1)
            scales = (step, torch.full((rank,), -6.0))
            splits[block.first][block.attribute]["static_scales"] = scales
    return splits


QUANTIZED = {
    "two bits": {},
    "static": {"k_scheme": {"static": True}, "k_bits": 2},
    "token scale": {"k_scheme": {"static": True, "token_scale": True}},
    "token scale and tiers": {"k_scheme": {"static": True, "token_scale": True}, "tiers": True},
}


def quantized_model(dense, shape: dict, kind: dict, share: float = 0.3) -> ALRDLlamaForCausalLM:
    kind = dict(kind)
    fields, tiers = {**shape, **TWO_BITS, **kind}, {}
    if fields.pop("tiers", False):
        for block in (blocks := tiny_blocks(dense, share, **shape).config).blocks():
            if block.settings_side == "k":
                tiers[block.name] = [[[r // 2, 4], [r - r // 2, 2]] for r in blocks.group_ranks(block)]
        fields["width_tiers"] = tiers
    static = "k_scheme" in kind
    if static:
        fields["k_hadamard"] = False
        if not shape["joint_kv"]:
            fields["v_scheme"] = kind["k_scheme"] | {"orientation": "per_channel"}
    splits = block_splits(dense, shape, share, static, tiers)
    fields["truncation_ranks"] = tiny_blocks(dense, share, **shape).config.truncation_ranks
    return tiny_blocks(dense, share, splits, **fields)


def member_attention(attention, query, keys, values, positions, new: int) -> torch.Tensor:
    """Plain attention in float64 of the last `new` of all tokens: `[B, L, H_q * d]`; keys before RoPE `[B, T, …]`."""
    d, heads = attention.head_dim, keys.shape[2] // attention.head_dim
    q = query.double().unflatten(2, (-1, d)).transpose(1, 2)
    k, v = (x.double().unflatten(2, (heads, d)).transpose(1, 2) for x in (keys, values))
    angle = torch.arange(keys.shape[1]).double()[:, None] * positions.double()
    cos, sin = torch.cat([angle, angle], -1).cos()[None], torch.cat([angle, angle], -1).sin()[None]
    q = apply_rotary_pos_emb(q, q, cos[:, -new:], sin[:, -new:])[0]
    k = apply_rotary_pos_emb(k, k, cos, sin)[1]
    k, v = (x.repeat_interleave(q.shape[1] // heads, dim=1) for x in (k, v))
    scores = q @ k.mT * attention.scaling
    mask = torch.ones(new, keys.shape[1]).tril(keys.shape[1] - new).bool()
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("shape", [(3, True, None), (2, True, 1), (2, False, 2), (1, False, None)], ids=str)
def test_attention_is_that_over_expanded_latents_and_exact_sinks(shape, kind, backend):
    check_attention(shape, kind, backend)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "kind"), [((2, True, 1), "token scale and tiers"), ((2, False, 2), "two bits")], ids=str
)
def test_triton_attends_to_blocks(shape, kind):
    check_attention(shape, QUANTIZED[kind], "triton")


def check_attention(shape, kind: dict, backend: str) -> None:
    """The outputs of all layers are those of plain attention over sinks, expanded latents and new tokens."""
    dense, new = four_layers(attention_bias=True), 3
    model, ids = quantized_model(dense, shape_fields(shape), kind), text(2, 53)
    cache = model.create_kivi_cache(backend=backend)
    logits(model, ids[:, :50], cache)
    assert all(len(row.blocks) == 5 for layer in cache.layers for row in layer.rows)
    held = [(layer.states(), layer.exact.clone().sinks) for layer in cache.layers]
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            hook = lambda module, _, output, key=(i, name): seen.__setitem__(key, output)  # noqa: E731
            hooks.append(getattr(layer.self_attn, name).register_forward_hook(hook))
        hook = lambda module, inputs, key=(i, "output"): seen.__setitem__(key, inputs[0])  # noqa: E731
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(hook))
    logits(model, ids[:, 50:], cache)
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        latents, sinks = held[i // shape[0]]
        member = slice(64 * (i % shape[0]), 64 * (i % shape[0]) + 64)
        keys, values = (
            torch.cat([sinks[side][:, :, member], factors.ALinear(latent), seen[i, name]], dim=1)
            for side, factors, latent, name in (
                ("keys", attention.k_latent, latents[0], "k_proj"),
                ("values", attention.v_latent, latents[1], "v_proj"),
            )
        )
        inv_freq = model.model.rotary_emb.inv_freq
        expected = member_attention(attention, seen[i, "q_proj"], keys, values, inv_freq, new)
        assert torch.allclose(seen[i, "output"].double(), expected, atol=2e-4 * expected.abs().max().item()), i


@pytest.mark.parametrize("layers", [1, 2])
def test_nobody_holds_the_storage_that_a_pool_has_outgrown(dense, layers, monkeypatch):
    """What a step reads is let go before the cache is given its tokens."""
    model, seen = quantized_model(dense, shape_fields((layers, True, None)), {}), []
    grow = BlockPool._grow

    def grown(pool, capacity):
        old = weakref.ref(pool.sides()[0])
        grow(pool, capacity)
        seen.append(old())

    cache, ids = model.create_kivi_cache(), text(1, 90)
    logits(model, ids[:, :50], cache)
    monkeypatch.setattr(BlockPool, "_grow", grown)
    for i in range(50, 90):
        logits(model, ids[:, i : i + 1], cache)
    assert seen and not any(seen)


@pytest.mark.parametrize("shape", [(3, True, None), (2, True, 1), (2, False, 2), (1, False, None)], ids=str)
def test_the_cache_holds_the_quantized_sums_of_all_members(dense, shape):
    model = quantized_model(dense, shape_fields(shape), {})
    parts = {}
    for i, layer in enumerate(model.model.layers):
        for side in "kv":
            hook = lambda module, _, output, key=(i, side): parts.__setitem__(key, output.clone())  # noqa: E731
            getattr(layer.self_attn, f"{side}_latent").BLinear.register_forward_hook(hook)
    cache = model.create_kivi_cache()
    logits(model, text(2, 50), cache)
    for layer, first in zip(cache.layers, range(0, 4, shape[0]), strict=True):
        own = range(first, min(first + shape[0], 4))
        for states, sides in zip(layer.states(), ("kv", "kv") if shape[1] else ("k", "v"), strict=True):
            z = sum(parts[i, side] for i in own for side in sides)[:, 3:]
            codec = layer.pool.codecs["keys" if "k" in sides else "values"]
            packed = z[:, :40].reshape(10, 8, -1)
            decoded = codec.decode(codec.encode(packed)).reshape(2, 40, -1)
            assert torch.allclose(states[:, 40:], z[:, 40:], rtol=1e-5, atol=1e-5)
            # A sum in another order may round to another code, once in many.
            assert (states[:, :40] - decoded).abs().gt(1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(3, True, None), (2, False, 1)], ids=str)
def test_sinks_outside_all_kept_directions_are_exact(dense, shape, backend):
    """At rank one nothing of four random tokens survives in a latent; as sinks they are what the dense model has."""
    model, ids = tiny_blocks(dense, 0.001, **shape_fields(shape), **(TWO_BITS | {"sink_length": 4})), text(2, 20)
    assert set(itertools.chain(*model.config.truncation_ranks.values())) == {1}
    cache = model.create_kivi_cache(backend=backend)
    logits(model, ids[:, :4], cache)
    assert torch.allclose(logits(model, ids[:, 4:], cache), logits(dense, ids)[:, 4:], atol=1e-4)
    # The tokens behind them are latents of one channel now, which is far from the dense model.
    new = text(2, 1, seed=8)
    found, expected = logits(model, new, cache), logits(dense, torch.cat([ids, new], dim=1))[:, -1:]
    assert not torch.allclose(found, expected, atol=1e-1)


# The cache of a block


def block_layer(joint: bool, **settings) -> KIVILatentLayer:
    widths = ((5, 8),) if joint else ((5, 8), (7, 3))
    return KIVILatentLayer(CacheScheme(**{**TWO_BITS, **settings}), widths)


def block_states(joint: bool, batch: int, length: int) -> tuple[dict, dict]:
    """Latents by argument of `append`, and the members' own states."""
    latents = {"keys": torch.randn(batch, length, 13), "values": torch.randn(batch, length, 10)}
    if joint:
        del latents["values"]
    return latents, {"keys": torch.randn(batch, length, 48), "values": torch.randn(batch, length, 48)}


def feed(layer, latents: dict, dense: dict, chunks: list[int], real: torch.Tensor | None = None):
    start = 0
    for size in chunks:
        piece = slice(start, start + size)
        own = None if real is None else real[:, piece]
        slots = layer.sink_slots(own, size)
        first = {side: x[:, start : start + slots] for side, x in dense.items()}
        layer.append(**{side: x[:, piece] for side, x in latents.items()}, real=own, dense=first)
        start += size
    return layer


def assert_same_layers(found: KIVILatentLayer, expected: KIVILatentLayer) -> None:
    for a, b in zip(found.rows, expected.rows, strict=True):
        assert (a.sinks, a.window, a.counts) == (b.sinks, b.window, b.counts)
    for i, row in enumerate(expected.rows):
        for x, y in zip(found.exact.sinks.values(), expected.exact.sinks.values(), strict=True):
            assert torch.equal(x[i, : row.sinks], y[i, : row.sinks])
        for x, y in zip(found.exact.window.values(), expected.exact.window.values(), strict=True):
            assert torch.equal(x[i, : row.window], y[i, : row.window])
        for side, fields in expected.pool.storage.items():
            for name, stored in fields.items():
                own = found.pool.storage[side][name][list(found.rows[i].blocks)]
                assert torch.equal(own, stored[list(row.blocks)])


@pytest.mark.parametrize("joint", [False, True])
def test_feeding_order_does_not_matter(joint):
    latents, dense = block_states(joint, 2, 60)
    whole = feed(block_layer(joint), latents, dense, [60])
    assert whole.sinks()[0].keys.shape == (2, 1, 3, 48) and torch.equal(whole.exact.sinks["keys"], dense["keys"][:, :3])
    for chunks in ([1] * 60, [2, 1, 30, 27], [16] * 3 + [12]):
        assert_same_layers(feed(block_layer(joint), latents, dense, chunks), whole)


@pytest.mark.parametrize("joint", [False, True])
def test_pads_are_not_stored(joint):
    latents, dense = block_states(joint, 3, 40)
    real = torch.rand(3, 40) > 0.3
    real[2, :21] = False
    for chunks in ([40], [1] * 40, [7, 20, 13]):
        together = feed(block_layer(joint), latents, dense, chunks, real)
        for i in range(3):
            own = [{side: x[i : i + 1, real[i]] for side, x in states.items()} for states in (latents, dense)]
            alone = feed(block_layer(joint), *own, [int(real[i].sum())])
            row = copy.copy(together)
            row.selection([i])()
            assert_same_layers(row, alone)


@pytest.mark.parametrize("joint", [False, True])
def test_true_size(joint):
    latents, dense = block_states(joint, 2, 60)
    layer = feed(block_layer(joint), latents, dense, [60])
    # 3 sinks, 6 blocks of 8, a window of 9. Per channel and block 8 codes of 2 bits in a word, a scale, a zero point.
    key_block = 13 * (4 + 2 + 2)
    # Per token and head group: the codes of 10 channels for 8 tokens, two scales and zero points for each token.
    value_block = 0 if joint else 10 * 4 + 8 * 2 * (2 + 2)
    packed = 6 * (key_block + value_block + TABLE_ENTRY_NBYTES)
    exact = 4 * (3 * (48 + 48) + 9 * (13 + 10 * (not joint)))
    assert layer.nbytes_used == 2 * (packed + exact)
    widths = layer.widths
    assert layer.scheme.layer_nbytes(60, widths, torch.float32, {"keys": 48, "values": 48}) == packed + exact


def test_size_of_a_model_s_cache(dense):
    for shape in SHAPES:
        model = quantized_model(dense, shape_fields(shape), QUANTIZED["token scale"])
        cache = model.create_kivi_cache()
        logits(model, text(2, 57), cache)
        expected = 0
        for i, layer in enumerate(cache.layers):
            members = min(shape[0], 4 - i * shape[0])
            assert layer.sink_channels == {"keys": 64 * members, "values": 64 * members}
            assert layer.sink_channels == config_sink_channels(model.config)[i]
            size = layer.scheme.layer_nbytes(57, layer.widths, torch.float32, layer.sink_channels)
            expected += 2 * size + layer.scheme.static_nbytes(layer.widths)
        assert cache.nbytes_used == expected <= cache.nbytes


def test_states_that_do_not_fit_are_refused():
    latents, dense = block_states(False, 2, 20)
    layer = feed(block_layer(False), latents, dense, [20])
    for wrong, message in (
        ({"values": None}, "values: the layer holds keys and values, got keys"),
        ({"dense": None}, "dense: states of None channels must be of"),
        ({"dense": {side: x[:, :, :-1] for side, x in dense.items()}}, "dense: states of .* must be of"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.append(**{**latents, "dense": dense, **wrong})
    assert_same_layers(layer, feed(block_layer(False), latents, dense, [20]))


def assert_goes_on(model, dense, cache, ids: torch.Tensor) -> None:
    """A lossless cache that holds the text of `ids` goes on as the dense model does."""
    assert cache.row_tokens() == [ids.shape[1]] * len(ids)
    new = text(len(ids), 3, seed=11)
    found, expected = logits(model, new, cache), logits(dense, torch.cat([ids, new], dim=1))[:, -3:]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, True, None), (2, False, 1)], ids=str)
def test_edits_of_a_cache(dense, shape, tmp_path):
    model, ids = lossless(dense, shape), text(2, 50)
    filled = model.create_kivi_cache()
    logits(model, ids, filled)
    fork = filled.fork()
    fork.crop(-9)  # into a packed block
    assert_goes_on(model, dense, fork, ids[:, :41])
    short = filled.fork()
    short.crop(-48)  # into the sinks: the third one is to come
    assert_goes_on(model, dense, short, ids[:, :2])
    swapped = filled.fork()
    swapped.reorder_cache(torch.tensor([1, 1]))
    assert_goes_on(model, dense, swapped, ids[[1, 1]])
    repeated = copy.deepcopy(filled)
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([1, 2]))
    assert_goes_on(model, dense, repeated, ids)
    filled.save(tmp_path / "cache")
    loaded = KIVILatentCache.load(tmp_path / "cache", model=model)
    for layer, own in zip(loaded.layers, filled.layers, strict=True):
        assert layer.sink_channels == own.sink_channels
        assert_same_layers(layer, own)
    assert loaded.nbytes_used == filled.nbytes_used
    assert_goes_on(model, dense, loaded, ids)
    assert_goes_on(model, dense, filled, ids)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_forward_pass_that_stops_leaves_the_cache_as_it_was(dense, failing, monkeypatch):
    model, ids = lossless(dense, (2, True, None)), text(2, 30)
    cache = model.create_kivi_cache()

    def fail(*args, **kwargs):
        raise MemoryError("stopped")

    for start, stop in ((0, 20), (20, 30)):
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[failing].mlp, "forward", fail)
            with pytest.raises(MemoryError):
                logits(model, ids[:, start:stop], cache)
        assert cache.row_tokens() == ([start] * 2 if start else [])
        logits(model, ids[:, start:stop], cache)
    assert_goes_on(model, dense, cache, ids)


# Models: saved, loaded, refused


@pytest.mark.parametrize("kind", ["two bits", "token scale and tiers"])
@pytest.mark.parametrize("shape", [(3, True, None), (2, False, 2)], ids=str)
def test_a_saved_model_is_the_same(dense, shape, kind, tmp_path):
    model = quantized_model(dense, shape_fields(shape), QUANTIZED[kind])
    expected = generated(model, {})
    model.save_pretrained(tmp_path / "split")
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split")
    assert torch.equal(generated(loaded, {}), expected)
    assert not torch.equal(expected, generated(dense, {}))
    back = loaded.to_dense()
    assert type(back) is LlamaForCausalLM and back.config.to_dict().keys() == dense.config.to_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    with pytest.raises(ValueError, match=f"joint_kv={not shape[1]}: must be {shape[1]} as stored"):
        ALRDLlamaForCausalLM.from_pretrained(
            tmp_path / "split", config=tiny_blocks(dense, **shape_fields((shape[0], not shape[1], None))).config
        )


def test_a_dense_checkpoint_is_split_while_it_is_loaded(dense, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    expected = tiny_blocks(dense, 0.3, layer_group_size=2, joint_kv=True)
    loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=expected.config, dtype=torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="device_map: must not be given where a dense checkpoint is split into blocks"):
        ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=expected.config, device_map="auto")
    with pytest.raises(ValueError, match="output_loading_info: must not be given"):
        ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=expected.config, output_loading_info=True)
    with pytest.raises(ValueError, match="k_bits=4: must not be given beside config, whose field it is"):
        ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=expected.config, k_bits=4)
    with pytest.raises(ValueError, match="truncation_ranks: must name all blocks"):
        ALRDLlamaForCausalLM(ALRDLlamaConfig.from_llama(dense.config, keep_dense=True))


def test_type_and_class_of_what_is_split_while_it_is_loaded(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    config = tiny_blocks(dense, 0.3, layer_group_size=2).config
    how = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    fields = {"keep_dense": True, "layer_group_size": 2, "truncation_ranks": config.truncation_ranks, "k_bits": 4}
    for blocks in ({"config": config}, fields):
        loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path, **blocks, **how)
        assert (loaded.dtype, loaded.config._attn_implementation) == (torch.bfloat16, "eager")
        assert loaded.config.k_bits == blocks.get("k_bits", 2)
    decoder = ALRDLlamaModel.from_pretrained(tmp_path, config=config)
    assert type(decoder) is ALRDLlamaModel


def test_a_model_of_blocks_is_split_anew(dense):
    blocks = tiny_blocks(dense, 0.3, layer_group_size=2, joint_kv=True)
    single = ALRDLlamaConfig.from_llama(dense.config, truncation_ranks={"model.layers.1.self_attn.k_proj": 16})
    for config in (tiny_blocks(dense, 0.5, layer_group_size=3).config, single):
        found, expected = (ALRDLlamaForCausalLM.from_dense(source, config).state_dict() for source in (blocks, dense))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_weights_on_disk(dense, tmp_path):
    model = lossless(dense, (2, True, None))
    model.save_pretrained(tmp_path / "split")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    cut = {f"model.layers.{i}": "disk" for i in range(4)}
    how = {"device_map": {**places, **cut}, "offload_folder": str(tmp_path / "off")}
    offloaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "split", **how)
    assert offloaded.model.layers[0].self_attn.k_latent.ALinear.weight.is_meta
    assert torch.equal(generated(offloaded, {}), generated(dense, {}))


@torch.no_grad()
def test_a_step_of_fixed_capacity_waits_for_nothing(dense):
    """On a device without data every read by the host is an error."""
    model = tiny_blocks(dense, 0.3, layer_group_size=3, joint_kv=True, **TWO_BITS).to("meta")
    cache = model.create_kivi_cache(capacity=300)
    for length in (50, 1, 16, 2):
        ids = torch.zeros((3, length), dtype=torch.long, device="meta")
        assert model(ids, past_key_values=cache).logits.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        cache.row_tokens()


@pytest.mark.parametrize("capacity", [None, 128])
def test_a_compiled_model_runs_its_steps_as_they_are(dense, capacity):
    model = lossless(dense, (2, True, None))
    cache, step = model.create_kivi_cache(capacity=capacity), torch.compile(model, backend="eager")
    ids = text(2, 40)
    with torch.no_grad():
        found = torch.cat([step(ids[:, i : i + 10], past_key_values=cache).logits for i in range(0, 40, 10)], dim=1)
    assert torch.allclose(found, logits(dense, ids), atol=1e-4)


def test_bfloat16_is_near_the_dense_model(dense):
    model = tiny_blocks(copy.deepcopy(dense).bfloat16(), layer_group_size=2, joint_kv=True, **LOSSLESS)
    cache, ids = model.create_kivi_cache(), text(2, 60)
    logits(model, ids[:, :40], cache)
    found = torch.cat([logits(model, ids[:, i : i + 1], cache) for i in range(40, 60)], dim=1).float()
    plain = logits(copy.deepcopy(dense).bfloat16(), ids)[:, 40:].float()
    exact = logits(dense, ids)[:, 40:]
    ours, theirs = ((exact.log_softmax(-1) - x.log_softmax(-1)).mul(exact.softmax(-1)).sum() for x in (found, plain))
    assert ours < 2 * theirs


def test_splits_must_have_every_block(dense):
    config = lossless(dense, (3, True, None)).config
    with pytest.raises(ValueError, match=r"splits: of layer 3 name \[\]; must have 'kv_latent' too"):
        ALRDLlamaForCausalLM.from_dense(dense, config, [{"kv_latent": {}}])
    with pytest.raises(ValueError, match=r"splits: of layer 0 name \['k_proj'\]; must have 'kv_latent' too"):
        ALRDLlamaForCausalLM.from_dense(dense, config, [{"k_proj": {}}] * 4)


def test_a_cache_of_another_layout_is_refused(tmp_path, dense):
    """By a dense model and by a split one, empty or filled, and from a file: never taken for its own keys."""
    joint, apart = lossless(dense, (3, True, None)), lossless(dense, (1, False, None))
    for model in (joint, apart):
        filled, ids = model.create_kivi_cache(), text()
        logits(model, ids, filled)
        filled.save(tmp_path / "cache", model)
        for cache in (model.create_kivi_cache(), filled, KIVILatentCache.load(tmp_path / "cache")):
            with pytest.raises(
                ValueError, match=r"past_key_values: layer 0 is for latents of .* must be a cache of no"
            ):
                logits(dense, ids, cache)
    with pytest.raises(ValueError, match=r"layer 0 is for keys and values of .* must be of \(\(64,\), \(64,\)\)"):
        logits(apart, text(), joint.create_kivi_cache())


def test_what_is_refused(dense):
    model = lossless(dense, (3, True, None))
    with pytest.raises(ValueError, match="an exit after 2 layers is inside a block"):
        generated(model, {"assistant_early_exit": 2}, looking_up())
    protected = {"k_scheme": {"protected": 0.1}, "token_score": lambda layer, keys, values: keys.sum(-1)}
    for make in (model.create_kivi_cache, partial(create_kivi_cache, config=model.config)):
        with pytest.raises(ValueError, match=r"token_score=.*: must be None with keep_dense=True"):
            make(**protected, k_bits=2)
    # A cache of no model in particular learns whose latents it holds when they come.
    with pytest.raises(ValueError, match="token_score: must be None for the latents of a block"):
        logits(model, text(), create_kivi_cache(**protected))
    # Those of the values would not be used.
    for settings in ({"v_bits": 8}, {"k_bits": 4, "v_bits": 8}, {"v_scheme": {"group_size": 16}}):
        with pytest.raises(ValueError, match=r"must be k_(bits|scheme) or left out with joint_kv=True"):
            model.create_kivi_cache(**settings)
    assert model.create_kivi_cache(k_bits=4, v_bits=4).scheme.keys.bits == 4
    places = dict.fromkeys(range(4), torch.device("cpu"))
    check_whole_blocks(model.config, places)
    check_whole_blocks(model.config, {3: torch.device("cpu")})
    for wrong in (places | {1: torch.device("meta")}, {0: places[0], 1: places[1]}):
        with pytest.raises(ValueError, match="layers 0 to 2 share their latents and must be on one device"):
            check_whole_blocks(model.config, wrong)
