"""The caches that evaluations compare with a dense model's, and the files of results that a run goes on from.

The dense model has a `DynamicCache`; beside it stand checkpoints of scripts/calibrate_svd_ranks.py, each with the cache
that it asks for, and plain splits of the dense model at one rank and several widths.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from transformers import AutoConfig, Cache, DynamicCache, PreTrainedModel

from configuration_alrd_llama import ALRDLlamaConfig, parse_json
from modules.fit.budget import dense_nbytes
from modules.kivi_cache import CacheScheme, KIVILatentCache
from scripts.common import (
    BUNDLED_MODEL,
    DTYPES,
    ROPE_HELP,
    environment,
    find_model,
    folder_sha256,
    latent_config,
    load_model,
    stretched,
)
from scripts.eval_perplexity import parse_bits, token_bytes
from scripts.records import ResultsFile

#: Lengths at which the bytes of a token are stated, beside those that an evaluation meets.
STATED_LENGTHS = (4096, 32768)


@dataclass
class ComparedCaches:
    """The caches to compare with the dense model's; the base of the evaluations' configs."""

    dense: str = field(
        default=BUNDLED_MODEL,
        metadata={"help": "Dense model: a local folder, a GGUF file or a hub name. Its scores stand first."},
    )
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Split checkpoints of it, each with the cache that it asks for."}
    )
    bits: list[str] = field(
        default_factory=list,
        metadata={"help": "Widths of caches for a plain split of the dense model: '2' for both sides, '3:2', '16'."},
    )
    rank: float = field(
        default=0.5, metadata={"help": "Rank of the plain split: a share of the full rank, or the total rank itself."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Elements per scale. None: the checkpoint's, or 128."}
    )
    residual_length: int | None = field(default=None, metadata={"help": "Window. None: the checkpoint's, or 32."})
    sink_length: int | None = field(default=None, metadata={"help": "Sinks. None: the checkpoint's, or 4."})
    rope_parameters: str | None = field(default=None, metadata={"help": ROPE_HELP})
    dtype: str = field(default="auto", metadata={"help": "Type of the models: float32, bfloat16, float16, auto."})
    device_map: str | None = field(
        default=None, metadata={"help": "Where the models go: auto, cuda, …. None: the CPU."}
    )
    output: str | None = field(
        default=None, metadata={"help": "JSON file for the results; what it holds already is not measured again."}
    )

    def __post_init__(self):
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}: must be one of auto, {', '.join(DTYPES)}")
        if not self.checkpoints and not self.bits:
            raise ValueError("checkpoints=[]: name split checkpoints or give widths in bits, to stand beside the dense")
        names = [Path(path).name for path in self.checkpoints]
        if len(set(names)) < len(names):
            raise ValueError(f"checkpoints={self.checkpoints}: folders are told apart by their last names")
        for bits in self.bits:
            CacheScheme(*parse_bits(bits), **self._window())
        parse_json("rope_parameters", self.rope_parameters)

    def _window(self) -> dict[str, int]:
        given = {name: getattr(self, name) for name in ("group_size", "residual_length", "sink_length")}
        return {name: value for name, value in given.items() if value is not None}

    def names(self) -> list[str]:
        """Names of the dense model and of the caches beside it, in the order of the tables."""
        splits = [f"rank {self.rank:.0%}" if self.rank <= 1 else f"rank {self.rank:g}"] * len(self.bits)
        return [
            "dense",
            *(Path(path).name for path in self.checkpoints),
            *(f"{split}, {bits} bit" for split, bits in zip(splits, self.bits)),
        ]

    def open(self, name: str) -> tuple[PreTrainedModel, Callable[[], Cache]]:
        """A model of `names()`, and what makes an empty cache for it; the model last opened stays loaded."""
        index = self.names().index(name) - 1
        path = self.checkpoints[index] if 0 <= index < len(self.checkpoints) else self.dense
        rank = self.rank if index >= len(self.checkpoints) else None
        model = _load(find_model(path), rank, index >= 0, self.dtype, self.device_map, self.rope_parameters)
        if index < 0:
            return model, DynamicCache
        settings = self._window()
        if rank is not None:
            settings["k_bits"], settings["v_bits"] = parse_bits(self.bits[index - len(self.checkpoints)])
        return model, partial(model.create_kivi_cache, **settings)

    def schemes(self) -> dict[str, CacheScheme]:
        """Schemes of the packed caches by name; all layers of a cache share window and blocks, not the other fields."""
        found = {}
        for path in self.checkpoints:
            scheme = CacheScheme.from_config(ALRDLlamaConfig.from_pretrained(find_model(path)))
            found[Path(path).name] = CacheScheme(**{**asdict(scheme), **self._window()})
        for name, bits in zip(self.names()[1 + len(self.checkpoints) :], self.bits):
            found[name] = CacheScheme(*parse_bits(bits), **self._window())
        return found

    def check_length(self, length: int) -> None:
        """Refuse more tokens than the dense model has positions for.

        Raises:
            ValueError: There are more, and no `rope_parameters` that stretch them.
        """
        config = AutoConfig.from_pretrained(find_model(self.dense))
        stretch = (parse_json("rope_parameters", self.rope_parameters) or {}).get("factor", 1.0)
        if length > config.max_position_embeddings * stretch:
            raise ValueError(
                f"length={length}: must be at most the {config.max_position_embeddings * stretch:g} positions of "
                f"{self.dense!r}; give shorter texts, or rope_parameters with a factor that stretches them"
            )


@lru_cache(maxsize=1)
def _load(path: str, rank: float | None, latent: bool, dtype: str, device_map, rope_parameters: str | None):
    """A dense model, a split checkpoint (`latent` without a rank), or a plain split of a dense one."""
    if not latent:
        config = AutoConfig.from_pretrained(path)
    else:
        config = ALRDLlamaConfig.from_pretrained(path) if rank is None else latent_config(path, rank)[0]
        if not config.truncation_ranks:
            raise ValueError(f"checkpoints: {path!r} must be a split checkpoint; give a dense one widths in bits")
    return load_model(path, dtype, device_map, stretched(config, rope_parameters))[0]


def packed_tokens(scheme: CacheScheme, held: int) -> int:
    """Tokens in packed blocks, of `held` tokens in a row."""
    return scheme.flushed_blocks(held - min(held, scheme.sink_length)) * scheme.block_length


class PackedContext:
    """Packed share of the tokens to which scored tokens attended; `scheme` is `None` for a cache that packs nothing."""

    def __init__(self, scheme: CacheScheme | None):
        self.scheme = scheme
        self.scored_tokens = self.with_packed = 0
        self.share = 0.0

    def add_steps(self, held: int, count: int, chunk: int) -> None:
        """Count `count` scored tokens that were fed in steps of `chunk` to a row that held `held` before."""
        self.scored_tokens += count
        if self.scheme is None:
            return
        for start in range(0, count, chunk):
            packed = packed_tokens(self.scheme, held + start)
            contexts = range(held + start + 1, held + min(start + chunk, count) + 1)
            self.with_packed += len(contexts) * (packed > 0)
            self.share += sum(packed / context for context in contexts)

    def record(self) -> dict:
        """Scored tokens; of a packed cache also how many had a packed context, and its mean share of their context."""
        found: dict = {"scored_tokens": self.scored_tokens}
        if self.scheme is not None:
            found["tokens_with_packed_context"] = self.with_packed
            found["packed_share_of_context"] = self.share / self.scored_tokens
        return found


def describe_cache(model: PreTrainedModel, cache: Cache, lengths: list[int]) -> dict:
    """Settings, back end and true bytes of the cache that a score was measured through.

    Args:
        model: Whose cache it is.
        cache: As it was used, any rows.
        lengths: Tokens in the rows that were evaluated.

    Returns:
        `bytes_per_token` of one row on the average over `lengths` ("measured") and at `STATED_LENGTHS`; `ratio`, the
        bytes of the dense cache in 16 bits over them; of a packed cache also its settings, back end and true bits.
    """
    packed = isinstance(cache, KIVILatentCache)

    def at(length: int) -> float:
        return token_bytes(cache, length) if packed else dense_nbytes(model.config, 1, model.dtype)

    by_length = {length: at(length) for length in set(lengths)}
    sizes = {"measured": sum(by_length[n] * n for n in lengths) / sum(lengths)}
    sizes |= {str(length): at(length) for length in STATED_LENGTHS}
    in_16_bits = dense_nbytes(model.config, 1, torch.float16)
    record = {"bytes_per_token": sizes, "ratio": {length: in_16_bits / size for length, size in sizes.items()}}
    if packed:
        record |= {
            "settings": asdict(cache.scheme),
            "layers_of_their_own": len(cache.layer_schemes),
            "backend": " and ".join(sorted({layer.backend_note for layer in cache.layers})),
            "bits_per_element": cache.bits_per_element,
        }
    return record


def open_results(config: ComparedCaches) -> ResultsFile:
    """The file `config.output`: options, environment, SHA-256 of the models, and `results`.

    Raises:
        ValueError: The file holds results of other options, or of other weights under the same name.
    """
    asked = asdict(config)
    paths = dict(zip(config.names(), [config.dense, *config.checkpoints]))
    models = {name: folder_sha256(find_model(path)) for name, path in paths.items()}
    fresh = {"config": asked, "environment": environment(), "models": models, "results": {}}
    file = ResultsFile(config.output, fresh)
    held = file.record
    # More caches may be asked for than the file holds; a path may be written in another way.
    for name, value in asked.items():
        if name not in ("output", "checkpoints", "bits", "dense") and held["config"].get(name) != value:
            file.refuse(f"{name}={held['config'].get(name)!r}, asked for is {value!r}")
    for name, digest in models.items():
        if held["models"].get(name, digest) != digest:
            file.refuse(f"other weights of {name!r}")
    held |= {"config": asked, "environment": fresh["environment"], "models": held["models"] | models}
    return file
