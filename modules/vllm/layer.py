"""What vLLM sees of the attention: layers that publish the bytes of their pages, and an operation that attends.

One object, `LatentPages`, stands for all layers that share a latent: it owns their pages, which are written when the
last of them has run, and vLLM knows of no other cache. A layer by itself is a block of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.library import Library
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backend import MultipleOf as Multiple
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

from modules.cache.pages import PAGE_MULTIPLE, PageLayout, Pages, check_page_length
from modules.cache.scheme import CacheScheme, LayerScales, LayerWidths
from modules.kernels import add_latents, get_backend
from modules.kernels.packed import LatentQuery, PackedCache
from modules.kivi_cache import needs_whole_pages
from modules.vllm.step import Requests, Step, make_step
from modules.vllm.stores import OpenStore, SinkStore


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the `Step` of a batch."""

    _last: tuple[CommonAttentionMetadata | None, Step | None] = (None, None)

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._whole_pages = needs_whole_pages(vllm_config.model_config.hf_config)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build=False) -> Step:
        batch = common_attn_metadata
        n = batch.num_reqs
        # Pages of other bytes have builders of their own, which are asked for the same step.
        if batch is not StepBuilder._last[0]:
            step = make_step(
                batch.query_start_loc_cpu[: n + 1].numpy(),
                batch.seq_lens[:n].cpu().numpy(),
                batch.block_table_tensor[:n].cpu().numpy(),
                batch.slot_mapping,
                self.kv_cache_spec.block_size,
                getattr(self.kv_cache_spec, "sliding_window", None),
                self._whole_pages,
            )
            StepBuilder._last = (batch, step)
        return StepBuilder._last[1]


