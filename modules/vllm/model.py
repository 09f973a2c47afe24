"""`ALRDLlamaForCausalLM` for vLLM: its own model of the dense architecture, whose attentions are ours.

The weights are those of the checkpoint folder, by the names that they have there.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import init_vllm_registered_model

from configuration_alrd_llama import SIDES
from modeling_alrd_llama import ALRDLlamaAttention, ALRDLlamaModel, dense_classes, take_over, waits_for_length
from modules.cache.scheme import SIDES as CACHE_SIDES
from modules.kernels.packed import LatentQuery, Rope
from modules.kivi_cache import config_sink_channels, needs_whole_pages, page_schemes
from modules.latent_step import LatentStep
from modules.loading import check_tensor_parallel
from modules.svd_linear import LatentFactors, SVDLinear, shard_groups
from modules.vllm.layer import LatentPages, Member
from modules.vllm.step import MAX_DRAFTS, Requests

#: Dense model types whose experts vLLM's own models, or its adapter of the library's, do not run on a CPU.
_NOT_SERVED = ("aria_text", "minimax_m2", "phimoe")


def check_served(vllm_config: VllmConfig) -> None:
    """Refuse what the plug-in does not serve, by field, value and rule."""
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if not config.truncation_ranks:
        raise ValueError("truncation_ranks={}: must name split projections; vLLM serves a dense checkpoint as it is")
    kind, ranks = config.dense_model_type, parallel.tensor_parallel_size
    if kind in _NOT_SERVED:
        raise ValueError(f"dense_model_type={kind!r}: must be none of {', '.join(_NOT_SERVED)}, which vLLM fails with")
    if waits_for_length(config):
        raise ValueError(f"rope_parameters={config.rope_parameters}: must not depend on the length of a text")
    if parallel.pipeline_parallel_size != 1:
        raise ValueError(f"pipeline_parallel_size={parallel.pipeline_parallel_size}: must be 1 for packed latents")
    if ranks > 1:
        check_tensor_parallel(config, ranks, 1)
        if config.traits.norm == "all" or config.traits.fused or kind == "cohere":
            raise ValueError(f"tensor_parallel_size={ranks}: must be 1 for {kind!r}, whose heads share a norm")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ValueError(f"speculative_config: method={speculative.method!r}: must be 'ngram' for packed latents")
    if speculative is not None and needs_whole_pages(config) and speculative.num_speculative_tokens > MAX_DRAFTS:
        raise ValueError(
            f"speculative_config: num_speculative_tokens={speculative.num_speculative_tokens}: must be at most "
            f"{MAX_DRAFTS} where pages are packed when they are full"
        )
    for name in ("kv_transfer_config", "lora_config", "quant_config"):
        if getattr(vllm_config, name) is not None:
            raise ValueError(f"{name}: must be None for packed latents")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype != "auto":
        raise ValueError(f"kv_cache_dtype={cache_dtype!r}: must be 'auto': the checkpoint says how latents are packed")


class LatentAttention(ALRDLlamaAttention):
    """Attention whose keys and values are cached as latents; the factors have the names of the checkpoint.

    Args:
        own: This layer's attention in our own model, on no device: forms, names and numbers are its.
        stock: That of vLLM's layer, which is replaced.
        ropes: Rotary embedding, or several by layer type.
        prefix: Name of the module.
    """

    def __init__(self, own: ALRDLlamaAttention, stock: nn.Module, ropes: Rope | dict[str, Rope], prefix: str):
        nn.Module.__init__(self)
        take_over(self, own)
        self.ropes, config = ropes, self.config
        #: This process and how many there are, which deal out the heads, and with them the head groups.
        self.shard = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        for name, module in own.named_children():
            if not isinstance(module, nn.Linear):
                module.to_empty(device=torch.get_default_device())
                continue
            # A dense projection is vLLM's, which cuts it for the processes.
            kind, how = ColumnParallelLinear, {"bias": module.bias is not None, "return_bias": False}
            if name == "o_proj":
                # Whether to sum up over the processes is for the layer to say.
                kind, how["reduce_results"] = RowParallelLinear, getattr(stock.o_proj, "reduce_results", True)
            setattr(self, name, kind(module.in_features, module.out_features, prefix=f"{prefix}.{name}", **how))

        # The first layer of a block makes the pages, which the others find by its name.
        first = self.layer_idx // config.layer_group_size * config.layer_group_size
        self.member = self.layer_idx - first
        self.pages_name = f"{prefix}.pages".replace(f".{self.layer_idx}.", f".{first}.")
        if self.member == 0:
            self._make_pages()
        layers = get_current_vllm_config().compilation_config.static_forward_context
        self.pages, project = layers[self.pages_name], None
        if config.keep_dense:
            project = tuple(zip(own.cache_sides, (self.k_latent.BLinear, self.v_latent.BLinear), strict=True))
        expansions = (getattr(source, "ALinear", None) for source in self._sources())
        self.pages.members.append(Member(self._latent_query_of, *expansions, project))

    def _sources(self) -> list[nn.Module | None]:
        """What has the factors of the keys and of the values, if they are split."""
        name = "{}_latent" if self.config.keep_dense else "{}_proj"
        return [getattr(self, name.format(side), None) for side in SIDES]

    def _make_pages(self) -> None:
        config, dtype = self.config, get_current_vllm_config().model_config.dtype
        i = config.cache_layer(self.layer_idx)
        widths = tuple(shard_groups(groups, *self.shard) for groups in config.layer_widths(self.layer_idx))
        sinks = config_sink_channels(config)[i]
        sinks = {side: channels // self.shard[1] for side, channels in (sinks or {}).items()}
        sinks = sinks or dict(zip(CACHE_SIDES, map(sum, widths), strict=True))
        scheme = page_schemes(config)[i].shard(*self.shard)
        heads = config.num_key_value_heads // self.shard[1]
        pages = LatentPages(self.pages_name, scheme, widths, sinks, heads, self.head_dim, dtype)
        # Each process adds the parts of its own heads to a latent of all heads.
        pages.is_summed = config.keep_dense and config.num_head_groups == 1 and self.shard[1] > 1

    def _latent_query_of(self, states: torch.Tensor, requests: Requests, expand_keys, widths) -> LatentQuery:
        step = LatentStep(requests.positions, None, requests.start, requests.added, None, None, True, self.ropes)
        return self._query_of(states, step, expand_keys, widths)

    def keep_shard(self) -> None:
        """Drop what other processes hold of the factors, which have been read whole."""
        for factors in self.children():
            if self.shard[1] > 1 and isinstance(factors, (SVDLinear, LatentFactors)):
                factors.keep_shard(*self.shard, get_tp_group().device_group)

    def scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Calibrated scales that the checkpoint brings, by side of the cache, float32."""
        # Of a block they stand with its first layer, which is the one that is asked.
        scales = {}
        for side, source in zip(CACHE_SIDES, self._sources(), strict=True):
            if getattr(source, "latent_scale", None) is not None:
                scales[side] = (source.latent_scale.float(), source.latent_zero_point.float())
        return scales

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None, **others):
        """Attention of the new tokens of a step, `[tokens, C]`.

        Where vLLM has no model of its own, the library's layer asks, for `[1, tokens, C]` and weights.
        """
        query, keys, values = self._project(hidden_states.view(1, -1, hidden_states.shape[-1]))
        query = query.transpose(1, 2).flatten(2)[0]
        output = torch.empty_like(query)
        torch.ops.alrd.latent_attention(query, keys[0], values[0], output, self.pages_name, self.member)
        output = self.o_proj(output.view(*hidden_states.shape[:-1], -1))
        return output if hidden_states.dim() == 2 else (output, None)


