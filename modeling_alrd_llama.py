"""Llama, Mistral or Qwen2 with low-rank key and value projections, whose latents live in a `KIVILatentCache`."""

import copy
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import wraps

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
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

from configuration_alrd_llama import ALRDLlamaConfig, check_tiers
from modules.kernels import MAX_QUERY_LENGTH
from modules.kernels.attention import attention_received
from modules.kernels.packed import PackedCache, Rope, Tile
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_schemes, create_kivi_cache
from modules.quant_utils import quantize_latent, require
from modules.svd_linear import ALinear, SVDLinear, factor_groups, join_factors, own_groups

# ---- loading a dense checkpoint


class SplitProjection(ConversionOps):
    """Factor one dense weight while it is loaded: plain SVD per head group, the rotation folded in."""

    def __init__(self, ranks: tuple[int, ...], rotate: bool, tiers: list | None = None):
        self.ranks, self.rotate, self.tiers = ranks, rotate, tiers

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensors = input_dict[source_patterns[0]]
        weight = tensors[0] if isinstance(tensors, list) else tensors
        a, b = join_factors(factor_groups(weight, self.ranks), self.rotate, weight.dtype, self.tiers)
        return {target_patterns[0]: b, target_patterns[1]: a}


def register_dense_conversion(config: ALRDLlamaConfig) -> None:
    """Tell the library how the dense weights of a checkpoint become those of a model with this configuration."""
    conversions = []
    for i in range(config.num_hidden_layers):
        for projection, rotate in (("k_proj", config.k_hadamard), ("v_proj", config.v_hadamard)):
            ranks = config.group_ranks(i, projection)
            if ranks is not None:
                name = f"layers.{i}.self_attn.{projection}"
                factors = [f"{name}.BLinear.weight", f"{name}.ALinear.weight"]
                tiers = config.width_tiers.get(f"model.{name}")
                conversions.append(WeightConverter(f"{name}.weight", factors, [SplitProjection(ranks, rotate, tiers)]))
                conversions.append(WeightRenaming(f"{name}.bias", f"{name}.ALinear.bias"))
    register_checkpoint_conversion_mapping(config.model_type, conversions, overwrite=True)


#: The library keeps conversions per model type, ours differ per configuration: one load at a time.
_loading = threading.Lock()

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _check_dense_model_type(stored: ALRDLlamaConfig, config: ALRDLlamaConfig) -> None:
    """Refuse a configuration of another kind of model than the weights are of: it would leave out their biases."""
    if stored.dense_model_type != config.dense_model_type:
        raise ValueError(
            f"dense_model_type={config.dense_model_type!r}: must be {stored.dense_model_type!r}, as the weights are; "
            "make the config from that of the checkpoint"
        )


def _check_stored_model(path, config: ALRDLlamaConfig, hub_arguments: dict) -> None:
    """Refuse a configuration whose model type or factors differ from those that a checkpoint stores."""
    stored = ALRDLlamaConfig.from_pretrained(path, **hub_arguments)
    _check_dense_model_type(stored, config)
    if not stored.truncation_ranks:
        for field in ("k_mean_split", "v_mean_split"):
            if getattr(config, field):
                raise ValueError(f"{field}=True: the mean is known to calibrated factors only; {path!r} is dense")
        return
    for projection, rotation in (("k_proj", "k_hadamard"), ("v_proj", "v_hadamard")):
        for i in range(config.num_hidden_layers):
            ranks = stored.group_ranks(i, projection)
            if ranks != config.group_ranks(i, projection):
                raise ValueError(
                    f"truncation_ranks: {projection} of layer {i} is stored with group ranks {ranks}, the given config "
                    f"asks for {config.group_ranks(i, projection)}; split the dense checkpoint again to change them"
                )
            if ranks is not None and getattr(stored, rotation) != getattr(config, rotation):
                raise ValueError(
                    f"{rotation}={getattr(config, rotation)}: the checkpoint's factors are stored with "
                    f"{rotation}={getattr(stored, rotation)}; split the dense checkpoint again to change it"
                )
            name = f"model.layers.{i}.self_attn.{projection}"
            tiers, asked = stored.width_tiers.get(name), config.width_tiers.get(name)
            static = (getattr(config, f"{projection[0]}_scheme") or {}).get("static", False)
            if tiers is not None and (static if asked is None else check_tiers(asked) != check_tiers(tiers)):
                raise ValueError(
                    f"width_tiers[{name!r}]={asked}: the checkpoint is calibrated for {tiers}; for one width give "
                    f"create_kivi_cache() {projection[0]}_bits, or calibrate the dense checkpoint again"
                )
            field = f"{projection[0]}_bits"
            if tiers is not None and asked is not None and getattr(config, field) != getattr(stored, field):
                raise ValueError(
                    f"{field}={getattr(config, field)}: must be {getattr(stored, field)} as stored, since width_tiers "
                    f"say the widths of {projection}; for one width give create_kivi_cache() {field}, or "
                    "width_tiers={}"
                )


