"""Models with a sliding window in some layers or in all: exact, in memory that the window bounds."""

import contextlib
import copy
import itertools
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.cache.file import export_layer, parse_layer
from modules.cache.scheme import CacheScheme
from modules.fit.budget import FitConfig, split_config
from modules.kivi_cache import KIVILatentCache, KIVILatentLayer, config_windows
from scripts import calibrate_svd_ranks, estimate_memory
from tests.helpers import TINY_LLAMA, all_ranks, randomize_vectors, save_byte_tokenizer, tiny_blocks

#: A text is four of them long.
WINDOW = 48
LOSSLESS = {"k_bits": 16, "v_bits": 16, "group_size": 8, "residual_length": 6, "sink_length": 3}
PACKED = {"k_bits": 4, "v_bits": 4, "group_size": 16, "residual_length": 8, "sink_length": 4}


def windowed(kind: str = "mistral", window: int = WINDOW, **fields):
    """A random model: all layers of a Mistral have the window, those of a Qwen2 but for the first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mistral":
            model = MistralForCausalLM(MistralConfig(**TINY_LLAMA | fields, sliding_window=window))
        else:
            own = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": window}
            model = Qwen2ForCausalLM(Qwen2Config(**TINY_LLAMA | own | fields))
        randomize_vectors(model)
    return model.eval()


def split(dense, **fields) -> ALRDLlamaForCausalLM:
    """At full rank, keys and values apart; with more keys than hidden channels only in groups of heads."""
    ranks = all_ranks(dense.config.num_hidden_layers, 16 * dense.config.num_key_value_heads)
    return ALRDLlamaForCausalLM.from_dense(
        dense, ALRDLlamaConfig.from_llama(dense.config, **{"truncation_ranks": ranks} | LOSSLESS | fields)
    )


def blocks(dense, **fields) -> ALRDLlamaForCausalLM:
    return tiny_blocks(dense, **{"joint_kv": True} | LOSSLESS | fields)


#: A split of each kind: dense model, how it is split.
MODELS = {
    "mistral": (windowed, split),
    "mistral MHA": (
        lambda: windowed(num_key_value_heads=8, initializer_range=0.15),
        lambda dense: split(dense, head_group_size=1),
    ),
    "mistral in blocks": (windowed, lambda dense: blocks(dense, layer_group_size=3)),
    "qwen2": (lambda: windowed("qwen2"), split),
    "qwen2 in blocks": (lambda: windowed("qwen2"), blocks),
}


@pytest.fixture(params=MODELS)
def pair(request):
    make, way = MODELS[request.param]
    dense = make()
    return dense, way(dense)


def text(batch: int = 1, length: int = 4 * WINDOW) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def feed(model, cache, ids: torch.Tensor, chunks=(37, 1, 29, 17, 5), mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a text that is fed in chunks, then token by token; `mask`: of what is held, too."""
    logits, start = [], 0
    held = cache.get_seq_length()
    for size in itertools.chain(chunks, itertools.repeat(1)):
        if start >= ids.shape[1]:
            return torch.cat(logits, 1)
        stop = start + size
        seen = None if mask is None else mask[:, : held + stop]
        logits.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
        start = stop


# ---- exact


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("capacity", [None, 4 * WINDOW + 8])
@torch.no_grad()
def test_a_text_of_four_windows(pair, backend, capacity):
    dense, model = pair
    ids = text()
    cache = model.create_kivi_cache(backend=backend, capacity=capacity)
    expected = dense(ids).logits
    assert torch.allclose(feed(model, cache, ids), expected, atol=1e-4)
    assert cache.get_seq_length() == 4 * WINDOW and cache.row_tokens() == [4 * WINDOW]
    # The window acts: without it the logits are others.
    whole = copy.deepcopy(dense)
    for attention in (layer.self_attn for layer in whole.model.layers):
        attention.layer_type = "full_attention"
    whole.config.sliding_window = whole.config.max_position_embeddings
    assert (whole(ids).logits - expected)[:, 2 * WINDOW :].abs().max() > 0.1


