"""The cache of fixed capacity: the bytes of any cache, no wait in a step, graphs, generation."""

import copy
import gc
import itertools
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from modules import KIVILatentCache, create_kivi_cache
from modules.cache import fixed_store as fixed_cache
from modules.cache.codecs import QUANTIZERS, ExactCodec
from modules.kivi_cache import CacheScheme, FixedLatentLayer, KIVILatentLayer
from tests.helpers import tiny_dense, tiny_split

WIDTHS = ((13, 7), (9, 9, 2))
TIERS = (((3, 16), (6, 4), (4, 1)), ((2, 16), (4, 4), (1, 1)))

SCHEMES = {
    "per channel and token": CacheScheme(2, 3, 20, 5, 4),
    "no window, no sinks": CacheScheme(4, 8, 8, 0, 0),
    "groups that a block ends in": CacheScheme(
        3, 2, 20, 33, 3, v_scheme={"group_size": 32, "orientation": "per_channel"}, k_scheme={"range_method": "mse"}
    ),
    "ternary and one bit": CacheScheme(1.58, 1, 16, 7, 4, k_scheme={"orientation": "per_token"}),
    "16 bits": CacheScheme(16, 16, 5, 2, 4),
    "tiers": CacheScheme(2, 2, 16, 5, 2, k_scheme={"tiers": TIERS}),
    "static": CacheScheme(5, 6, 16, 5, 2, {"static": True}, {"static": True, "orientation": "per_channel"}),
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)

#: Model settings whose blocks are small, so that much happens within few tokens.
SMALL = {"k_bits": 2, "v_bits": 2, "group_size": 20, "residual_length": 5, "sink_length": 4}
RANKS = {"k_proj": [13, 21], "v_proj": [32, 7]}


def scales() -> dict:
    return {"keys": (torch.rand(20) / 4, torch.randn(20) - 2), "values": (torch.rand(20) / 20, torch.randn(20) - 2)}


def pair(
    scheme: CacheScheme, capacity: int = 400, backend: str | None = None
) -> tuple[KIVILatentLayer, FixedLatentLayer]:
    """A layer as any other, of the reference back end, and one of fixed capacity, for the same tokens."""
    calibrated = scales()
    fixed = FixedLatentLayer(scheme, WIDTHS, calibrated, backend, capacity=capacity)
    return KIVILatentLayer(scheme, WIDTHS, calibrated, "reference"), fixed


def random_states(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((3 * torch.randn(batch, length, 20) + torch.arange(20) / 4).to(dtype) for _ in range(2))


def stored_row(layer: KIVILatentLayer, i: int) -> dict[str, torch.Tensor]:
    """All bytes and counts of a row, wherever its blocks are."""
    row, table = layer.rows[i], layer.block_table()[:, i]
    found = {f"sink_{side}": layer.exact.sinks[side][i, : row.sinks] for side in ("keys", "values")}
    found |= {f"window_{side}": layer.exact.window[side][i, : row.window] for side in ("keys", "values")}
    blocks = len(row.blocks)
    found |= {"starts": table[1, :blocks], "counts": table[2, :blocks], "pads": torch.tensor(row.pads)}
    slots = table[0, :blocks].long()
    stored = [(f"{side}.{n}", t) for side, fields in layer.pool.storage.items() for n, t in fields.items()]
    return found | {name: tensor[slots] for name, tensor in stored}


def assert_same_rows(found: KIVILatentLayer, expected: KIVILatentLayer) -> None:
    assert found.slots == expected.slots and len(found.rows) == len(expected.rows)
    for i in range(len(expected.rows)):
        a, b = stored_row(found, i), stored_row(expected, i)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), f"row {i}: {name}"


def left_padded(batch: int, length: int, pads: tuple[int, ...]) -> torch.Tensor:
    """`[B, length]` bool, false for the pads at the start of each row."""
    return torch.arange(length) >= torch.tensor(pads)[:, None].expand(batch, 1)


# ---- the same bytes


