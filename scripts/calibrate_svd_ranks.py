"""Turn a dense model into a split checkpoint: statistics on text, ranks by water-filling, factors, report.

    python scripts/calibrate_svd_ranks.py --model models/tiny-python-llama --share 0.5 --output build/half

The output is an ordinary Hugging Face checkpoint directory that `ALRDLlamaForCausalLM.from_pretrained` loads, with
`report.json` beside the weights.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.calibration import collect_statistics, group_energies, projection_statistics, water_fill
from scripts.common import BUNDLED_MODEL, environment, find_model, load_model, parse_config, parse_json, write_json
from scripts.corpus import describe, load_documents, tokenize_windows


@dataclass
class CalibrationConfig:
    """What to split, on which text, into how much."""

    model: str = field(default=BUNDLED_MODEL, metadata={"help": "Dense Llama, Mistral or Qwen2: folder or hub name."})
    output: str = field(default="build/calibrated", metadata={"help": "Folder of the split checkpoint."})
    share: float = field(default=0.5, metadata={"help": "Share of the latent channels to keep, over all layers."})
    head_group_size: int | None = field(
        default=None, metadata={"help": "Key/value heads that share a latent; all of them (joint) if not given."}
    )
    text: str = field(default="stdlib:calibration", metadata={"help": "Text for statistics: see scripts/corpus.py."})
    windows: int = field(default=32, metadata={"help": "Windows of text to run the model on."})
    length: int = field(default=1024, metadata={"help": "Tokens per window."})
    plain_svd: bool = field(default=False, metadata={"help": "Ignore the text: uniform ranks, SVD of the weights."})
    rank_multiple: int = field(default=8, metadata={"help": "Ranks are multiples of this."})
    k_bits: float = field(default=2, metadata={"help": "Width of cached keys written to the config: 1 … 16."})
    v_bits: float = field(default=2, metadata={"help": "Width of cached values written to the config."})
    group_size: int = field(default=128, metadata={"help": "Elements per scale written to the config."})
    residual_length: int = field(default=32, metadata={"help": "Newest tokens kept in full precision."})
    k_scheme: str | None = field(
        default=None, metadata={"help": "Other fields of QuantScheme for keys written to the config, as JSON."}
    )
    v_scheme: str | None = field(default=None, metadata={"help": "The same for values."})


@dataclass
class Calibration:
    """A dense model and how to split it."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype
    statistics: list | None
    energies: dict[str, list[torch.Tensor]]
    target: ALRDLlamaConfig
    text: dict

    def split(self, **fields) -> ALRDLlamaForCausalLM:
        """The split model in the type of the dense checkpoint, with other `fields` of its configuration."""
        target = ALRDLlamaConfig.from_llama(self.target, **fields)
        return ALRDLlamaForCausalLM.from_dense(self.dense, target, self.statistics).to(self.stored_dtype)


def calibrate(config: CalibrationConfig) -> Calibration:
    """Load the dense model, collect the statistics, choose the ranks."""
    source = ALRDLlamaConfig.from_pretrained(find_model(config.model))
    if source.truncation_ranks:
        raise ValueError(f"model={config.model!r}: must be a dense checkpoint, is split already")
    fields = {name: getattr(config, name) for name in ("k_bits", "v_bits", "group_size", "residual_length")}
    schemes = {name: parse_json(name, getattr(config, name)) for name in ("k_scheme", "v_scheme")}
    target = ALRDLlamaConfig.from_llama(source, head_group_size=config.head_group_size, **fields, **schemes)
    dense, tokenizer = load_model(config.model, torch.float32)

    documents = load_documents(config.text)
    statistics = None
    if not config.plain_svd:
        tokens = tokenize_windows(documents, tokenizer, config.length)
        if len(tokens) < config.windows:
            raise ValueError(
                f"windows={config.windows}: {config.text!r} has only {len(tokens)} windows of {config.length} tokens"
            )
        spread = torch.linspace(0, len(tokens) - 1, config.windows).round().long()
        batches = tqdm(tokens[spread].split(4), desc="Statistics")
        statistics = projection_statistics(dense, collect_statistics(dense, batches))

    energies = group_energies(dense, target, statistics)
    if config.plain_svd:
        rank = max(1, round(config.share * target.full_group_rank))
        target.truncation_ranks = {name: [rank] * len(groups) for name, groups in energies.items()}
    else:
        target.truncation_ranks = water_fill(energies, config.share, config.rank_multiple)
    stored_dtype = source.dtype or torch.float32
    return Calibration(dense, tokenizer, stored_dtype, statistics, energies, target, describe(documents))


def main(config: CalibrationConfig) -> dict:
    """Write the checkpoint; returns the report."""
    started = time.perf_counter()
    calibration = calibrate(config)
    calibration.split().save_pretrained(config.output)
    calibration.tokenizer.save_pretrained(config.output)

    energies, ranks = calibration.energies, calibration.target.truncation_ranks
    full = sum(len(e) for groups in energies.values() for e in groups)
    report = {
        "config": asdict(config),
        "environment": environment(),
        "text": calibration.text,
        "share": sum(map(sum, ranks.values())) / full,
        "truncation_ranks": ranks,
        "energy_kept": {
            name: [round((e[:r].sum() / e.sum()).item(), 6) for e, r in zip(energies[name], group, strict=True)]
            for name, group in ranks.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(Path(config.output) / "report.json", report)
    print(f"{config.output}: {report['share']:.1%} of the latent channels kept, {report['seconds']} s")
    for name, group in ranks.items():
        print(f"  {name}: rank {'+'.join(map(str, group))}, energy {report['energy_kept'][name]}")
    return report


if __name__ == "__main__":
    main(parse_config(CalibrationConfig, __doc__))
