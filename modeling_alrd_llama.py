"""A Llama, or a decoder of its family (`ARCHITECTURES`), with low-rank keys and values in a `KIVILatentCache`.

The model is the library's own: its embeddings, norms, MLPs, decoder layers, head and forward passes. Only the attention
of each layer is ours, made of the projections and norms of the library's.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import lru_cache, partial, wraps

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaModel,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from configuration_alrd_llama import SIDES, ALRDLlamaConfig, Projection, rotary_channels
from modules import loading
from modules.decode_graph import DecodeGraph
from modules.kernels import MAX_QUERY_LENGTH, Backend
from modules.kernels.attention import attention_received
from modules.kernels.packed import LatentQuery, PackedCache, Rope
from modules.kivi_cache import (
    CacheScheme,
    KIVILatentCache,
    check_token_score,
    config_schemes,
    config_widths,
    create_kivi_cache,
)
from modules.latent_step import LatentStep, LatentSums
from modules.projections import has_rope, in_rope_order, normalised, own_part, padded_frequencies, projection_name
from modules.quant_utils import quantize_latent
from modules.svd_linear import ALinear, LatentFactors, MemberBLinear, SVDLinear, shard_groups

#: The capacity that `generate` gives a cache is a multiple of it, in tokens.
CAPACITY_STEP = 512


@lru_cache(maxsize=64)
def dense_classes(model_type: str) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The library's decoder, and the decoder with its head, of a dense model type."""
    config_class = CONFIG_MAPPING[model_type]
    return MODEL_MAPPING[config_class], MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


def take_over(module: nn.Module, dense: nn.Module) -> None:
    """Give a module the submodules and attributes of a library's that it has not."""
    for name, child in dense.named_children():
        if name not in module._modules:
            module.add_module(name, child)
    for name, value in vars(dense).items():
        if not name.startswith("_") and name not in vars(module):
            setattr(module, name, value)