@by_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bytes_as_any_cache(scheme, dtype):
    ordinary, fixed = pair(scheme)
    for length, pads in ((3, (2, 0, 3)), (70, (68, 0, 7)), *((1, None),) * 45, (16, None), (2, None), (40, (0, 9, 40))):
        states, real = random_states(3, length, dtype), None if pads is None else left_padded(3, length, pads)
        for layer in (ordinary, fixed):
            layer.append(*states, real)
    assert_same_rows(fixed, ordinary)
    assert fixed.nbytes_used == ordinary.nbytes_used
    assert fixed.store.lengths.tolist() == [row.tokens for row in ordinary.rows]
    assert min(len(row.blocks) for row in fixed.rows) >= 2


def test_feeding_order_does_not_matter():
    states = random_states(2, 130)
    layers = []
    for cuts in ((130,), (1,) * 130, (2, 17, 61, 16, 1, 33)):
        layers.append(FixedLatentLayer(SCHEMES["per channel and token"], WIDTHS, capacity=130))
        for piece in zip(*(x.split(cuts, dim=1) for x in states), strict=True):
            layers[-1].append(*piece)
    for layer in layers[1:]:
        assert_same_rows(layer, layers[0])


@by_scheme
def test_what_attention_reads(scheme):
    """The tiles give the tokens of any cache, and nothing that is not finite beyond their counts."""
    ordinary, fixed = pair(scheme)
    for length, pads in ((60, (50, 0)), (30, None), (1, None), (8, None)):
        states, real = random_states(2, length), None if pads is None else left_padded(2, length, pads)
        for layer in (ordinary, fixed):
            layer.append(*states, real)
    read = []
    for layer in (ordinary, fixed):
        tokens = [{}, {}]
        for tile in layer.tiles():
            assert torch.isfinite(tile.keys).all() and torch.isfinite(tile.values).all()
            for i, row in enumerate(tokens):
                for run, (start, count) in enumerate(zip(tile.start[i].tolist(), tile.count[i].tolist(), strict=True)):
                    for t in range(count):
                        assert start + t not in row
                        row[start + t] = torch.cat([tile.keys[i, run, t], tile.values[i, run, t]])
        read.append(tokens)
    for a, b in zip(*read, strict=True):
        assert sorted(a) == list(range(len(a))) and a.keys() == b.keys()
        assert all(torch.equal(a[position], b[position]) for position in a)


# ---- editing, sizes


def test_crops_and_reorders_as_any_cache():
    scheme = SCHEMES["per channel and token"]
    ordinary, fixed = pair(scheme, 200)
    addresses = None
    steps = [("append", 60, (55, 0, 31)), ("crop", -2), ("append", 21), ("crop", -30), ("append", 1), ("append", 40)]
    steps += [("reorder", [2, 0, 0]), ("append", 16), ("crop", -70), ("append", 3), ("crop", 0), ("append", 30)]
    for name, what, *pads in steps:
        states = random_states(3, what) if name == "append" else None
        for layer in (ordinary, fixed):
            if name == "append":
                layer.append(*states, left_padded(3, what, *pads) if pads else None)
            elif name == "crop":
                layer.crop(what)
            else:
                layer.reorder_cache(torch.tensor(what))
        assert_same_rows(fixed, ordinary)
        addresses = addresses or [t.data_ptr() for t in fixed.store.tensors.values()]
    assert addresses == [t.data_ptr() for t in fixed.store.tensors.values()]
    assert any(count < 20 for row in fixed.rows for count in row.counts)


def test_reset_keeps_the_allocation():
    _, fixed = pair(SCHEMES["tiers"])
    fixed.append(torch.full((2, 9, 20), torch.nan), torch.full((2, 9, 20), torch.nan))
    allocated = [t.data_ptr() for t in fixed.store.tensors.values()]
    fixed.reset()
    assert fixed.rows == [] and fixed.slots == 0 and len(fixed.row_lengths()) == 0
    fresh = pair(SCHEMES["tiers"])[1]
    for length in (40, 1, 30):
        states = random_states(2, length)
        fixed.append(*states)
        fresh.append(*states)
    assert_same_rows(fixed, fresh)
    assert all(torch.isfinite(tile.keys).all() for tile in fixed.tiles())
    assert allocated == [t.data_ptr() for t in fixed.store.tensors.values()]
    with pytest.raises(ValueError, match=r"keys: \[batch, tokens, channels\] of \[3, 1, 20\]"):
        fixed.append(*random_states(3, 1))


