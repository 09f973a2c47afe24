"""The reference attention against PyTorch's softmax in float64, and attention to parts of the keys, merged."""

from dataclasses import replace

import pytest
import torch

from modules.kernels.attention import Attended, latent_attention, merge_attended
from modules.kernels.packed import LatentQuery, PackedCache, PackedSide, Rope, Tile
from modules.svd_linear import ALinear, split_groups

#: Head size, and channels of the head groups of keys and values.
SIZE, KEY_RANKS, VALUE_RANKS = 10, (7, 5, 9), (11, 3, 6)


def noisy_tile(start: int, counts: tuple[int, ...], dtype: torch.dtype) -> Tile:
    """A run for each row from position `start` on, `counts` of its tokens valid, infinities behind them."""
    tokens = max(counts)
    keys, values = (torch.randn(len(counts), 1, tokens, sum(ranks), dtype=dtype) for ranks in (KEY_RANKS, VALUE_RANKS))
    tile = Tile(keys, values, torch.full((len(counts), 1), start).int(), torch.tensor(counts)[:, None].int())
    return tile.masked()


def case(dtype: torch.dtype, query_heads: int, length: int) -> tuple[LatentQuery, list[Tile]]:
    """Queries of two rows, the second of which is shorter, and the tiles of 75 and 52 tokens."""
    expand = ALinear(KEY_RANKS, 3 * SIZE, 3, bias=True).to(dtype).requires_grad_(False)
    expand.bias.copy_(torch.randn(3 * SIZE))
    rope = Rope(1 / 100 ** (torch.arange(0, SIZE, 2) / SIZE), 1.1)
    states = 2 * torch.randn(2, query_heads, length, SIZE, dtype=dtype)
    positions = torch.tensor([75, 52])[:, None] - length + torch.arange(length)
    tiles = [noisy_tile(0, (4, 4), dtype), noisy_tile(4, (63, 41), dtype), noisy_tile(67, (8, 0), dtype)]
    tiles[2].start[1], tiles[2].count[1] = 45, 7
    return LatentQuery(states, positions, expand, VALUE_RANKS, rope, 0.4), tiles


def directly(query: LatentQuery, tiles: list[Tile]) -> Attended:
    """All scores at once, in float64: the definition."""
    states, shared = query.states.double(), query.states.shape[1] // 3
    with torch.no_grad():
        keys = torch.cat([query.expand_keys(tile.keys[:, 0]) for tile in tiles], 1).double().unflatten(-1, (3, SIZE))
    places = [tile.start + torch.arange(tile.keys.shape[2]) for tile in tiles]
    valid = torch.cat([torch.arange(tile.keys.shape[2]) < tile.count for tile in tiles], 1)
    at = torch.cat(places, 1)
    keys = query.rope.rotate(keys.transpose(1, 2), at[:, None]).repeat_interleave(shared, 1)
    scores = query.rope.rotate(states, query.positions[:, None]) @ keys.transpose(2, 3) * query.scaling
    seen = valid[:, None, None] & (at[:, None, None] <= query.positions[:, None, :, None])
    if query.sliding_window is not None:
        seen &= at[:, None, None] > query.positions[:, None, :, None] - query.sliding_window
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    values = split_groups(torch.cat([tile.values[:, 0] for tile in tiles], 1).double(), VALUE_RANKS).transpose(1, 2)
    return Attended(weights @ values.repeat_interleave(shared, 1), scores.logsumexp(-1))


def assert_close(actual: Attended, expected: Attended) -> None:
    exactness = 1e-10 if actual.summed.dtype == torch.float64 else 2e-5
    for mine, other in zip(actual[:2], expected[:2], strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.double(), other.double(), rtol=exactness, atol=exactness)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("query_heads, length", [(3, 1), (6, 1), (15, 7)])
def test_sums_and_logarithms_are_those_of_the_softmax(query_heads, length, dtype):
    query, tiles = case(dtype, query_heads, length)
    # The second row's window starts at its own position, inside the first row's middle.
    attended = latent_attention(query, PackedCache(before=tuple(tiles[:1]), after=tuple(tiles[1:])))
    assert attended.summed.dtype == attended.log_sum.dtype == dtype
    assert_close(attended, directly(query, tiles))


