"""The common ground of the command line programs: options, loading, sizes, environment."""

import hashlib
import os
import platform
import subprocess
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_alrd_llama  # noqa: F401  (makes the auto classes know the model)
from configuration_alrd_llama import ALRDLlamaConfig, parse_json
from modules.kivi_cache import CacheScheme
from scripts.gguf_file import converted_folder

ROOT = Path(__file__).resolve().parent.parent

#: The small Llama that ships with the repository, as seen from the current folder.
BUNDLED_MODEL = os.path.relpath(ROOT / "models" / "tiny-python-llama")

DTYPES = ("float32", "bfloat16", "float16")

#: What the option says in the evaluations of long texts.
ROPE_HELP = (
    "RoPE of every model in place of its own, as JSON, to go beyond the length they were trained for: "
    '{"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 2048}.'
)

Config = TypeVar("Config")


@dataclass
class CacheOptions:
    """Settings of the packed cache; the base of the scripts' configs."""

    k_bits: float | None = field(
        default=None, metadata={"help": "Bits of a cached key code: 1 … 16. None: the checkpoint's, or 2."}
    )
    v_bits: float | None = field(
        default=None, metadata={"help": "Bits of a cached value code: 1 … 16. None: the checkpoint's, or 2."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Elements that share a scale; 0: no bound. None: the checkpoint's, or 128."}
    )
    residual_length: int | None = field(
        default=None,
        metadata={"help": "Newest tokens that stay in full precision, at least. None: the checkpoint's, or 32."},
    )
    sink_length: int | None = field(
        default=None, metadata={"help": "First tokens that stay in full precision. None: the checkpoint's, or 4."}
    )

    k_scheme: str | None = field(
        default=None,
        metadata={
            "help": 'Other fields of QuantScheme for keys, as JSON: {"range_method": "mse"}. None: checkpoint\'s.'
        },
    )
    v_scheme: str | None = field(default=None, metadata={"help": "The same for values."})

    def __post_init__(self):
        CacheScheme(**self.cache_settings())

    def cache_settings(self) -> dict[str, Any]:
        """The settings that were given, by the names of `ALRDLlamaConfig`; whole numbers of bits as int."""
        given = {f.name: getattr(self, f.name) for f in fields(CacheOptions) if getattr(self, f.name) is not None}
        for name, value in given.items():
            given[name] = parse_json(name, value) if isinstance(value, str) else whole(value)
        return given


def whole(value: float) -> int | float:
    """A whole number as int."""
    return int(value) if value == int(value) else value


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def parse_config(config_class: type[Config], description: str | None) -> Config:
    """The options of the command line; a `ValueError` of the config becomes a usage error."""
    parser = HfArgumentParser(config_class, description=description, formatter_class=_HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(str(error))


def find_model(name_or_path: str) -> str:
    """The folder of a model, or else the name of one on the hub; a GGUF file is converted to a folder first.

    Raises:
        ImportError: A GGUF file is given, and the package that reads it is not installed.
        ValueError: It can be none of these, or the folder or file holds no model that fits.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return str(converted_folder(path))
    if path.is_dir():
        # The library takes a folder without this file for a model with the default configuration.
        if not (path / "config.json").is_file():
            raise ValueError(f"model={name_or_path!r}: must be a checkpoint folder, with a config.json")
        return str(path)
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.endswith(".gguf")
    if name_or_path == BUNDLED_MODEL or name_or_path.count("/") != 1 or is_path:
        raise ValueError(
            f"model={name_or_path!r}: must be an existing folder, a GGUF file, or a hub name like 'owner/name'"
        )
    return name_or_path


def load_model(
    name_or_path: str,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict | None = None,
    config: ALRDLlamaConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense model that can be split, or an `alrd_llama` checkpoint with its tokenizer.

    Args:
        name_or_path: Folder, GGUF file or hub name.
        dtype: Type of the weights; "auto": the checkpoint's.
        device_map: As for `from_pretrained`.
        config: Splits a dense checkpoint while it is loaded; `None` loads what is stored.

    Raises:
        ValueError: Another kind of model, or the weights do not fit.
    """
    path = find_model(name_or_path)
    ALRDLlamaConfig.get_config_dict(path)  # refuses other architectures by name
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, device_map=device_map)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def stretched(config: PreTrainedConfig, rope_parameters: str | None) -> PreTrainedConfig:
    """A configuration with other RoPE, JSON, and by its `factor` more positions; `None` leaves it as it is."""
    if rope_parameters is not None:
        config.rope_parameters = parse_json("rope_parameters", rope_parameters)
        config.max_position_embeddings = int(config.max_position_embeddings * config.rope_parameters.get("factor", 1))
    return config


def latent_config(name_or_path: str, rank: float, head_group_size: int | None = None) -> tuple[ALRDLlamaConfig, bool]:
    """Configuration of the latent model that a checkpoint is, or that a dense one is to become.

    Args:
        name_or_path: Folder, GGUF file or hub name; only its `config.json` is read.
        rank: For a dense checkpoint, the rank of every projection: a share of the full rank up to 1, or the total
            rank itself, a whole number above 1. A split checkpoint keeps its ranks.
        head_group_size: Key/value heads that share a latent; `None`: all, or the split checkpoint's.

    Returns:
        The configuration, and whether the checkpoint is a split one.

    Raises:
        ValueError: A field is out of range, or disagrees with a split checkpoint.
    """
    config = ALRDLlamaConfig.from_pretrained(find_model(name_or_path))
    is_split = bool(config.truncation_ranks)
    if is_split and head_group_size not in (None, config.head_group_size or config.num_key_value_heads):
        raise ValueError(
            f"head_group_size={head_group_size!r}: the checkpoint is stored with {config.head_group_size or 'all'} "
            "heads per group; split the dense checkpoint again to change it"
        )
    if is_split:
        config.check_latent_cache()
    else:
        set_ranks(config, rank, head_group_size)
    return config, is_split


def set_ranks(config: ALRDLlamaConfig, rank: float, head_group_size: int | None = None) -> None:
    """Give every key and value projection the same rank; arguments and errors as `latent_config`."""
    config.head_group_size = head_group_size
    config.check_latent_cache()
    groups = config.num_head_groups
    full = groups * config.full_group_rank
    if not 0 < rank <= full or (rank > 1 and rank != int(rank)):
        raise ValueError(f"rank={rank!r}: must be a share in (0, 1], or a whole number from 2 to the full rank {full}")
    total = max(groups, round(rank * full)) if rank <= 1 else int(rank)
    config.truncation_ranks = {projection.name: total for projection in config.projections()}
    config.check_latent_cache()


def folder_sha256(path: str) -> str | None:
    """SHA-256 of the configuration and weights in a folder; `None` for a name on the hub."""
    if not Path(path).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([Path(path) / "config.json", *Path(path).glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


def human_bytes(nbytes: float) -> str:
    """Bytes in binary units with three or more digits, e.g. `512 KiB` and `1.50 GiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(nbytes) >= 1024 and len(units) > 1:
        nbytes /= 1024
        units.pop(0)
    if nbytes == int(nbytes) or nbytes >= 100:
        digits = 0
    elif nbytes >= 10:
        digits = 1
    else:
        digits = 2
    return f"{nbytes:.{digits}f} {units[0]}"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Text table with columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in [header, *rows]]
    return "\n".join(lines)


def cpu_name() -> str:
    """Model name of the processor, as Linux gives it, or what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """Version of an installed package; `None`: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the repository, `-dirty` if tracked files differ from it; `None` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device | str = "cpu", processes: PartialState | None = None) -> dict[str, Any]:
    """The environment on which a figure depends: versions, commit, machine, and processes that share it."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": installed_version("triton"),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": 1 if processes is None else processes.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