@torch.no_grad()
def test_padded_rows(pair):
    """Pads on the left, and in a later chunk; rows of several lengths."""
    dense, model = pair
    ids, mask = text(3), torch.ones(3, 4 * WINDOW, dtype=torch.long)
    mask[1, :61] = mask[2, :13] = 0
    found = feed(model, model.create_kivi_cache(), ids, (80, 1, 29, 17, 5), mask)
    for row in range(3):
        own = ids[row : row + 1, mask[row].bool()]
        assert torch.allclose(found[row, mask[row].bool()], dense(own).logits[0], atol=1e-4)


@torch.no_grad()
def test_generate(pair):
    """Greedy text without and with a draft, whose rejected tokens are cropped; stock caches and none."""
    dense, model = pair
    ids = text(length=2 * WINDOW + 5)
    asked = {"max_new_tokens": 2 * WINDOW, "do_sample": False}
    expected = dense.generate(ids, **asked)
    assert torch.equal(model.generate(ids, **asked), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **asked), expected)
    assert torch.equal(model.generate(ids, num_beams=2, **asked), dense.generate(ids, num_beams=2, **asked))
    for stock in ({"use_cache": False}, {"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
        assert torch.equal(model.generate(ids, **asked, **stock), expected)
    own = DynamicCache(config=model.config)
    assert any(own.is_sliding) and torch.equal(model.generate(ids, **asked, past_key_values=own), expected)


@torch.no_grad()
def test_attention_weights():
    dense = windowed("qwen2")
    dense.set_attn_implementation("eager")
    model, ids = split(dense), text(length=2 * WINDOW)
    model.set_attn_implementation("eager")
    cache = model.create_kivi_cache()
    model(ids[:, :-3], past_key_values=cache)
    found = model(ids[:, -3:], past_key_values=cache, output_attentions=True).attentions
    expected = dense(ids, output_attentions=True).attentions
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other[:, :, -3:], atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 8, 9])
@torch.no_grad()
def test_windows_shorter_than_a_block(window):
    dense = windowed(window=window)
    model, ids = split(dense, residual_length=0), text(2, 60)
    assert torch.allclose(feed(model, model.create_kivi_cache(), ids, (20, 3)), dense(ids).logits, atol=1e-4)


