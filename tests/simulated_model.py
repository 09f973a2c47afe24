"""A forward pass over simulated caches, from the definition: full keys and values, absolute positions, one softmax."""

import copy

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.svd_linear import SVDLinear
from tests.simulated_cache import SimulatedCache


def simulated_caches(model: ALRDLlamaForCausalLM) -> list[SimulatedCache]:
    """One empty cache per layer with the settings of the model's config."""
    c = model.config
    return [
        SimulatedCache(
            c.k_bits,
            c.v_bits,
            c.group_size,
            c.residual_length,
            c.sink_length,
            c.layer_widths(i),
        )
        for i in range(c.num_hidden_layers)
    ]


class ExactRotaryEmbedding(torch.nn.Module):
    """The library's embedding with angles in the type of the states, so that float64 models are exact throughout."""

    def __init__(self, embedding):
        super().__init__()
        self.inv_freq, self.attention_scaling = embedding.inv_freq.double(), embedding.attention_scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        angle = position_ids[..., None].to(x.dtype) * torch.cat([self.inv_freq, self.inv_freq])
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def rotated(x: torch.Tensor, positions: torch.Tensor, embedding) -> torch.Tensor:
    """`[H, T, d]` at absolute positions."""
    cos, sin = embedding(x, positions[None])
    return x * cos + rotate_half(x) * sin


def expanded(projection, latents: torch.Tensor, size: int) -> torch.Tensor:
    """`[T, C]` latents to `[H_kv, T, d]`, multiplied with the dense, block-diagonal A."""
    if not isinstance(projection, SVDLinear):
        return latents.unflatten(-1, (-1, size)).transpose(0, 1)
    a = projection.ALinear
    rows = a.weight.shape[0] // len(a.ranks)
    blocks = [a.weight[i * rows : (i + 1) * rows, :rank] for i, rank in enumerate(a.ranks)]
    states = latents @ torch.block_diag(*blocks).T
    states = states if a.bias is None else states + a.bias
    return states.unflatten(-1, (-1, size)).transpose(0, 1)


@torch.no_grad()
def simulated_forward(model, ids: torch.Tensor, caches: list[SimulatedCache], real: torch.Tensor | None = None):
    """`[B, L, V]` logits of new tokens, which are appended to the caches; rows of pads are zero.

    Args:
        model: In float64, with an `ExactRotaryEmbedding`: a last bit could otherwise flip a code here or there.
        ids: `[B, L]`, or their embeddings `[B, L, hidden_size]`.
        caches: From `simulated_caches`, with the tokens before these.
        real: `[B, L]` bool, false for pads.
    """
    config, embedding = model.config, model.model.rotary_emb
    hidden = ids if ids.is_floating_point() else model.model.embed_tokens(ids)
    real = torch.ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
    for layer, cache in zip(model.model.layers, caches, strict=True):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        new = [p.BLinear(x) if isinstance(p, SVDLinear) else p(x) for p in (attention.k_proj, attention.v_proj)]
        mixed = torch.zeros(*hidden.shape[:2], attention.o_proj.in_features).to(x)
        for i in range(len(ids)):
            past = cache.row_states(i) if cache.rows and cache.rows[i].tokens else tuple(n[i, :0] for n in new)
            sides = [torch.cat([old, n[i][real[i]]]) for old, n in zip(past, new, strict=True)]
            total, length = len(sides[0]), int(real[i].sum())
            if not length:
                continue
            positions = torch.arange(total)
            query = attention.q_proj(x[i][real[i]]).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
            query = rotated(query, positions[total - length :], embedding)
            key = rotated(expanded(attention.k_proj, sides[0], config.head_dim), positions, embedding)
            value = expanded(attention.v_proj, sides[1], config.head_dim)
            key, value = (repeat_kv(s[None], attention.num_key_value_groups)[0] for s in (key, value))
            scores = query @ key.transpose(-1, -2) * attention.scaling
            future = positions[None, :] > positions[total - length :, None]
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            mixed[i, real[i]] = (weights @ value).transpose(0, 1).flatten(1)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        cache.append(*new, real)
    return model.lm_head(model.model.norm(hidden)).masked_fill(~real[..., None], 0.0)


class SimulatedLatents:
    """What `generate` asks of a cache, of simulated caches of all layers."""

    is_compileable = False

    def __init__(self, layers: list[SimulatedCache]):
        self.layers = layers

    def get_seq_length(self) -> int:
        rows = self.layers[0].rows
        return len(rows[0].slots) if rows else 0

    def activate_past_recording(self) -> None:
        """Every past is kept as it is."""

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for layer in self.layers:
            layer.select(beam_idx.tolist())


class SimulatedForCausalLM(ALRDLlamaForCausalLM):
    """A model over simulated caches, for `generate`; make one by `of`.

    Attributes:
        new_caches: Gives the caches of all layers, empty.
    """

    @classmethod
    def of(cls, model: ALRDLlamaForCausalLM, new_caches=simulated_caches) -> "SimulatedForCausalLM":
        """The simulation of a model, which must be as `simulated_forward` wants it; the weights are shared."""
        simulated = copy.copy(model)
        simulated.__class__, simulated.new_caches = cls, new_caches
        return simulated

    def new_cache(self) -> SimulatedLatents:
        return SimulatedLatents(self.new_caches(self))

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **kwargs
    ) -> CausalLMOutputWithPast:
        cache = past_key_values or self.new_cache()
        new = input_ids if inputs_embeds is None else inputs_embeds
        real = None if attention_mask is None else attention_mask[:, -new.shape[1] :].bool()
        if attention_mask is not None and cache.get_seq_length():
            for layer in cache.layers:
                layer.take_out(attention_mask[:, : cache.get_seq_length()].bool())
        return CausalLMOutputWithPast(logits=simulated_forward(self, new, cache.layers, real), past_key_values=cache)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()
