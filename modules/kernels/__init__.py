"""Back ends of the packed cache: the same functions on the same tensors.

    reference   plain PyTorch (`modules/quant_utils.py`, `modules/kernels/attention.py`); runs anywhere
    triton      Triton kernels; CUDA devices, and for tests Triton's interpreter on the CPU
    cpu         a C++ kernel, built on first use; CPUs with AVX2 or AVX-512

Packing gives the same bits everywhere. Attention agrees to the rounding of the queries' type. `triton` and `cpu` attend
to the packed blocks themselves in a step of up to 16 new tokens. For more, a prompt in pieces, the cache is rebuilt
tile by tile (`modules/kernels/chunk.py`). Every back end uses the reference instead for

* states of other types than `FUSED_DTYPES` (float64),
* a quantizer that the kernels do not know (`Backend.attends_to`),
* attention weights,
* more than 16 new tokens whose queries, or expansions, get a gradient,
* packed tokens that are not seen (`PackedCache.hidden`, triton),
* a layer whose weights are offloaded.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from configuration_alrd_llama import check_choice
from modules import quant_utils, trellis
from modules.kernels.attention import Attended, latent_attention, merge_attended
from modules.kernels.chunk import chunk_attention
from modules.kernels.packed import LatentQuery, PackedCache, PackedSide, Tile
from modules.svd_linear import ALinear, MemberBLinear

BACKENDS = ("reference", "triton", "cpu")

#: Environment variable that chooses the back end where the caller does not.
BACKEND_VARIABLE = "ALRD_BACKEND"

#: Types of states that the fused kernels take.
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: New tokens of a step that the fused kernels take; more are matrix products, which the library is good at.
MAX_QUERY_LENGTH = 16


@dataclass(frozen=True, repr=False)
class Backend:
    """Functions of `modules/quant_utils.py` and `modules/kernels/attention.py`, or equivalents.

    Attributes:
        quantize_and_pack, unpack_and_dequantize: With the signatures, results and errors of `modules/quant_utils.py`.
        trellis_codes: As `encode` in `modules/trellis.py`.
        folded: For `chunk_attention`; `None`: there is none for this processor.
        scale_tokens: As that of `modules/kernels/cpu/quantize.py`; `None`: PyTorch chooses the scales of tokens.
        fused_attention: As `latent_attention` without `weights_length`; `None`: there is none.
        expands_values: Whether `fused_attention` also takes what expands values, and returns the heads' outputs.
        fused_block: As `attend_block` without `weights_length`, the tokens without latents last; `None`: there is none.
        fused_latents: As `add_latents` of `modules/kernels/cpu/latents.py`; `None`: PyTorch multiplies.
        fused_append: `FusedAppend` of `modules/kernels/triton/append.py`, for caches of fixed capacity; `None`: there
            is none.
        compiled_together: A context in which attention is not computed, but compiled, side by side; `None`: no need to.
    """

    name: str
    quantize_and_pack: Callable
    unpack_and_dequantize: Callable
    trellis_codes: Callable = trellis.encode
    fused_attention: Callable | None = None
    expands_values: bool = False
    fused_block: Callable | None = None
    fused_latents: Callable | None = None
    fused_append: Callable | None = None
    scale_tokens: Callable | None = None
    folded: Callable | None = None
    compiled_together: Callable | None = None

    def __repr__(self) -> str:
        return self.name

    def attends_to(self, *sides: PackedSide) -> bool:
        """Whether the fused kernel of this back end reads such blocks."""
        return self.fused_attention is not None and all([side.parts is not None for side in sides])

    def attend(self, query: LatentQuery, cache: PackedCache, weights_length: int | None = None) -> Attended:
        """As `latent_attention`: by the fused kernel where there is one for what is asked, else by the reference."""
        if not self._is_fused(query, cache, weights_length):
            return latent_attention(query, cache, weights_length)
        return _without_gradient(query, self.fused_attention(query, cache))

    def _expands(self, expand_values: ALinear | None) -> bool:
        """Whether `fused_attention` expands the sums."""
        return self.expands_values and expand_values is not None and self._is_readable(expand_values)

    @staticmethod
    def _is_readable(expand_values: ALinear) -> bool:
        """Whether a fused kernel may expand the sums: not with a weight that is offloaded, or gets a gradient."""
        weight = expand_values.weight
        return not weight.is_meta and not (weight.requires_grad and torch.is_grad_enabled())

    def _is_fused(self, query: LatentQuery, cache: PackedCache, weights_length: int | None) -> bool:
        states, expansion, sides = query.states, query.expand_keys, ()
        if cache.keys is not None:
            sides = (cache.keys, cache.values)
        fused = weights_length is None and self.attends_to(*sides)
        fused = fused and states.shape[2] <= MAX_QUERY_LENGTH and states.dtype in FUSED_DTYPES
        if cache.hidden and self.name == "triton":
            fused = False
        # An offloaded weight is in memory only while its module is called, as the reference does.
        return fused and not (expansion is not None and expansion.weight.is_meta)

    def multiplies(self, linear: MemberBLinear, outputs: torch.Tensor) -> bool:
        """Whether `fused_latents` takes a member's projection and its `[B, L, H_kv * d]` inputs."""
        weight = linear.weight
        gradient = torch.is_grad_enabled() and (weight.requires_grad or outputs.requires_grad)
        fused = self.fused_latents is not None and outputs.shape[1] <= MAX_QUERY_LENGTH and not weight.is_meta
        alike = weight.dtype == linear.bias.dtype and weight.dtype in FUSED_DTYPES
        return fused and alike and not gradient and outputs.dtype in FUSED_DTYPES

    def attend_values(
        self,
        query: LatentQuery,
        cache: PackedCache,
        expand_values: Callable | None,
        weights_length: int | None = None,
    ) -> Attended:
        """As `attend`, with the sums expanded to the heads' outputs `[B, H_q, L, d]`.

        Args:
            query, cache, weights_length: As for `attend`.
            expand_values: An `ALinear` of the values; `None`: the values themselves are cached.
        """
        states, trains = query.states, query.states.requires_grad
        for expand in (query.expand_keys, expand_values):
            trains |= torch.is_grad_enabled() and expand is not None and expand.weight.requires_grad
        if states.shape[2] > MAX_QUERY_LENGTH and weights_length is None and not trains:
            return chunk_attention(query, cache, expand_values, self.folded)
        if self._expands(expand_values) and self._is_fused(query, cache, weights_length):
            return _without_gradient(query, self.fused_attention(query, cache, expand_values))
        attended = self.attend(query, cache, weights_length)
        if expand_values is None:
            return attended
        # The sum of latents is expanded, not the value of every token.
        return attended._replace(summed=expand_values(attended.summed.to(states.dtype), per_head=True))

    def attend_block(
        self,
        query: LatentQuery,
        plain: tuple[Tile, ...],
        history: PackedCache,
        expand_values: ALinear,
        weights_length: int | None = None,
    ) -> Attended:
        """As `attend_values`, to tokens that have no latents beside those that have.

        Args:
            query, expand_values, weights_length: As for `attend_values`, of the latents.
            plain: The other tokens: keys before RoPE and values, head by head.
            history: The tokens that have latents; there may be none.
        """
        fused = self.fused_block is not None and self._is_readable(expand_values)
        if fused and self._is_fused(query, history, weights_length):
            return _without_gradient(query, self.fused_block(query, history, expand_values, plain))
        size = query.states.shape[3]
        heads = plain[-1].keys.shape[3] // size
        as_they_are = replace(query, expand_keys=None, value_widths=(size,) * heads)
        attended = self.attend_values(as_they_are, PackedCache(after=plain), None, weights_length)
        # A short text has no latents yet.
        if history.is_empty:
            return attended
        # Merged behind the expansion of the values, so that its bias counts for the latents only.
        return merge_attended(attended, self.attend_values(query, history, expand_values, weights_length))


