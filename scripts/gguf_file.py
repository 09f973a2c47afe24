"""Models in GGUF files, the format of llama.cpp, turned into the checkpoint folders that all scripts read."""

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configuration_alrd_llama import check_dense_model_type
from modules.files import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader

#: Where files named by `--model` are converted to, as seen from the current folder.
CONVERTED = Path("build/gguf")

#: Architectures whose files are read; transformers may read others, of which none was tried.
READ = ("llama", "mistral", "qwen2", "qwen3")

#: Special tokens by the names of transformers and of the file.
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def converted_folder(file: Path) -> Path:
    """Folder of the dense checkpoint that holds the model of a GGUF file; the first call makes it.

    Raises:
        ImportError, ValueError: As for `convert`.
    """
    check_magic(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = CONVERTED / f"{file.stem}-{digest[:12]}"
    if not folder.is_dir():
        convert(file, folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as an ordinary dense checkpoint in bfloat16.

    The folder appears when all of it is written.

    Raises:
        ImportError: The package that reads GGUF is not installed.
        ValueError: The file is not a whole GGUF file, its architecture is not one that is `READ`, it is one of several
            parts, or its RoPE is scaled in a way that is not read.
    """
    check_magic(file)
    reader = open_reader(file)
    check_model(file, reader)
    print(f"{file}: converted to {folder}, once")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where)
    set_rope(file, reader, config)
    how = {"config": config, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(**where, **how)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        part = Path(scratch) / "checkpoint"
        model.save_pretrained(part)
        write_tokenizer(reader, AutoTokenizer.from_pretrained(**where), part)
        # Another process may have been faster.
        if not folder.is_dir():
            os.rename(part, folder)


def write_tokenizer(reader: "GGUFReader", tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer that transformers makes of a file, mended where the file says otherwise."""
    # transformers 5.17 takes the first special token for the one that ends a text.
    for name, key in _SPECIAL_TOKENS.items():
        index = value(reader, f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(index)))
    # It would take spaces out of the text that it decodes.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    # A special token of GPT-2 is added behind a vocabulary that lacks it, where the model has no embedding.
    stored = folder / "tokenizer.json"
    state = json.loads(stored.read_text(encoding="utf-8"))
    size = len(reader.get_field("tokenizer.ggml.tokens").data)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    write_json(stored, state)


def check_magic(file: Path) -> None:
    """Refuse a file that does not begin as a GGUF file does."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(
                f"model={str(file)!r}: must be a GGUF file or a checkpoint folder, is another kind of file"
            )


def open_reader(file: Path) -> "GGUFReader":
    """The metadata and the table of tensors of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"model={str(file)!r}: a GGUF file is read by the package gguf: pip install gguf") from error
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"model={str(file)!r}: must be a whole GGUF file ({error})") from error


def value(reader: "GGUFReader", key: str) -> Any:
    """The metadata under `key`; `None`: the file has none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def check_model(file: Path, reader: "GGUFReader") -> None:
    """Refuse a file whose model is of another architecture, or lies in several files."""
    architecture = value(reader, "general.architecture")
    # llama.cpp writes a Mixtral as a Llama with experts.
    if architecture == "llama" and value(reader, "llama.expert_count"):
        architecture = "mixtral"
    field = f"model={str(file)!r}: general.architecture"
    check_dense_model_type(field, architecture)
    if architecture not in READ:
        choices = ", ".join(map(repr, READ))
        raise ValueError(f"{field}={architecture!r}: must be one of {choices} in a GGUF file; take another checkpoint")
    parts = value(reader, "split.count") or 1
    if parts > 1:
        raise ValueError(
            f"model={str(file)!r}: split.count={parts}: must be 1; join the files by `llama-gguf-split --merge`"
        )


def set_rope(file: Path, reader: "GGUFReader", config: PreTrainedConfig) -> None:
    """Add to `config` the scaling of RoPE, which transformers does not read from the file.

    A Llama 3.1 comes with a tensor of factors that divide the frequencies. Its fields follow from the largest factor;
    the context of the first training, 8,192 tokens, and the bounds 1 and 4 are those of every such model.

    Raises:
        ValueError: The scaling is of another kind.
    """
    kind = value(reader, f"{value(reader, 'general.architecture')}.rope.scaling.type")
    if kind not in (None, "none"):
        raise ValueError(
            f"model={str(file)!r}: rope.scaling.type={kind!r}: must be 'none'; take the original checkpoint"
        )
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    if "rope_freqs.weight" not in tensors:
        return
    divisors = torch.tensor(tensors["rope_freqs.weight"])
    config.rope_parameters = config.rope_parameters | {
        "rope_type": "llama3",
        "factor": divisors.max().item(),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(len(divisors)) / len(divisors)
    plain = config.rope_parameters["rope_theta"] ** -exponents
    if len(scaled) != len(plain) or not torch.allclose(plain / divisors, scaled, rtol=1e-3, atol=0):
        raise ValueError(
            f"model={str(file)!r}: rope_freqs.weight: must be the factors of Llama 3.1; take the original checkpoint"
        )
