"""Scores of tokens: by attention, against the eager attention of a stock Llama; by queries; and by any function."""

import copy

import numpy as np
import pytest
import torch
from helpers import tiny_dense, tiny_split
from test_codecs import read_bits, same_bits
from test_kivi_cache import chunks_of, feed, raw_row
from transformers import DynamicCache

from configuration_alrd_llama import QuantScheme
from modules.cache.token_scores import QuerySimilarity
from modules.kivi_cache import CacheScheme, KIVILatentCache, KIVILatentLayer, create_kivi_cache

PROTECTED = {"protected": 0.2, "protected_bits": 4}
SCHEME = CacheScheme(2, 2, 128, 5, 4, v_scheme=PROTECTED)
WIDTHS = ((13, 7), (9, 2))


def layer_of(score, scheme: CacheScheme = SCHEME) -> KIVILatentLayer:
    return KIVILatentCache(scheme, [WIDTHS], token_score=score).layers[0]


def states(batch: int, length: int):
    return [torch.randn(batch, length, sum(widths)) for widths in WIDTHS]


def protected_of(layer: KIVILatentLayer, i: int, side: str = "values") -> list[set[int]]:
    """Positions, in their blocks, of the protected tokens of each block of a row."""
    masks = raw_row(layer, i)[f"{side}.is_protected"]
    return [set(read_bits(mask, layer.scheme.block_length).nonzero()[0].tolist()) for mask in masks]


# ---- attention

PADDED = [20, 9, 1, 1, 6, 1, 1]


def padded_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows with left pads, and a pad in the middle of one."""
    ids, mask = torch.randint(1, 97, (3, sum(PADDED))), torch.ones(3, sum(PADDED), dtype=torch.long)
    mask[1, :7] = 0
    mask[2, :1] = 0
    mask[0, 23] = 0
    return ids.masked_fill(mask == 0, 0), mask


def run(model, ids, mask, cache, sizes, **how) -> list:
    outputs, start = [], 0
    for size in sizes:
        start += size
        with torch.no_grad():
            outputs.append(
                model(ids[:, start - size : start], attention_mask=mask[:, :start], past_key_values=cache, **how)
            )
    return outputs


def dense_scores(model, ids, mask) -> list[torch.Tensor]:
    """By layer `[B, T]`: the columns of the eager attention of a stock Llama in one pass, of real queries, summed."""
    dense = model.to_dense()
    dense.set_attn_implementation("eager")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = dense(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    return [(weights * mask[:, None, :, None]).sum((1, 2)) for weights in found]


@pytest.mark.parametrize("heads", [8, 4, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_that_of_a_stock_llama(tmp_path, heads, attention):
    """Nothing is packed yet, so what the window has received is what a dense model's tokens receive."""
    dense = tiny_dense(num_key_value_heads=heads)
    model = tiny_split(tmp_path, ranks=min(24, heads * 16), dense=dense)
    model.set_attn_implementation(attention)
    ids, mask = padded_text()
    cache = model.create_kivi_cache(v_scheme=PROTECTED, token_score="attention")
    run(model, ids, mask, cache, PADDED)
    expected = dense_scores(model, ids, mask)
    for layer, score in zip(cache.layers, expected, strict=True):
        for i, row in enumerate(layer.rows):
            assert (row.sinks, row.packed, row.window) == (4, 0, int(mask[i].sum()) - 4)
            own = score[i, mask[i] == 1]
            found = layer.exact.window["score"][i, : row.window]
            assert torch.allclose(found, own[4:], atol=2e-4)
            # All attention of all heads goes somewhere.
            assert own.sum() == pytest.approx(8 * int(mask[i].sum()), rel=1e-4)
    assert float(torch.stack(expected).std()) > 0.1


def test_attention_of_many_queries(tmp_path):
    """More queries than are taken at a time, without pads."""
    model = tiny_split(tmp_path, ranks=24)
    ids = torch.randint(1, 97, (2, 131))
    cache = model.create_kivi_cache(v_scheme=PROTECTED, token_score="attention")
    run(model, ids, torch.ones_like(ids), cache, [131])
    for layer, score in zip(cache.layers, dense_scores(model, ids, torch.ones_like(ids)), strict=True):
        for i in range(2):
            assert torch.allclose(layer.exact.window["score"][i, :127], score[i, 4:], atol=1e-3)