class ALRDLlamaForCausalLM(nn.Module):
    """vLLM's model of the dense architecture with latent attention in each layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_served(vllm_config)
        self.config = config = vllm_config.model_config.hf_config
        dense, architecture = config.to_dense(), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.dense_model_type]
        # vLLM's models read a size that not every class has. Its Qwen2 refuses windows in some layers, not its own.
        dense.head_dim, dense.max_window_layers = config.head_dim, config.num_hidden_layers
        args = {"prefix": prefix, "hf_config": dense, "architectures": [architecture]}
        self.dense = init_vllm_registered_model(vllm_config, **args)
        with torch.device("meta"):
            own = ALRDLlamaModel(config)
        # Frequencies, not weights: a kernel rotates by them, no table of cosines is needed.
        own.rotary_emb = type(own.rotary_emb)(config)
        ropes = own._ropes(None, None)
        layers = vllm_config.compilation_config.static_forward_context
        #: By the names that they have in the checkpoint.
        self.attentions: dict[str, LatentAttention] = {}
        for i, layer in enumerate(own.layers):
            name = f"model.layers.{i}.self_attn"
            stock = self.dense.get_submodule(name)
            # vLLM must make no pages for the attention that is replaced.
            for module in stock.modules():
                if isinstance(module, AttentionLayerBase):
                    del layers[module.layer_name]
            latent = LatentAttention(layer.self_attn, stock, ropes, name)
            self.dense.get_submodule(f"model.layers.{i}").self_attn = self.attentions[name] = latent

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.dense.embed_input_ids(input_ids)

    def forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args, **kwargs):
        return self.dense(input_ids, positions, *args, **kwargs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.dense.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = set()
        others = self.dense.load_weights(self._others(weights, loaded))
        # The quantizers of the pages take the scales that have just been read.
        for attention in self.attentions.values():
            attention.keep_shard()
            if attention.member == 0:
                attention.pages.scales = attention.scales()
        return loaded | {f"dense.{name}" for name in others}

    def _others(self, weights: Iterable[tuple[str, torch.Tensor]], loaded: set[str]) -> Iterator[tuple]:
        """The weights that are not an attention's; those are read on the way, and their names added to `loaded`."""
        with torch.device("meta"):
            library = dense_classes(self.config.dense_model_type)[1](self.config.to_dense())
        for name, weight in weights:
            layer, is_own, own_name = name.partition(".self_attn.")
            if is_own:
                attention = self.attentions[f"{layer}.self_attn"]
                tensor = {**dict(attention.named_parameters()), **dict(attention.named_buffers())}[own_name]
                getattr(tensor, "weight_loader", default_weight_loader)(tensor, weight)
                loaded.add(f"dense.{name}")
            else:
                # vLLM reads experts one by one, as dense checkpoints have them; ours are saved as the library has them.
                yield from revert_weight_conversion(library, {name: weight}).items()
