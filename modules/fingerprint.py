"""What tells one model from another: its shape, and a sample of every weight that a cached state depends on."""

import hashlib
import json
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Elements of each weight, evenly spread, that are looked at.
SAMPLE = 256

_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "head_group_size",
    "truncation_ranks",
)

#: Fingerprints by decoder, with the versions of the weights that they were taken of.
_known: WeakKeyDictionary[nn.Module, tuple[tuple, dict[str, Any]]] = WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Fingerprint of a model of transformers, in JSON types: fields of its configuration, digest of its weights.

    The digest covers name, type and shape of every parameter and buffer of the decoder, and `SAMPLE` of its elements:
    not the head, on which no cached state depends. Another checkpoint, a fine-tuned or a rounded one has another
    digest; a change of a few single elements may not show. It is computed once for the same weights.
    """
    decoder = model.get_decoder()
    versions = tuple((t.data_ptr(), _version(t)) for t in _local(decoder.state_dict(keep_vars=True)).values())
    known = _known.get(decoder)
    if known is None or known[0] != versions:
        fields = {name: getattr(decoder.config, name, None) for name in _FIELDS}
        fields |= {"dtype": str(decoder.dtype), "weights": _digest(decoder)}
        _known[decoder] = known = (versions, json.loads(json.dumps(fields)))
    return known[1]


def forget() -> None:
    """Compute every fingerprint anew, as a new process would."""
    _known.clear()


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words."""
    differing = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    words = {name: f"{name} is {found.get(name)!r}, must be {expected.get(name)!r}" for name in differing}
    return [text if len(text) < 120 else f"{name} differs" for name, text in words.items()]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _weights_at_hand(module: nn.Module):
    """Context in which weights that accelerate has offloaded are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # the model runs without this package where nothing is offloaded

    return align_module_device(module)


def _local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of each tensor that is on this rank."""
    return {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors.items()}


@torch.no_grad()
def _digest(decoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for prefix, module in decoder.named_modules():
        with _weights_at_hand(module):
            own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            for name, tensor in _local(own).items():
                digest.update(f"{prefix}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.flatten()
                count = min(SAMPLE, len(flat))
                picked = flat[torch.arange(count, dtype=torch.int64, device=flat.device) * (len(flat) - 1) // max(1, count - 1)]
                digest.update(picked.clone().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["differences", "forget", "model_fingerprint"]