# ---- several devices


def _check_tensor_parallel(config: ALRDLlamaConfig, size: int, other_sizes: int) -> None:
    """Refuse a number of ranks over which the heads, or their groups, cannot be dealt out whole."""
    counts = {"num_key_value_heads": config.num_key_value_heads}
    if config.num_head_groups > 1 and config.truncation_ranks:
        counts[f"the head groups of head_group_size={config.head_group_size}"] = config.num_head_groups
        if not config.use_kivi:
            raise ValueError(
                f"tp_size={size}: the simple scheme (use_kivi=False) rounds the latents of all head groups together, "
                "so they cannot be on several ranks; head_group_size must be None"
            )
    for name, count in counts.items():
        if count % size:
            raise ValueError(f"tp_size={size}: must divide {name}, {count}: a rank caches whole ones")
    if other_sizes > 1:
        raise ValueError(f"tp_size={size}: cannot be combined with FSDP (over {other_sizes} ranks)")


def _check_tensor_parallel_plan(plan: dict[str, str]) -> None:
    for projection in ("q_proj", "k_proj", "v_proj"):
        styles = {style for name, style in plan.items() if name.endswith(f"self_attn.{projection}")}
        if styles != {"colwise"}:
            raise ValueError(
                f"tp_plan: {projection} must be 'colwise', as the cache is split with its heads; got {styles or None}"
            )


def _static_buffer(split: SVDLinear, name: str) -> torch.Tensor:
    """A buffer in float32, from where accelerate keeps it if it is offloaded (`offload_buffers=True`)."""
    buffer = getattr(split, name)
    return (split._hf_hook.weights_map[name] if buffer.is_meta else buffer).float()


# ---- model


@dataclass(frozen=True)
class LatentStep:
    """What every layer must know about the new tokens of a forward pass over a `KIVILatentCache`.

    Attributes:
        positions: `[B, L]`, position of each token in its row; a pad has that of the token before it.
        real: `[B, L]` bool on the CPU, false for pads; `None`: no pads.
        lengths: Tokens that each row holds already; `[B]` on the device if the cache's capacity is fixed.
        has_past: Whether the cache has been fed before.
        rope: Frequencies for the cached keys.
        slots: `[B, past slots + L]`, position of the token in each slot, -1 for pads, if attention weights are to be
            returned; else `None`.
    """

    positions: torch.Tensor
    real: torch.Tensor | None
    lengths: list[int] | torch.Tensor
    has_past: bool
    rope: Rope
    slots: torch.Tensor | None = None

    def new_tile(self, keys: torch.Tensor, values: torch.Tensor) -> Tile:
        """The new tokens' latents `[B, L, C]` as a tile: pads moved behind the row's real tokens."""
        device = keys.device
        start = torch.as_tensor(self.lengths, dtype=torch.int32, device=device)[:, None]
        if self.real is None:
            count = torch.full_like(start, keys.shape[1])
        else:
            real = self.real.to(device)
            count = real.sum(dim=1, keepdim=True, dtype=torch.int32)
            order = (~real).to(torch.int8).argsort(dim=1, stable=True)[..., None]
            keys, values = (x.gather(1, order.expand_as(x)) for x in (keys, values))
        return Tile(keys[:, None], values[:, None], start, count)


