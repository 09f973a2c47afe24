"""Llama, Mistral or Qwen2 with low-rank key and value projections, whose latents live in a `KIVILatentCache`."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial, wraps

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from configuration_alrd_llama import SIDES, ALRDLlamaConfig, Projection
from modules import loading
from modules.decode_graph import DecodeGraph
from modules.kernels import Backend
from modules.kernels.attention import attention_received, merge_attended
from modules.kernels.packed import LatentQuery, PackedCache, Rope
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_schemes, config_widths, create_kivi_cache
from modules.latent_step import LatentStep, LatentSums
from modules.quant_utils import quantize_latent
from modules.svd_linear import ALinear, LatentFactors, MemberBLinear, SVDLinear, shard_groups

#: The capacity that `generate` gives a cache is a multiple of it, in tokens.
CAPACITY_STEP = 512


class ALRDLlamaAttention(LlamaAttention):
    """Llama attention whose keys and values pass through latents; stock unless the cache is a `KIVILatentCache`."""

    def __init__(self, config: ALRDLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.traits.qkv_bias is not None:
            self.o_proj.bias = None  # `attention_bias` is for q, k and v only
        for side in SIDES:
            projection = Projection(layer_idx, side)
            ranks = config.group_ranks(projection)
            if ranks is None:
                continue
            # The library has made a dense layer; the factors take its place.
            dense, heads = getattr(self, projection.attribute), config.num_key_value_heads
            static = config.is_static(side)
            split = SVDLinear(dense.in_features, dense.out_features, ranks, heads, dense.bias is not None, static)
            split.latent_transform = SimpleRounding(config, f"{side}_bits")
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
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

        # Project. The cache stores latents before RoPE, which comes when they are expanded.
        query = self._heads(self.q_proj(hidden_states))
        key_latents = to_latents(self.k_proj, hidden_states)
        value_latents = to_latents(self.v_proj, hidden_states)
        layer = past_key_values.layer(self.layer_idx, self.widths)
        step = latent_step.on(query.device)

        # The common step: the cache attends and appends at one go.
        scores_attention = layer.score == "attention"
        if step.has_past and step.slots is None and not scores_attention:
            new = step.new_tokens(key_latents, value_latents)
            summed = layer.attend_and_append(self._latent_query(query, step), new)
            return self.o_proj(self._expand_values(summed, query.dtype).flatten(2)), None

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
        return self.o_proj(output.flatten(2)), weights

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, H * d]` to `[B, H, L, d]`."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _latent_query(self, query: torch.Tensor, step: LatentStep) -> LatentQuery:
        """Queries `[B, H_q, L, d]` before RoPE with how this layer attends to latents."""
        expand_keys = getattr(self.k_proj, "ALinear", None)  # a dense projection has none
        return LatentQuery(query, step.positions, expand_keys, self.widths[1], step.rope, self.scaling)

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

    def _expand_values(self, summed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Weighted sums of the values' latents `[B, H_q, L, r]` to the heads' outputs `[B, L, H_q, d]`."""
        output = summed.to(dtype)
        if isinstance(self.v_proj, SVDLinear):
            # The sum of latents is expanded, not the value of every token.
            output = self.v_proj.ALinear(output, per_head=True)
        return output.transpose(1, 2)

    def _attention_received(self, query: LatentQuery, cache: PackedCache, step: LatentStep) -> torch.Tensor:
        """Attention that each token receives, by which `KIVILatentLayer.append` chooses the protected ones."""
        received = attention_received(query, cache, step.real, step.longest)
        if self.tp_group is not None:
            dist.all_reduce(received, group=self.tp_group)  # of all heads, so that all ranks protect the same tokens
        return received

    def _attend_cache(self, query: LatentQuery, cache: PackedCache, backend: Backend, step: LatentStep):
        """Attention of new tokens, which are not appended, over the packed cache; `[B, L, H_q, d]` and weights."""
        dtype = query.states.dtype
        if step.slots is None:
            return self._expand_values(backend.attend(query, cache).summed, dtype), None
        summed, _, weights = backend.attend(query, cache, step.slots.shape[1])
        return self._expand_values(summed, dtype), step.weights_by_slot(weights).to(dtype)

    def _attend_dense(self, query, key_latents, value_latents, position_embeddings, attention_mask, **kwargs):
        """Attention of the first tokens to themselves, by the library's functions; `[B, L, H_q, d]` and weights."""
        # These tokens have no past, so their keys and values are expanded whole.
        key = self._heads(from_latents(self.k_proj, key_latents))
        value = self._heads(from_latents(self.v_proj, value_latents))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def shard_heads(self, rank: int, size: int, process_group=None) -> None:
        """Drop the heads of other ranks of tensor parallelism from the split projections and from the cache.

        Args:
            rank, size, process_group: As for `SVDLinear.keep_shard`.
        """
        self.tp_rank, self.tp_size, self.tp_group = rank, size, process_group
        for projection in (self.k_proj, self.v_proj):
            if size > 1 and isinstance(projection, SVDLinear):
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

    def __init__(self, config: ALRDLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
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
        query = self._heads(self.q_proj(hidden_states))
        keys, values = self.k_proj(hidden_states), self.v_proj(hidden_states)
        layer = past_key_values.layer(self.config.cache_layer(self.layer_idx), self.widths)
        step = latent_step.on(query.device)
        if step.has_past:
            output, weights = self._attend_block(query, keys, values, layer, step)
        else:
            output, weights = self._attend_dense(query, keys, values, position_embeddings, attention_mask, **kwargs)

        # The latents of the new tokens are sums over the layers of the block: the last layer has them whole.
        if self.layer_idx == self.block.first:
            step.sums.begin(self.layer_idx, layer.sink_slots(step.real, keys.shape[1]))
        parts = (self.k_latent.BLinear(keys), self.v_latent.BLinear(values))
        step.sums.add(self.layer_idx, self.cache_sides, parts, (keys.detach(), values.detach()))
        if self.layer_idx == self.block.last:
            latents = {}
            for side, latent in step.sums.latents.items():
                if self.k_latent.is_joint:
                    dist.all_reduce(latent, group=self.tp_group)  # each rank has added its own heads
                latents[side] = latent.to(keys.dtype)
            layer.append(**latents, real=step.real, dense=step.sums.members())
        return self.o_proj(output.flatten(2)), weights

    def shard_heads(self, rank: int, size: int, process_group=None) -> None:
        """As `ALRDLlamaAttention.shard_heads`, of the factors beside the dense projections."""
        super().shard_heads(rank, size, process_group)
        if size > 1:
            self.k_latent.keep_shard(rank, size, process_group)
            self.v_latent.keep_shard(rank, size, process_group)

    def _latent_query(self, query: torch.Tensor, step: LatentStep) -> LatentQuery:
        return LatentQuery(query, step.positions, self.k_latent.ALinear, self.widths[-1], step.rope, self.scaling)

    def _attend_block(self, query, keys, values, layer, step: LatentStep):
        """Attention of new tokens to sinks and to themselves as they are, and to latents; `[B, L, H_q, d]` and weights.

        The two parts are merged behind the expansion of the values, so that its bias counts for the latents only.
        """
        length = None if step.slots is None else step.slots.shape[1]
        layer.check_type(keys)  # before a kernel takes it at its word
        # Sinks lie side by side, layer by layer.
        size, member = keys.shape[2], self.layer_idx - self.block.first
        sinks = layer.sinks(slice(member * size, (member + 1) * size))
        heads = (self.head_dim,) * (size // self.head_dim)
        exact_query = LatentQuery(query, step.positions, None, heads, step.rope, self.scaling)
        new = step.new_tokens(keys, values).tile()
        attended = layer.backend.attend(exact_query, PackedCache(sinks, (new,)), length)

        # A short text has no latents yet.
        history = layer.packed()
        if not history.is_empty:
            latent = layer.backend.attend(self._latent_query(query, step), history, length)
            summed = self.v_latent.ALinear(latent.summed.to(query.dtype), per_head=True)
            attended = merge_attended(attended, latent._replace(summed=summed))
        weights = attended.weights
        if weights is not None:
            weights = step.weights_by_slot(weights).to(query.dtype)
        return attended.summed.to(query.dtype).transpose(1, 2), weights


def to_latents(projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """States that the cache stores: latents of a split projection, the output of a dense one."""
    return projection.BLinear(hidden_states) if isinstance(projection, SVDLinear) else projection(hidden_states)


def from_latents(projection: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Keys or values `[..., H_kv * d]` from the states that the cache stores."""
    return projection.ALinear(latents) if isinstance(projection, SVDLinear) else latents


def captures_graphs(model: PreTrainedModel) -> bool:
    """Whether steps of a model can be captured as CUDA graphs."""
    return model.device.type == "cuda"


def _static_buffer(split: nn.Module, name: str) -> torch.Tensor:
    """A buffer in float32, from where accelerate keeps it if it is offloaded (`offload_buffers=True`)."""
    buffer = getattr(split, name)
    if buffer.is_meta:
        buffer = split._hf_hook.weights_map[name]
    return buffer.float()


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


class ALRDLlamaDecoderLayer(LlamaDecoderLayer):
    #: Gradient checkpointing leaves the cache there, so that `generate` is right in training mode too; a step that is
    #: computed again for its gradient would fill the cache twice, and `ALRDLlamaModel.forward` refuses it.
    _can_checkpoint_with_cache = True

    def __init__(self, config: ALRDLlamaConfig, layer_idx: int):
        # Skips the library's own `__init__`, which would build a stock attention.
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        attention = ALRDLlamaBlockAttention if config.keep_dense else ALRDLlamaAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class ALRDLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: ALRDLlamaConfig
    config_class = ALRDLlamaConfig
    _no_split_modules = ["ALRDLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": ALRDLlamaDecoderLayer, "attentions": ALRDLlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
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
            loading.check_tensor_parallel_plan(model.tp_plan)
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

    def check_blocks(self) -> None:
        """Raise a `ValueError` unless the layers of each block are together, on one device."""
        if not self.config.keep_dense:
            return
        devices = {}
        for i, attention in self.local_attentions().items():
            devices[i] = loading.execution_device(attention.k_proj)
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
            sources = (attention.k_proj, attention.v_proj)
            if self.config.keep_dense:
                sources = (attention.k_latent, attention.v_latent)
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
        # Skips the library's own `__init__`, which would build stock layers.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([ALRDLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
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
        """Like `LlamaModel.forward`; makes a `KIVILatentCache` when a cache is wanted, none is given and `use_kivi`.

        With such a cache, `attention_mask` is `None` or `[B, past slots + L]`, and `position_ids`, if given, count
        the tokens of each row from 0, pads not counted.
        """
        if not self.config.use_kivi:
            self.config.check_latent_cache()  # the field may have been assigned since the model was built
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and self.config.use_kivi and not self.training:
            past_key_values = self.create_kivi_cache()
        latent = isinstance(past_key_values, KIVILatentCache)
        self._check_window(input_ids, inputs_embeds, past_key_values)
        if self.training and past_key_values is not None:
            self._check_training(latent)
        forward = super().forward
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

    def _check_window(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, cache) -> None:
        """Reject a text beyond the sliding window, which a dense Mistral would no longer see as a whole."""
        window = getattr(self.config, "sliding_window", None)
        new = input_ids if inputs_embeds is None else inputs_embeds
        if window is None or new is None:
            return
        capacity = getattr(cache, "capacity", None)  # asking such a cache for its length would wait for the device
        if capacity:
            slots, text = capacity, f"capacity={capacity}"
        else:
            slots = new.shape[1]
            if cache is not None:
                slots += cache.get_seq_length()
            text = f"a text of {slots} slots"
        if slots > window:
            raise ValueError(
                f"sliding_window={window}: {text} exceeds it, and must not; attention over a sliding window is not "
                "supported"
            )

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

    @merge_with_config_defaults
    @capture_outputs
    def _forward_latent(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=None, **kwargs
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        is_bound = past_key_values.is_bound_to(self)
        if not is_bound:
            past_key_values.check_model(self)
            self.check_blocks()
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        step = LatentStep.after(past_key_values, hidden_states, attention_mask, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=step.positions)
        # Dynamic NTK changes the frequencies with the length, so they are read after the embedding has seen it.
        step = replace(step, rope=Rope(self.rotary_emb.inv_freq, self.rotary_emb.attention_scaling))
        if self.config.keep_dense:
            step = replace(step, sums=LatentSums())
        if kwargs.get("output_attentions", self.config.output_attentions):
            step = replace(step, slots=step.slot_positions(past_key_values))
        # The first chunk attends to itself by the library's functions; later ones read the cache by its own lengths.
        causal_mask = None
        if not step.has_past:
            causal_mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=None)

        # An error in a layer leaves no layer with tokens that the others have not.
        with past_key_values.transaction():
            for layer in list(self.layers)[: self.config.num_hidden_layers]:
                hidden_states = layer(
                    hidden_states,
                    attention_mask=causal_mask,
                    position_ids=step.positions,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    latent_step=step,
                    **kwargs,
                )
        if not is_bound:
            past_key_values.bind(self)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class ALRDLlamaForCausalLM(ALRDLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    def __init__(self, config: ALRDLlamaConfig):
        # Skips the library's own `__init__`, which would build a stock decoder.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = ALRDLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        cache = args[3] if len(args) > 3 else kwargs.get("past_key_values")
        if _is_traced_in_vain(cache, self.config):
            return _untraced(super().forward, *args, **kwargs)
        grows = isinstance(cache, KIVILatentCache) and cache.capacity is None
        # The logits are what takes most memory in a step.
        with cache.transaction() if grows else nullcontext():
            return super().forward(*args, **kwargs)

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
        capacity = -(-max_cache_length // CAPACITY_STEP) * CAPACITY_STEP
        window = getattr(self.config, "sliding_window", None)
        if window is not None and capacity > window:
            if max_cache_length > window:
                return None  # the text may end before; if it does not, the step that exceeds the window is refused
            capacity = window
        cache = self.create_kivi_cache(capacity=capacity)
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
        rope_type = (self.config.rope_parameters or {}).get("rope_type", "default")
        refused = isinstance(model_kwargs.get("past_key_values"), KIVILatentCache) and (
            (self.tp_size or 1) > 1
            or getattr(self, "_pp_stage", None) is not None
            or len(set(getattr(self, "hf_device_map", {}).values())) > 1
            or (self.config.keep_dense and (generation_config.compile_config or not captures_graphs(self)))
            or "dynamic" in rope_type
            or rope_type == "longrope"
        )
        return not refused and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config):
        """The decode step of `generate`: replayed from a CUDA graph, or compiled as a `compile_config` says.

        Capturing takes a step, and compiling a minute.
        """
        compiled = super().get_compiled_call
        if compile_config is not None or not captures_graphs(self):
            return compiled(compile_config)
        replayed = DecodeGraph(self)

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
        """Split a loaded Llama, Mistral or Qwen2.

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
        loading.check_plain(dense)
        loading.check_same_model_type(ALRDLlamaConfig.from_llama(dense.config), config)
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