@pytest.mark.parametrize("sliding_window", [1, 3, 20, 60, 75, 2**40])
def test_a_sliding_window(sliding_window):
    """One that ends in the new tokens, in the blocks, in the sinks; one that all fit."""
    query, tiles = case(torch.float64, 6, 7)
    query = replace(query, sliding_window=sliding_window)
    found = latent_attention(query, PackedCache(after=tuple(tiles)), 75)
    assert_close(found, directly(query, tiles))
    # A query sees as many positions as fit the window, its own the last.
    assert torch.equal((found.weights > 0).sum(-1)[:, 0], (query.positions + 1).clamp(max=sliding_window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("query_heads, length", [(3, 1), (6, 7)])
@pytest.mark.parametrize("cut", range(4))
def test_parts_merge_to_the_whole(cut, query_heads, length, dtype):
    """Cut between any two tiles, before the first and behind the last: one part may be empty."""
    query, tiles = case(dtype, query_heads, length)
    whole = latent_attention(query, PackedCache(after=tuple(tiles)), 75)
    parts = [latent_attention(query, PackedCache(after=tuple(part)), 75) for part in (tiles[:cut], tiles[cut:])]
    for first, second in (parts, reversed(parts)):
        merged = merge_attended(first, second)
        assert_close(merged, whole)
        torch.testing.assert_close(merged.weights, whole.weights)
        assert merge_attended(first._replace(weights=None), second._replace(weights=None)).weights is None


def test_what_no_part_sees_stays_zero():
    """Queries before all keys, before those of one part, and scores that would overflow."""
    query, tiles = case(torch.float32, 6, 3)
    query.positions[0], query.positions[1] = torch.tensor([-1, 2, 60]), torch.tensor([-3, -2, -1])
    first, second = (latent_attention(query, PackedCache(after=(tile,))) for tile in tiles[:2])
    merged = merge_attended(first, second)
    for part in (first, merged):
        assert not part.summed[0, :, 0].any() and not part.summed[1].any()
        assert (part.log_sum[0, :, 0] == -torch.inf).all() and (part.log_sum[1] == -torch.inf).all()
    assert torch.equal(merged.summed[0, :, 1], first.summed[0, :, 1])
    assert torch.equal(merged.log_sum[0, :, 1], first.log_sum[0, :, 1])
    large = [part._replace(log_sum=part.log_sum + 1e6) for part in (first, second)]
    merged_large = merge_attended(*large)
    assert torch.isfinite(merged_large.summed).all()
    torch.testing.assert_close(merged_large.summed, merged.summed, rtol=0.1, atol=0.1)


def test_one_latent_for_keys_and_values_is_read_once():
    """Blocks and tiles whose values are their keys: the results of two copies, from one reading for each tile."""
    query, tiles = case(torch.float64, 6, 2)
    query.value_widths = KEY_RANKS
    pool, slots = torch.randn(9, 16, sum(KEY_RANKS), dtype=torch.float64), []

    def read(some: torch.Tensor) -> torch.Tensor:
        slots.append(some)
        return pool[some.long()]

    table = torch.tensor([[[8, 2, 5], [1, 0, 0]], [[4, 20, 36], [4, 0, 0]], [[16, 16, 16], [11, 0, 0]]]).int()
    joint, other = PackedSide(read), PackedSide(lambda some: pool[some.long()])
    window = replace(tiles[2], values=tiles[2].keys)
    cache = PackedCache(after=(window,), keys=joint, values=joint, block_length=16, table=table)
    for tile in cache.tiles(16):
        assert tile.values is tile.keys
    assert len(slots) == 3
    found = latent_attention(query, cache)
    copied = replace(cache, after=(replace(window, values=window.keys.clone()),), values=other)
    for mine, expected in zip(found[:2], latent_attention(query, copied)[:2], strict=True):
        assert torch.equal(mine, expected)


def test_an_affine_map_may_come_before_the_merge():
    """Sums are expanded, bias and all, then merged: as merged, then expanded."""
    query, tiles = case(torch.float64, 6, 2)
    weight, bias = torch.randn(13, max(VALUE_RANKS), dtype=torch.float64), torch.randn(13, dtype=torch.float64)
    parts = [latent_attention(query, PackedCache(after=(tile,))) for tile in tiles[:2]]
    expanded = [part._replace(summed=part.summed @ weight.T + bias) for part in parts]
    expected = merge_attended(*parts).summed @ weight.T + bias
    torch.testing.assert_close(merge_attended(*expanded).summed, expected)
