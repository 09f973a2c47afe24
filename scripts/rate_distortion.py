"""What a shared latent is worth: bits per element of keys and values at equal distortion, by what shares a latent.

    python scripts/rate_distortion.py --model build/real/dense --statistics build/real/statistics

The bound for Gaussian latents (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3): with
the energies E of all channels in the Fisher metric and a water level w, the distortion is `Σ min(E, w)` and the rate
`Σ ½ log2(E / w)` over the channels above it. The energies are those that the budget command finds for blocks.
"""

from dataclasses import asdict, dataclass, field

import torch

from configuration_alrd_llama import ALRDLlamaConfig
from modules.files import write_json
from modules.fit.budget import FitConfig, calibrate
from modules.fit.objectives import block_factors, water_level
from scripts.common import environment, find_model, load_model, parse_config
from scripts.sources import TEXT_HELP, describe_sources, draw_windows, list_texts, load_sources

#: Settings of blocks, by the name of a column.
SHAPES = {
    "separate": {},
    "k + v": {"joint_kv": True},
    "2 layers, k and v apart": {"layer_group_size": 2},
    "2 layers, k + v": {"layer_group_size": 2, "joint_kv": True},
    "3 layers, k + v": {"layer_group_size": 3, "joint_kv": True},
    "5 layers, k + v": {"layer_group_size": 5, "joint_kv": True},
    "per head: separate": {"head_group_size": 1},
    "per head: 5 layers, k + v": {"layer_group_size": 5, "joint_kv": True, "head_group_size": 1},
}

#: Shares of all energy that are lost.
DISTORTIONS = (0.02, 0.01, 0.002)


@dataclass
class RateConfig:
    """The model, the text, and where its statistics are kept."""

    model: str = field(metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."})
    text: list[str] = field(default_factory=lambda: ["mixture"], metadata={"help": TEXT_HELP})
    windows: int = field(default=32, metadata={"help": "Windows of text."})
    length: int = field(default=1024, metadata={"help": "Tokens per window."})
    statistics: str = field(default="build/statistics", metadata={"help": "Folder of the statistics."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        self.text = list_texts(self.text)


def rate(energy: torch.Tensor, share: float) -> tuple[float, int]:
    """Bits of all channels together at a distortion of `share` of their energy `[n]`, and how many get any."""
    level = water_level(energy, share)
    above = energy[energy > level]
    return (above / level).log2().sum().item() / 2, len(above)


def rate_table(record: dict) -> str:
    """Bits per element, by distortion and by what shares a latent."""
    names = list(record["results"])
    lines = [f"| distortion | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for share in record["distortions"]:
        cells = [f"{record['results'][name]['bits'][str(share)]:.2f}" for name in names]
        lines.append(f"| {share:.1%} of the energy | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: RateConfig) -> dict:
    """Find the energies for every shape; returns the record."""
    source = ALRDLlamaConfig.from_pretrained(find_model(config.model))
    sources = load_sources(config.text)
    dense, tokenizer = load_model(config.model, torch.float32)
    tokens = draw_windows(sources, tokenizer, config.length, config.windows)
    fit = FitConfig(keep_dense=True, statistics=config.statistics)
    calibration = calibrate(fit, dense, source, tokens)
    elements, results = sum(f.energy.numel() for groups in calibration.factors.values() for f in groups), {}
    for name, shape in SHAPES.items():
        if shape.get("layer_group_size", 1) > source.num_hidden_layers:
            continue
        factors = block_factors(ALRDLlamaConfig.from_llama(source, keep_dense=True, **shape), calibration.statistics)
        energy = torch.cat([group.energy for groups in factors.values() for group in groups])
        found = {f"{share}": rate(energy, share) for share in DISTORTIONS}
        results[name] = {
            "bits": {share: bits / elements for share, (bits, _) in found.items()},
            "channels": {share: channels / len(factors) for share, (_, channels) in found.items()},
        }
    record = {
        "config": asdict(config),
        "environment": environment(dense.device),
        "text": describe_sources(sources, config.length, config.windows),
        "distortions": list(DISTORTIONS),
        "results": results,
    }
    if config.output:
        write_json(config.output, record)
    print(rate_table(record))
    return record


if __name__ == "__main__":
    main(parse_config(RateConfig, __doc__))