def test_a_copy_is_a_cache_of_its_own():
    ordinary, fixed = pair(SCHEMES["static"])
    first, then, other = random_states(2, 60), random_states(2, 30), random_states(2, 30)
    ordinary.append(*first)
    fixed.append(*first)
    copied = copy.deepcopy(fixed)
    torch.compile(copied.append, backend="eager", fullgraph=True)(*other)
    ordinary.append(*then)
    fixed.append(*then)
    assert_same_rows(fixed, ordinary)
    assert not torch.equal(copied.exact.window["keys"], fixed.exact.window["keys"])


def test_capacity_is_a_bound():
    ordinary, fixed = pair(SCHEMES["no window, no sinks"], 45)
    states = random_states(2, 44)
    for layer in (ordinary, fixed):
        layer.append(*states, left_padded(2, 44, (40, 0)))
    for length in (2, 20):
        with pytest.raises(ValueError, match="capacity=45: a row of the cache would exceed it"):
            fixed.append(*random_states(2, length))
    assert_same_rows(fixed, ordinary)
    fixed.append(*random_states(2, 1))
    assert fixed.store.lengths.tolist() == [5, 45] and fixed.get_max_length() == 45
    with pytest.raises(ValueError, match="capacity=45"):
        fixed.append(*random_states(2, 1))


def test_a_refused_block_leaves_the_rows_as_they_were():
    ordinary, fixed = pair(SCHEMES["per channel and token"])
    states = random_states(2, 40)
    states[1][1, 30, 3] = torch.inf
    for layer in (ordinary, fixed):
        layer.append(*states)
    for length in (30, 17):
        with pytest.raises(ValueError, match="must be finite"):
            fixed.append(*random_states(2, length))
    assert_same_rows(fixed, ordinary)


def test_sizes_and_repr(tmp_path):
    model = tiny_split(tmp_path, 24, **SMALL)
    cache, ordinary = model.create_kivi_cache(capacity=100), model.create_kivi_cache()
    assert cache.nbytes == 0 and "capacity=100" in repr(cache) and "empty" in repr(cache)
    ids = torch.randint(1, 97, (2, 70))
    model(ids, past_key_values=cache)
    model(ids, past_key_values=ordinary)
    allocated = cache.nbytes
    assert cache.nbytes_used == ordinary.nbytes_used < allocated
    slots = 2 * ((100 - 4 - 5) // 20) + 1
    window = 2 * (4 + 5 + 20 - 1 + 16) * 48 * 4
    assert allocated == 3 * (slots * cache.layers[0].pool.slot_nbytes + window + 2 * 4 * 12 + 2 * 16)
    model(ids[:, :30], past_key_values=cache)
    assert cache.nbytes == allocated and cache.get_seq_length() == 100 and cache.get_max_length() == 100
    assert cache.bits_per_element == ordinary.bits_per_element
    assert "rows of [100, 100] tokens" in repr(cache)


def test_saved_and_loaded_as_any_cache(tmp_path):
    model = tiny_split(tmp_path, 24, **SMALL)
    cache = model.create_kivi_cache(capacity=150)
    ids = torch.randint(1, 97, (2, 90))
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = KIVILatentCache.load(tmp_path / "cache")
    assert [type(layer) for layer in loaded.layers] == [KIVILatentLayer] * 3
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert_same_rows(a, b)
    step = torch.randint(1, 97, (2, 4))
    a, b = (model(step, past_key_values=c).logits for c in (cache, loaded))
    assert (a - b).abs().max() < 1e-4


def test_an_emptied_cache_is_saved_and_grows(tmp_path):
    model = tiny_split(tmp_path, 24, **SMALL)
    cache = model.create_kivi_cache(capacity=150)
    model(torch.randint(1, 97, (2, 60)), past_key_values=cache)
    cache.reset()
    cache.save(tmp_path / "cache")
    ids = torch.randint(1, 97, (3, 40))
    expected = model(ids, past_key_values=model.create_kivi_cache()).logits
    for empty in (cache.growing(), KIVILatentCache.load(tmp_path / "cache")):
        assert empty.row_tokens() == []
        assert torch.equal(model(ids, past_key_values=empty).logits, expected)


class OwnCodec(ExactCodec):
    pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_bits": 1.5}, "keys have bits=1.5"),
        ({"v_scheme": {"protected": 0.1}}, "values have protected=0.1"),
        ({"k_scheme": {"rotation": True}}, "keys have rotation=True"),
        ({"k_scheme": {"quantizer": "own"}}, "keys have quantizer='own'"),
    ],
)
def test_schemes_without_a_fixed_size_are_refused(monkeypatch, tmp_path, settings, message):
    monkeypatch.setitem(QUANTIZERS, "own", OwnCodec)
    model = tiny_split(tmp_path, 24)
    with pytest.raises(ValueError, match=f"capacity: {message}, which a cache of fixed capacity does not store"):
        model.create_kivi_cache(capacity=100, **settings)
    assert model.create_kivi_cache(**settings).capacity is None