class ALRDLlamaAttention(nn.Module):
    """Attention whose keys and values pass through latents; the library's own unless the cache is a `KIVILatentCache`.

    Args:
        dense: The library's attention of this layer, whose projections, norms and numbers become those of this one.
    """

    def __init__(self, dense: nn.Module):
        super().__init__()
        take_over(self, dense)
        #: Its `forward` is that of caches other than ours.
        self.dense_class = type(dense)
        self.traits, self.turned_channels = self.config.traits, rotary_channels(self.config)
        self.sliding_window = self.config.layer_window(self.layer_idx)
        for side in SIDES:
            projection = Projection(self.layer_idx, side)
            ranks = self.config.group_ranks(projection)
            if ranks is None:
                continue
            # The factors take the place of the dense layer.
            linear, heads = getattr(self, projection.attribute), self.config.num_key_value_heads
            static = self.config.is_static(side)
            split = SVDLinear(linear.in_features, linear.out_features, ranks, heads, linear.bias is not None, static)
            split.latent_transform = SimpleRounding(self.config, f"{side}_bits")
            setattr(self, projection.attribute, split)
        # One process holds all heads; `from_pretrained` shards them under tensor parallelism.
        self.shard_heads(0, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        latent_step: LatentStep | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if latent_step is None:
            if isinstance(past_key_values, KIVILatentCache):
                raise RuntimeError(f"{self.dense_class.__name__}: its layer does not hand keyword arguments on")
            given = (hidden_states, position_embeddings, attention_mask, past_key_values)
            return self.dense_class.forward(self, *given, **kwargs)

        # Project. The cache stores latents before RoPE, which comes when they are expanded.
        query, key_latents, value_latents = self._project(hidden_states)
        layer = past_key_values.layer(self.layer_idx, self.widths, self.sliding_window)
        step = latent_step.on(query.device)

        # The common step of few tokens: the cache attends and appends at one go. The sum of latents is expanded, not
        # the value of every token.
        scores_attention = layer.score == "attention"
        few = query.shape[2] <= MAX_QUERY_LENGTH
        if step.has_past and few and step.slots is None and not scores_attention:
            new = step.new_tokens(key_latents, value_latents)
            output = layer.attend_and_append(self._latent_query(query, step), new, self.expand_values)
            return self._output(output.to(query.dtype).transpose(1, 2).flatten(2)), None

        # Attention over latents: for the output, or in a first chunk only to see which tokens receive most.
        arguments = received = None
        if step.has_past or scores_attention:
            arguments = self._attention_arguments(query, key_latents, value_latents, layer, step)
        if scores_attention:
            received = self._attention_received(*arguments, step)
        if step.has_past:
            output, weights = self._attend_cache(*arguments, layer.backend, step)
        else:
            output, weights = self._attend_dense(
                query, key_latents, value_latents, position_embeddings, attention_mask, **kwargs
            )
        layer.append(key_latents, value_latents, step.real, received)
        return self._output(output.flatten(2)), weights

    def attend(self, hidden_states: torch.Tensor, cache: KIVILatentCache, step: LatentStep):
        """Attention of new tokens, which are not appended, to a cache; `[B, L, H_q, d]` and weights."""
        query, *latents = self._project(hidden_states)
        layer = cache.layer(self.layer_idx, self.widths, self.sliding_window)
        return self._attend_cache(*self._attention_arguments(query, *latents, layer, step), layer.backend, step)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, H_q, L, d]`, and keys and values `[B, L, C]` as the cache stores them, all before RoPE."""
        if not self.traits.of_outputs:
            keys, values = to_latents(self.k_proj, hidden_states), to_latents(self.v_proj, hidden_states)
            return self._heads(self.q_proj(hidden_states)), keys, values
        projected, states = {}, []
        for side in ("q", *SIDES):
            name = projection_name(self.traits, side)
            if name not in projected:
                projected[name] = to_latents(getattr(self, name), hidden_states)
            own = normalised(self, side, own_part(self, side, projected[name]))
            states.append(in_rope_order(self, side, own))
        if self.gathers_outputs:
            states = [state.chunk(self.tp_size, dim=-1)[self.tp_rank] for state in states]
        query, keys, values = states
        return self._heads(query), keys, values

    def _output(self, attended: torch.Tensor) -> torch.Tensor:
        """The output projection of what the heads have attended to, `[B, L, H_q * d]`."""
        if self.gathers_outputs:
            parts = [torch.empty_like(attended) for _ in range(self.tp_size)]
            dist.all_gather(parts, attended.detach().contiguous(), group=self.tp_group)
            parts[self.tp_rank] = attended
            attended = torch.cat(parts, dim=-1)
            if attended.requires_grad:
                attended.register_hook(_refuse_gradient)
        return self.o_proj(attended)

    def _split_side(self, side: str) -> SVDLinear | None:
        """The factors of the keys or the values; `None`: what is cached are the keys or values themselves."""
        projection = self._modules.get(f"{side}_proj")
        return projection if isinstance(projection, SVDLinear) else None

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, H * d]` to `[B, H, L, d]`."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _latent_query(self, query: torch.Tensor, step: LatentStep) -> LatentQuery:
        """Queries `[B, H_q, L, d]` before RoPE with how this layer attends to latents."""
        split = self._split_side("k")
        return self._query_of(query, step, split and split.ALinear, self.widths[1])

    def _query_of(self, query: torch.Tensor, step: LatentStep, expand_keys, widths: tuple[int, ...]) -> LatentQuery:
        rope = step.rope
        if isinstance(rope, dict):
            rope = rope[self.config.layer_types[self.layer_idx]]
        if self.traits.rope_switch is not None and not has_rope(self):
            rope = Rope(torch.zeros_like(rope.inv_freq))
        turned = self.turned_channels
        if turned < self.head_dim and rope.attention_scaling != 1:
            # Cosines are scaled for all channels of a key and of a query; the library scales those that are turned.
            ratio = torch.full_like(rope.inv_freq, rope.attention_scaling**-2)
            ratio[: turned // 2] = 1
            query = query * torch.cat([ratio, ratio]).to(query.dtype)
        how = (expand_keys, widths, rope, self.scaling, self.sliding_window)
        return LatentQuery(query, step.positions, *how)

    def _attention_arguments(
        self, query, key_latents, value_latents, layer, step: LatentStep
    ) -> tuple[LatentQuery, PackedCache]:
        """Arguments of an attention of the new tokens to the cache and to themselves."""
        new = step.new_tokens(key_latents, value_latents).tile()
        cache = PackedCache(after=(new,))
        if step.has_past:
            layer.check_states(key_latents, value_latents)  # before a kernel takes them at their word
            cache = layer.packed(new)
        return self._latent_query(query, step), cache

    @property
    def expand_values(self) -> ALinear | None:
        """What expands latents to values; `None`: the values themselves are cached."""
        split = self._split_side("v")
        return split and split.ALinear

    def _attention_received(self, query: LatentQuery, cache: PackedCache, step: LatentStep) -> torch.Tensor:
        """Attention that each token receives, by which `KIVILatentLayer.append` chooses the protected ones."""
        received = attention_received(query, cache, step.real, step.longest)
        if self.tp_group is not None:
            dist.all_reduce(received, group=self.tp_group)  # of all heads, so that all ranks protect the same tokens
        return received

    def _attend_cache(self, query: LatentQuery, cache: PackedCache, backend: Backend, step: LatentStep):
        """Attention of new tokens, which are not appended, over the packed cache; `[B, L, H_q, d]` and weights."""
        dtype, length = query.states.dtype, None if step.slots is None else step.slots.shape[1]
        output, _, weights = backend.attend_values(query, cache, self.expand_values, length)
        if weights is not None:
            weights = step.weights_by_slot(weights).to(dtype)
        return output.to(dtype).transpose(1, 2), weights

    def _attend_dense(self, query, key_latents, value_latents, position_embeddings, attention_mask, **kwargs):
        """Attention of the first tokens to themselves, by the library's functions; `[B, L, H_q, d]` and weights."""
        # These tokens have no past, so their keys and values are expanded whole.
        key = self._heads(from_latents(self._split_side("k"), key_latents))
        value = self._heads(from_latents(self._split_side("v"), value_latents))
        query, key = self._turn(query, key, position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        how = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if self.sliding_window is not None:
            how["sliding_window"] = self.sliding_window  # for kernels that take no mask
        return attend(self, query, key, value, attention_mask, **how, **kwargs)

    def _turn(self, query: torch.Tensor, key: torch.Tensor, position_embeddings):
        """Queries and keys `[B, H, L, d]` behind RoPE, by the library's cosines and sines."""
        if not has_rope(self):
            return query, key
        cos, sin = position_embeddings
        if self.traits.neighbours == "pairs":
            cos, sin = torch.cat([cos[..., ::2]] * 2, dim=-1), torch.cat([sin[..., ::2]] * 2, dim=-1)
        missing = (self.head_dim - cos.shape[-1]) // 2
        if missing > 0:
            # Channels that are not turned stand behind those of either half.
            still = cos.new_ones(*cos.shape[:-1], missing)
            low, high = cos.chunk(2, dim=-1)
            cos = torch.cat([low, still, high, still], dim=-1)
            still = torch.zeros_like(still)
            low, high = sin.chunk(2, dim=-1)
            sin = torch.cat([low, still, high, still], dim=-1)
        # Some rotary embeddings give float32, whatever the model's type.
        return tuple([turned.to(query.dtype) for turned in apply_rotary_pos_emb(query, key, cos, sin)])

    def shard_heads(self, rank: int, size: int, process_group=None) -> None:
        """Drop the heads of other ranks of tensor parallelism from the split projections and from the cache.

        Args:
            rank, size, process_group: As for `SVDLinear.keep_shard`.
        """
        self.tp_rank, self.tp_size, self.tp_group = rank, size, process_group
        self.gathers_outputs = size > 1 and loading.gathers_outputs(self.config)
        for projection in filter(None, map(self._split_side, SIDES)):
            if size > 1:
                # The library's plan took it for a dense layer: its wrapper would make DTensors of what comes and goes.
                vars(projection).pop("forward", None)
                projection.keep_shard(rank, size, process_group)
        self.widths = self._config_widths()

    def _config_widths(self) -> tuple[tuple[int, ...], ...]:
        """Channels by head group of keys and values that this rank caches by the config as it is now."""
        widths = self.config.layer_widths(self.layer_idx)
        return tuple(shard_groups(groups, self.tp_rank, self.tp_size) for groups in widths)

    def check_config(self) -> None:
        """Reject a config whose ranks or head groups have been assigned since the layer was built."""
        if self._config_widths() != self.widths:
            raise ValueError(
                f"truncation_ranks, head_group_size: must stay as layer {self.layer_idx} was built, for {self.widths} "
                f"channels by head group, not {self._config_widths()}; split the dense model again to change them"
            )

    def shard_scheme(self, scheme: CacheScheme) -> CacheScheme:
        """The scheme restricted to this rank's head groups."""
        return scheme.shard(self.tp_rank, self.tp_size)


class ALRDLlamaBlockAttention(ALRDLlamaAttention):
    """Attention of a layer whose keys and values are cached in the latents of blocks (`Block`).

    The dense projections serve new tokens and sinks as they are; `k_latent` and `v_latent` have the factors of this
    layer. Without a `KIVILatentCache` it is the dense model's attention.
    """

    def __init__(self, dense: nn.Module):
        super().__init__(dense)
        config, layer_idx = self.config, self.layer_idx
        heads, blocks = config.num_key_value_heads, config.layer_parts(layer_idx)
        self.block = blocks[0]
        # A latent of both sides is that of the keys, to the cache as to the settings.
        for side, block in zip(SIDES, (blocks[0], blocks[-1]), strict=True):
            first = layer_idx == block.first and side == block.settings_side
            static = first and config.is_static(side)
            factors = LatentFactors(heads * self.head_dim, config.group_ranks(block), heads, static)
            setattr(self, f"{side}_latent", factors)
        #: Side of the cache that holds the latents of the keys, and of the values.
        self.cache_sides = ("keys", "keys" if config.joint_kv else "values")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        latent_step: LatentStep | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if latent_step is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

        # Project: keys before RoPE, as the dense model has them.
        query, keys, values = self._project(hidden_states)
        layer = past_key_values.layer(self.config.cache_layer(self.layer_idx), self.widths, self.sliding_window)
        step = latent_step.on(query.device)
        sums = step.sums
        if self.layer_idx == self.block.first:
            sums.begin(self.layer_idx, layer.sink_slots(step.real, keys.shape[1]), layer if step.has_past else None)
        sums.enter(self.layer_idx)
        if step.has_past:
            output, weights = self._attend_block(query, keys, values, layer, step, sums.history, sums.sinks)
        else:
            output, weights = self._attend_dense(query, keys, values, position_embeddings, attention_mask, **kwargs)

        # The latents of the new tokens are sums over the layers of the block: the last layer has them whole.
        projections = (self.k_latent.BLinear, self.v_latent.BLinear)
        sums.add(self.cache_sides, projections, (keys, values), layer.backend if step.has_past else None)
        if self.layer_idx == self.block.last:
            latents = {}
            for side, latent in sums.latents.items():
                if self.k_latent.is_joint:
                    dist.all_reduce(latent, group=self.tp_group)  # each rank has added its own heads
                latents[side] = latent.to(keys.dtype)
            layer.append(**latents, real=step.real, dense=sums.members())
        return self._output(output.flatten(2)), weights

    def attend(self, hidden_states: torch.Tensor, cache: KIVILatentCache, step: LatentStep):
        layer = cache.layer(self.config.cache_layer(self.layer_idx), self.widths, self.sliding_window)
        return self._attend_block(*self._project(hidden_states), layer, step, layer.packed(), layer.sinks())

    def shard_heads(self, rank: int, size: int, process_group=None) -> None:
        """As `ALRDLlamaAttention.shard_heads`, of the factors beside the dense projections."""
        super().shard_heads(rank, size, process_group)
        if size > 1:
            self.k_latent.keep_shard(rank, size, process_group)
            self.v_latent.keep_shard(rank, size, process_group)

    @property
    def expand_values(self) -> ALinear:
        """As `ALRDLlamaAttention.expand_values`, from the latents of the block."""
        return self.v_latent.ALinear

    def _latent_query(self, query: torch.Tensor, step: LatentStep) -> LatentQuery:
        return self._query_of(query, step, self.k_latent.ALinear, self.widths[-1])

    def _attend_block(self, query, keys, values, layer, step: LatentStep, history: PackedCache, sinks: tuple):
        """Attention of new tokens to sinks, to themselves and to latents; `[B, L, H_q, d]` and weights."""
        length = None if step.slots is None else step.slots.shape[1]
        layer.check_type(keys)  # before a kernel takes it at its word
        # Sinks lie side by side, layer by layer.
        size, member = keys.shape[2], self.layer_idx - self.block.first
        own = slice(member * size, (member + 1) * size)
        plain = (*[sink.of_channels(own) for sink in sinks], step.new_tokens(keys, values).tile())
        latent = self._latent_query(query, step)
        attended = layer.backend.attend_block(latent, plain, history, self.expand_values, length)
        weights = attended.weights
        if weights is not None:
            weights = step.weights_by_slot(weights).to(query.dtype)
        return attended.summed.to(query.dtype).transpose(1, 2), weights


def to_latents(projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """States that the cache stores: latents of a split projection, the output of a dense one."""
    return projection.BLinear(hidden_states) if isinstance(projection, SVDLinear) else projection(hidden_states)


def from_latents(split: SVDLinear | None, latents: torch.Tensor) -> torch.Tensor:
    """Keys or values `[..., H_kv * d]` from the states that the cache stores, latents if they are split."""
    return latents if split is None else split.ALinear(latents)


def captures_graphs(model: PreTrainedModel) -> bool:
    """Whether steps of a model can be captured as CUDA graphs."""
    return model.device.type == "cuda"


def waits_for_length(config: ALRDLlamaConfig) -> bool:
    """Whether the frequencies of RoPE depend on the length of the text."""
    rope = config.rope_parameters or {}
    types = [rope.get("rope_type", "default")]
    for of_layers in rope.values():
        if isinstance(of_layers, dict):
            types.append(of_layers.get("rope_type", "default"))
    return "longrope" in types or "dynamic" in " ".join(types)


def _static_buffer(split: nn.Module, name: str) -> torch.Tensor:
    """A buffer in float32, from where accelerate keeps it if it is offloaded (`offload_buffers=True`)."""
    buffer = getattr(split, name)
    if buffer.is_meta:
        buffer = split._hf_hook.weights_map[name]
    return buffer.float()


def _refuse_gradient(gradient: torch.Tensor) -> None:
    """A hook for what a norm over the heads of all ranks would need the gradients of all ranks for."""
    raise RuntimeError("past_key_values: must be no KIVILatentCache where gradients are taken over such ranks")


@torch.compiler.disable
def _untraced(function: Callable, *args, **kwargs):
    return function(*args, **kwargs)


def _is_traced_in_vain(cache, config: ALRDLlamaConfig) -> bool:
    """Whether `torch.compile` is about to trace a step of a cache that grows, which it would trace for each block anew,
    or of blocks of projections, whose attention is no node of a graph."""
    latent = torch.compiler.is_compiling() and isinstance(cache, KIVILatentCache)
    return latent and (cache.capacity is None or config.keep_dense)


class SimpleRounding(nn.Module):
    """The simple scheme, where the config says `use_kivi=False` now: every latent rounded on its way to keys or values,
    except in training."""

    def __init__(self, config: ALRDLlamaConfig, bits_field: str):
        super().__init__()
        self.config, self.bits_field = config, bits_field

    def extra_repr(self) -> str:
        n_bits = None if self.config.use_kivi else getattr(self.config, self.bits_field)
        return f"n_bits={n_bits}, group_size={self.config.group_size}"

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        # Rounding has no gradient.
        if self.config.use_kivi or self.training:
            return latents
        return quantize_latent(latents, getattr(self.config, self.bits_field), self.config.group_size)


class ALRDLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: ALRDLlamaConfig
    config_class = ALRDLlamaConfig
    #: The library's decoder layers, of every architecture; `_can_record_outputs` is kept by class, not by model.
    _can_record_outputs = {"hidden_states": GradientCheckpointingLayer, "attentions": ALRDLlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # As the library's class does, of which no instance is needed.
        dense_class = dense_classes(self.config.dense_model_type)[0]
        dense = dense_class.__new__(dense_class)
        vars(dense)["config"] = self.config
        dense._init_weights(module)
        if isinstance(module, (ALinear, MemberBLinear)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Load a split checkpoint, or a dense one, whose projections are split as `config` says while loading.

        Takes the arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: A parameter would stay at its random initialisation, or `config`, or a field of it given by
                keyword, asks for another kind of model or other factors than the checkpoint stores.
        """
        if pretrained_model_name_or_path is not None:
            blocks = loading.check_stored_model(pretrained_model_name_or_path, config, kwargs)
            if blocks is not None:
                kwargs |= {"config": blocks, "output_loading_info": output_loading_info}
                is_given = isinstance(config, PreTrainedConfig)
                return cls._blocks_of_dense(pretrained_model_name_or_path, *args, is_given=is_given, **kwargs)
        # The library keeps conversions per model type, ours are for this configuration.
        with loading.lock:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
            )
        loading.check_all_loaded(pretrained_model_name_or_path, info)
        if (model.tp_size or 1) > 1:
            # The library's plan has cut the dense layers; the factors are cut here.
            mesh = model._device_mesh
            if mesh.ndim > 1:
                mesh = mesh["tp"]
            for attention in model.local_attentions().values():
                attention.shard_heads(mesh.get_local_rank(), mesh.size(), mesh.get_group())
        return (model, info) if output_loading_info else model

    @classmethod
    def _blocks_of_dense(
        cls, path, *args, config: ALRDLlamaConfig, is_given: bool, **kwargs
    ) -> "ALRDLlamaPreTrainedModel":
        """A dense checkpoint in memory, split into blocks by plain SVD of its weights.

        Args:
            path: The checkpoint.
            config: Of the blocks.
            is_given: Whether the caller gave all of it, and no fields by keyword.
            args, kwargs: The other arguments of `from_pretrained`.
        """
        for name in ("device_map", "tp_plan", "distributed_config", "quantization_config", "output_loading_info"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name}: must not be given where a dense checkpoint is split into blocks (keep_dense=True); save "
                    "the split model, and load that"
                )
        for name in set(kwargs) & set(ALRDLlamaConfig.__dataclass_fields__) - {"dtype"}:
            if is_given:
                raise ValueError(f"{name}={kwargs[name]!r}: must not be given beside config, whose field it is")
            del kwargs[name]  # `config` has it
        dense = AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)
        model = ALRDLlamaForCausalLM.from_dense(dense, config)
        if "attn_implementation" in kwargs:
            model.set_attn_implementation(kwargs["attn_implementation"])
        return model if isinstance(model, cls) else model.get_decoder()

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *mesh):
        """The library's hook before the weights are read."""
        size = 1 if distributed_config is None else distributed_config.tp_size
        if size > 1:
            others = distributed_config.fsdp_size * getattr(distributed_config, "dp_replicate_size", 1)
            # Whether the heads can be dealt out is known before the library cuts a weight, its plan only afterwards.
            loading.check_tensor_parallel(model.config, size, others)
        model = super().maybe_distribute_model(model, distributed_config, *mesh)
        if size > 1:
            loading.check_tensor_parallel_plan(model.config, model.tp_plan)
        return model

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict: dict, *args, **kwargs) -> dict:
        """The library's hook of `save_pretrained`, called by every rank: add what it does not know to be in parts."""
        whole = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        return whole | loading.gathered_factors(model_to_save, whole)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """Save the factors as they are; with `save_original_format=True` the dense model of `to_dense`.

        A `README.md` that says how to load the folder is written beside the factors, unless there is one.

        Under tensor parallelism every rank must call it, and the first one writes the whole model.

        Raises:
            ValueError: The model is a stage of a pipeline, or under tensor parallelism another format is asked for.
        """
        loading.check_all_layers(self, "save_pretrained")
        if kwargs.get("distributed_checkpoint") and (self.tp_size or 1) > 1:
            raise ValueError("distributed_checkpoint=True: must be False; the factors are gathered into one checkpoint")
        if save_original_format:
            return self.to_dense().save_pretrained(save_directory, *args, **kwargs)
        super().save_pretrained(save_directory, *args, save_original_format=False, **kwargs)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process and self.config.truncation_ranks:
            loading.write_folder_readme(save_directory)

    def create_kivi_cache(self, **settings) -> KIVILatentCache:
        """An empty packed cache for this model.

        Args:
            settings: Override the config's `k_bits`, `v_bits`, `group_size`, `residual_length`, `sink_length`,
                `k_scheme` or `v_scheme` (see `config_schemes`); or `quantization_config` in place of them all;
                `layer_schemes`, `backend`, `token_score` and `capacity`. See the function `create_kivi_cache`.

        Raises:
            ValueError: A setting is out of range.
        """
        config = self._config_of_active_layers()
        config.check_latent_cache()
        # Fields of the scheme, and arguments of the cache that holds it.
        names = tuple(f.name for f in fields(CacheScheme))
        others = ("quantization_config", "layer_schemes", "backend", "token_score", "capacity")
        unknown = sorted(set(settings) - set(names) - set(others))
        if unknown:
            known = ", ".join(names + others)
            raise ValueError(f"{', '.join(unknown)}: no such setting of the cache; there are {known}")
        check_token_score(config, settings.get("token_score"))
        given = {name: settings.pop(name) for name in names if name in settings}
        quantization_config = settings.pop("quantization_config", None)
        if quantization_config is None:
            scheme, layer_schemes = config_schemes(config, **given)
        else:
            # A cache without layers says what the dictionary means.
            scheme = create_kivi_cache(**given, quantization_config=quantization_config).scheme
            layer_schemes = {}
        # A scheme that the caller gives for a layer takes the place of the layer's width tiers.
        layer_schemes |= settings.pop("layer_schemes", None) or {}
        self.check_blocks()
        widths = config_widths(config)
        # A rank of tensor parallelism caches its own head groups.
        for layer, attention in self.local_attentions().items():
            attention.check_config()
            i = config.cache_layer(layer)
            widths[i] = attention.widths
            whole = layer_schemes.get(i, scheme)
            shard = attention.shard_scheme(whole)
            if shard != whole:
                layer_schemes[i] = shard
        cache = KIVILatentCache(scheme, widths, layer_schemes, self._static_scales(), **settings)
        cache.bind(self.get_decoder())
        return cache

    def local_attentions(self) -> dict[int, ALRDLlamaAttention]:
        """Attention of each active layer by index; a stage of a pipeline has some of the layers only."""
        layers = enumerate(self.get_decoder().layers[: self.config.num_hidden_layers])
        return {i: layer.self_attn for i, layer in layers if hasattr(layer, "self_attn")}

    @torch.no_grad()
    def compile_step(self, input_ids: torch.Tensor, cache: KIVILatentCache) -> None:
        """Compile the kernels by which new tokens attend to a cache, those of all layers side by side.

        Nothing is computed, and the cache stays as it is. Where attention is not compiled, nothing is done.

        Args:
            input_ids: `[B, L]`, L of 16 at most: others do not matter.
            cache: On one device.
        """
        compiled_together = cache.layers[0].backend.compiled_together
        if compiled_together is None:
            return
        decoder = self.get_decoder()
        embeds = decoder.embed_tokens(input_ids)
        step = LatentStep.after(cache, embeds, None, None)
        step = replace(step, rope=decoder._ropes(embeds, step.positions))
        with compiled_together():
            for attention in self.local_attentions().values():
                attention.attend(embeds, cache, step)

    def check_blocks(self) -> None:
        """Raise a `ValueError` unless the layers of each block are together, on one device."""
        if not self.config.keep_dense:
            return
        devices = {}
        for i, attention in self.local_attentions().items():
            devices[i] = loading.execution_device(attention.o_proj)
        loading.check_whole_blocks(self.config, devices)

    def _config_of_active_layers(self) -> ALRDLlamaConfig:
        """The config without the projections of layers that an early exit of `generate` skips for a while."""
        active = self.config.num_hidden_layers
        if active >= len(self.get_decoder().layers):
            return self.config
        config = copy.copy(self.config)
        loading.check_exit(config, active)
        active_names = {part.name for part in config.parts()}
        for field in ("truncation_ranks", "width_tiers"):
            by_name = getattr(config, field)
            setattr(config, field, {name: by_name[name] for name in by_name if name in active_names})
        return config

    def _static_scales(self) -> dict[int, dict]:
        """Calibrated scales that the checkpoint brings, by layer and side."""
        scales: dict[int, dict] = {}
        for layer, attention in self.local_attentions().items():
            name = "{}_latent" if self.config.keep_dense else "{}_proj"
            sources = [getattr(attention, name.format(side), None) for side in SIDES]
            for states, source in zip(("keys", "values"), sources, strict=True):
                if getattr(source, "latent_scale", None) is not None:
                    of_layer = scales.setdefault(self.config.cache_layer(layer), {})
                    of_layer[states] = (
                        _static_buffer(source, "latent_scale"),
                        _static_buffer(source, "latent_zero_point"),
                    )
        return scales


class ALRDLlamaModel(ALRDLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: ALRDLlamaConfig):
        config.check_latent_cache()
        if config.keep_dense and not config.truncation_ranks:
            raise ValueError("truncation_ranks: must name all blocks with keep_dense=True")
        loading.register_dense_conversion(config)
        # Skips the library's own `__init__`, which would build a Llama.
        super(LlamaModel, self).__init__(config)
        with init.no_init_weights():
            dense = dense_classes(config.dense_model_type)[0](config)
        take_over(self, dense)
        for name in ("_no_split_modules", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(self, name, getattr(dense, name))
        attention = ALRDLlamaBlockAttention if config.keep_dense else ALRDLlamaAttention
        for layer in self.layers:
            layer.self_attn = attention(layer.self_attn)
            # Gradient checkpointing leaves the cache there, so that `generate` is right in training mode too; a step
            # that is computed again for its gradient would fill the cache twice, and `forward` refuses it.
            layer._can_checkpoint_with_cache = True
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Like the library's; makes a `KIVILatentCache` when a cache is wanted, none is given and `use_kivi`.

        With such a cache, `attention_mask` is `None` or `[B, past slots + L]`, and `position_ids`, if given, count
        the tokens of each row from 0, pads not counted.
        """
        if not self.config.use_kivi:
            self.config.check_latent_cache()  # the field may have been assigned since the model was built
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and self.config.use_kivi and not self.training:
            past_key_values = self.create_kivi_cache()
        latent = isinstance(past_key_values, KIVILatentCache)
        if self.training and past_key_values is not None:
            self._check_training(latent)
        forward = partial(dense_classes(self.config.dense_model_type)[0].forward, self)
        if latent:
            forward = self._forward_latent
        if _is_traced_in_vain(past_key_values, self.config):
            forward = partial(_untraced, forward)
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _ropes(self, embeds: torch.Tensor, positions: torch.Tensor) -> Rope | dict[str, Rope]:
        """The rotary embedding of a step; by layer type, where layers have different ones."""
        ropes, rotary = {}, self.rotary_emb
        for layer_type in getattr(rotary, "layer_types", [None]):
            prefix, which = "", ()
            if layer_type is not None:
                prefix, which = f"{layer_type}_", (layer_type,)
            if waits_for_length(self.config):
                rotary(embeds, positions, *which)  # gives the frequencies of this length
            inv_freq = padded_frequencies(getattr(rotary, f"{prefix}inv_freq"), self.config.head_dim)
            ropes[layer_type] = Rope(inv_freq, getattr(rotary, f"{prefix}attention_scaling"))
        return ropes.get(None, ropes)

    def _check_training(self, latent: bool) -> None:
        """Reject a cache in training mode where it would be filled twice, or a dropout left out."""
        if torch.is_grad_enabled() and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            raise ValueError(
                "past_key_values: must be None with gradient checkpointing in training mode, where a layer that is "
                "computed again for its gradient would fill the cache twice; use torch.no_grad(), model.eval() or "
                "use_cache=False"
            )
        if latent and self.config.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.config.attention_dropout}: must be 0 in training mode with a packed cache, "
                "whose attention has no dropout; use model.eval() or another cache"
            )

    def _forward_latent(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, return_dict=None, **kwargs
    ) -> BaseModelOutputWithPast | tuple:
        """The library's forward pass, whose attentions get a `LatentStep`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        is_bound = past_key_values.is_bound_to(self)
        if not is_bound:
            past_key_values.check_model(self)
            self.check_blocks()
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        step = LatentStep.after(past_key_values, embeds, attention_mask, position_ids)
        step = replace(step, rope=self._ropes(embeds, step.positions))
        if self.config.keep_dense:
            step = replace(step, sums=LatentSums())
        if kwargs.get("output_attentions", self.config.output_attentions):
            step = replace(step, slots=step.slot_positions(past_key_values))
        # The first chunk attends to itself by the library's functions; later ones read the cache by its own lengths.
        if step.has_past:
            # The library makes no other mask of one that has four dimensions.
            attention_mask = torch.empty((0, 0, 0, 0), dtype=embeds.dtype, device=embeds.device)

        # An error in a layer leaves no layer with tokens that the others have not.
        with past_key_values.transaction():
            output = dense_classes(self.config.dense_model_type)[0].forward(
                self,
                attention_mask=attention_mask,
                position_ids=step.positions,
                past_key_values=past_key_values,
                inputs_embeds=embeds,
                latent_step=step,
                return_dict=True,
                **kwargs,
            )
        if not is_bound:
            past_key_values.bind(self)
        output.past_key_values = past_key_values
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()


class ALRDLlamaForCausalLM(ALRDLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    def __init__(self, config: ALRDLlamaConfig):
        # Skips the library's own `__init__`, which would build a stock decoder.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = ALRDLlamaModel(config)
        # What the head's forward pass reads beside weights, from a model of no layer that holds none.
        empty = copy.copy(config)
        empty.num_hidden_layers = 0
        with init.no_init_weights(), torch.device("meta"):
            dense = dense_classes(config.dense_model_type)[1](empty)
        del dense.model, dense.lm_head
        take_over(self, dense)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        cache = args[3] if len(args) > 3 else kwargs.get("past_key_values")
        forward = partial(dense_classes(self.config.dense_model_type)[1].forward, self)
        if _is_traced_in_vain(cache, self.config):
            return _untraced(forward, *args, **kwargs)
        grows = isinstance(cache, KIVILatentCache) and cache.capacity is None
        # The logits are what takes most memory in a step.
        with cache.transaction() if grows else nullcontext():
            return forward(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(*args, inputs_embeds, attention_mask=None, past_key_values=None, **kwargs):
        """The mask that `generate` gives to compiled steps: of a packed cache the prompt's own, none for one token."""
        if not isinstance(past_key_values, KIVILatentCache):
            kwargs |= {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
            return create_masks_for_generate(*args, past_key_values=past_key_values, **kwargs)
        if inputs_embeds.shape[1] == 1:
            return None
        return attention_mask

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        result = super().generate(*args, **kwargs)
        cache = getattr(result, "past_key_values", None)
        if isinstance(cache, KIVILatentCache) and cache.made_by_generate:
            # Its capacity was that of this text; a caller who goes on has a longer one.
            result.past_key_values = cache.growing()
        return result

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """Like the parent, but for a draft model: without a mask its target has one of ones, whatever the ids are."""
        if generation_config.is_assistant:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Like the parent; here `generate` has prompt, mask and cache side by side, none of them cut yet."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, KIVILatentCache) and cache.get_seq_length():
            self._continue_cache(cache, inputs_tensor.shape[1], model_kwargs["attention_mask"])
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    @staticmethod
    def _continue_cache(cache: KIVILatentCache, length: int, mask: torch.Tensor) -> None:
        """Reject a prompt that does not go on from the cached tokens; take out those that its mask calls pads."""
        slots = cache.get_seq_length()
        if mask.shape[1] != slots + length and not mask.shape[1] == length > slots:
            raise ValueError(
                f"past_key_values: holds {slots} slots, rows of {cache.row_tokens()} tokens; the prompt has {length}, "
                f"its attention_mask {mask.shape[1]}: must be the whole text, longer than what the cache holds, or new "
                f"tokens with a mask of all {slots + length} slots. cache.crop(-n) takes back its last n slots, "
                "cache.reset() all"
            )
        if len(mask) == len(cache.row_tokens()):
            cache.take_out(mask)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Give `generate` a packed cache of our own where it would make a `DynamicCache`."""
        self._check_assisted(model_kwargs.get("past_key_values"), generation_mode)
        exit_layer = generation_config.assistant_early_exit
        if exit_layer is not None and exit_layer < self.config.num_hidden_layers:
            loading.check_exit(self.config, exit_layer)
        given = model_kwargs.get("past_key_values") is not None
        # A cache that the caller names is the library's to make.
        stock = generation_config.use_cache is False or generation_config.cache_implementation is not None
        if self.config.use_kivi and not given and not stock:
            cache = self._compiled_cache(generation_config, generation_mode, max_cache_length, model_kwargs)
            if cache is None:
                cache = self.create_kivi_cache()
            model_kwargs["past_key_values"] = cache
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _compiled_cache(
        self, generation_config, generation_mode, max_cache_length: int, model_kwargs
    ) -> KIVILatentCache | None:
        """A cache of fixed capacity, whose decode steps `generate` replays or compiles; `None` where it cannot.

        As for the library's own compilation `disable_compile=True` turns it off.
        """
        if (
            generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            or generation_config.is_assistant  # whose text goes on from call to call
            or generation_config.output_attentions
            or self._has_pads_after(generation_config.prefill_chunk_size, model_kwargs.get("attention_mask"))
            or not all(layer.scheme.takes_capacity for layer in self.create_kivi_cache().layers)
        ):
            return None
        # Rounded up, so that a compiled step serves texts of other lengths too.
        cache = self.create_kivi_cache(capacity=-(-max_cache_length // CAPACITY_STEP) * CAPACITY_STEP)
        cache.made_by_generate = True
        if not self._valid_auto_compile_criteria({"past_key_values": cache}, generation_config):
            return None
        return cache

    @staticmethod
    def _has_pads_after(chunk: int | None, attention_mask: torch.Tensor | None) -> bool:
        """Whether a prompt fed in chunks has pads after the first one, where a short step of fixed capacity refuses
        them."""
        return chunk is not None and attention_mask is not None and not bool(attention_mask[:, chunk:].all())

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Like the parent; a step over several devices is no graph, nor one whose RoPE waits for the longest row.

        A step of blocks is captured as a CUDA graph, but not compiled.
        """
        refused = isinstance(model_kwargs.get("past_key_values"), KIVILatentCache) and (
            (self.tp_size or 1) > 1
            or getattr(self, "_pp_stage", None) is not None
            or len(set(getattr(self, "hf_device_map", {}).values())) > 1
            or (self.config.keep_dense and (generation_config.compile_config or not captures_graphs(self)))
            or waits_for_length(self.config)
        )
        return not refused and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config):
        """The decode step of `generate`: replayed from a CUDA graph, or compiled as a `compile_config` says.

        Capturing takes a step, and compiling a minute.
        """
        compiled = super().get_compiled_call
        if compile_config is not None or not captures_graphs(self):
            return compiled(compile_config)
        replayed = DecodeGraph(self, self.compile_step)

        def step(**inputs):
            if isinstance(inputs.get("past_key_values"), KIVILatentCache):
                return replayed(**inputs)
            return compiled(compile_config)(**inputs)

        return step

    @staticmethod
    def _check_assisted(cache, generation_mode, *args, **kwargs) -> None:
        """Reject a cache that holds tokens where the library feeds the text from its beginning."""
        speculative = generation_mode == GenerationMode.ASSISTED_GENERATION
        if speculative and isinstance(cache, KIVILatentCache) and cache.get_seq_length():
            raise ValueError(
                f"past_key_values: holds {cache.get_seq_length()} slots, but assisted decoding and prompt look-up feed "
                "the whole text: give an empty cache (reset()), or generate without a draft"
            )

    def init_continuous_batching(self, *args, **kwargs):
        """Like the parent. The library's paged cache stores dense keys and values: correct, but not packed."""
        if self.config.use_kivi:
            warnings.warn(
                "continuous batching: keys and values lie dense in the library's pages, not in a KIVILatentCache",
                stacklevel=2,
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Leave the positions after the prompt to a packed cache: `generate` counts on from pads on the right."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if isinstance(model_kwargs.get("past_key_values"), KIVILatentCache):
            model_kwargs.pop("position_ids", None)
        return model_kwargs

    @classmethod
    def from_dense(
        cls,
        dense: PreTrainedModel,
        config: ALRDLlamaConfig,
        splits: list[dict[str, dict]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ALRDLlamaForCausalLM":
        """Split a loaded dense model (`ARCHITECTURES`).

        Args:
            dense: The model; it is not changed, and no weight is shared with it.
            config: Which projections to split, and into which ranks.
            splits: For each layer, keyword arguments of `SVDLinear.from_linear` by projection name, e.g.
                `[{"k_proj": {"covariance": …, "metric": …}, "v_proj": {…}}, …]`; of blocks, those of `member_states`
                at the first layer of each, e.g. `{"kv_latent": {"factors": …}}`; default: plain SVD.
            dtype, device: Type and place of the split model; default: those of `dense`.

        Raises:
            ValueError: `dense` is a model that cannot be split, has adapters of PEFT or another wrapper around it, or
                `config` is for another kind of model.
        """
        stored = ALRDLlamaConfig.from_llama(dense.config)
        loading.check_plain(dense)
        loading.check_same_model_type(stored, config)
        model = cls(config)
        # As in a loaded model the frequencies of RoPE stay in float32.
        rotary_emb = model.model.rotary_emb
        model.model.rotary_emb = None
        dtype, device = dtype or dense.dtype, torch.device(device or dense.device)
        model.to(dtype)
        model.model.rotary_emb = rotary_emb
        model.load_state_dict(loading.factored_state(dense, config, splits, dtype, device))
        model.generation_config = dense.generation_config
        return model.to(device).eval()

    def to_dense(self) -> PreTrainedModel:
        """A plain model of the config's `dense_model_type` with the products of the factors.

        Raises:
            ValueError: The model is distributed.
        """
        return loading.dense_model(self)


AutoModel.register(ALRDLlamaConfig, ALRDLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(ALRDLlamaConfig, ALRDLlamaForCausalLM, exist_ok=True)
