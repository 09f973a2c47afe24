"""Attention of many new tokens at once to a packed cache: prompts in pieces, long turns, drafts.

A few queries are best served by sums of value latents (`attention.py` and the kernels); with many it is cheaper to
rebuild the values too, tile by tile as the keys, and to attend by the library's flash attention. The tiles' results are
merged by their log-sums (arXiv:2205.14135, section 3.1), so that nothing of the size of the context is ever built.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from modules.kernels.attention import Attended
from modules.kernels.packed import LatentQuery, PackedCache, Tile

#: Cached tokens, and queries, that meet at a time.
TILE = 512

#: By type of device, the kernel behind `scaled_dot_product_attention`, which keeps the log-sums to itself.
_FLASH = {"cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


def chunk_attention(
    query: LatentQuery, cache: PackedCache, expand_values: Callable | None, folded: Callable | None = None
) -> Attended:
    """As `latent_attention` without weights, in the type of the queries, with the values expanded.

    Args:
        query: The queries `[B, H_q, L, d]`, and how they meet the latents.
        cache: The cache and the new tokens.
        expand_values: Value latents `[..., C]` to values `[..., H_kv * d]`; `None`: the values themselves are cached.
        folded: A class like `Merged` for bfloat16 that takes all queries at once; `None`: there is none.

    Returns:
        `summed` `[B, H_q, L, d]` float32 (float64 for float64 queries): the heads' outputs.
    """
    states, (length, size) = query.states, query.states.shape[2:]
    pieces = [slice(first, min(first + TILE, length)) for first in range(0, length, TILE)]
    if query.rope is not None:
        states = torch.empty_like(states, memory_format=torch.contiguous_format)
        # A piece at a time stays in the processor's cache, in float32 too.
        for piece in pieces:
            positions = query.positions[:, None, piece]
            states[:, :, piece] = query.rope.rotate(_wide(query.states[:, :, piece]), positions)
    # Such a class multiplies channels by pairs.
    if states.dtype != torch.bfloat16 or size % 2:
        folded = None
    so_far = (folded or Merged)(states, query.scaling)
    for tile, all_seen in _tiles(query, cache):
        keys, values, positions, valid = _rebuilt(query, tile, expand_values)
        if all_seen and folded is not None:
            so_far.add(slice(0, length), keys, values, None)
            continue
        for piece in pieces:
            seen = None
            if not all_seen:
                distance = query.positions[:, piece, None] - positions[:, None]
                seen = valid[:, None] & (distance >= 0)
                if query.sliding_window is not None:
                    seen &= distance < query.sliding_window
                # Other devices would have to be waited for.
                if seen.device.type == "cpu":
                    if not seen.any():
                        continue
                    seen = None if seen.all() else seen
            so_far.add(piece, keys, values, seen)
    return so_far.attended()


class Merged:
    """What queries have attended to so far, tile by tile, by the library's flash attention.

    Args:
        states: The queries `[B, H_q, L, d]`, rotated.
        scaling: Factor on the logits.
    """

    def __init__(self, states: torch.Tensor, scaling: float):
        self.states, self.scaling = states, scaling
        self.summed = torch.zeros_like(states, dtype=torch.promote_types(states.dtype, torch.float32))
        self.log_sum = self.summed.new_full(states.shape[:-1], -torch.inf)

    def add(self, piece: slice, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None) -> None:
        """Attend to a tile.

        Args:
            piece: Which of the L queries.
            keys, values: `[B, H_kv, n, d]`, keys rotated.
            seen: `[B, L of the piece, n]` bool; `None`: all queries see all tokens.
        """
        states, mask = self.states[:, :, piece], None
        if seen is not None:
            mask = states.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(states.dtype).min)
        attended = _attend(states, keys, values, mask, self.scaling)
        # As `merge_attended`, in place: the two shares sum to one; of a tile that a query does not see it is none.
        log_sum = self.log_sum[:, :, piece]
        share = torch.sigmoid(attended.log_sum - log_sum).masked_fill_(attended.log_sum == -torch.inf, 0.0)
        self.summed[:, :, piece].lerp_(attended.summed, share[..., None])
        self.log_sum[:, :, piece] = torch.logaddexp(log_sum, attended.log_sum)

    def attended(self) -> Attended:
        """The heads' outputs `[B, H_q, L, d]` and the log-sums."""
        return Attended(self.summed, self.log_sum)


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
