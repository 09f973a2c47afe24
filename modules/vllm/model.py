"""`ALRDLlamaForCausalLM` for vLLM: its Llama with attention over packed latents.

The weights are those of the checkpoint folder, by the names that they have there.
"""

from functools import partial

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from configuration_alrd_llama import SIDES, ALRDLlamaConfig, Projection
from modules.cache.scheme import SIDES as CACHE_SIDES
from modules.kernels.packed import Rope
from modules.kivi_cache import config_sink_channels
from modules.loading import check_tensor_parallel
from modules.projections import in_rope_order, normalised
from modules.svd_linear import LatentFactors, SVDLinear, shard_groups
from modules.vllm.layer import LatentPages, Member
from modules.vllm.pages import page_schemes

#: Kinds of RoPE whose frequencies are the same for all texts.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")

#: Dense model types whose decoder is that of vLLM's Llama.
_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "ernie4_5")

_STACKED = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}


def check_served(vllm_config: VllmConfig) -> None:
    """Refuse what the plug-in does not serve, by field, value and rule."""
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if not config.truncation_ranks:
        raise ValueError(
            "truncation_ranks={}: must name split projections; serve a dense checkpoint as the Llama it is"
        )
    if config.dense_model_type not in _DECODERS:
        raise ValueError(
            f"dense_model_type={config.dense_model_type!r}: must be one of {', '.join(_DECODERS)}, whose decoder is "
            "that of vLLM's Llama; the others are served by scripts/serve.py"
        )
    longest = vllm_config.model_config.max_model_len
    for layer in range(config.num_hidden_layers):
        window = config.layer_window(layer)
        if window is not None and window < longest:
            raise ValueError(
                f"sliding_window={window}: must be None or at least max_model_len={longest}; packed latents have no "
                "sliding window in vLLM"
            )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _FIXED_ROPE:
        raise ValueError(f"rope_type={rope!r}: must be one of {', '.join(_FIXED_ROPE)}, whose cached keys stay right")
    if parallel.pipeline_parallel_size != 1:
        raise ValueError(f"pipeline_parallel_size={parallel.pipeline_parallel_size}: must be 1 for packed latents")
    if parallel.tensor_parallel_size > 1:
        check_tensor_parallel(config, parallel.tensor_parallel_size, 1)
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ValueError(f"speculative_config: method={speculative.method!r}: must be 'ngram' for packed latents")
    for name in ("kv_transfer_config", "lora_config", "quant_config"):
        if getattr(vllm_config, name) is not None:
            raise ValueError(f"{name}: must be None for packed latents")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype={cache_dtype!r}: must be 'auto', for the checkpoint says how latents are packed"
        )