def test_the_tokens_that_received_most_are_protected(tmp_path):
    """Through packed blocks, by the weights that the model itself returns."""
    model = tiny_split(tmp_path, ranks={"k_proj": 20, "v_proj": 24})
    model.set_attn_implementation("eager")
    length, sizes = 320, [150, 1, 1, 16, 1, 1, 120, 1, 1, 28]
    ids, mask = torch.randint(1, 97, (2, length)), torch.ones(2, length, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    settings = {"residual_length": 16, "v_scheme": PROTECTED, "k_scheme": {"protected": 0.1}}
    cache = model.create_kivi_cache(**settings, token_score="attention")
    received, held, chosen = torch.zeros(3, 2, length), {}, {}
    start = 0
    for size in sizes:
        stop = start + size
        with torch.no_grad():
            output = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, output_attentions=True
            )
        for j, weights in enumerate(output.attentions):
            received[j, :, :stop] += (weights * mask[:, None, start:stop, None]).sum((1, 2))
            for i in range(2):
                for block in range(held.get((j, i), 0), len(cache.layers[j].rows[i].blocks)):
                    chosen[j, i, block] = received[j, i, mask[i] == 1][4 + 128 * block : 132 + 128 * block].clone()
                    held[j, i] = block + 1
        start = stop
    assert len(chosen) == 3 * 2 * 2
    for (j, i, block), score in chosen.items():
        order = score.argsort(descending=True)
        for side, count in (("values", round(0.2 * 128)), ("keys", round(0.1 * 128))):
            found = protected_of(cache.layers[j], i, side)[block]
            assert len(found) == count
            # Equal up to rounding at the border.
            border = score[order[count - 1]]
            assert all(score[token] >= border - 1e-4 for token in found)
            assert set(order[: count - 1].tolist()) - found == set() or (score[order[count - 2]] - border) < 1e-4
    # By attention, not by position or error: the first block's own error would choose otherwise.
    by_error = model.create_kivi_cache(**settings)
    run(model, ids, mask, by_error, [length])
    assert protected_of(by_error.layers[0], 0)[0] != protected_of(cache.layers[0], 0)[0]


def test_generate_by_attention_survives_beams_and_look_up(tmp_path):
    model = tiny_split(tmp_path, ranks=20)
    ids = torch.randint(1, 97, (1, 160))
    for how in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {}):
        cache = model.create_kivi_cache(residual_length=8, v_scheme=PROTECTED, token_score="attention")
        text = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False, **how)
        assert text.shape == (1, 170)
        for layer in cache.layers:
            for i, row in enumerate(layer.rows):
                score = layer.exact.window["score"][i, : row.window]
                assert torch.isfinite(score).all()
                # A token sees itself, so every one of the window has received something, but for the newest.
                assert (score[:-1] > 0).all()


def test_attention_without_our_model_is_refused():
    for feed_it in (
        lambda c: c.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), 0),
        lambda c: tiny_dense()(torch.randint(1, 97, (1, 5)), past_key_values=c),
    ):
        cache = create_kivi_cache(v_scheme=PROTECTED, token_score="attention")
        with pytest.raises(ValueError, match="token_score='attention': only ALRDLlamaForCausalLM"):
            feed_it(cache)
        assert cache.get_seq_length() == cache.nbytes == 0


@pytest.mark.parametrize("single", [True, False])
def test_a_refused_append_keeps_the_attention_received(single):
    layer = layer_of("attention")
    keys, values = states(2, 136 + 1)
    keys[1, 60] = torch.nan
    received = torch.rand(2, 136 + 1)
    layer.append(keys[:, :100], values[:, :100], received=received[:, :100])
    layer.append(keys[:, 100:136], values[:, 100:136], received=received[:, :136])
    scores = layer.exact.window["score"].clone()
    expected = received[:, :136].clone()
    expected[:, :100] *= 2
    assert torch.allclose(scores[:, :132], expected[:, 4:])
    before = [raw_row(layer, i) for i in range(2)]
    step = [x[:, 136:] if single else x[:, 120:] for x in (keys, values)]
    with pytest.raises(ValueError, match="finite"):
        layer.append(*step, received=torch.rand(2, 136 + step[0].shape[1]))
    assert torch.equal(layer.exact.window["score"], scores)
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw_row(layer, i).values(), before[i].values(), strict=True))


# ---- a function


def by_first_channel(layer_idx, keys, values):
    return keys[..., 0] * (-1) ** layer_idx


@pytest.mark.parametrize("sizes", [[300], [40, 1, 1, 200, 58], [1] * 300])
def test_a_function_chooses_the_tokens(sizes):
    cache = KIVILatentCache(SCHEME, [WIDTHS] * 2, token_score=by_first_channel)
    keys, values = states(2, 300)
    real = torch.rand(2, 300) < 0.9
    real[0] = True
    for layer in cache.layers:
        feed(layer, keys, values, sizes, real)
    for index, i in np.ndindex(2, 2):
        worth = by_first_channel(index, keys, values)[i, real[i]]
        blocks = protected_of(cache.layers[index], i)
        assert len(blocks) >= 1
        for j, found in enumerate(blocks):
            order = worth[4 + 128 * j : 132 + 128 * j].argsort(descending=True)
            assert found == set(order[:26].tolist())
        window = cache.layers[index].rows[i].window
        assert torch.equal(cache.layers[index].exact.window["score"][i, :window], worth[len(worth) - window :])


