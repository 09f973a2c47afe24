"""Scores by which the tokens of a block are protected (`QuantScheme.protected`), for `token_score` of a cache.

A score is a function `(layer_idx, keys, values) -> [B, L]` of new tokens, the higher the more worth keeping. Besides
the one here there are `token_score="attention"`, the attention that a token has received by the time it is packed (in
`ALRDLlamaForCausalLM`), and `None`: the token's squared error at the lower width.
"""

from collections.abc import Mapping

import torch


class QuerySimilarity:
    """Cosine similarity of a token's keys to given query states (VidKV's cross-modal score, arXiv:2503.16257).

    Args:
        query_states: By layer, `[Q, C_k]` states that keys are compared with, in the space that the cache stores: for
            another model its post-RoPE keys, heads side by side; for `ALRDLlamaForCausalLM` its key latents. A token's
            score is its similarity to the nearest of them.

    Raises:
        ValueError: A layer has no query states, or states of another number of channels.
    """

    def __init__(self, query_states: Mapping[int, torch.Tensor]):
        self.query_states = dict(query_states)

    def __call__(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        queries = self.query_states.get(layer_idx)
        rule = f"must be [queries, {keys.shape[-1]}]"
        if queries is None:
            raise ValueError(f"query_states[{layer_idx}]: None {rule}")
        if queries.shape[-1] != keys.shape[-1]:
            raise ValueError(f"query_states[{layer_idx}]: {list(queries.shape)} {rule}")
        # In float64, so that a token's score does not depend on how many others come with it.
        queries = torch.nn.functional.normalize(queries.to(keys.device, torch.float64), dim=-1)
        # Of all similarities of a token the largest counts.
        return (torch.nn.functional.normalize(keys.double(), dim=-1) @ queries.T).amax(-1).float()