@torch.no_grad()
def test_triton_within_a_model():
    """Its interpreter is slow: two steps behind a prompt of a window and a half."""
    pytest.importorskip("triton")
    dense = windowed(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model, ids = split(dense, group_size=32), text(1, 75)
    cache = model.create_kivi_cache(backend="triton")
    assert torch.allclose(feed(model, cache, ids, (72, 2)), dense(ids).logits, atol=1e-4)


# ---- memory


@pytest.mark.parametrize("name", ["mistral", "mistral in blocks"])
@torch.no_grad()
def test_bytes_are_bounded_by_the_window(name):
    """Used and allocated bytes, of a text that is fed in long chunks, and token by token."""
    make, way = MODELS[name]
    model, ids = way(make()), text(2, 8 * WINDOW)
    for chunks in ((150, 100, 1), (8,)):
        cache, sizes, allocated = model.create_kivi_cache(**PACKED), {}, {}
        block = sum(layer.scheme.slot_nbytes(layer.given_widths, torch.float32) for layer in cache.layers)
        start = 0
        for size in itertools.chain(chunks, itertools.repeat(1)):
            if start >= ids.shape[1]:
                break
            model(ids[:, start : start + size], past_key_values=cache)
            start = min(start + size, ids.shape[1])
            sizes[start], allocated[start] = cache.nbytes_used, cache.nbytes
            for layer in cache.layers:
                assert layer.nbytes_used == 2 * layer.scheme.layer_nbytes(
                    start, layer.widths, torch.float32, layer.sink_channels, WINDOW
                )
                held = sum(layer.rows[0].counts)
                assert held <= WINDOW + layer.scheme.block_length
                assert layer.pool.capacity <= layer.pool.used + max(1, layer.pool.used // 4)
        lengths = [n for n in sizes if n >= 2 * WINDOW]
        assert max(sizes[n] for n in lengths) <= min(sizes[n] for n in lengths) + 2 * block + 2 * 16 * 2 * 64 * 4 * 3
        assert allocated[8 * WINDOW] <= max(allocated[n] for n in allocated if n <= 4 * WINDOW) + 2 * block


@torch.no_grad()
def test_blocks_behind_the_window_of_a_prompt_are_not_packed(monkeypatch):
    model, packed = split(windowed(), **PACKED), []
    cache = model.create_kivi_cache()
    encode = type(cache.layers[0].scheme.codecs(((4,), (4,)), torch.float32)["keys"]).encode
    codec = type(cache.layers[0].scheme.codecs(((4,), (4,)), torch.float32)["keys"])

    def counted(self, states, score=None):
        packed.append(len(states))
        return encode(self, states, score)

    monkeypatch.setattr(codec, "encode", counted)
    model(text(), past_key_values=cache)
    assert packed == [3] * 6 and cache.row_tokens() == [4 * WINDOW]


def test_estimates(tmp_path):
    """Of a Qwen2 whose first layer sees all: the other two stop growing, packed and dense."""
    dense = windowed("qwen2")
    dense.save_pretrained(tmp_path)
    lengths = [2 * WINDOW, 20 * WINDOW]
    config = estimate_memory.EstimateConfig(model=str(tmp_path), length=lengths, rank=1.0, k_bits=4, v_bits=4)
    short, long = estimate_memory.main(config)["estimates"]
    per_token = 2 * 64 * 4
    assert short["dense"] == per_token * (2 * WINDOW + 2 * (WINDOW - 1))
    assert long["dense"] - short["dense"] == per_token * 18 * WINDOW
    model = split(dense, k_bits=4, v_bits=4, **dict.fromkeys(("group_size",), 128), residual_length=32, sink_length=4)
    assert config_windows(model.config) == [None, WINDOW, WINDOW]
    for length, estimate in zip(lengths, (short, long), strict=True):
        cache = model.create_kivi_cache()
        for window, layer in zip(config_windows(model.config), cache.layers, strict=True):
            layer.sliding_window = window
            layer.append(torch.randn(1, length, 64), torch.randn(1, length, 64))
        assert cache.nbytes_used == estimate["packed"] and cache.nbytes <= estimate["allocated_at_most"]


# ---- edits


def filled(model, ids: torch.Tensor, **settings) -> KIVILatentCache:
    cache = model.create_kivi_cache(**settings)
    feed(model, cache, ids)
    return cache


@torch.no_grad()
def test_crops(pair):
    """Up to `residual_length` tokens at any time; what would need dropped tokens is refused, and changes nothing."""
    dense, model = pair
    ids, residual = text(), LOSSLESS["residual_length"]
    expected = dense(ids).logits
    for fed in range(3 * WINDOW, 3 * WINDOW + 9):
        cache = filled(model, ids[:, :fed])
        for tokens in (WINDOW, fed - 4):
            with pytest.raises(ValueError, match=r"tokens_to_remove: must leave what the next token sees"):
                cache.crop(-tokens)
        cache.crop(-residual)
        assert cache.row_tokens() == [fed - residual]
        found = model(ids[:, fed - residual : fed + 20], past_key_values=cache).logits
        assert torch.allclose(found, expected[:, fed - residual : fed + 20], atol=1e-4)
    # Of a text within its window anything goes, and down to the sinks nothing was dropped.
    cache = filled(model, ids[:, : WINDOW + 2])
    cache.crop(-WINDOW)
    assert torch.allclose(feed(model, cache, ids[:, 2:], (11,)), expected[:, 2:], atol=1e-4)
    cache.crop(-(4 * WINDOW - 2))
    assert torch.allclose(feed(model, cache, ids[:, 2:], (90,)), expected[:, 2:], atol=1e-4)


@torch.no_grad()
def test_rows_change_places(pair):
    dense, model = pair
    ids, mask = text(3), torch.ones(3, 4 * WINDOW, dtype=torch.long)
    mask[1, :61] = 0
    expected = [dense(ids[i : i + 1, mask[i].bool()]).logits[0] for i in range(3)]
    cut = 3 * WINDOW
    cache = model.create_kivi_cache()
    feed(model, cache, ids[:, :cut], (100,), mask)
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    fork = cache.fork()
    for held in (cache, fork, copy.deepcopy(cache)):
        order = [2, 1, 1]
        found = feed(model, held, ids[order, cut:], (3,), mask[order])
        for row, i in enumerate(order):
            assert torch.allclose(found[row], expected[i][cut - 4 * WINDOW :], atol=1e-4)


@torch.no_grad()
def test_a_failed_step_brings_dropped_blocks_back(pair, monkeypatch):
    """Dropped in one layer when another fails; slots that were free to be written hold what they held."""
    dense, model = pair
    ids, cut = text(), 3 * WINDOW
    expected = dense(ids).logits
    cache = filled(model, ids[:, :cut])
    rows = [layer.rows for layer in cache.layers]

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no memory"):
                model(ids[:, cut:], past_key_values=cache)
    assert cache.row_tokens() == [cut]
    for before, layer in zip(rows, cache.layers, strict=True):
        assert [row._replace(blocks=()) for row in before] == [row._replace(blocks=()) for row in layer.rows]
    assert torch.allclose(feed(model, cache, ids[:, cut:], (7, 30)), expected[:, cut:], atol=1e-4)


def test_pieces_of_any_size_leave_the_same():
    """Rows and bytes do not depend on how tokens come."""
    states, found = torch.randn(2, 2, 300, 6), []
    for sizes in ([300], [1] * 300, [130, 7, 100, 63]):
        layer = KIVILatentLayer(CacheScheme(2, 2, 16, 8, 4), ((6,), (6,)))
        layer.sliding_window = 50
        for keys, values in zip(*(x.split(sizes, 1) for x in states), strict=True):
            layer.append(keys, values)
        assert {row.dropped for row in layer.rows} == {224}
        found.append((layer.states(), [row._replace(blocks=()) for row in layer.rows], layer.block_table()[1:]))
    for other in found[1:]:
        assert all(map(torch.equal, other[0], found[0][0])) and other[1] == found[0][1]
        assert torch.equal(other[2], found[0][2])


def held_tokens(layer: KIVILatentLayer) -> list[dict[int, float]]:
    """Of each row the tokens, whose states are one number, by their positions."""
    found = [{} for _ in layer.rows]
    for tile in layer.tiles():
        for row, by_run in enumerate(tile.keys[..., 0].tolist()):
            for values, start, count in zip(by_run, tile.start[row].tolist(), tile.count[row].tolist(), strict=True):
                found[row] |= dict(enumerate(values[:count], start))
    return found


def has_all(layer: KIVILatentLayer, texts: list[list[float]]) -> bool:
    """Whether the rows hold what the next tokens see, and nothing that is wrong."""
    if not layer.is_initialized:
        return not any(texts)
    for tokens, held, row in zip(texts, held_tokens(layer), layer.rows, strict=True):
        right = dict(enumerate(tokens))
        seen = set(range(max(0, len(tokens) + 1 - layer.sliding_window), len(tokens)))
        if row.tokens != len(tokens) or not held.items() <= right.items() or not seen <= set(held):
            return False
    return True


@pytest.mark.parametrize("seed", range(12))
def test_any_edits(seed):
    """Appends with pads, crops, other rows, forks that go on by themselves, failures: no token seen is ever missing."""
    choose = random.Random(seed)
    window, block, residual = choose.choice(((1, 4, 0), (10, 4, 3), (20, 8, 5), (34, 8, 0)))
    scheme = CacheScheme(16, 16, block, residual, choose.choice((0, 3)))
    cache = KIVILatentCache(scheme, [((1,), (1,))])
    cache.layers[0].sliding_window = window
    texts, others, count = [[], [], []], [], itertools.count(1)
    for _ in range(120):
        layer = cache.layers[0]
        kind = choose.choice(("append", "append", "append", "one", "crop", "order", "fork", "fail", "save"))
        if kind in ("append", "one", "fail"):
            length = 1 if kind == "one" else choose.randrange(1, 30)
            real = torch.rand(3, length, generator=torch.Generator().manual_seed(next(count))) < 0.8
            states = torch.tensor([[[float(next(count))] for _ in range(length)] for _ in texts])
            expected = pytest.raises(RuntimeError) if kind == "fail" else contextlib.nullcontext()
            with expected, cache.transaction():
                layer.append(states, states, real)
                if kind == "fail":
                    # Blocks that fall due now would like the room of those that have been dropped.
                    layer.append(states.repeat(1, 5, 1), states.repeat(1, 5, 1))
                    layer.append(states.repeat(1, 5, 1), states.repeat(1, 5, 1))
                    raise RuntimeError
            if kind != "fail":
                texts = [old + new[own, 0].tolist() for old, new, own in zip(texts, states, real, strict=True)]
        elif not layer.is_initialized:
            continue
        elif kind == "crop":
            kept = layer.slots - min(layer.slots, choose.choice((1, residual, 3 * window, layer.slots)))
            left = [n[: row.cropped(kept).tokens] for n, row in zip(texts, layer.rows, strict=True)]
            try:
                cache.crop(kept - layer.slots)
                texts = left
            except ValueError:
                # Refused only where it must be.
                cropped = [row.cropped(kept) for row in layer.rows]
                assert any(row.sees_dropped(window) for row in cropped) and kept < layer.slots - residual
        elif kind == "order":
            order = [choose.randrange(3) for _ in texts]
            cache.reorder_cache(torch.tensor(order))
            texts = [list(texts[i]) for i in order]
        elif kind == "fork":
            others = [*others, (cache.fork(), texts)][-2:]
            if choose.random() < 0.5:
                cache, texts = others.pop(0)
        else:
            tensors, record = export_layer(layer)
            layer.restore(parse_layer(tensors, json.loads(json.dumps(record)), scheme, False))
        assert all(has_all(some.layers[0], held) for some, held in [(cache, texts), *others])


@torch.no_grad()
def test_a_stored_prefix(pair, tmp_path):
    dense, model = pair
    ids, cut = text(), 3 * WINDOW
    expected = dense(ids).logits
    filled(model, ids[:, :cut]).save(tmp_path / "prefix")
    cache = KIVILatentCache.load(tmp_path / "prefix", model=model)
    with pytest.raises(ValueError, match="must leave what the next token sees"):
        cache.crop(-WINDOW)
    assert torch.allclose(feed(model, cache, ids[:, cut:], (3,)), expected[:, cut:], atol=1e-4)
    # Another window is another model.
    cache = KIVILatentCache.load(tmp_path / "prefix")
    with pytest.raises(ValueError, match=rf"holds what a sliding window of {WINDOW} tokens sees, the model's is 47"):
        cache.layer(len(cache.layers) - 1, cache.layers[-1].widths, WINDOW - 1)


@torch.no_grad()
def test_a_cache_of_fixed_capacity_goes_on_growing():
    """It masks only; what it holds goes on in a cache that then drops what is behind the window."""
    dense = windowed()
    model, ids = split(dense), text()
    cache = filled(model, ids[:, :150], capacity=200)
    assert not any(row.dropped for layer in cache.layers for row in layer.rows)
    grown = cache.growing()
    expected = dense(ids).logits
    assert torch.allclose(feed(model, grown, ids[:, 150:], (9,)), expected[:, 150:], atol=1e-4)
    assert all(row.dropped for layer in grown.layers for row in layer.rows)


# ---- configurations


def test_configurations_go_and_come_back(tmp_path):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    for dense in (windowed(), windowed("qwen2"), windowed("qwen2", layer_types=types)):
        model = split(dense)
        model.save_pretrained(tmp_path)
        loaded = ALRDLlamaForCausalLM.from_pretrained(tmp_path)
        for config in (model.config, loaded.config):
            windows = [config.layer_window(i) for i in range(3)]
            assert windows == [getattr(layer.self_attn, "sliding_window", WINDOW) for layer in dense.model.layers]
        back = loaded.to_dense()
        assert type(back) is type(dense)
        for name in ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"):
            assert getattr(back.config, name, None) == getattr(dense.config, name, None)
        ids = text(length=3 * WINDOW)
        with torch.no_grad():
            assert torch.allclose(back(ids).logits, dense(ids).logits, atol=1e-3)
            assert torch.allclose(loaded(ids).logits, dense(ids).logits, atol=1e-3)


def test_a_block_of_different_windows_is_refused():
    dense = windowed("qwen2")
    with pytest.raises(ValueError, match=r"layer_group_size=2: .* layers 0 to 1 are None, 48"):
        ALRDLlamaConfig.from_llama(dense.config, keep_dense=True, layer_group_size=2)
    types = ["full_attention", "full_attention", "sliding_attention"]
    own = windowed("qwen2", layer_types=types)
    assert ALRDLlamaConfig.from_llama(own.config, keep_dense=True, layer_group_size=2).num_cache_layers == 2
    # A budget that may choose takes the largest blocks that windows allow.
    for model, layers in ((dense, 1), (own, 2), (windowed(), 3)):
        target = split_config(FitConfig(), ALRDLlamaConfig.from_llama(model.config), 1_000_000)
        assert target.layer_group_size == layers


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "many"])
def test_windows_out_of_range(window):
    config = ALRDLlamaConfig.from_llama(windowed().config)
    config.sliding_window = window
    with pytest.raises(ValueError, match="sliding_window="):
        ALRDLlamaForCausalLM(config)