class LatentBackend(AttentionBackend):
    """Names the pages' layout and the builder of steps."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "ALRD_LATENT"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("latent attention is an operation of the layers' pages, not an implementation")

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [Multiple(PAGE_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


@dataclass(frozen=True, eq=False)
class Member:
    """One layer of those that share pages.

    Attributes:
        query: Queries `[n, H_q, L, d]` of requests, and how they meet keys, by `expand_keys` and widths of head groups.
        expand_keys, expand_values: Latents to its keys and values, `ALinear`; `None`: the states themselves are cached.
        project: Its parts of the latents, by side of the cache, from its keys and values; `None`: what it gives is
            cached as it is.
    """

    query: Callable[..., LatentQuery]
    expand_keys: torch.nn.Module | None
    expand_values: torch.nn.Module | None
    project: tuple[tuple[str, torch.nn.Module], ...] | None = None


class LatentPages(AttentionLayerBase):
    """The pages of layers that share a latent, or of one layer, and the attention over them.

    Args:
        name: By which vLLM knows it, with the number of the first layer.
        scheme, widths, sink_channels: What is stored, as in a `KIVILatentCache`.
        heads: Key/value heads.
        head_dim: Their size.
        dtype: Type of the states.
    """

    impl = None

    def __init__(
        self,
        name: str,
        scheme: CacheScheme,
        widths: LayerWidths,
        sink_channels: dict[str, int],
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ):
        self.name, self.scheme, self.widths, self.sink_channels = name, scheme, widths, sink_channels
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        #: Layer by layer, in their order.
        self.members: list[Member] = []
        #: Calibrated scales, which are known when the weights are loaded.
        self.scales: LayerScales | None = None
        #: Whether the latents are to be summed up over the processes of tensor parallelism.
        self.is_summed = False
        self.kv_cache = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pages: Pages | None = None
        config = get_current_vllm_config()
        #: If pages are packed when they are full: most pages that are not; 0: each token is packed by itself.
        self.open_limit = 2 * config.scheduler_config.max_num_seqs * needs_whole_pages(config.model_config.hf_config)
        layers = config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"{name!r}: must be the name of one layer only")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec | SlidingWindowSpec:
        """A page is one state, of all its tokens: its bytes need not divide by them."""
        length = vllm_config.cache_config.block_size
        check_page_length(length, self.scheme.sink_length)
        layout = PageLayout(self.scheme, self.widths, length, self.dtype)
        kind, how = FullAttentionSpec, {}
        config = vllm_config.model_config.hf_config
        windows = set(map(config.layer_window, range(config.num_hidden_layers)))
        # Pages of different bytes must be of one kind. So those before a window are only let go if all layers have it.
        if len(windows) == 1 and None not in windows:
            kind, how["sliding_window"] = SlidingWindowSpec, windows.pop()
        how |= {"block_size": length, "num_kv_heads": 1, "head_size": self.head_dim, "dtype": torch.uint8}
        return kind(**how, num_head_slots=1, tokens_per_state=length, state_content_bytes=layout.nbytes)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the pages `[pages, 1, 1, bytes]` that vLLM has allocated."""
        self.kv_cache, self._pages = kv_cache, None
        # Here, since building the kernels takes a minute, which no request should wait for.
        self.backend = get_backend(None, kv_cache.device)

    def _bound(self, step: Step) -> Pages:
        """The pages as they are read and written, whose length is known with the first step."""
        if self._pages is None:
            raw = self.kv_cache.flatten(1)
            layout = PageLayout(self.scheme, self.widths, step.page_length, self.dtype, self.backend, self.scales)
            self._pages = Pages(layout, raw)
            like = torch.empty(0, dtype=self.dtype, device=raw.device)
            self.sinks = SinkStore(self.scheme.sink_length, self.sink_channels, like)
            channels = dict(zip(layout.codecs, map(sum, self.widths), strict=True))
            self.open = OpenStore(layout.length, channels, like, self.open_limit, self.scheme.sink_length)
        return self._pages

    def attend(self, member: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step):
        """Attention of the new tokens of a step in one layer, and their place in the pages after the last one.

        Args:
            member: Number of the layer among those that share the pages.
            query, keys, values: `[tokens, C]` before RoPE; keys and values as they are cached if `project` is `None`.
            step: Where the tokens stand.

        Yields:
            Requests, and their outputs `[n, H_q, L, d]`.
        """
        pages, own = self._bound(step), self.members[member]
        keys, values = keys[: step.tokens], values[: step.tokens]
        # All requests read before anything is written.
        for requests in step.requests:
            states = requests.gathered(query).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            attend = self._attend_latents if own.project is None else self._attend_block
            yield requests, attend(member, states, keys, values, requests, pages)
        self._collect(member, keys, values, step)

    def _packed(self, requests: Requests, pages: Pages, window: int | None, before=(), after=()) -> PackedCache:
        """The latents of the history of requests, those in the pages and those that wait, with tiles beside them."""
        table, length = requests.table, pages.layout.length
        tiles = {"before": before, "after": (*self.open.tiles(requests), *after)}
        if table is None:
            return PackedCache(**tiles)
        if window is not None:
            # Pages that none of the queries sees are not read.
            unseen = max(0, requests.least_held - window + 1) // length
            table = table[:, :, min(unseen, table.shape[2] - 1) :].contiguous()
        packed = {"block_length": length, "table": table, "full": requests.full, "hidden": self.scheme.sink_length}
        return PackedCache(keys=pages.keys, values=pages.values, **packed, **tiles)

    def _attend_latents(self, member: int, states, keys, values, requests: Requests, pages: Pages) -> torch.Tensor:
        """Attention to latents, packed and new ones."""
        own, new = self.members[member], requests.new_tiles(keys, values)
        query = own.query(states, requests, own.expand_keys, self.widths[-1])
        cache = self._packed(requests, pages, query.sliding_window, before=self.sinks.tiles(requests), after=new)
        return self.backend.attend_values(query, cache, own.expand_values).summed.to(states.dtype)

    def _attend_block(self, member: int, states, keys, values, requests: Requests, pages: Pages) -> torch.Tensor:
        """Attention to sinks and new tokens as they are, and to latents; as `ALRDLlamaBlockAttention` does it."""
        own, size = self.members[member], self.heads * self.head_dim
        sinks = self.sinks.tiles(requests, slice(member * size, (member + 1) * size))
        query = own.query(states, requests, own.expand_keys, self.widths[-1])
        history = self._packed(requests, pages, query.sliding_window)
        plain = (*sinks, *requests.new_tiles(keys, values))
        attended = self.backend.attend_block(query, plain, history, own.expand_values)
        return attended.summed.to(states.dtype)

    def _collect(self, member: int, keys: torch.Tensor, values: torch.Tensor, step: Step) -> None:
        """Add a layer's part of the latents; after the last layer they are whole, and are written."""
        own, rows = self.members[member], self.sinks.among(step)
        sinks = {"keys": keys[rows], "values": values[rows]}
        if own.project is None:
            self._write(step, {"keys": keys, "values": values})
            self.sinks.write(step, rows, sinks)
            return
        # The first layer starts the sums, to which each one adds its keys and its values.
        if member == 0:
            self._latents, self._dense = {}, {"keys": [], "values": []}
        add_latents(self.backend, *zip(*own.project, strict=True), (keys[None], values[None]), self._latents)
        for side, of_member in sinks.items():
            self._dense[side].append(of_member)
        if member == len(self.members) - 1:
            latents = {}
            for side, latent in self._latents.items():
                if self.is_summed:
                    latent = tensor_model_parallel_all_reduce(latent)
                latents[side] = latent[0].to(keys.dtype)
            self._write(step, latents)
            self.sinks.write(step, rows, {side: torch.cat(parts, dim=-1) for side, parts in self._dense.items()})
            self._latents, self._dense = {}, {}

    def _write(self, step: Step, states: dict[str, torch.Tensor]) -> None:
        """Pack new tokens, or the pages that they fill."""
        if self.open_limit:
            self._pages.write_whole(*self.open.write(step, states))
        else:
            self._pages.write(step.slots, states)


def latent_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, name: str, member: int
) -> None:
    """Attention of the new tokens of a step, which are stored then.

    Args:
        query, keys, values: `[tokens, C]` before RoPE.
        output: `[tokens, H_q * d]`, written.
        name, member: Of the `LatentPages`, and the number of the layer there.
    """
    context = get_forward_context()
    # vLLM measures the memory of a step without a cache.
    if context.attn_metadata is None:
        output.zero_()
        return
    step = context.attn_metadata[name]
    output[step.tokens :] = 0
    # Requests of one length at a time.
    for requests, attended in context.no_compile_layers[name].attend(member, query, keys, values, step):
        output[requests.rows] = attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _no_attention(query, keys, values, output, name: str, member: int) -> None:
    """What a compiler is told of the operation."""


_library = Library("alrd", "FRAGMENT")
direct_register_custom_op(
    "latent_attention", latent_attention, mutates_args=["output"], fake_impl=_no_attention, target_lib=_library
)