def add_latents(
    backend: Backend | None, sides: tuple[str, ...], linears: tuple, outputs: tuple, latents: dict[str, torch.Tensor]
) -> None:
    """Add a member's parts of the latents of its block, `[B, L, Σ r]` float32, to those of the members before it.

    Args:
        backend: Of a cache that has begun; `None`: PyTorch multiplies.
        sides: Of the cache, to which the parts belong; twice the same where a latent is of keys and values.
        linears, outputs: What makes each part, `MemberBLinear`, of `[B, L, H_kv * d]`.
        latents: By side the sums so far, changed; no entry: it is the first part.
    """
    if backend is None or not all(map(backend.multiplies, linears, outputs)):
        for side, linear, x in zip(sides, linears, outputs, strict=True):
            part = linear(x)
            latents[side] = latents[side] + part if side in latents else part
        return
    for side, linear, x in zip(sides, linears, outputs, strict=True):
        if side not in latents:
            latents[side] = x.new_zeros((*x.shape[:2], sum(linear.ranks)), dtype=torch.float32)
    backend.fused_latents(linears, outputs, tuple([latents[side] for side in sides]))


def _without_gradient(query: LatentQuery, attended: Attended) -> Attended:
    if not query.states.requires_grad:
        return attended
    return Attended(*_WithoutGradient.apply(query.states, attended.summed, attended.log_sum))


