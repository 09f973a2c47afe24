r"""Attention over a latent KV cache in plain PyTorch: the reference of the kernels.

It goes tile by tile (the flash-attention recurrence, arXiv:2205.14135, over latents): the keys of a tile of cached
tokens are rebuilt from their latents, rotated and scored, and its values are summed up in the latent: `Σ_j p_j c_j`.
Nothing of the size of the context is ever built.

RoPE is relative, so a tile's keys are rotated by their offset inside its runs, a constant table, and the queries to
their distance from each run's first token.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from modules.kernels.packed import LatentQuery, PackedCache
from modules.svd_linear import split_groups

#: Queries at a time whose attention weights are formed when only their sum is wanted.
_QUERIES = 64


class Attended(NamedTuple):
    """What queries get from the keys that they attend to, be they all keys or a part of them.

    Attributes:
        summed: `[B, H_q, L, C]` float, sums of the values weighted by the softmax over these keys; zero where a query
            sees none.
        log_sum: `[B, H_q, L]` float, the natural logarithm of `Σ_j exp(score_j · scaling)` over the keys that a query
            sees; -inf where it sees none.
        weights: `[B, H_q, L, positions]` float, the softmax by position of the key; `None`: they were not asked for.
    """

    summed: torch.Tensor
    log_sum: torch.Tensor
    weights: torch.Tensor | None = None


def merge_attended(first: Attended, second: Attended) -> Attended:
    """Attention to two sets of keys, from the attention to each of them (arXiv:2205.14135, section 3.1).

    Args:
        first, second: Of the same queries, both with `log_sum`, and both with `weights` or none. `summed` may be what
            an affine map has made of it: the softmaxes' weights sum to one, so biases come out right.

    Returns:
        In the wider of the two types and that of `log_sum`. Zeros, and -inf, where a query sees no key of either.
    """
    log_sum = torch.logaddexp(first.log_sum, second.log_sum)
    # A query that sees nothing at all: any finite number makes its two shares exp(-inf).
    reference = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
    shares = [(part.log_sum - reference).exp()[..., None] for part in (first, second)]
    summed, weights = first.summed * shares[0] + second.summed * shares[1], None
    if first.weights is not None:
        weights = first.weights * shares[0] + second.weights * shares[1]
    return Attended(summed, log_sum, weights)


def latent_attention(query: LatentQuery, cache: PackedCache, weights_length: int | None = None) -> Attended:
    r"""Softmax attention of queries over tiles of latents, all arithmetic in float32 (float64 for float64 queries).

    Args:
        query: The queries `[B, H_q, L, d]`, and how they meet the latents.
        cache: The cache and the new tokens.
        weights_length: Return the attention weights over positions 0 … weights_length - 1 too.

    Returns:
        `summed` `[B, H_q, L, max(value_widths)]`: for every query head the weighted sum of its group's value latents,
        shorter groups filled with zeros. `log_sum` `[B, H_q, L]`. `weights` `[B, H_q, L, weights_length]`, or `None`.
    """
    positions, rope, value_widths = query.positions, query.rope, query.value_widths
    batch, heads, length, size = query.states.shape
    states = query.states.to(torch.promote_types(query.states.dtype, torch.float32))
    highest = states.new_full((batch, heads, length, 1), -torch.inf)
    total = torch.zeros_like(highest)
    summed = states.new_zeros((batch, heads, length, max(value_widths)))
    scored = []

    for tile in cache.tiles():
        runs, tokens = tile.keys.shape[1:3]
        offsets = torch.arange(tokens, dtype=torch.int64, device=states.device)
        keys = tile.keys
        if query.expand_keys is not None:
            keys = query.expand_keys(keys)
        keys, shifted = keys.unflatten(-1, (-1, size)).to(states.dtype), states[:, None]
        # RoPE is relative: keys turn by their offset in the run, queries back by the run's first position.
        if rope is not None:
            keys = rope.rotate(keys, offsets[:, None])
            shifted = rope.rotate(shifted, (positions[:, None] - tile.start[..., None])[:, :, None])

        # Query heads that share a key head are queries of the same product: [B, m, H_kv, shared * L, d].
        shared = shifted.unflatten(2, (keys.shape[3], -1)).flatten(3, 4)
        scores = (shared @ keys.permute(0, 1, 3, 4, 2)) * query.scaling
        scores = scores.reshape(batch, runs, heads, length, tokens)
        # A query sees the valid tokens up to its own position, and no more than fit its window.
        key_positions = tile.start[..., None] + offsets
        distance = positions[:, None, :, None] - key_positions[:, :, None]
        valid = (offsets < tile.count[..., None]) & (key_positions >= tile.hidden)
        seen = valid[:, :, None] & (distance >= 0)
        if query.sliding_window is not None:
            seen &= distance < query.sliding_window
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf).permute(0, 2, 3, 1, 4).flatten(3)
        if weights_length is not None:
            scored.append((scores, key_positions.flatten(1)))

        # The sums so far go to the scale of the new highest score; with none yet, any scale will do.
        higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        reference = higher.masked_fill(higher == -torch.inf, 0.0)
        weights = (scores - reference).exp()
        decay = (highest - reference).exp()
        values = split_groups(tile.values.to(states.dtype).flatten(1, 2), value_widths).transpose(1, 2)
        gained = weights.unflatten(1, (len(value_widths), -1)).flatten(2, 3) @ values
        summed = summed * decay + gained.reshape(summed.shape)
        total = total * decay + weights.sum(dim=-1, keepdim=True)
        highest = higher

    log_sum = (highest + total.log()).squeeze(-1)
    # A query that sees nothing gets zeros, not NaN.
    total = total.masked_fill(total == 0, 1.0)
    if weights_length is None:
        return Attended(summed / total, log_sum)
    # The weights follow once the highest score and the total are known: each goes to its key's position.
    result = states.new_zeros((batch, heads, length, weights_length))
    for scores, key_positions in scored:
        weights = (scores - highest.masked_fill(highest == -torch.inf, 0.0)).exp() / total
        index = key_positions.clamp(max=weights_length - 1).long()[:, None, None].expand_as(weights)
        result.scatter_add_(3, index, weights)
    return Attended(summed / total, log_sum, result)


@torch.no_grad()
def attention_received(query: LatentQuery, cache: PackedCache, real: torch.Tensor | None, length: int) -> torch.Tensor:
    """Attention that the tokens at positions 0 … length - 1 receive from all queries and heads: `[B, length]`.

    Args:
        query, cache: As for `latent_attention`.
        real: `[B, L]` bool, false for queries of pads, which do not count; `None`: no pads.
    """
    received = query.states.new_zeros((len(query.states), length), dtype=torch.float32)
    for start in range(0, query.states.shape[2], _QUERIES):
        piece = slice(start, start + _QUERIES)
        # Weights of a few queries at a time: `length` of them for each query and head.
        some = replace(query, states=query.states[:, :, piece], positions=query.positions[:, piece])
        weights = latent_attention(some, cache, length).weights
        if real is not None:
            weights = weights * real[:, None, piece, None].to(weights)
        received += weights.sum((1, 2)).float()
    return received
