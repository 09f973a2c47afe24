"""Files that are whole at any time."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file and the folders above it; an interruption leaves an old file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may write the same file; each renames a file of its own.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)
        with part.open("rb") as written:
            os.fsync(written.fileno())  # before the name points to it
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write `record` so that `path` holds either the old text or the new one; makes the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    # Renaming is one step: a reader finds the old text or the new one.
    os.replace(temporary, path)