class _WithoutGradient(torch.autograd.Function):
    """The outputs of a fused kernel, for a query that requires a gradient: asking for it raises instead of giving 0."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple([output.view_as(output) for output in outputs])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("a step over a packed cache has no gradient; train without a KIVILatentCache")


def _reference(field: str, device: torch.device) -> Backend:
    return Backend("reference", quant_utils.quantize_and_pack, quant_utils.unpack_and_dequantize)


def _triton(field: str, device: torch.device) -> Backend:
    # Imported here, so that triton is needed only where it is chosen.
    import modules.kernels.triton.quantize as kernels
    from modules.kernels.triton import common
    from modules.kernels.triton.append import FusedAppend
    from modules.kernels.triton.attention import compiled_together
    from modules.kernels.triton.attention import latent_attention as fused_attention
    from modules.kernels.triton.token_scales import scale_tokens
    from modules.kernels.triton.trellis import encode

    if device.type != "cuda" and not common.INTERPRETED:
        raise ValueError(
            f"{field}='triton': must be 'reference' or 'cpu' for tensors on {device}: triton runs on CUDA devices, and "
            "elsewhere only in its interpreter (TRITON_INTERPRET=1, set before the kernels are imported)"
        )
    functions = (kernels.quantize_and_pack, kernels.unpack_and_dequantize, encode)
    fused = {"fused_attention": fused_attention, "expands_values": True, "fused_append": FusedAppend}
    return Backend("triton", *functions, **fused, scale_tokens=scale_tokens, compiled_together=compiled_together)


def _cpu(field: str, device: torch.device) -> Backend:
    if device.type != "cpu":
        raise ValueError(f"{field}='cpu': must be 'reference' or 'triton' for tensors on {device}")
    # Imported here, so that the kernels are built only where they are chosen.
    from modules.kernels.cpu import quantize as kernels
    from modules.kernels.cpu.attention import latent_attention as fused_attention
    from modules.kernels.cpu.fold import Folded, folds
    from modules.kernels.cpu.latents import add_latents
    from modules.kernels.cpu.library import library
    from modules.kernels.cpu.trellis import encode

    library()
    functions = (kernels.quantize_and_pack, kernels.unpack_and_dequantize, encode)
    # Where there are tile registers the library's flash attention takes them, and is the faster one.
    folded = Folded if folds() and not library().alrd_has_tiles() else None
    fused = {"fused_attention": fused_attention, "fused_block": fused_attention, "fused_latents": add_latents}
    return Backend("cpu", *functions, **fused, scale_tokens=kernels.scale_tokens, folded=folded)


_MAKERS = {"reference": _reference, "triton": _triton, "cpu": _cpu}


def get_backend(name: str | None, device: torch.device) -> Backend:
    """The back end for tensors on `device`.

    Args:
        name: One of `BACKENDS`. `None`: the value of the environment variable `ALRD_BACKEND`; if it is not set,
            "triton" on CUDA devices, "cpu" on CPUs, "reference" elsewhere, and with a warning "reference" where triton
            cannot be imported or no C++ compiler is found.
        device: Where the tensors are.

    Raises:
        ValueError: Another name, or a back end is asked for where it cannot run.
    """
    field = "backend"
    if name is None and os.environ.get(BACKEND_VARIABLE):
        field, name = BACKEND_VARIABLE, os.environ[BACKEND_VARIABLE]
    if name is not None:
        check_choice(field, name, BACKENDS)
    chosen = name or {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    try:
        return _MAKERS[chosen](field, device)
    except (ImportError, RuntimeError) as error:
        # A back end that was asked for is an error; only the default falls back, and says so.
        if name is not None:
            raise ValueError(f"{field}={name!r}: cannot be used on this machine: {error}") from error
        warnings.warn(f"backend: chose 'reference' on {device}, since {chosen!r} cannot be used: {error}", stacklevel=2)
        return _reference(field, device)