@pytest.mark.parametrize("capacity", [-1, 2.5, True])
def test_capacity_is_a_count(capacity):
    with pytest.raises(ValueError, match="capacity"):
        create_kivi_cache(capacity=capacity).layer(0)


def test_what_a_fixed_cache_cannot_do_is_said():
    _, fixed = pair(SCHEMES["16 bits"])
    fixed.append(*random_states(2, 30))
    with pytest.raises(ValueError, match=r"batch_repeat_interleave: .* repeat the prompt's rows"):
        fixed.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"batch_select_indices: .* use reorder_cache\(\)"):
        fixed.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="tokens_to_remove=1"):
        fixed.crop(1)
    with pytest.raises(ValueError, match="tokens_to_remove: must be no more tokens than the rows hold"):
        fixed.crop(-31)


# ---- as the cache of a model


@torch.no_grad()
def decoded(model, ids, mask, cache, step=None, prompt: int = 50) -> torch.Tensor:
    """Logits of a prompt's last token, and of the tokens after it by steps of one."""
    step = model if step is None else step
    logits = [model(ids[:, :prompt], attention_mask=mask, past_key_values=cache).logits[:, -1:]]
    for token in ids[:, prompt:].split(1, dim=1):
        logits.append(step(token, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("heads", [4, 8])
def test_logits_are_those_of_any_cache(tmp_path, heads):
    model = tiny_split(tmp_path, RANKS, heads // 2, dense=tiny_dense(num_key_value_heads=heads), **SMALL)
    ids, mask = torch.randint(1, 97, (3, 120)), left_padded(3, 50, (37, 0, 48)).long()
    ordinary, fixed = model.create_kivi_cache(), model.create_kivi_cache(capacity=160)
    expected = decoded(model, ids, mask, ordinary)
    assert (decoded(model, ids, mask, fixed) - expected).abs().max() < 1e-3
    assert fixed.row_tokens() == ordinary.row_tokens() == [83, 120, 72]

    # Then several tokens at once, with masks and positions given, and a second turn with pads.
    mask = torch.cat([mask, torch.ones(3, 70)], dim=1)
    for length, pads in ((16, (0, 0, 0)), (3, (0, 0, 0)), (17, (5, 0, 17))):
        more = torch.randint(1, 97, (3, length))
        mask = torch.cat([mask, left_padded(3, length, pads)], dim=1).long()
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]}
        a, b = (model(more, past_key_values=cache, **given).logits for cache in (ordinary, fixed))
        assert (a - b)[mask[:, -length:].bool()].abs().max() < 1e-3
    assert fixed.row_tokens() == ordinary.row_tokens()
    with pytest.raises(ValueError, match="attention_mask: with a fixed capacity, steps of up to 16 have no pads"):
        model(more[:, :2], attention_mask=torch.tensor([[1, 1], [0, 1], [1, 1]]), past_key_values=fixed)
    with pytest.raises(ValueError, match="position_ids: must count"):
        model(more[:, :2], position_ids=torch.tensor([[5, 6]]), past_key_values=fixed)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_generation(tmp_path, how):
    # Each row owns its blocks: what beams and crops do is seen in the text.
    model = tiny_split(tmp_path, 40, k_bits=8, v_bits=8, group_size=20, residual_length=12)
    batch = 1 if "prompt_lookup_num_tokens" in how else 2
    ids, mask = torch.randint(1, 97, (batch, 60)), left_padded(batch, 60, (11, 0)[:batch]).long()
    settings = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, **how}
    expected = model.generate(ids, past_key_values=model.create_kivi_cache(), **settings)
    cache = model.create_kivi_cache(capacity=130)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    assert min(len(row.blocks) for row in cache.layers[0].rows) >= 3