def test_scores_follow_their_rows_and_cost_four_bytes():
    layer = layer_of(by_first_channel)
    feed(layer, *states(3, 100), [100])
    scores = layer.exact.window["score"].clone()
    formula = 3 * SCHEME.layer_nbytes(100, WIDTHS, torch.float32)
    assert layer.nbytes_used == formula + 3 * 96 * 4
    unscored = feed(layer_of(None), *states(3, 100), [100])
    assert unscored.nbytes_used == formula
    assert layer.nbytes - unscored.nbytes == scores.nbytes == 3 * (5 + 128) * 4
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.exact.window["score"], scores[[2, 2, 0]])
    copied = copy.deepcopy(layer)
    layer.crop(-10)
    keys, values = states(3, 20)
    feed(layer, keys, values, [20])
    found = layer.exact.window["score"][:, :106]
    assert torch.equal(found, torch.cat([scores[[2, 2, 0], :86], keys[..., 0]], 1))
    assert torch.equal(copied.exact.window["score"], scores[[2, 2, 0]])


def test_without_protected_tokens_there_are_no_scores():
    layer = layer_of(by_first_channel, CacheScheme(2, 2, 128, 5, 4))
    feed(layer, *states(1, 30), [30])
    assert layer.score is None
    assert "score" not in layer.exact.window


@pytest.mark.parametrize("bad", ["Attention", "error", 1, True, [1]])
def test_other_scores_are_refused(bad):
    with pytest.raises(ValueError, match=r"token_score=.*: must be a function, 'attention' or None"):
        create_kivi_cache(token_score=bad)


@pytest.mark.parametrize("shape", [(2,), (2, 3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("fresh", [True, False])
def test_scores_of_another_shape_are_refused(shape, fresh):
    layer = layer_of(lambda i, keys, values: torch.zeros(shape if keys.shape[1] == 3 else keys.shape[:2]))
    if not fresh:
        feed(layer, *states(2, 50), [50])
    slots = layer.slots
    with pytest.raises(ValueError, match=rf"token_score: returned \[{', '.join(map(str, shape))}\], must be \[2, 3\]"):
        layer.append(*states(2, 3))
    assert layer.slots == slots
    assert layer.is_initialized != fresh


@pytest.mark.parametrize("length", [1, 150])
def test_a_nan_in_a_scored_token_is_refused_when_it_is_packed(length):
    layer = layer_of(by_first_channel)
    keys, values = states(2, 136 + length)
    keys[1, 20, 0] = torch.nan
    feed(layer, keys, values, [136])
    before, scores = [raw_row(layer, i) for i in range(2)], layer.exact.window["score"].clone()
    with pytest.raises(ValueError, match="finite"):
        layer.append(keys[:, 136:], values[:, 136:])
    assert same_bits(layer.exact.window["score"], scores)
    for i in range(2):
        assert all(same_bits(a, b) for a, b in zip(raw_row(layer, i).values(), before[i].values(), strict=True))


def test_scores_keep_no_gradients():
    weight = torch.ones(13 + 7, requires_grad=True)
    layer = layer_of(lambda i, keys, values: keys @ weight)
    feed(layer, *states(1, 50), [30, 1, 19])
    assert not layer.exact.window["score"].requires_grad


def test_a_loaded_cache_goes_on_by_its_scores(tmp_path):
    cache = KIVILatentCache(SCHEME, [WIDTHS], token_score="attention")
    keys, values = states(1, 140)
    received = torch.rand(1, 140)
    cache.layers[0].append(keys[:, :100], values[:, :100], received=received[:, :100])
    cache.save(tmp_path / "cache")
    loaded = KIVILatentCache.load(tmp_path / "cache")
    assert loaded.token_score == "attention"
    for other in (cache, loaded):
        other.layers[0].append(keys[:, 100:], values[:, 100:], received=received)
    assert protected_of(loaded.layers[0], 0) == protected_of(cache.layers[0], 0)


def test_a_cache_that_was_saved_with_a_function_asks_for_it(tmp_path):
    cache = KIVILatentCache(SCHEME, [WIDTHS], token_score=by_first_channel)
    feed(cache.layers[0], *states(1, 60), [60])
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="token_score"):
        KIVILatentCache.load(tmp_path / "cache")


@pytest.mark.parametrize("shape", [(2, 52), (1, 53)])
def test_received_attention_of_another_shape_is_refused(shape):
    layer = layer_of("attention")
    keys, values = states(2, 53)
    layer.append(keys[:, :50], values[:, :50], received=torch.rand(2, 50))
    scores = layer.exact.window["score"].clone()
    with pytest.raises(ValueError, match="received"):
        layer.append(keys[:, 50:], values[:, 50:], received=torch.rand(shape))
    assert torch.equal(layer.exact.window["score"], scores)
    assert layer.get_seq_length() == 50


def test_any_failure_of_a_first_append_leaves_the_cache_empty():
    def fails(layer_idx, keys, values):
        raise RuntimeError("no score")

    layer = layer_of(fails)
    with pytest.raises(RuntimeError, match="no score"):
        layer.append(*states(3, 9))
    assert not layer.is_initialized


# ---- similarity to queries


def test_query_similarity_is_the_largest_cosine():
    queries, keys = torch.randn(5, 20), torch.randn(2, 9, 20)
    keys[1, 3] = 0
    found = QuerySimilarity({2: queries})(2, keys, keys)
    q, k = queries.double().numpy(), keys.double().numpy()
    size = np.linalg.norm(k, axis=-1, keepdims=True)
    cosine = k @ (q / np.linalg.norm(q, axis=-1, keepdims=True)).T / np.where(size == 0, 1, size)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), cosine.max(-1), atol=1e-6)
    # Lengths do not matter, half precision does not lose it.
    again = QuerySimilarity({2: queries * 7})(2, keys * 3, keys)
    assert torch.allclose(found, again, atol=1e-6)
    half = QuerySimilarity({2: queries.half()})(2, keys.half(), keys)
    assert half.dtype == torch.float32
    assert torch.allclose(found, half, atol=3e-3)


