"""The file of a saved cache: a safetensors file whose header and tensors have checksums, and which says its version.

The metadata holds the header as JSON under `kivi_latent_cache` and that text's SHA-256 under `sha256`. The header has
the `version`, what the cache says of itself (`KIVILatentCache.save`), and the SHA-256 of the bytes of each tensor.
"""

import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modules.files import save_tensors

KEY, CHECKSUM, VERSION = "kivi_latent_cache", "sha256", 4


def _sha256(tensor: torch.Tensor) -> str:
    # A tensor of one element counts as contiguous with any stride, but is no bytes then.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()


def write_cache_file(path: str | os.PathLike, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write header (JSON types) and tensors; an interruption leaves an old file as it was."""
    checksums = {name: _sha256(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, **header, "tensors": checksums})
    save_tensors(path, tensors, {KEY: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()})


def read_cache_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors (on the CPU) of a file that `write_cache_file` has written.

    Raises:
        ValueError: The file is truncated, altered, of another kind or version; the message says which.
        OSError: There is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    text = metadata.get(KEY)
    if text is None:
        raise ValueError(f"{path}: not a saved cache; its metadata must have {KEY!r}")
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: altered; its header must be a JSON object with a version") from None
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r} must be {VERSION}")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(CHECKSUM):
        raise ValueError(f"{path}: altered; the header is not that of its checksum")
    checksums = header.get("tensors")
    if not isinstance(checksums, dict) or set(checksums) != set(names):
        raise ValueError(f"{path}: altered; its tensors are not those that the header names")
    altered = sorted(name for name in names if _sha256(tensors[name]) != checksums[name])
    if altered:
        raise ValueError(f"{path}: altered; the contents of {', '.join(altered)} are not those of their checksums")
    return header, tensors


__all__ = ["read_cache_file", "write_cache_file"]
