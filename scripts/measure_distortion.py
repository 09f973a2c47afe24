"""Mean squared error over variance of every scheme on known distributions and on real latents, beside its true bits.

    python scripts/measure_distortion.py --output scripts/results/distortion.json

The latents are those of the bundled model split at half rank (`scripts/calibrate_svd_ranks.py`), with the rotation
folded in and without it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm

from configuration_alrd_llama import QuantScheme
from modules.cache.codecs import block_nbytes, make_codec
from modules.files import write_json
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model
from scripts.common import BUNDLED_MODEL, environment, parse_config
from scripts.corpus import evenly_spread, load_documents, tokenize_windows

#: What theory and sampling give for a unit Gaussian, by (bits, group size), for the default range method of the width.
EXPECTED = {
    (2, 32): 0.154,
    (2, 128): 0.251,
    (3, 32): 0.028,
    (3, 128): 0.046,
    (4, 32): 0.0061,
    (4, 128): 0.0099,
    (1, 32): 0.352,
    (1, 128): 0.361,
    (1.58, 32): 0.182,
    (1.58, 128): 0.189,
}


@dataclass
class DistortionConfig:
    """The latents and synthetic data to quantize."""

    model: str = field(default=BUNDLED_MODEL, metadata={"help": "Dense model whose latents are measured."})
    share: float = field(default=0.5, metadata={"help": "Share of the latent channels to keep."})
    text: str = field(default="stdlib:selection", metadata={"help": "Text of the latents: see scripts/corpus.py."})
    windows: int = field(default=4, metadata={"help": "Windows of 1,024 tokens of text."})
    tokens: int = field(default=8192, metadata={"help": "Tokens of the synthetic data, a multiple of 128."})
    channels: int = field(default=128, metadata={"help": "Channels of the synthetic data."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def schemes() -> Iterator[QuantScheme]:
    """Every width, orientation and range method, in groups of 32 and 128."""
    for group_size in (32, 128):
        for orientation in ("per_channel", "per_token"):
            place = {"orientation": orientation, "group_size": group_size}
            for bits in (1, 1.5, 1.58, 2, 3, 4, 8):
                if bits == 1.5 and orientation == "per_token":
                    continue
                for method in ("minmax", "mse") if bits >= 2 else ("mse",):
                    yield QuantScheme(bits, **place, range_method=method)
            yield QuantScheme(1, **place, symmetric=False)
            for bits in (2, 3, 4, 8):
                yield QuantScheme(bits, **place, symmetric=True)
            yield QuantScheme(2, **place, rotation=True)
            yield QuantScheme(2, **place, rotation=True, range_method="mse")
            yield QuantScheme(1.58, **place, protected=0.2, protected_bits=2)
            yield QuantScheme(1.58, **place, protected=0.2, protected_bits=4)
    yield QuantScheme(8, static=True)


def synthetic(tokens: int, channels: int) -> dict[str, torch.Tensor]:
    """`[1, tokens, channels]` samples of unit variance, but for every 16th channel of "outlier channels": 8 times."""
    torch.manual_seed(0)
    gaussian = torch.randn(1, tokens, channels)
    laplace = torch.distributions.Laplace(0.0, 0.5**0.5).sample((1, tokens, channels))
    outliers = torch.randn(1, tokens, channels)
    outliers[..., ::16] *= 8
    return {"Gaussian": gaussian, "Laplace": laplace, "outlier channels": outliers}


@torch.no_grad()
def latents(config: DistortionConfig) -> dict[str, list[torch.Tensor]]:
    """Latents `[1, T, r]` of every layer, by side and rotation; attention sinks left out."""
    how = {"share": config.share, "objective": "query_output", "text": ["stdlib:calibration"]}
    calibration = calibrate_model(CalibrationConfig(model=config.model, **how))
    windows = tokenize_windows(load_documents(config.text), calibration.tokenizer, 1024)
    windows = evenly_spread(windows, config.windows, config.text)
    found = {}
    for rotated in (True, False):
        model = calibration.split(k_hadamard=rotated, v_hadamard=rotated).eval()
        cache = model.create_kivi_cache(k_bits=16, v_bits=16, sink_length=0, residual_length=0)
        model(windows, past_key_values=cache)
        suffix = "rotated" if rotated else "as factored"
        states = [layer.states() for layer in cache.layers]
        for i, side in enumerate(("key", "value")):
            found[f"{side} latents, {suffix}"] = [
                s[i][:, 128:].float().reshape(-1, 128, s[i].shape[-1]) for s in states
            ]
    return found


def distortion(scheme: QuantScheme, groups: list[torch.Tensor]) -> tuple[float, float]:
    """Squared error over variance (of each channel, summed over all), and true bits per element.

    Static scales are those of the data's own range.
    """
    error = variance = bits = elements = 0.0
    for states in groups:
        blocks = states.reshape(-1, 128, states.shape[-1])
        static = None
        if scheme.static:
            low, high = blocks.amin((0, 1)), blocks.amax((0, 1))
            static = ((high - low) / 255, low)
        codec = make_codec(scheme, 128, (blocks.shape[-1],), torch.float32, static_scales=static)
        error += (codec.decode(codec.encode(blocks)) - blocks).double().square().sum().item()
        flat = blocks.flatten(0, 1).double()
        variance += (flat - flat.mean(0)).square().sum().item()
        bits += 8 * block_nbytes(codec) * len(blocks)
        elements += blocks.numel()
    return error / variance, bits / elements


def main(config: DistortionConfig) -> dict:
    """Measure; returns the record."""
    data = {name: [x] for name, x in synthetic(config.tokens, config.channels).items()} | latents(config)
    rows = []
    for scheme in tqdm(list(schemes()), desc="Schemes"):
        measured = {name: distortion(scheme, groups) for name, groups in data.items()}
        rows.append(
            {
                "scheme": scheme.to_dict(),
                "bits_per_element": measured["Gaussian"][1],
                "distortion": {name: error for name, (error, _) in measured.items()},
                "expected": EXPECTED.get((scheme.bits, scheme.group_size))
                if scheme == QuantScheme(scheme.bits, scheme.orientation, scheme.group_size)
                else None,
            }
        )
    record = {"config": asdict(config), "environment": environment(), "rows": rows}
    print(distortion_table(record))
    if config.output:
        write_json(config.output, record)
    return record


def distortion_table(record: dict, group_size: int | None = None) -> str:
    """The record as a Markdown table."""
    names = list(record["rows"][0]["distortion"])
    lines = [f"| scheme | bits/element | theory | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for row in record["rows"]:
        if group_size is None or row["scheme"]["group_size"] == group_size:
            expected = "" if row["expected"] is None else f"{row['expected']:.4g}"
            figures = " | ".join(f"{error:.3g}" for error in row["distortion"].values())
            name = QuantScheme(**row["scheme"])
            lines.append(f"| {name} | {row['bits_per_element']:.3f} | {expected} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(DistortionConfig, __doc__))
