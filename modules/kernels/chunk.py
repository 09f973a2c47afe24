"""Attention of many new tokens at once to a packed cache: prompts in pieces, long turns, drafts.

A few queries are best served by sums of value latents (`attention.py` and the kernels); with many it is cheaper to
rebuild the values too, tile by tile as the keys, and to attend by the library's flash attention. The tiles' results are
merged by their log-sums (arXiv:2205.14135, section 3.1), so that nothing of the size of the context is ever built.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from modules.kernels.attention import Attended, merge_attended
from modules.kernels.packed import LatentQuery, PackedCache, Tile

#: Cached tokens, and queries, that meet at a time.
TILE = 512

#: By type of device, the kernel behind `scaled_dot_product_attention`, which keeps the log-sums to itself.
_FLASH = {"cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


def chunk_attention(query: LatentQuery, cache: PackedCache, expand_values: Callable | None) -> Attended:
    """As `latent_attention` without weights, in the type of the queries, with the values expanded.

    Args:
        query: The queries `[B, H_q, L, d]`, and how they meet the latents.
        cache: The cache and the new tokens.
        expand_values: Value latents `[..., C]` to values `[..., H_kv * d]`; `None`: the values themselves are cached.

    Returns:
        `summed` `[B, H_q, L, d]` float32 (float64 for float64 queries): the heads' outputs.
    """
    states = query.states
    if query.rope is not None:
        states = query.rope.rotate(_wide(states), query.positions[:, None]).to(states.dtype)
    pieces: list[Attended | None] = [None] * -(-states.shape[2] // TILE)
    for tile, all_seen in _tiles(query, cache):
        keys, values, positions, valid = _rebuilt(query, tile, expand_values)
        for i in range(len(pieces)):
            piece, mask = slice(i * TILE, (i + 1) * TILE), None
            if not all_seen:
                distance = query.positions[:, piece, None] - positions[:, None]
                seen = valid[:, None] & (distance >= 0)
                if query.sliding_window is not None:
                    seen &= distance < query.sliding_window
                mask = states.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(states.dtype).min)
            found = _attend(states[:, :, piece], keys, values, mask, query.scaling)
            so_far = pieces[i]
            pieces[i] = found if so_far is None else merge_attended(so_far, found)
    summed, log_sums, _ = zip(*pieces, strict=True)
    return Attended(torch.cat(summed, dim=2), torch.cat(log_sums, dim=2))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tiles(query: LatentQuery, cache: PackedCache) -> Iterator[tuple[Tile, bool]]:
    """Tiles of at most `TILE` tokens, and whether all queries are known to see all of their tokens."""
    packed = replace(cache, before=(), after=())
    # Packed tokens are older than all queries.
    all_seen = cache.full and query.sliding_window is None
    for i, tile in enumerate(packed.tiles(TILE)):
        # Those that are not seen, the sinks, are in the first block.
        yield tile, all_seen and (i > 0 or cache.hidden == 0)
    for tile in (*cache.before, *cache.after):
        for first in range(0, tile.keys.shape[2], TILE):
            piece = slice(first, first + TILE)
            keys, values = tile.keys[:, :, piece], tile.values[:, :, piece]
            yield Tile(keys, values, tile.start + first, tile.count - first), False


def _rebuilt(query: LatentQuery, tile: Tile, expand_values: Callable | None) -> tuple[torch.Tensor, ...]:
    """Rotated keys and values `[B, H_kv, n, d]` of a tile, its tokens' positions and whether they are valid."""
    dtype, size = query.states.dtype, query.states.shape[-1]
    keys = tile.keys if query.expand_keys is None else query.expand_keys(tile.keys)
    values = tile.values if expand_values is None else expand_values(tile.values)
    offsets = torch.arange(keys.shape[2], dtype=torch.int64, device=keys.device)
    positions = (tile.start[..., None] + offsets).flatten(1)
    valid = (offsets < tile.count[..., None]).flatten(1) & (positions >= tile.hidden)
    keys = keys.flatten(1, 2).unflatten(-1, (-1, size)).transpose(1, 2)
    values = values.flatten(1, 2).unflatten(-1, (-1, size)).transpose(1, 2)
    if query.rope is not None:
        keys = query.rope.rotate(_wide(keys), positions[:, None])
    return keys.to(dtype), values.to(dtype), positions, valid


def _attend(
    states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> Attended:
    """Attention of queries `[B, H_q, L, d]` to the keys of a tile; `mask` `[B, L, n]` is added to the scores."""
    length, heads = states.shape[2], keys.shape[1]
    # Query heads that share a key head are queries of the same product.
    shared = states.unflatten(1, (heads, -1)).flatten(2, 3)
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, states.shape[1] // heads, 1)
    if states.device.type in _FLASH:
        summed, log_sum = _FLASH[states.device.type](shared, keys, values, attn_mask=mask, scale=scaling)
    else:
        scores = _wide(shared @ keys.transpose(2, 3)) * scaling
        if mask is not None:
            scores += mask
        log_sum = scores.logsumexp(-1)
        summed = (scores - log_sum[..., None]).exp().to(values.dtype) @ values
    summed, log_sum = _wide(summed), _wide(log_sum)
    if mask is not None:
        # Queries that see no token of the tile have got the mean of them all.
        unseeing = log_sum < torch.finfo(states.dtype).min / 2
        summed, log_sum = summed.masked_fill(unseeing[..., None], 0.0), log_sum.masked_fill(unseeing, -torch.inf)
    return Attended(summed.unflatten(2, (-1, length)).flatten(1, 2), log_sum.unflatten(2, (-1, length)).flatten(1, 2))
