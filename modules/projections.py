"""Queries, keys and values of an attention of any architecture (`Traits`), in the form in which the cache stores them.

That form is `[B, L, H * d]` before RoPE, behind the architecture's norms, heads side by side, and within a head the
channels in an order in which RoPE turns channel i with channel i + d/2, as in a Llama.
"""

from typing import NamedTuple

import torch
from torch import nn

from configuration_alrd_llama import Traits, architecture, rotary_channels


class DenseLayer(NamedTuple):
    """What keys or values are made of, for a factorization by the weights alone.

    Attributes:
        weight: `[H * d, C]`.
        bias: `[H * d]`, or `None`.
        gain: `[H * d]`, by which a norm multiplies the channels afterwards, or `None`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    gain: torch.Tensor | None


def source(attention: nn.Module, side: str) -> nn.Module:
    """The module of a library's attention behind which the side, "q", "k" or "v", is as it is cached, but for its form.

    `stored_form` makes that form of its output.
    """
    if norm_of(attention, side) is not None:
        return getattr(attention, f"{side}_norm")
    return getattr(attention, projection_name(architecture(attention.config), side))


def norm_of(attention: nn.Module, side: str) -> str | None:
    """What the norm of a side goes over, as `Traits.norm`; `None`: it has none."""
    return architecture(attention.config).norm if hasattr(attention, f"{side}_norm") else None


def projection_name(traits: Traits, side: str) -> str:
    """Name of the linear layer that gives a side."""
    return "qkv_proj" if traits.fused else f"{side}_proj"


def stored_form(attention: nn.Module, side: str, output: torch.Tensor) -> torch.Tensor:
    """The cached form of an output of `source`, or of its gradient."""
    if norm_of(attention, side) is None:
        output = own_part(attention, side, output)
    elif output.dim() == 4:
        if architecture(attention.config).heads_first:
            output = output.transpose(1, 2)
        output = output.flatten(2)
    return in_rope_order(attention, side, output)


def own_part(attention: nn.Module, side: str, output: torch.Tensor) -> torch.Tensor:
    """The channels `[..., H * d]` of a side among those that its linear layer gives."""
    config = attention.config
    if not architecture(config).fused:
        return output
    keys = config.num_key_value_heads * attention.head_dim
    sizes = (output.shape[-1] - 2 * keys, keys, keys)
    return output.split(sizes, dim=-1)["qkv".index(side)]


def normalised(attention: nn.Module, side: str, states: torch.Tensor) -> torch.Tensor:
    """Queries or keys `[B, L, H * d]` behind the norm of the architecture, if it has one."""
    norm = norm_of(attention, side)
    if norm is None:
        return states
    module = getattr(attention, f"{side}_norm")
    if norm == "all":
        return module(states)
    return module(states.unflatten(-1, (-1, attention.head_dim))).flatten(-2)


def in_rope_order(attention: nn.Module, side: str, states: torch.Tensor) -> torch.Tensor:
    """Queries or keys `[..., H * d]` with the channels of each head in the order of a Llama's RoPE.

    Where RoPE turns the first p channels of a head only, i with i + p/2, the others are put behind either half; they
    have frequency zero. Where it turns 2i with 2i + 1, the first of each pair make the lower half.
    """
    turned, size = rotary_channels(attention.config), attention.head_dim
    neighbours = architecture(attention.config).neighbours is not None
    if side == "v" or (turned == size and not neighbours):
        return states
    rest, half = (size - turned) // 2, turned // 2
    heads = states.unflatten(-1, (-1, size))
    low, high, first, second = heads.split([half, half, rest, rest], dim=-1)
    if neighbours:
        low, high = heads[..., 0:turned:2], heads[..., 1:turned:2]
    return torch.cat([low, first, high, second], dim=-1).flatten(-2)


def has_rope(attention: nn.Module) -> bool:
    """Whether the attention of this layer has RoPE."""
    switch = architecture(attention.config).rope_switch
    return switch is None or bool(getattr(attention, switch))


def dense_layer(attention: nn.Module, side: str) -> DenseLayer:
    """The dense layer of keys or values, in the order of `in_rope_order`. That of normalised keys has no bias: how much
    of it is left depends on the token."""
    linear, gain = getattr(attention, projection_name(architecture(attention.config), side)), None
    weight = own_part(attention, side, linear.weight.detach().T)
    bias = linear.bias
    if bias is not None:
        bias = in_rope_order(attention, side, own_part(attention, side, bias.detach()))
    if source(attention, side) is not linear:
        # What the norm makes of ones is its weight, or that plus one, as a Gemma has it.
        ones = weight.new_ones(weight.shape[1])
        bias, gain = None, in_rope_order(attention, side, normalised(attention, side, ones).detach())
    return DenseLayer(in_rope_order(attention, side, weight).T, bias, gain)


def padded_frequencies(inv_freq: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Frequencies `[d/2]` of the channels in the order of `in_rope_order`, from those `[p/2]` of the turned ones."""
    return nn.functional.pad(inv_freq, (0, head_dim // 2 - len(inv_freq)))
