"""Fingerprint of a model: its shape, and a digest of everything that a cached state depends on."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from configuration_alrd_llama import check_choice

#: Kinds of digest: of every byte of the weights, or of `SAMPLE` elements of each, evenly spread.
DIGESTS = ("all", "sample")
SAMPLE = 256

_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "vocab_size",
    "rope_parameters",
    "head_group_size",
    "truncation_ranks",
)

#: Numbers and switches of modules, beside weights: of attention, norms, RoPE, and of adapters as PEFT names them.
_ATTRIBUTES = (
    *("scaling", "variance_epsilon", "attention_scaling"),
    *("active_adapters", "merged_adapters", "disable_adapters"),
)

#: Bytes that are hashed at a time, by as many threads as there are processors.
_PIECE = 1 << 24


def model_fingerprint(model: nn.Module, digest: str = "all") -> dict[str, Any]:
    """Fingerprint of a model of transformers, in JSON types: fields of its configuration, digest of its weights.

    The digest covers name, type, shape and contents of everything that the modules of the decoder store, quantized
    weights and adapters included, and the switches of adapters; not the head, on which no cached state depends, nor
    hooks. Nothing is remembered from call to call, for weights can be written without a trace.

    Args:
        model: The model.
        digest: "all": every byte, in some 1.5 seconds per gigabyte of weights and processor; "sample": 256 elements of
            each tensor, in milliseconds, which tell another checkpoint, but not a change of a few elements.

    Raises:
        ValueError: `digest` is neither.
    """
    check_choice("digest", digest, DIGESTS)
    decoder = model.get_decoder()
    fields = {name: getattr(decoder.config, name, None) for name in _FIELDS}
    fields |= {"dtype": str(decoder.dtype), "digest": digest, "weights": _digest(decoder, digest == "sample")}
    return json.loads(json.dumps(fields))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Fields in which two fingerprints differ, in words."""
    words = []
    for name in sorted({*found, *expected}):
        if found.get(name) == expected.get(name):
            continue
        text = f"{name} is {found.get(name)!r}, must be {expected.get(name)!r}"
        if len(text) >= 120:
            text = f"{name} differs"
        words.append(text)
    return words


def weights_at_hand(module: nn.Module):
    """Context in which weights that accelerate has offloaded are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # the model runs without this package where nothing is offloaded

    return align_module_device(module)


def _sha256(piece: memoryview | bytes) -> bytes:
    return hashlib.sha256(piece).digest()


@torch.no_grad()
def _digest(decoder: nn.Module, sample: bool) -> str:
    """Digest of all modules: of the names of their values, and of the digests of the values' pieces."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for prefix, module in decoder.named_modules():
            with weights_at_hand(module):
                for name, value in _state(module).items():
                    digest.update(f"{prefix}.{name}".encode())
                    for content in _contents(value, sample):
                        pieces = [content[i : i + _PIECE] for i in range(0, len(content), _PIECE)]
                        digest.update(b"".join(pool.map(_sha256, pieces)))
    return digest.hexdigest()


def _state(module: nn.Module) -> dict[str, Any]:
    """Values of a module, without its children, on which its results depend."""
    state: dict[str, Any] = {}
    # Quantized modules give here what they have in place of parameters.
    module._save_to_state_dict(state, "", True)
    # Buffers that are not saved count, too.
    state |= dict(module.named_buffers(recurse=False))
    for name in _ATTRIBUTES:
        if hasattr(module, name):
            value = getattr(module, name)
            state[name] = _printed(module, value) if callable(value) else value
    return state


def _printed(decoder: nn.Module, method: Callable) -> str:
    """What stands for a method among the values, such as `active_adapters`: how it is printed, its decoder with it.

    Of a split model as it was when caches were saved whose files still hold the digest: its layers were of a class of
    ours, and all else was a Llama's.
    """
    text = repr(method)
    if not hasattr(decoder.config, "dense_model_type"):
        return text
    layer = type(decoder.layers[0]).__name__
    return text.replace(f" {layer}(", " ALRDLlamaDecoderLayer(").replace(
        f"): {layer.removesuffix('DecoderLayer')}", "): Llama"
    )


def _contents(value: Any, sample: bool) -> Iterator[bytes]:
    """Stored bytes of a value: of a tensor of any kind, or of a list of tensors."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _contents(part, sample)
    elif isinstance(value, str):
        yield value.encode()
    elif not isinstance(value, torch.Tensor):
        yield repr(value).encode()
    elif is_traceable_wrapper_subclass(value):
        # A tensor of torchao, or this rank's part of a distributed tensor: its inner tensors count.
        for name in value.__tensor_flatten__()[0]:
            yield from _contents(getattr(value, name), sample)
    else:
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        flat = value.detach()
        if value.is_quantized:
            flat = value.dequantize()
        flat = flat.flatten()
        count = len(flat)
        if sample and count > SAMPLE:
            # Evenly spread, the first and the last element included.
            places = torch.arange(SAMPLE, dtype=torch.int64, device=flat.device) * (count - 1) // (SAMPLE - 1)
            flat = flat[places]
        flat = flat.cpu().contiguous()
        # One element counts as contiguous with any stride, but is no bytes then.
        yield memoryview(flat.as_strided((len(flat),), (1,)).view(torch.uint8).numpy())