@pytest.mark.parametrize("queries", [{}, {1: torch.randn(3, 20)}, {0: torch.randn(3, 19)}])
def test_query_similarity_needs_queries_of_every_layer(queries):
    score = QuerySimilarity(queries)
    with pytest.raises(ValueError, match=r"query_states\[0\]: .* must be \[queries, 20\]"):
        score(0, torch.randn(1, 4, 20), torch.randn(1, 4, 11))
    layer = layer_of(score)
    with pytest.raises(ValueError, match=r"query_states\[0\]"):
        layer.append(*states(1, 4))
    assert not layer.is_initialized


def test_tokens_that_look_like_the_queries_are_protected():
    query = torch.randn(1, 20)
    keys, values = states(1, 4 + 128 + 5)
    alike = torch.randperm(128)[:26]
    keys[0, 4 + alike] = query * (0.5 + torch.rand(26, 1)) + 0.05 * torch.randn(26, 20)
    for sizes in ([137], [1] * 137):
        layer = feed(layer_of(QuerySimilarity({0: query})), keys, values, sizes)
        assert protected_of(layer, 0) == [set(alike.tolist())]


def test_query_similarity_does_not_depend_on_the_feeding_order():
    """The same bits for a token alone, in a chunk, and beside other rows (invariant 1)."""
    queries = torch.randn(37, 512)
    keys = torch.randn(3, 200, 512)
    score = QuerySimilarity({0: queries})
    whole = score(0, keys, keys)
    pieces = torch.cat([score(0, piece, piece) for piece in keys.split(chunks_of(200, 9), 1)], 1)
    singles = torch.cat([score(0, piece, piece) for piece in keys.split(1, 1)], 1)
    assert torch.equal(whole, pieces)
    assert torch.equal(whole, singles)
    assert torch.equal(whole[1:2], score(0, keys[1:2], keys))


def test_vidkv_with_query_similarity_through_a_stock_model():
    model = tiny_dense()
    ids = torch.randint(1, 97, (2, 150))
    stock = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=stock)
    flat = [layer.keys.transpose(1, 2).flatten(2) for layer in stock.layers]
    chosen = [keys[0, 100:103] for keys in flat]
    config = {"backend": "QuantizedCacheVLMSTP", "nbits": [1.5, 1.58], "residual_length": 4, "vidkv_stp": 0.2}
    score = QuerySimilarity(dict(enumerate(chosen)))
    cache = create_kivi_cache(quantization_config=config, token_score=score)
    model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    for index, layer in enumerate(cache.layers):
        worth = torch.nn.functional.cosine_similarity(flat[index][0, 4:132, None], chosen[index][None], dim=-1).amax(1)
        found = protected_of(layer, 0)[0]
        assert {96, 97, 98} <= found
        assert len(found) == 26
        assert min(worth[token] for token in found) >= worth.sort(descending=True).values[25] - 1e-4
    assert cache.scheme.values == QuantScheme(1.58, group_size=32, protected=0.2, protected_bits=2)


def test_a_score_that_the_saved_cache_did_not_have_is_refused(tmp_path):
    for token_score in (None, "attention"):
        KIVILatentCache(SCHEME, [WIDTHS], token_score=token_score).save(tmp_path / "cache")
        with pytest.raises(ValueError, match="token_score: must not be given"):
            KIVILatentCache.load(tmp_path / "cache", token_score=by_first_channel)
