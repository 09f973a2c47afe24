"""Pages of vLLM as packed blocks, and steps of a batch; without vLLM, whose engine `test_vllm.py` starts."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configuration_alrd_llama import ALRDLlamaConfig, QuantScheme
from modules.cache.pages import PageLayout, Pages, check_page_length
from modules.cache.scheme import CacheScheme
from modules.kernels import get_backend
from modules.kernels.attention import latent_attention
from modules.kernels.packed import LatentQuery, PackedCache, Rope, Tile
from modules.kivi_cache import needs_whole_pages, page_schemes
from modules.svd_linear import ALinear
from modules.vllm import register
from modules.vllm.step import make_step
from modules.vllm.stores import OpenStore, SinkStore
from tests.helpers import TINY_LLAMA, all_ranks

CPU = torch.device("cpu")
#: Channels of two head groups, and their tiers: all widths, odd counts.
TIERS = [[[3, 8], [5, 6], [7, 5], [6, 4]], [[9, 3], [4, 2], [3, 1]]]
WIDTHS = (21, 16)
SCHEMES = {
    "tiers": QuantScheme(static=True, tiers=TIERS),
    "token scale": QuantScheme(static=True, token_scale=True, tiers=TIERS),
    "trellis": QuantScheme(static=True, token_scale=True, tiers=TIERS, code="trellis"),
    "one width": QuantScheme(bits=3, static=True),
    "per token": QuantScheme(bits=4, orientation="per_token", group_size=16),
    "exact": QuantScheme(bits=16),
}


def layout(name: str, length: int, dtype=torch.float32, backend: str = "cpu") -> PageLayout:
    scheme = CacheScheme.of(SCHEMES[name], SCHEMES["exact"])
    scales = (torch.rand(sum(WIDTHS)) * 0.1 + 0.05, torch.randn(sum(WIDTHS)) - 1)
    return PageLayout(scheme, (WIDTHS,), length, dtype, get_backend(backend, CPU), {"keys": scales})


def rubbish(layout: PageLayout, pages: int) -> torch.Tensor:
    return torch.randint(0, 256, (pages, layout.nbytes), dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [32, 64, 128])
@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_leave_the_bytes_of_a_block_in_any_order(name, length, backend):
    torch.manual_seed(0)
    page_of = layout(name, length, backend=backend)
    states = torch.randn(3, length, sum(WIDTHS)) * 2
    raw = rubbish(page_of, 5)
    pages, untouched = Pages(page_of, raw), raw[[0, 3]].clone()
    order, used = torch.randperm(3 * length), torch.tensor([4, 1, 2])
    slots = (used[:, None] * length + torch.arange(length)).flatten()
    for piece in order.split([1, 2, 3 * length - 40, 37]):
        pages.write(slots[piece], {"keys": states.flatten(0, 1)[piece]})
    for field, expected in page_of.codecs["keys"].encode(states).items():
        assert torch.equal(pages.storage["keys"][field][used], expected), field
    assert torch.equal(raw[[0, 3]], untouched)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_page_has_the_bytes_of_its_fields(name):
    page_of = layout(name, 32)
    fields = page_of.codecs["keys"].fields().values()
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in fields)
    assert nbytes <= page_of.nbytes < nbytes + 4


def test_a_token_that_is_not_finite_is_refused():
    pages = Pages(layout("tiers", 32), rubbish(layout("tiers", 32), 1))
    with pytest.raises(ValueError, match="keys: must be finite"):
        pages.write(torch.tensor([3]), {"keys": torch.full((1, sum(WIDTHS)), torch.nan)})


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_attention_reads_pages_in_place(name, hidden, queries):
    """The C++ kernel over strided pages gives what plain PyTorch does over the decoded tokens that are seen."""
    torch.manual_seed(0)
    page_of = layout(name, 32)
    pages = Pages(page_of, rubbish(page_of, 7))
    held, table = torch.tensor([70, 33]), torch.tensor([[5, 1, 6], [3, 2, 0]])
    states = torch.randn(2, 96, sum(WIDTHS))
    for row in range(2):
        tokens = torch.arange(int(held[row]))
        pages.write(table[row][tokens // 32] * 32 + tokens % 32, {"keys": states[row, tokens]})
    start = torch.arange(3) * 32
    counts = (held[:, None] - start).clamp(0, 32)
    entries = torch.stack([table, start.expand(2, 3), counts]).int()
    expand = ALinear(WIDTHS, 4 * 16, 4, bias=True)
    query = LatentQuery(
        torch.randn(2, 8, queries, 16), held[:, None] + torch.arange(queries), expand, WIDTHS, Rope(torch.rand(8)), 0.25
    )
    packed = {"block_length": 32, "table": entries, "hidden": hidden}
    cache = PackedCache(keys=pages.keys, values=pages.keys, **packed)
    got = get_backend("cpu", CPU).attend(query, cache)
    # Without the hidden tokens a row is a text that begins later: the same blocks decoded, by their own positions.
    decoded = pages.keys.read(table)
    for row in range(2):
        seen = decoded[row].flatten(0, 1)[hidden : int(held[row])][None]
        tile = Tile(seen[:, None], seen[:, None], torch.tensor([[hidden]]), torch.tensor([[seen.shape[1]]]))
        of_row = LatentQuery(
            query.states[row : row + 1], query.positions[row : row + 1], expand, WIDTHS, query.rope, 0.25
        )
        expected = latent_attention(of_row, PackedCache(after=(tile,)))
        torch.testing.assert_close(got.summed[row : row + 1], expected.summed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.log_sum[row : row + 1], expected.log_sum, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        made = function(*arguments, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_a_piece_of_a_prompt_makes_nothing_of_the_size_of_its_context():
    page_of = layout("token scale", 32)
    pages = Pages(page_of, rubbish(page_of, 256))
    for first in range(0, 8192, 512):
        pages.write(torch.arange(first, first + 512), {"keys": torch.randn(512, sum(WIDTHS))})
    step = step_of([40], [8192], [[*range(256), 0, 1]])
    expand, new = ALinear(WIDTHS, 4 * 16, 4, bias=True), torch.randn(40, sum(WIDTHS))
    (requests,) = step.requests
    query = LatentQuery(torch.randn(1, 8, 40, 16), requests.positions, expand, WIDTHS, Rope(torch.rand(8)), 0.25)
    packed = {"block_length": 32, "table": requests.table, "hidden": 4, "after": requests.new_tiles(new, new)}
    with torch.no_grad(), Largest() as largest:
        get_backend("cpu", CPU).attend(query, PackedCache(keys=pages.keys, values=pages.keys, **packed))
    assert 0 < largest.elements < 8192 * sum(WIDTHS) / 2


def test_another_release_of_vllm_is_refused(monkeypatch):
    registered = []
    registry = SimpleNamespace(register_model=lambda *names: registered.append(names))
    engine = SimpleNamespace(__version__="0.32.0+cpu", ModelRegistry=registry)
    monkeypatch.setitem(sys.modules, "vllm", engine)
    register()
    register()
    assert registered == [("ALRDLlamaForCausalLM", "modules.vllm.model:ALRDLlamaForCausalLM")] * 2
    for version in ("0.30.2", "0.33.0", "1.0.0"):
        engine.__version__ = version
        with pytest.raises(ValueError, match=f"vllm={version}: must be at least 0.31 and below 0.33"):
            register()


def test_a_query_that_sees_hidden_tokens_only_gets_nothing():
    page_of = layout("tiers", 32)
    pages = Pages(page_of, rubbish(page_of, 1))
    pages.write(torch.arange(3), {"keys": torch.randn(3, sum(WIDTHS))})
    expand = ALinear(WIDTHS, 4 * 16, 4, bias=True)
    query = LatentQuery(torch.randn(1, 8, 1, 16), torch.tensor([[3]]), expand, WIDTHS, Rope(torch.rand(8)), 0.25)
    entries = torch.tensor([0, 0, 3], dtype=torch.int32).view(3, 1, 1)
    packed = {"block_length": 32, "table": entries, "hidden": 4}
    for attend in (get_backend("cpu", CPU).attend, latent_attention):
        attended = attend(query, PackedCache(keys=pages.keys, values=pages.keys, **packed))
        assert not attended.summed.any()
        assert (attended.log_sum == -torch.inf).all()


def step_of(new, held, pages, length=32, **how):
    starts = np.cumsum([0, *new])
    slots = []
    for n, h, row in zip(new, held, pages, strict=True):
        slots += [row[p // length] * length + p % length for p in range(h, h + n)]
    table = np.zeros((len(new), max(map(len, pages))), dtype=np.int32)
    for row, used in zip(table, pages, strict=True):
        row[: len(used)] = used
    return make_step(starts, np.array(held) + np.array(new), table, torch.tensor(slots), length, **how)


def test_requests_of_one_length_go_together():
    step = step_of([1, 20, 1, 1], [40, 0, 5, 0], [[7, 3], [1], [2], [4]])
    one, long = step.requests
    assert (one.count, long.count) == (3, 1)
    assert one.positions.tolist() == [[40], [5], [0]]
    assert one.rows.tolist() == [0, 21, 22]
    assert one.table.tolist() == [[[7, 3], [2, 0], [0, 0]], [[0, 32], [0, 0], [0, 0]], [[32, 8], [5, 0], [0, 0]]]
    assert one.first_pages == [7, 2, -1]
    assert long.table is None
    assert step.positions.tolist() == [40, *range(20), 5, 0]


def test_pages_that_another_request_is_writing_are_read_from_its_new_tokens():
    """The first request has 40 tokens and writes 60; the second shares its first 96, the third the first 32 only."""
    step = step_of([60, 3, 1], [40, 96, 32], [[5, 6, 7, 8], [5, 6, 7, 9], [5, 10]])
    borrowing = next(requests for requests in step.requests if requests.borrowed)
    assert borrowing.positions.tolist() == [[96, 97, 98]]
    assert borrowing.table[2].tolist() == [[32, 8, 0]]
    (run,) = borrowing.borrowed
    assert (run.first, run.start, run.count) == (0, 40, 56)
    keys = torch.arange(64.0)[:, None]
    tiles = borrowing.new_tiles(keys, keys)
    read = [(int(tile.start), tile.keys.flatten().tolist()) for tile in tiles]
    assert read == [(40, list(range(56))), (96, [60, 61, 62])]
    assert sum(bool(requests.borrowed) for requests in step.requests) == 1


def test_sinks_follow_the_pages_that_begin_texts():
    store = SinkStore(4, {"keys": 2, "values": 2}, torch.empty(0))
    states = torch.randn(9, 2)

    def write(step, first=0):
        rows = store.among(step)
        store.write(step, rows, {"keys": states[first:][rows], "values": -states[first:][rows]})

    # A text in pieces of 3 and 3 tokens, of which 4 are sinks, beside one of 3.
    write(step_of([3, 3], [0, 0], [[5], [6]]))
    write(step_of([3], [3], [[5]]), first=6)
    (tile,) = store.tiles(step_of([1, 1], [6, 3], [[5], [6]]).requests[0])
    assert tile.count.flatten().tolist() == [4, 3]
    assert torch.equal(tile.keys[0, 0], states[[0, 1, 2, 6]])
    assert torch.equal(tile.values[1, 0, :3], -states[3:6])
    # A page that becomes the second one of another text has none any more.
    write(step_of([1], [32], [[6, 5]]))
    assert list(store.row_of) == [6]
    assert store.tiles(step_of([1], [2], [[5]]).requests[0]) == ()


#: Schemes by which codes depend on the other tokens of a block, or have no bits of their own.
WHOLE = {
    "measured": QuantScheme(bits=2, group_size=32),
    "short runs": QuantScheme(bits=3, group_size=12),
    "ternary": QuantScheme(bits=1.58, orientation="per_token", group_size=16),
    "mixed": QuantScheme(bits=1.5, group_size=32),
    "rotated": QuantScheme(bits=2, rotation=True),
    "protected": QuantScheme(bits=2, orientation="per_token", group_size=16, protected=0.1),
    "tiers": QuantScheme(tiers=TIERS, group_size=32),
}


class WholePages:
    """What a layer of the engine does with tokens whose pages are packed when they are full, without an engine."""

    def __init__(self, name: str, length: int, pages: int, sinks: int = 0, limit: int = 8):
        scheme = CacheScheme.of(WHOLE[name], SCHEMES["exact"])
        self.layout = PageLayout(scheme, (WIDTHS,), length, torch.float32, get_backend("cpu", CPU))
        self.raw = rubbish(self.layout, pages)
        self.pages = Pages(self.layout, self.raw)
        self.store = OpenStore(length, {"keys": sum(WIDTHS)}, torch.empty(0), limit, sinks)

    def step(self, new, held, pages):
        return step_of(new, held, pages, self.layout.length, whole_pages=True)

    def write(self, step, states: torch.Tensor) -> None:
        self.pages.write_whole(*self.store.write(step, {"keys": states}))


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("name", WHOLE)
def test_full_pages_are_blocks_whatever_way_their_tokens_came(name, length, sinks):
    """Two texts in pieces of many lengths, with drafts before many a piece that are rejected."""
    torch.manual_seed(0)
    engine, texts = WholePages(name, length, 12, sinks), torch.randn(2, 5 * length, sum(WIDTHS)) * 2
    pages, held, random = [[7, 1, 9, 4, 3, 2], [5, 11, 6, 8, 10, 0]], [0, 0], np.random.default_rng(1)
    # Sinks must not stretch the scales of their block.
    blocks = texts.clone().unflatten(1, (5, length))
    blocks[:, 0, :sinks] = blocks[:, 0, sinks : sinks + 1]
    codec = engine.layout.codecs["keys"]
    encoded = codec.encode(blocks.flatten(0, 1))
    decoded = codec.decode(encoded).view_as(texts)
    while max(held) < 4 * length:
        # Of the drafts of a step only its first token is right.
        n = int(random.integers(1, 32))
        step = engine.step([1 + n, 1], held, pages)
        check_history(engine, step, texts, decoded, sinks)
        first = [text[h : h + 1] for text, h in zip(texts, held, strict=True)]
        engine.write(step, torch.cat([first[0], torch.randn(n, sum(WIDTHS)), first[1]]))
        new = random.choice([0, 1, 2, 31, length, 2 * length + 5], 2).tolist()
        new = [min(n, 5 * length - h) for n, h in zip(new, held, strict=True)]
        step = engine.step(new, held, pages)
        check_history(engine, step, texts, decoded, sinks)
        engine.write(step, torch.cat([text[h : h + n] for text, h, n in zip(texts, held, new, strict=True)]))
        held = [h + n for h, n in zip(held, new, strict=True)]
    assert max(held) > 4 * length and len(engine.store.row_of) <= 4
    for i, (row, n) in enumerate(zip(pages, held, strict=True)):
        full = row[: n // length]
        for field, expected in encoded.items():
            expected = expected[5 * i : 5 * i + len(full)]
            assert torch.equal(engine.pages.storage["keys"][field][full], expected), field


def check_history(engine, step, texts, decoded, sinks) -> None:
    """What a step reads of the history of two texts is their full blocks, decoded, and the tokens behind them."""
    length, expand = engine.layout.length, ALinear(WIDTHS, 4 * 16, 4, bias=True)
    for requests in step.requests:
        held = requests.start
        if not (held > sinks).all():
            continue
        states = torch.randn(requests.count, 8, 1, 16)
        query = LatentQuery(states, held.long(), expand, WIDTHS, Rope(torch.rand(8)), 0.25)
        packed = {"block_length": length, "full": requests.full, "hidden": sinks}
        if requests.table is not None:
            packed |= {"keys": engine.pages.keys, "values": engine.pages.keys, "table": requests.table}
        got = get_backend("cpu", CPU).attend(query, PackedCache(after=engine.store.tiles(requests), **packed))
        # Page 7 begins the first text.
        which = [0 if page == 7 else 1 for page in requests.first_pages]
        offsets = torch.arange(texts.shape[1])
        seen = torch.where((offsets < held // length * length)[..., None], decoded[which], texts[which])
        tile = Tile(seen[:, None, sinks:], seen[:, None, sinks:], torch.full_like(held, sinks), held - sinks)
        expected = latent_attention(query, PackedCache(after=(tile,)))
        torch.testing.assert_close(got.summed, expected.summed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.log_sum, expected.log_sum, rtol=1e-4, atol=1e-5)


def test_a_text_has_two_open_pages_at_most():
    engine, pages, seen = WholePages("measured", 32, 12), list(range(1, 9)), set()
    for held in range(200):
        engine.write(engine.step([1 + held % 7], [held], [pages]), torch.randn(1 + held % 7, sum(WIDTHS)))
        seen.add(len(engine.store.row_of))
    assert seen == {1, 2}


def test_open_pages_that_are_left_behind_go_when_there_are_too_many():
    engine = WholePages("measured", 32, 20, limit=16)
    for page in range(18):
        engine.write(engine.step([1, 3], [page, 0], [[19], [page]]), torch.randn(4, sum(WIDTHS)))
    assert sorted(engine.store.row_of) == [*range(3, 18), 19]
    assert len(engine.store.states["keys"]) == 16  # no room for more than are kept
    step = engine.step([1], [3], [[2]])
    (requests,) = step.requests
    for touch in (lambda: engine.store.tiles(requests), lambda: engine.write(step, torch.randn(1, sum(WIDTHS)))):
        with pytest.raises(RuntimeError, match=r"max_num_seqs=8: must be more: .* page 2, which is not packed"):
            touch()
    # Those of one step have room in any case; pages that it fills for good need none.
    engine.write(engine.step([3] * 18, [0] * 18, [[page] for page in range(18)]), torch.randn(54, sum(WIDTHS)))
    assert len(engine.store.states["keys"]) == 18
    engine.write(engine.step([32 * 17], [0], [list(range(17))]), torch.randn(32 * 17, sum(WIDTHS)))
    assert sorted(engine.store.row_of) == [16, 17]


def test_an_open_page_takes_no_token_that_is_not_finite():
    engine = WholePages("measured", 32, 2)
    with pytest.raises(ValueError, match="keys: must be finite"):
        engine.write(engine.step([2], [0], [[1]]), torch.tensor([[0.0], [torch.nan]]).expand(2, sum(WIDTHS)))
    assert not engine.store.row_of


def test_an_open_page_that_is_being_filled_is_shared():
    """The first request has 40 tokens and writes 60; the second shares its first 96, of which eight are not packed."""
    engine = WholePages("measured", 32, 12)
    states = torch.randn(40, sum(WIDTHS))
    engine.write(engine.step([40], [0], [[5, 6]]), states)
    step = engine.step([60, 3], [40, 96], [[5, 6, 7, 8], [5, 6, 7, 9]])
    borrowing = next(requests for requests in step.requests if requests.borrowed)
    assert borrowing.table[2].tolist() == [[32]]
    (tile,) = engine.store.tiles(borrowing)
    assert (int(tile.start), int(tile.count)) == (32, 8)
    assert torch.equal(tile.keys[0, 0], states[32:])
    (run,) = borrowing.borrowed
    assert (run.start, run.count) == (40, 56)


@pytest.mark.parametrize(
    ("fields", "whole"),
    [
        ({"k_bits": 2}, True),
        ({"k_bits": 16, "v_bits": 1.58, "v_scheme": {"orientation": "per_token"}}, True),
        ({"k_bits": 16, "v_bits": 2, "v_scheme": {"protected": 0.1}}, True),
        ({"k_bits": 16, "v_bits": 2, "v_scheme": {"rotation": True}}, True),
        ({"k_bits": 16, "v_bits": 2}, False),
        ({"k_bits": 16, "v_bits": 16}, False),
    ],
)
def test_which_schemes_pack_whole_pages(fields, whole):
    config = ALRDLlamaConfig(**TINY_LLAMA, truncation_ranks=all_ranks(3, 8), **fields)
    assert needs_whole_pages(config) == whole


def test_pages_that_are_refused():
    check_page_length(64, 64)
    with pytest.raises(ValueError, match="block_size=48: must be a multiple of 32"):
        check_page_length(48)
    with pytest.raises(ValueError, match="sink_length=65: must be at most block_size=64"):
        check_page_length(64, 65)


def test_a_model_without_packed_latents_is_refused():
    config = ALRDLlamaConfig(**TINY_LLAMA, truncation_ranks=all_ranks(3, 8), use_kivi=False)
    with pytest.raises(ValueError, match="use_kivi=False: must be True"):
        page_schemes(config)
