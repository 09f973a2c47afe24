"""What tells one model from another: its shape, and a digest of all that a cached state depends on."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from configuration_alrd_llama import check_choice

#: What a digest is of: every byte of the weights, or `SAMPLE` elements of each, evenly spread.
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

    The digest covers name, type, shape and contents of all that the modules of the decoder store, quantized weights and
    adapters included, and the switches of adapters: not the head, on which no cached state depends, nor hooks. Nothing
    is remembered from call to call, for weights can be written without a trace.

    Args:
        model: The model.
        digest: "all": of every byte, in some 1.5 seconds per gigabyte of weights and processor; "sample": of 256
            elements of each tensor, in milliseconds, by which other checkpoints are told, but not a change of a few
            elements.

    Raises:
        ValueError: Another `digest`.
    """
    check_choice("digest", digest, DIGESTS)
    decoder = model.get_decoder()
    fields = {name: getattr(decoder.config, name, None) for name in _FIELDS}
    fields |= {"dtype": str(decoder.dtype), "digest": digest, "weights": _digest(decoder, digest == "sample")}
    return json.loads(json.dumps(fields))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words."""
    differing = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    words = {name: f"{name} is {found.get(name)!r}, must be {expected.get(name)!r}" for name in differing}
    return [text if len(text) < 120 else f"{name} differs" for name, text in words.items()]


def _weights_at_hand(module: nn.Module):
    """Context in which weights that accelerate has offloaded are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # the model runs without this package where nothing is offloaded

    return align_module_device(module)


@torch.no_grad()
def _digest(decoder: nn.Module, sample: bool) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for prefix, module in decoder.named_modules():
            with _weights_at_hand(module):
                for name, value in _state(module).items():
                    digest.update(f"{prefix}.{name}".encode())
                    for content in _contents(value, sample):
                        pieces = (content[i : i + _PIECE] for i in range(0, len(content), _PIECE))
                        digest.update(b"".join(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)))
    return digest.hexdigest()


def _state(module: nn.Module) -> dict[str, Any]:
    """All that a module, without its children, brings to a result."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", True)  # in which quantized modules say what they have in place of parameters
    state |= dict(module.named_buffers(recurse=False))  # those that are not saved, too
    return state | {name: getattr(module, name) for name in _ATTRIBUTES if hasattr(module, name)}


def _contents(value: Any, sample: bool) -> Iterator[bytes]:
    """What a value stores, as bytes: a tensor of any kind, or what holds tensors."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _contents(part, sample)
    elif not isinstance(value, torch.Tensor):
        yield repr(value).encode()
    elif is_traceable_wrapper_subclass(value):  # of torchao, or this rank's part of a distributed tensor
        for name in value.__tensor_flatten__()[0]:
            yield from _contents(getattr(value, name), sample)
    else:
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        flat = (value.dequantize() if value.is_quantized else value.detach()).flatten()
        count = len(flat)
        if sample and count > SAMPLE:
            places = torch.arange(SAMPLE, dtype=torch.int64, device=flat.device) * (count - 1) // (SAMPLE - 1)
            flat = flat[places]
        flat = flat.cpu().contiguous()
        # One element counts as contiguous with any stride, but is no bytes then.
        yield memoryview(flat.as_strided((len(flat),), (1,)).view(torch.uint8).numpy())


__all__ = ["DIGESTS", "differences", "model_fingerprint"]