class ALRDLlamaAttention(LlamaAttention):
    """Llama attention whose keys and values pass through latents; stock unless the cache is a `KIVILatentCache`."""

    def __init__(self, config: ALRDLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.dense_model_type == "qwen2":
            self.o_proj.bias = None  # `attention_bias` is for q, k and v only
        for name, bits in (("k_proj", config.k_bits), ("v_proj", config.v_bits)):
            ranks = config.group_ranks(layer_idx, name)
            if ranks is None:
                continue
            dense, heads = getattr(self, name), config.num_key_value_heads
            static = bool((getattr(config, f"{name[0]}_scheme") or {}).get("static"))
            split = SVDLinear(dense.in_features, dense.out_features, ranks, heads, dense.bias is not None, static)
            if not config.use_kivi:
                split.latent_transform = SimpleRounding(bits, config.group_size)
            setattr(self, name, split)
        self.keep_heads(0, 1)

    def keep_heads(self, rank: int, size: int, process_group=None) -> None:
        """Drop what other ranks of tensor parallelism hold of the split projections, and of the cache.

        Args:
            rank, size, process_group: As for `SVDLinear.keep_shard`.
        """
        self.tp_rank, self.tp_size, self.tp_group = rank, size, process_group
        for projection in (self.k_proj, self.v_proj):
            if size > 1 and isinstance(projection, SVDLinear):
                # The library's plan took it for a dense layer: its wrapper would make DTensors of what comes and goes.
                vars(projection).pop("forward", None)
                projection.keep_shard(rank, size, process_group)
        widths = (self.config.cached_widths(self.layer_idx, name) for name in ("k_proj", "v_proj"))
        self.widths = tuple(own_groups(w, rank, size) for w in widths)

    def own_scheme(self, scheme: CacheScheme) -> CacheScheme:
        """What this rank stores of a scheme whose width tiers, if it has some, are those of all head groups."""
        tiers = {name: getattr(scheme, name).get("tiers") for name in ("k_scheme", "v_scheme")}
        own = {
            name: {**getattr(scheme, name), "tiers": own_groups(t, self.tp_rank, self.tp_size)}
            for name, t in tiers.items()
            if t
        }
        return replace(scheme, **own) if own else scheme

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

        query = self._heads(self.q_proj(hidden_states))
        key_latents = to_latents(self.k_proj, hidden_states)
        value_latents = to_latents(self.v_proj, hidden_states)
        layer = past_key_values.layer(self.layer_idx, self.widths)
        if latent_step.has_past:
            layer.check_states(key_latents, value_latents)  # before a kernel takes them at their word

        received = self._attention_received(query, key_latents, value_latents, layer, latent_step)
        if latent_step.has_past:
            output, weights = self._attend_cache(query, key_latents, value_latents, layer, latent_step)
        else:
            key = self._heads(from_latents(self.k_proj, key_latents))
            value = self._heads(from_latents(self.v_proj, value_latents))
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            output, weights = attend(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        layer.append(key_latents, value_latents, latent_step.real, received)
        return self.o_proj(output.flatten(2)), weights

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, L, H * d]` to `[B, H, L, d]`."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attention_arguments(self, query, key_latents, value_latents, layer, step: LatentStep) -> dict:
        """Arguments of an attention of the new tokens to the cache and to themselves."""
        new = step.new_tile(key_latents, value_latents)
        return {
            "query": query,
            "positions": step.positions.to(query.device),
            "cache": layer.packed(new) if step.has_past else PackedCache(after=(new,)),
            "expand_keys": self.k_proj.ALinear if isinstance(self.k_proj, SVDLinear) else None,
            "value_widths": self.widths[1],
            "rope": replace(step.rope, inv_freq=step.rope.inv_freq.to(query.device)),
            "scaling": self.scaling,
        }

    def _attention_received(self, query, key_latents, value_latents, layer, step: LatentStep) -> torch.Tensor | None:
        """What `KIVILatentLayer.append` takes, if the cache chooses its protected tokens by it."""
        if layer.score != "attention":
            return None
        arguments = self._attention_arguments(query, key_latents, value_latents, layer, step)
        received = attention_received(**arguments, real=step.real, length=max(step.lengths) + query.shape[2])
        if self.tp_group is not None:
            dist.all_reduce(received, group=self.tp_group)  # of all heads, so that all ranks protect the same tokens
        return received

    def _attend_cache(self, query, key_latents, value_latents, layer, step: LatentStep):
        """Attention of new tokens over the packed cache and themselves; returns `[B, L, H_q, d]` and weights."""
        arguments = self._attention_arguments(query, key_latents, value_latents, layer, step)
        weights_length = None if step.slots is None else step.slots.shape[1]
        summed, weights = layer.backend.attend(**arguments, weights_length=weights_length)
        summed = summed.to(query.dtype)
        output = self.v_proj.ALinear(summed, per_head=True) if isinstance(self.v_proj, SVDLinear) else summed
        if weights is not None:
            slots = step.slots.to(weights.device)[:, None, None].expand_as(weights)
            weights = weights.gather(3, slots.clamp(min=0)).masked_fill(slots < 0, 0.0).to(query.dtype)
        return output.transpose(1, 2), weights


def to_latents(projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the cache stores of a projection: its latents, or, of a dense one, its output."""
    return projection.BLinear(hidden_states) if isinstance(projection, SVDLinear) else projection(hidden_states)


def from_latents(projection: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Keys or values `[..., H_kv * d]` from what the cache stores."""
    return projection.ALinear(latents) if isinstance(projection, SVDLinear) else latents


class SimpleRounding(nn.Module):
    """The simple scheme of `use_kivi=False`: every latent rounded on its way to keys or values, except in training."""

    def __init__(self, n_bits: float, group_size: int):
        super().__init__()
        self.n_bits, self.group_size = n_bits, group_size

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, group_size={self.group_size}"

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents if self.training else quantize_latent(latents, self.n_bits, self.group_size)


class ALRDLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: ALRDLlamaConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = ALRDLlamaAttention(config, layer_idx)
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
        if isinstance(module, ALinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """Load a split checkpoint, or a dense one, whose projections are split as `config` says while loading.

        Takes the arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: A parameter would stay at its random initialisation, or `config` asks for another kind of model
                or other factors than the checkpoint stores.
        """
        if config is not None and pretrained_model_name_or_path is not None:
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            _check_stored_model(pretrained_model_name_or_path, config, hub_arguments)
        with _loading:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
            )
        unloaded = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if unloaded:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the checkpoint has no fitting weights for {', '.join(unloaded)}; "
                "they would be random"
            )
        if (model.tp_size or 1) > 1:
            mesh = model._device_mesh
            mesh = mesh["tp"] if mesh.ndim > 1 else mesh
            for attention in model.own_attentions().values():
                attention.keep_heads(mesh.get_local_rank(), mesh.size(), mesh.get_group())
        return (model, info) if output_loading_info else model

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *mesh):
        """The library's hook before the weights are read."""
        size = 1 if distributed_config is None else distributed_config.tp_size
        if size > 1:
            others = distributed_config.fsdp_size * getattr(distributed_config, "dp_replicate_size", 1)
            _check_tensor_parallel(model.config, size, others)
        model = super().maybe_distribute_model(model, distributed_config, *mesh)
        if size > 1:
            _check_tensor_parallel_plan(model.tp_plan)
        return model

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict: dict, *args, **kwargs) -> dict:
        """The library's hook of `save_pretrained`, called by every rank: add what it does not know to be in parts."""
        whole = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        for module_name, module in model_to_save.named_modules():
            if isinstance(module, SVDLinear) and module.BLinear.process_group is not None:
                for name, tensor in module.gathered_state().items():
                    if f"{module_name}.{name}" in whole:
                        whole[f"{module_name}.{name}"] = tensor.cpu()
        return whole

    def _check_whole(self, what: str) -> None:
        if getattr(self, "_pp_stage", None) is not None:
            raise ValueError(f"{what}: a stage of a pipeline has some of the layers only; load the model without it")

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """Save the factors as they are; with `save_original_format=True` the dense model of `to_dense`.

        Under tensor parallelism every rank must call it, and the first one writes the whole model.

        Raises:
            ValueError: The model is a stage of a pipeline, or under tensor parallelism another format is asked for.
        """
        self._check_whole("save_pretrained")
        if kwargs.get("distributed_checkpoint") and (self.tp_size or 1) > 1:
            raise ValueError("distributed_checkpoint=True: must be False; the factors are gathered into one checkpoint")
        if save_original_format:
            return self.to_dense().save_pretrained(save_directory, *args, **kwargs)
        return super().save_pretrained(save_directory, *args, save_original_format=False, **kwargs)

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
        names = tuple(f.name for f in fields(CacheScheme))
        others = ("quantization_config", "layer_schemes", "backend", "token_score", "capacity")
        unknown = sorted(set(settings) - set(names) - set(others))
        if unknown:
            known = ", ".join(names + others)
            raise ValueError(f"{', '.join(unknown)}: no such setting of the cache; there are {known}")
        if settings.get("quantization_config") is None:
            scheme, tiered = config_schemes(config, **{n: settings.pop(n) for n in names if n in settings})
            settings |= {n: getattr(scheme, n) for n in names}
            settings["layer_schemes"] = tiered | (settings.get("layer_schemes") or {})
            for i, attention in self.own_attentions().items():
                whole = settings["layer_schemes"].get(i, scheme)
                if (own := attention.own_scheme(whole)) != whole:
                    settings["layer_schemes"][i] = own
        cache = create_kivi_cache(**settings, static_scales=self._static_scales(), config=config)
        for i, attention in self.own_attentions().items():
            cache.layers[i].given_widths = attention.widths
        cache.bind(self.get_decoder())
        return cache

    def own_attentions(self) -> dict[int, ALRDLlamaAttention]:
        """Attention of each active layer by index; of those of its own, if the model is a stage of a pipeline."""
        layers = enumerate(self.get_decoder().layers[: self.config.num_hidden_layers])
        return {i: layer.self_attn for i, layer in layers if hasattr(layer, "self_attn")}

    def _config_of_active_layers(self) -> ALRDLlamaConfig:
        """The config without the projections of layers that an early exit of `generate` skips for a while."""
        active = self.config.num_hidden_layers
        if active >= len(self.get_decoder().layers):
            return self.config
        config = copy.copy(self.config)
        for field in ("truncation_ranks", "width_tiers"):
            by_name = getattr(config, field)
            setattr(config, field, {name: by_name[name] for name in by_name if int(name.split(".")[2]) < active})
        return config

    def _static_scales(self) -> dict[int, dict]:
        """Calibrated scales that the checkpoint brings, by layer and side."""
        found = {}
        for i, attention in self.own_attentions().items():
            for side, projection in (("keys", attention.k_proj), ("values", attention.v_proj)):
                if isinstance(projection, SVDLinear) and projection.latent_scale is not None:
                    scales = tuple(_static_buffer(projection, n) for n in ("latent_scale", "latent_zero_point"))
                    found.setdefault(i, {})[side] = scales
        return found


class ALRDLlamaModel(ALRDLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: ALRDLlamaConfig):
        config.check_latent_cache()
        register_dense_conversion(config)
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
        """As `LlamaModel.forward`; makes a `KIVILatentCache` when a cache is wanted, none is given and `use_kivi`.

        With such a cache, `attention_mask` is `None` or `[B, past slots + L]`, and `position_ids`, if given, count
        the tokens of each row from 0, pads not counted.
        """
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and self.config.use_kivi and not self.training:
            past_key_values = self.create_kivi_cache()
        latent = isinstance(past_key_values, KIVILatentCache)
        return (self._forward_latent if latent else super().forward)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @merge_with_config_defaults
    @capture_outputs
    def _forward_latent(
        self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=None, **kwargs
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        known = past_key_values.is_bound_to(self)
        if not known:
            past_key_values.check_model(self)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions, real, lengths = self._place_tokens(hidden_states, attention_mask, position_ids, past_key_values)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=positions)
        # Dynamic NTK changes the frequencies with the length, so they are read after the embedding has seen it.
        rope = Rope(self.rotary_emb.inv_freq, self.rotary_emb.attention_scaling)
        slots = None
        if kwargs.get("output_attentions", self.config.output_attentions):
            slots = self._slot_positions(past_key_values, real, *positions.shape)
        has_past = isinstance(lengths, torch.Tensor) or past_key_values.get_seq_length() > 0
        step = LatentStep(positions, real, lengths, has_past, rope, slots)
        # The first chunk attends to itself by the library's functions; later ones read the cache by its own lengths.
        causal_mask = None
        if not step.has_past:
            causal_mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=None)

        with past_key_values.all_or_nothing():
            for layer in self.layers[: self.config.num_hidden_layers]:
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
        if not known:
            past_key_values.bind(self)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _place_tokens(self, embeds, attention_mask, position_ids, cache: KIVILatentCache):
        """`LatentStep`'s positions, pads and lengths of the new tokens, checked against what the cache holds."""
        batch, length = embeds.shape[:2]
        lengths = cache.row_lengths()
        lengths = lengths if len(lengths) else [0] * batch
        if len(lengths) != batch:
            raise ValueError(f"input_ids: batch of {batch} must be the {len(lengths)} rows of the cache")
        real = self._new_tokens(attention_mask, lengths, cache, length)
        past = torch.as_tensor(lengths, dtype=torch.int64, device=embeds.device)[:, None]
        if real is None:
            positions = past + torch.arange(length, dtype=torch.int64, device=embeds.device)
        else:
            positions = (past + real.to(embeds.device).cumsum(1) - 1).clamp(min=0)
        if position_ids is not None:
            agrees = position_ids.to(embeds.device) == positions
            agrees = agrees if real is None else agrees | ~real.to(embeds.device)
            require(
                agrees.all(),
                "position_ids: must count the tokens of each row from 0 without gaps, pads not counted, and go on "
                "where the cache ends; leave them out to have them made",
            )
        return positions, real, lengths

    @staticmethod
    def _new_tokens(attention_mask, lengths, cache: KIVILatentCache, length: int) -> torch.Tensor | None:
        """`[B, L]` on the CPU, which of the new slots hold tokens; `None` if all do."""
        if attention_mask is None:
            return None
        if isinstance(lengths, torch.Tensor):
            if length <= MAX_QUERY_LENGTH:  # no wait, neither for the mask nor for the slots of the past
                real = (attention_mask[:, -length:] != 0).all()
                require(real, f"attention_mask: with a fixed capacity, steps of up to {MAX_QUERY_LENGTH} have no pads")
                return None
            lengths = lengths.tolist()
        slots = cache.get_seq_length()
        expected = (len(lengths), slots + length)
        if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != expected:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
            raise ValueError(
                f"attention_mask: {shape} must be [batch, past slots + new tokens] = {expected} with a "
                "KIVILatentCache; later turns pass the full mask"
            )
        mask = attention_mask != 0
        if length == 1 and mask.device.type != "cpu":
            # One token at a time on an accelerator: no wait for the mask, which must say that the tokens are real.
            require(mask[:, -1].all(), "attention_mask: a step of one token must not be a pad on an accelerator")
            return None
        mask = mask.cpu()
        if mask[:, :slots].sum(1).tolist() != lengths:
            raise ValueError(f"attention_mask: its past part must mark the {lengths} tokens that the rows hold")
        real = mask[:, slots:]
        return None if real.all() else real

    @staticmethod
    def _slot_positions(cache: KIVILatentCache, real, batch: int, length: int) -> torch.Tensor:
        """`[B, past slots + L]` position of the token in each slot, -1 for pads."""
        past = cache.get_seq_length()
        mask = torch.ones((batch, past + length), dtype=torch.bool, device="cpu")
        for row_mask, row in zip(mask, cache.layers[cache.first_layer].rows):
            for start, stop in row.pads:
                row_mask[start:stop] = False
        if real is not None:
            mask[:, past:] = real
        return (mask.cumsum(1) - 1).masked_fill(~mask, -1)


class ALRDLlamaForCausalLM(ALRDLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    def __init__(self, config: ALRDLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = ALRDLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        cache = kwargs.get("past_key_values") if len(args) < 4 else args[3]
        grows = isinstance(cache, KIVILatentCache) and cache.capacity is None
        # The logits are what takes most memory in a step.
        with cache.all_or_nothing() if grows else nullcontext():
            return super().forward(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(*args, inputs_embeds, attention_mask=None, past_key_values=None, **kwargs):
        """The mask that `generate` gives to compiled steps: of a packed cache the prompt's own, none for one token."""
        if isinstance(past_key_values, KIVILatentCache):
            return attention_mask if inputs_embeds.shape[1] > 1 else None
        how = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return create_masks_for_generate(*args, **how, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give `generate` a packed cache of our own where it would make a `DynamicCache`."""
        given = model_kwargs.get("past_key_values") is not None
        stock = generation_config.use_cache is False or generation_config.cache_implementation is not None
        if self.config.use_kivi and not given and not stock:
            model_kwargs["past_key_values"] = self.create_kivi_cache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As the library's, whose cache of its own holds keys and values made of the latents: right, but not packed."""
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
                `[{"k_proj": {"covariance": …, "metric": …}, "v_proj": {…}}, …]`; default: plain SVD.
            dtype, device: Type and place of the split model; default: those of `dense`.

        Raises:
            ValueError: `dense` is a model that cannot be split, or `config` is for another kind of model.
        """
        _check_dense_model_type(ALRDLlamaConfig.from_llama(dense.config), config)
        model = cls(config)
        # As in a loaded model the frequencies of RoPE stay in float32.
        rotary_emb = model.model.rotary_emb
        model.model.rotary_emb = None
        dtype, device = dtype or dense.dtype, torch.device(device or dense.device)
        model.to(dtype)
        model.model.rotary_emb = rotary_emb
        state = {name: t.detach().to(device, dtype, copy=True) for name, t in dense.state_dict().items()}
        for i, layer in enumerate(dense.model.layers):
            for projection, rotate in (("k_proj", config.k_hadamard), ("v_proj", config.v_hadamard)):
                ranks = config.group_ranks(i, projection)
                if ranks is None:
                    continue
                name, linear = f"model.layers.{i}.self_attn.{projection}", getattr(layer.self_attn, projection)
                how = splits[i][projection] if splits else {}
                tiers = config.width_tiers.get(name)
                if tiers is None and getattr(config, f"{projection[0]}_mean_split"):
                    # A rotation must not spread the mean over the other channels.
                    tiers = [[(n, 16) for n in (1, rank - 1) if n] for rank in ranks]
                split = SVDLinear.from_linear(linear, ranks, config.num_key_value_heads, rotate, tiers, **how)
                state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
                state.update({f"{name}.{key}": tensor for key, tensor in split.state_dict().items()})
        model.load_state_dict(state)
        model.generation_config = dense.generation_config
        return model.to(device).eval()

    @torch.no_grad()
    def to_dense(self) -> PreTrainedModel:
        """A plain model of the config's `dense_model_type` with the products of the factors.

        Raises:
            ValueError: The model is distributed.
        """
        self._check_whole("to_dense")
        if (self.tp_size or 1) > 1:
            raise ValueError(f"to_dense: a rank of {self.tp_size} has some of the heads only; load the model on one")
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, SVDLinear):
                bias = state.get(f"{name}.ALinear.bias")
                state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
                state[f"{name}.weight"] = module.dense_weight()
                if bias is not None:
                    state[f"{name}.bias"] = bias
        dense = AutoModelForCausalLM.from_config(self.config.to_dense()).to(self.dtype)
        dense.load_state_dict(state)
        dense.generation_config = self.generation_config
        return dense.to(self.device).eval()


AutoModel.register(ALRDLlamaConfig, ALRDLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(ALRDLlamaConfig, ALRDLlamaForCausalLM, exist_ok=True)

__all__ = ["ALRDLlamaForCausalLM", "ALRDLlamaModel", "ALRDLlamaPreTrainedModel"]
