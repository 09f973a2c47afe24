"""What a cache in a model of another project looks at when states come by `update`."""

import warnings

import torch

from configuration_alrd_llama import QuantScheme
from modules.cache.layer import LatentLayer

#: Reach of the keys of a drop-in cache beyond which it warns (`warn_of_turning_keys`).
MOST_REACH = 12.0


class UpdateGuard:
    """Refuses updates that leave the layers with different tokens, and warns of keys that quantize badly.

    Attributes:
        announced: Slots that a step will fill, if its model has asked for the sizes of a mask.
    """

    def __init__(self):
        self.announced: int | None = None
        self._last_updated: int | None = None
        self._measured: set[int] = set()  # layers whose first packed keys have been looked at
        self._told = False  # whether they have given cause for a warning

    def check_same_tokens(self, layers: list[LatentLayer], layer_idx: int, new_slots: int) -> None:
        """Refuse `new_slots` slots for a layer that would then hold others than the layer below it.

        Raises:
            ValueError: It would, or it is fed twice in one step.
        """
        # A model that shares a cache between layers, or feeds cross-attention, would mix the tokens of two sequences.
        held = layers[layer_idx].slots
        slots = held + new_slots
        below = next((i for i in reversed(range(layer_idx)) if layers[i].is_initialized), None)
        twice = self._last_updated == layer_idx and self.announced == held
        if twice or (below is not None and slots != layers[below].slots):
            other = "it is fed twice in one step" if twice else f"layer {below} holds {layers[below].slots}"
            raise ValueError(
                f"past_key_values: layer {layer_idx} would hold {slots} slots, but {other}; must be the same tokens in "
                "all layers, once. An encoder-decoder model needs EncoderDecoderCache(this cache, DynamicCache()); "
                "after an error in a step, crop() or reset() the cache"
            )
        self._last_updated = layer_idx

    def look_at_keys(self, layer_idx: int, layer: LatentLayer, keys: torch.Tensor) -> None:
        """Warn once, when first keys `[B, H, T, D]` are packed, if a large bias turns in them."""
        sinks = layer.scheme.sink_length
        if self._told or layer_idx in self._measured or not layer.scheme.flushed_blocks(keys.shape[2] - sinks):
            return
        self._measured.add(layer_idx)
        self._told = warn_of_turning_keys(layer_idx, keys[:, :, sinks:], layer.scheme.keys)


def check_no_latents(layer_idx: int, layer: LatentLayer) -> None:
    """Raise a `ValueError` if states come by `update` for a layer that is for the latents of a model."""
    if layer.given_widths is not None:
        raise ValueError(
            f"past_key_values: layer {layer_idx} is for latents of {layer.given_widths} channels by head group, of an "
            "ALRDLlamaForCausalLM; must be a cache of no model in particular, create_kivi_cache() of "
            "modules.kivi_cache, for the keys and values of another one"
        )


def warn_of_turning_keys(layer_idx: int, keys: torch.Tensor, scheme: QuantScheme) -> bool:
    """Warn, if need be, of keys `[B, H, T, D]` after RoPE with a large bias that turns; returns whether it did.

    RoPE keeps the length of each pair of channels (i, i + D/2), so the spread of these lengths over the tokens measures
    how much the keys differ, turned or not. Without a bias the range of the keys is some 8 times that spread.
    """
    if keys.shape[3] % 2 or scheme.tiers is not None or scheme.bits >= 8:
        return False
    keys = keys[:, :, :128].detach().float()
    # RoPE turns channel i with channel i + D/2.
    low, high = keys.chunk(2, dim=-1)
    length = (low.square() + high.square()).sqrt()
    spread = length.std(dim=(0, 2))
    differ = spread > 1e-5 * length.mean(dim=(0, 2))  # but for tokens that are all the same
    reach = (keys.amax(2) - keys.amin(2)).mean(0).unflatten(-1, (2, -1)).amax(1)
    measure = (reach[differ] / spread[differ]).mean().item() if differ.any() else 0.0
    if measure > MOST_REACH:
        warnings.warn(
            f"layer {layer_idx}: keys after RoPE reach over {measure:.0f} times the spread of their lengths (without a "
            f"bias it is some 8), and codes of {scheme.bits} bits lose what differs from token to token; split the "
            "model (ALRDLlamaForCausalLM caches keys before RoPE, and no bias), or take k_bits=8",
            stacklevel=4,
        )
    return measure > MOST_REACH
