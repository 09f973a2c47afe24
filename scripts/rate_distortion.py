"""What a shared latent is worth, and what the choice of its directions: bounds, from the statistics alone.

    python scripts/rate_distortion.py --model build/real/dense --statistics build/real/statistics

First, bits per element of keys and values at equal distortion, by what shares a latent.

The bound for Gaussian latents (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3): with
the energies E of all channels in the Fisher metric and a water level w, the distortion is `Σ min(E, w)` and the rate
`Σ ½ log2(E / w)` over the channels above it. The energies are those that the budget command finds for blocks.

Then, at equal bits, the divergence from the dense model, to second order, on windows of the text from which the
directions were not taken: by how they are estimated (`estimates`). Each is a share of that of the budget command's way.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm

from configuration_alrd_llama import ALRDLlamaConfig
from modules.files import write_json
from modules.fit.budget import Calibration, FitConfig, calibrate
from modules.fit.objectives import block_factors, water_level
from modules.fit.statistics import member_samples
from modules.svd_linear import metric_root
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

#: Bits per element of keys and values at which estimates are compared: about those of an eighth and of a sixteenth.
BITS = (1.6, 0.8)

#: Every so many windows one is held out.
HELD_OUT = 4

#: Smallest eigenvalue of a metric, as a share of the largest.
_FLOOR = 1e-7


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


def _moment(states: torch.Tensor) -> torch.Tensor:
    """`[n, n]`, mean of the outer products of `[windows, S, n]` states."""
    states = states.flatten(0, 1).double()
    return states.T @ states / len(states)


def _parts(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """A matrix without what stands outside blocks of `size` rows and columns along its diagonal."""
    starts = range(0, len(matrix), size)
    return torch.block_diag(*[matrix[i : i + size, i : i + size] for i in starts])


def _level(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """A multiple of the identity for each `size` rows, with the trace of a matrix there."""
    means = matrix.diagonal().unflatten(0, (-1, size)).mean(1)
    return means.repeat_interleave(size).diag()


def estimates(
    states: torch.Tensor, gradients: torch.Tensor, weight: torch.Tensor, member: int, head: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Covariances and metrics `[n, n]` of a block's outputs by the name of the estimate, the budget command's first.

    Args:
        states, gradients: `[windows, S, n]`, outputs of all members less their mean, and the gradients there.
        weight: `[n, C]`, the members' weights.
        member, head: Outputs of a member, and of one of its heads.
    """
    covariance, full = _moment(states), _moment(gradients) / 2
    metric = _parts(full, member)
    # What outputs have in common because of the weights alone: inputs that are all alike.
    own = weight.double() @ weight.double().T
    scale = (_level(covariance, member).diagonal() / _level(own, member).diagonal()).sqrt()
    own = scale[:, None] * own * scale
    return {
        "covariance of all members, Fisher information of each": (covariance, metric),
        "half of the windows": (_moment(states[::2]), _parts(_moment(gradients[::2]) / 2, member)),
        "half of the tokens of each": (_moment(states[:, ::2]), _parts(_moment(gradients[:, ::2]) / 2, member)),
        "covariance: 1% of the weights' own": (0.99 * covariance + 0.01 * own, metric),
        "covariance: 10% of the weights' own": (0.9 * covariance + 0.1 * own, metric),
        "covariance: 1% of each member by itself": (0.99 * covariance + 0.01 * _parts(covariance, member), metric),
        "covariance: 10% of each member by itself": (0.9 * covariance + 0.1 * _parts(covariance, member), metric),
        "metric: each channel by itself": (covariance, _parts(full, 1)),
        "metric: each head by itself": (covariance, _parts(full, head)),
        "metric: all members together": (covariance, full),
        "metric: 30% of all members together": (covariance, 0.3 * full + 0.7 * metric),
        "metric: 3% alike in all directions": (covariance, 0.97 * metric + 0.03 * _level(metric, member)),
    }


def divergences(
    covariance: torch.Tensor, metric: torch.Tensor, true_covariance: torch.Tensor, true_metric: torch.Tensor
) -> list[float]:
    """Divergence in nats per token at each of `BITS` with directions from estimates, on text of the true moments.

    Each channel gets the bits that its estimated energy asks for, and its error is what they leave of its true energy.
    """
    root, inverse, _ = metric_root(metric, len(metric), metric.device, _FLOOR)
    energy, vectors = torch.linalg.eigh(root @ covariance @ root)
    energy = energy.clamp(min=_FLOOR**2 * energy[-1])
    project, expand = root @ vectors, inverse @ vectors
    true_energy, price = _quadratic(project, true_covariance), _quadratic(expand, true_metric)
    found = []
    for bits in BITS:
        low, high = energy[0].log(), energy[-1].log()
        for _ in range(60):
            level = (low + high) / 2
            given = (energy.log() - level).clamp(min=0) / 2
            if given.mean() > bits * math.log(2):
                low = level
            else:
                high = level
        found.append((price * true_energy * (-2 * given).exp()).sum().item())
    return found


def _quadratic(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`vᵀ M v` of each column of `vectors`."""
    return (vectors * (matrix @ vectors)).sum(0)


def compare_estimates(calibration: Calibration) -> dict[str, list[float]]:
    """Divergence of each estimate at each of `BITS`, over all blocks, as a share of the first one's."""
    target, totals = calibration.target, {}
    for block in tqdm(target.blocks(), desc="Estimates"):
        states, gradients = (
            member_samples(calibration.statistics, block, 1, field)[0] for field in ("sample", "gradient")
        )
        is_held_out = torch.arange(len(states)) % HELD_OUT == HELD_OUT - 1
        weights = [calibration.dense.get_submodule(member.name).weight.detach() for member in block.members()]
        member = target.num_key_value_heads * target.head_dim
        how = {"weight": torch.cat(weights), "member": member, "head": target.head_dim}
        true = _moment(states[is_held_out]), _moment(gradients[is_held_out]) / 2
        for name, estimate in estimates(states[~is_held_out], gradients[~is_held_out], **how).items():
            found = torch.tensor(divergences(*estimate, *true), dtype=torch.float64)
            totals[name] = totals.get(name, 0) + found
    first = next(iter(totals.values()))
    return {name: (total / first).tolist() for name, total in totals.items()}


def estimates_table(record: dict) -> str:
    """Divergence on windows held out, by estimate and bits, as a share of the first one's."""
    bits = record["estimate_bits"]
    lines = [
        f"| directions from | {' | '.join(f'{b} bits per element' for b in bits)} |",
        "|---" * (len(bits) + 1) + "|",
    ]
    for name, shares in record["estimates"].items():
        lines.append(f"| {name} | {' | '.join(f'{share - 1:+.1%}' for share in shares)} |")
    return "\n".join(lines)


def main(config: RateConfig) -> dict:
    """Find the energies for every shape, and what estimates cost; returns the record."""
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
        "estimate_bits": list(BITS),
        "estimates": compare_estimates(calibration),
    }
    if config.output:
        write_json(config.output, record)
    print(f"{rate_table(record)}\n\n{estimates_table(record)}")
    return record


if __name__ == "__main__":
    main(parse_config(RateConfig, __doc__))