# ---- calibration


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_budget_on_windows_shorter_than_the_calibration(kind, tmp_path):
    """The statistics are those of the dense model with its windows; a fitted cache is near it beyond them."""
    dense = windowed(kind, vocab_size=300)
    dense.save_pretrained(tmp_path / "dense")
    save_byte_tokenizer(tmp_path / "dense")
    (tmp_path / "text").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    options = {"budget": 0.25, "text": str(tmp_path / "text"), "windows": 4, "length": 3 * WINDOW, "keep_dense": True}
    options["joint_kv"] = False  # more outputs than hidden channels here
    calibrate_svd_ranks.main(
        calibrate_svd_ranks.CalibrationConfig(
            model=str(tmp_path / "dense"), output=str(tmp_path / "quarter"), **options
        )
    )
    model = ALRDLlamaForCausalLM.from_pretrained(tmp_path / "quarter")
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "dense")((tmp_path / "text").read_text()).input_ids])
    ids = ids[:, 1000 : 1000 + 4 * WINDOW]
    with torch.no_grad():
        cache = model.create_kivi_cache()
        found = feed(model, cache, ids, (90, 16)).log_softmax(-1)[:, 2 * WINDOW :]
        expected = dense(ids).logits.log_softmax(-1)[:, 2 * WINDOW :]
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.01
    assert cache.layers[-1].rows[0].dropped and cache.layers[-1].pool.used