def test_compiled_generation(tmp_path):
    """The library compiles the steps of a cache that says that it can."""
    model = tiny_split(tmp_path, 24, **SMALL)
    ids, mask = torch.randint(1, 97, (2, 40)), left_padded(2, 40, (11, 0)).long()
    settings = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, past_key_values=model.create_kivi_cache(capacity=90), **settings)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=compiler, mode=None)
    config._compile_all_devices = True
    cache = model.create_kivi_cache(capacity=90)
    found = model.generate(ids, past_key_values=cache, compile_config=config, **settings)
    assert torch.equal(found, expected)
    assert len(graphs) == 1


def test_drop_in_for_other_models():
    dense = tiny_dense()
    ids = torch.randint(1, 97, (2, 70))
    logits = []
    for capacity in (None, 100):
        cache = create_kivi_cache(2, 4, 20, 5, capacity=capacity)
        logits.append(torch.cat([dense(piece, past_key_values=cache).logits for piece in ids.split(35, 1)], 1))
        assert not cache.is_compileable
    assert torch.equal(*logits)


# ---- graphs


def test_a_step_compiles_once(tmp_path):
    """200 steps with several flushes of each row, then another cache of that kind: one graph, the same logits."""
    model = tiny_split(tmp_path, 24, 2, dense=tiny_dense(num_hidden_layers=2), **SMALL)
    ids, mask = torch.randint(1, 97, (3, 250)), left_padded(3, 50, (37, 0, 48)).long()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    caches = [model.create_kivi_cache(capacity=260) for _ in range(3)]
    assert all(cache.is_compileable for cache in caches)
    expected = decoded(model, ids, mask, caches[0])
    assert torch.equal(decoded(model, ids, mask, caches[1], step), expected)
    assert [len(row.blocks) for row in caches[1].layers[0].rows] == [10, 12, 9]
    assert torch.equal(decoded(model, ids[:, :90], mask, caches[2], step), expected[:, :41])
    assert counter.frame_count == 1
    for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert_same_rows(mine, other)


@pytest.mark.parametrize("name", ["per channel and token", "tiers", "static"])
def test_inductor_stores_the_same_bytes(name):
    """It would keep the casts that round scales in float32, if it saw them."""
    ordinary, fixed = pair(SCHEMES[name])
    states = random_states(2, 30, torch.bfloat16)
    for layer in (ordinary, fixed):
        layer.append(*states)
    step = torch.compile(fixed.append, backend="inductor", fullgraph=True)
    for _ in range(40):
        states = random_states(2, 1, torch.bfloat16)
        ordinary.append(*states)
        step(*states)
    assert_same_rows(fixed, ordinary)