class LatentAttention(nn.Module):
    """Attention whose keys and values are cached as latents; the factors have the names of the checkpoint.

    Args:
        config: Of the model.
        bias: Whether q, k and v have biases.
        bias_o_proj: Whether a Llama's o has one.
        prefix: Name of the module.
        others: What the library's decoder layer gives its attention and this one does not need.
    """

    def __init__(self, config: ALRDLlamaConfig, bias: bool, bias_o_proj: bool, prefix: str, **others):
        super().__init__()
        layer, size = extract_layer_index(prefix), config.head_dim
        self.config, self.head_dim = config, size
        if config.traits.norm == "head":
            self.q_norm, self.k_norm = RMSNorm(size, config.rms_norm_eps), RMSNorm(size, config.rms_norm_eps)
        #: This process and how many there are, which deal out the heads, and with them the head groups.
        self.shard = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        self.heads = config.num_key_value_heads // self.shard[1]
        if config.traits.qkv_bias is not None:
            bias_o_proj = False  # `attention_bias` is for q, k and v only
        hidden, queries, heads = config.hidden_size, config.num_attention_heads * size, config.num_key_value_heads
        project = partial(ColumnParallelLinear, hidden, bias=bias)
        self.q_proj = project(queries, prefix=f"{prefix}.q_proj")
        for side in SIDES:
            name = f"{side}_proj"
            ranks = config.group_ranks(Projection(layer, side))
            if ranks is None:
                setattr(self, name, project(heads * size, prefix=f"{prefix}.{name}"))
            else:
                split = SVDLinear(hidden, heads * size, ranks, heads, bias, config.is_static(side))
                setattr(self, name, split)
        self.o_proj = RowParallelLinear(queries, hidden, bias=bias_o_proj, prefix=f"{prefix}.o_proj")

        # The first layer of a block makes the pages, which the others find by its name.
        first = layer // config.layer_group_size * config.layer_group_size
        self.member = layer - first
        self.pages_name = f"{prefix}.pages".replace(f".{layer}.", f".{first}.")
        if self.member == 0:
            self._make_pages(config, layer)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        self.pages = layers[self.pages_name]
        if config.keep_dense:
            self.pages.members.append(self._block_member(config, layer))
        else:
            expansions = (getattr(self.k_proj, "ALinear", None), getattr(self.v_proj, "ALinear", None))
            self.pages.members.append(Member(*expansions))

    def _make_pages(self, config: ALRDLlamaConfig, layer: int) -> None:
        i, dtype = config.cache_layer(layer), get_current_vllm_config().model_config.dtype
        widths = tuple(shard_groups(groups, *self.shard) for groups in config.layer_widths(layer))
        sinks = config_sink_channels(config)[i]
        if sinks is None:
            sinks = dict(zip(CACHE_SIDES, map(sum, widths), strict=True))
        else:
            sinks = {side: channels // self.shard[1] for side, channels in sinks.items()}
        # The library's frequencies: a kernel rotates by them, no table of cosines is needed.
        rotary = LlamaRotaryEmbedding(config)
        rope = Rope(rotary.inv_freq, rotary.attention_scaling)
        scheme = page_schemes(config)[i].shard(*self.shard)
        pages = LatentPages(self.pages_name, scheme, widths, sinks, self.heads, config.head_dim, rope, dtype)
        # Each process adds the parts of its own heads to a latent of all heads.
        pages.is_summed = config.keep_dense and config.num_head_groups == 1 and self.shard[1] > 1

    def _block_member(self, config: ALRDLlamaConfig, layer: int) -> Member:
        blocks, heads = config.layer_parts(layer), config.num_key_value_heads
        # A latent of both sides is that of the keys, to the cache as to the settings.
        for side, block in zip(SIDES, (blocks[0], blocks[-1]), strict=True):
            static = self.member == 0 and side == block.settings_side and config.is_static(side)
            factors = LatentFactors(heads * config.head_dim, config.group_ranks(block), heads, static)
            setattr(self, f"{side}_latent", factors)
        sides = ("keys", "keys" if config.joint_kv else "values")
        project = tuple(zip(sides, (self.k_latent.BLinear, self.v_latent.BLinear), strict=True))
        return Member(self.k_latent.ALinear, self.v_latent.ALinear, project)

    def keep_shard(self) -> None:
        """Drop what other processes hold of the factors, which have been read whole."""
        for factors in self.children():
            if self.shard[1] > 1 and isinstance(factors, (SVDLinear, LatentFactors)):
                factors.keep_shard(*self.shard, get_tp_group().device_group)

    def scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Calibrated scales that the checkpoint brings, by side of the cache, float32."""
        # Of a block they stand with its first layer, which is the one that is asked.
        scales = {}
        for side, name in zip(CACHE_SIDES, SIDES, strict=True):
            source = getattr(self, f"{name}_latent", getattr(self, f"{name}_proj"))
            if getattr(source, "latent_scale", None) is not None:
                scales[side] = (source.latent_scale.float(), source.latent_zero_point.float())
        return scales

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.q_proj(hidden_states)[0]
        keys, values = _cached(self.k_proj, hidden_states), _cached(self.v_proj, hidden_states)
        query = in_rope_order(self, "q", normalised(self, "q", query))
        keys = in_rope_order(self, "k", normalised(self, "k", keys))
        output = torch.empty_like(query)
        torch.ops.alrd.latent_attention(query, keys, values, output, self.pages_name, self.member)
        return self.o_proj(output)[0]


def _cached(projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Latents of a split projection, the output of a dense one."""
    if isinstance(projection, SVDLinear):
        return projection.BLinear(hidden_states)
    return projection(hidden_states)[0]


class LatentDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: ALRDLlamaConfig | None = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=LatentAttention)


class LatentModel(LlamaModel):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=_STACKED)


class ALRDLlamaForCausalLM(LlamaForCausalLM):
    hf_to_vllm_mapper = LatentModel.hf_to_vllm_mapper
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_served(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LatentDecoderLayer)

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type=LatentDecoderLayer) -> LatentModel:
        return LatentModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights) -> set[str]:
        loaded = super().load_weights(weights)
        # The quantizers of the pages take the scales that have just been read.
        for layer in self.model.layers:
            layer.self_attn.keep_shard()
            if layer.self_attn.member == 0:
                layer.self_attn.pages.scales = layer.self_attn.scales()
        return loaded
