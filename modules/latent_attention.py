r"""Attention over a latent KV cache, tile by tile (the flash-attention recurrence, arXiv:2205.14135, over latents).

For each tile of cached tokens the keys are rebuilt from their latents, rotated and scored, and the values are summed
up in the latent: `Σ_j p_j c_j`. Nothing of the size of the context is ever built.

RoPE is relative, so a tile's keys are rotated by their offset inside its runs, a constant table, and the queries to
their distance from each run's first token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from modules.kivi_cache import Tile
from modules.svd_linear import split_groups

#: Queries at a time whose attention weights are formed when only their sum is wanted.
_QUERIES = 64


@dataclass(frozen=True)
class Rope:
    """Frequencies `[d/2]` of a rotary embedding and the factor that scales its cosines and sines (yarn)."""

    inv_freq: torch.Tensor
    attention_scaling: float = 1.0

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `x` `[..., d]` to `positions`, which broadcast to `x.shape[:-1]`, in the type of `x`."""
        angle = positions[..., None].to(x.dtype) * self.inv_freq.to(x)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def latent_attention(
    query: torch.Tensor,
    positions: torch.Tensor,
    tiles: Iterable[Tile],
    expand_keys: Callable[[torch.Tensor], torch.Tensor],
    value_widths: tuple[int, ...],
    rope: Rope,
    scaling: float,
    weights_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Softmax attention of queries over tiles of latents, all arithmetic in float32 (float64 for float64 queries).

    Args:
        query: `[B, H_q, L, d]` before RoPE.
        positions: `[B, L]`, position of each query; a key is seen if its own position is not larger.
        tiles: The cache and the new tokens, in any order.
        expand_keys: Key latents `[..., C_k]` to keys `[..., H_kv * d]` before RoPE.
        value_widths: Channels of each head group of the value latents.
        rope: Rotary embedding.
        scaling: Factor on the logits.
        weights_length: Return the attention weights over positions 0 … weights_length - 1 too.

    Returns:
        `[B, H_q, L, max(value_widths)]`: for every query head the weighted sum of its group's value latents,
        shorter groups filled with zeros; zero where a query sees nothing. And the weights `[B, H_q, L,
        weights_length]`, or `None`.
    """
    batch, heads, length, size = query.shape
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    highest = query.new_full((batch, heads, length, 1), -torch.inf)
    total = torch.zeros_like(highest)
    summed = query.new_zeros((batch, heads, length, max(value_widths)))
    scored = []

    for tile in tiles:
        runs, tokens = tile.keys.shape[1:3]
        offsets = torch.arange(tokens, device=query.device)
        keys = expand_keys(tile.keys).unflatten(-1, (-1, size)).to(query.dtype)
        keys = rope.rotate(keys, offsets[:, None])
        shifted = rope.rotate(query[:, None], (positions[:, None] - tile.start[..., None])[:, :, None])

        # Query heads that share a key head are queries of the same product: [B, m, H_kv, shared * L, d].
        shared = shifted.unflatten(2, (keys.shape[3], -1)).flatten(3, 4)
        scores = (shared @ keys.permute(0, 1, 3, 4, 2)) * scaling
        scores = scores.reshape(batch, runs, heads, length, tokens)
        key_positions = tile.start[..., None] + offsets
        valid = (offsets < tile.count[..., None])[:, :, None]
        seen = valid & (key_positions[:, :, None] <= positions[:, None, :, None])
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf).permute(0, 2, 3, 1, 4).flatten(3)
        if weights_length is not None:
            scored.append((scores, key_positions.flatten(1)))

        higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        reference = higher.masked_fill(higher == -torch.inf, 0.0)
        weights = (scores - reference).exp()
        decay = (highest - reference).exp()
        values = split_groups(tile.values.to(query.dtype).flatten(1, 2), value_widths).transpose(1, 2)
        gained = weights.unflatten(1, (len(value_widths), -1)).flatten(2, 3) @ values
        summed = summed * decay + gained.reshape(summed.shape)
        total = total * decay + weights.sum(dim=-1, keepdim=True)
        highest = higher

    total = total.masked_fill(total == 0, 1.0)
    if weights_length is None:
        return summed / total, None
    result = query.new_zeros((batch, heads, length, weights_length))
    for scores, key_positions in scored:
        weights = (scores - highest.masked_fill(highest == -torch.inf, 0.0)).exp() / total
        index = key_positions.clamp(max=weights_length - 1).long()[:, None, None].expand_as(weights)
        result.scatter_add_(3, index, weights)
    return summed / total, result


@torch.no_grad()
def attention_received(
    query: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None, tiles: Iterable[Tile], length: int, **how
) -> torch.Tensor:
    """Attention that the tokens at positions 0 … length - 1 receive from all queries and heads: `[B, length]`.

    Args:
        query, positions, tiles: As for `latent_attention`.
        real: `[B, L]` bool, false for queries of pads, which do not count; `None`: no pads.
        how: The other arguments of `latent_attention`.
    """
    tiles, received = list(tiles), query.new_zeros((len(query), length), dtype=torch.float32)
    for start in range(0, query.shape[2], _QUERIES):
        piece = slice(start, start + _QUERIES)
        weights = latent_attention(query[:, :, piece], positions[:, piece], tiles, weights_length=length, **how)[1]
        if real is not None:
            weights = weights * real[:, None, piece, None].to(weights)
        received += weights.sum((1, 2)).float()
    return received