@pytest.mark.parametrize("name", ["per channel and token", "static"])
def test_an_unpickled_layer_in_a_graph(name, monkeypatch):
    """As in another process, where nobody has its plan, and the name of it may be that of another one."""
    monkeypatch.setattr(fixed_cache, "_count", itertools.count())
    ordinary, fixed = pair(SCHEMES[name])
    states = random_states(2, 30)
    for layer in (ordinary, fixed):
        layer.append(*states)
    pickled = pickle.dumps(fixed)
    del fixed, layer
    gc.collect()
    monkeypatch.setattr(fixed_cache, "_count", itertools.count())
    if name == "static":
        other = pair(SCHEMES[name])[1]  # with scales of its own
        other.append(*states)
    fixed = pickle.loads(pickled)
    step = torch.compile(fixed.append, backend="aot_eager", fullgraph=True)  # which copies what an operation changes
    for _ in range(20):
        states = random_states(2, 1)
        ordinary.append(*states)
        step(*states)
    assert_same_rows(fixed, ordinary)


@pytest.mark.slow
def test_inductor_gives_the_logits(tmp_path):
    model = tiny_split(tmp_path, 24, 2, dense=tiny_dense(num_hidden_layers=1), **SMALL)
    ids, mask = torch.randint(1, 97, (3, 120)), left_padded(3, 50, (37, 0, 48)).long()
    expected = decoded(model, ids, mask, model.create_kivi_cache(capacity=130))
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(model, backend=counter, fullgraph=True)
    found = decoded(model, ids, mask, model.create_kivi_cache(capacity=130), step)
    assert (found - expected).abs().max() < 1e-2 and counter.frame_count == 1


def test_an_error_in_a_graph_is_an_error():
    _, fixed = pair(SCHEMES["per channel and token"], 50)
    step = torch.compile(fixed.append, backend="eager", fullgraph=True)
    fixed.append(*random_states(2, 10))
    for _ in range(4):
        step(*random_states(2, 10))
    with pytest.raises(ValueError, match="capacity=50"):
        step(*random_states(2, 10))


@pytest.mark.parametrize("settings", [{}, {"k_bits": 3, "k_scheme": {"range_method": "mse"}, "v_bits": 1.58}], ids=str)
@torch.no_grad()
def test_a_step_waits_for_nothing(tmp_path, settings):
    """On a device without data every read by the host is an error: of a value, a count, a copy to the CPU."""
    model = tiny_split(tmp_path, RANKS, 2, tiny_dense(num_hidden_layers=1), **(SMALL | settings)).to("meta")
    cache = model.create_kivi_cache(capacity=300)
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(2, device="meta").sum().item()

    def ids(length):
        return torch.zeros((3, length), dtype=torch.long, device="meta")

    for length, mask in ((50, None), (1, None), (16, None), (1, ids(68)), (5, ids(73))):
        logits = model(ids(length), attention_mask=mask, past_key_values=cache).logits
        assert logits.shape == (3, length, 97) and logits.device.type == "meta"
    cache.crop(-3)
    cache.reorder_cache(ids(1)[:, 0])
    model(ids(1), position_ids=ids(1), past_key_values=cache)
    cache.reset()
    model(ids(60), past_key_values=cache)
    with pytest.raises(RuntimeError, match="meta"):
        cache.row_tokens()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
@torch.no_grad()
def test_cuda_graph(tmp_path, backend):
    """A captured step, replayed over several flushes, writes what steps without a graph write."""
    model = tiny_split(tmp_path, 32, 2, **SMALL).cuda()
    ids = torch.randint(1, 97, (2, 150), device="cuda")
    mask = left_padded(2, 50, (37, 0)).long().cuda()
    eager, graphed = (model.create_kivi_cache(capacity=160, backend=backend) for _ in range(2))
    for cache in (eager, graphed):
        model(ids[:, :50], attention_mask=mask, past_key_values=cache)

    token = ids[:, 50:51].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which a capture cannot
        for t in range(50, 53):
            token.copy_(ids[:, t : t + 1])
            model(token, past_key_values=graphed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, past_key_values=graphed).logits

    for t in range(50, 150):
        expected = model(ids[:, t : t + 1], past_key_values=eager).logits
        if t >= 53:
            token.copy_(ids[:, t : t + 1])
            graph.replay()
            assert (logits - expected).abs().max() < 1e-4, t
    for mine, other in itertools.zip_longest(graphed.layers, eager.layers):
        assert [len(row.blocks) for row in mine.rows] == [5, 7]
        assert mine.rows == other.rows
