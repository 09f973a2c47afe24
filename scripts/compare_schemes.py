"""Perplexity through the cache for every quantization scheme, with and without rotation on each side.

    python scripts/compare_schemes.py --output scripts/results/schemes.json

First the latents of the model split at a share of its rank, each scheme with the rotation folded into the factors of
keys and values or not; then the full keys and values of the dense model, through the drop-in cache: QLUTATTN's
formats one side at a time, VidKV's configurations, calibrated INT8. Results are kept as they come, and a
run that was interrupted goes on where it stopped.
"""

from dataclasses import asdict, dataclass, field
from functools import partial

from configuration_alrd_llama import QuantScheme
from modules.files import write_json
from modules.formats.calibrated_int8 import calibrate as calibrate_int8
from modules.formats.qlutattn import QLUTATTN, layer_schemes_by_range
from modules.kivi_cache import CacheScheme, KIVILatentCache, create_kivi_cache
from scripts.calibrate_svd_ranks import CalibrationConfig, calibrate_model
from scripts.common import BUNDLED_MODEL, load_model, parse_config
from scripts.corpus import load_documents, tokenize_windows
from scripts.eval_perplexity import EvalConfig, measure, perplexity_table
from scripts.records import ResultsFile


@dataclass
class CompareConfig:
    """The model, how much of its rank to keep, and how much text to measure on."""

    model: str = field(
        default=BUNDLED_MODEL, metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."}
    )
    share: float = field(default=0.5, metadata={"help": "Share of the latent channels to keep."})
    text: str = field(default="stdlib:selection", metadata={"help": "Text to measure on: see scripts/corpus.py."})
    windows: int = field(default=8, metadata={"help": "Windows of text."})
    length: int = field(default=2048, metadata={"help": "Tokens per window."})
    prefill: int = field(default=1664, metadata={"help": "Tokens of a window that are fed at once."})
    chunk: int = field(default=32, metadata={"help": "Tokens per step after the prefill."})
    only: list[str] = field(default_factory=list, metadata={"help": "Measure only these schemes, by name."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    recommended: bool = field(
        default=False,
        metadata={"help": "Only the recommended schemes beside the default, as eval_perplexity.py does it."},
    )


#: Both sides in the "mse" range.
MSE = {"range_method": "mse"}
#: Settings of `create_kivi_cache` by name.
SCHEMES = {
    "1 bit": {"k_bits": 1, "v_bits": 1},
    "1 bit, asymmetric": {"k_bits": 1, "v_bits": 1, "k_scheme": {"symmetric": False}, "v_scheme": {"symmetric": False}},
    "ternary": {"k_bits": 1.58, "v_bits": 1.58},
    "keys 1.5, values ternary": {"k_bits": 1.5, "v_bits": 1.58},
    "keys 1.5, values 2 mse": {"k_bits": 1.5, "v_bits": 2, "v_scheme": MSE},
    "keys 1.5, values ternary, 20% of them 2": {
        "k_bits": 1.5,
        "v_bits": 1.58,
        "v_scheme": {"protected": 0.2, "protected_bits": 2},
    },
    "keys 2 mse, values ternary": {"v_bits": 1.58, "k_scheme": MSE},
    "… 20% of the values at 4, by error": {
        "v_bits": 1.58,
        "k_scheme": MSE,
        "v_scheme": {"protected": 0.2, "protected_bits": 4},
    },
    "… 20% of the values at 4, by attention": {
        "v_bits": 1.58,
        "k_scheme": MSE,
        "v_scheme": {"protected": 0.2, "protected_bits": 4},
        "token_score": "attention",
    },
    "2": {},
    "2 mse": {"k_scheme": MSE, "v_scheme": MSE},
    "keys 2 mse, values 2": {"k_scheme": MSE},
    "keys 2, values 2 mse": {"v_scheme": MSE},
    "2 symmetric mse": {"k_scheme": MSE | {"symmetric": True}, "v_scheme": MSE | {"symmetric": True}},
    "2, groups of 32": {"group_size": 32},
    "2 mse, groups of 64": {"group_size": 64, "k_scheme": MSE, "v_scheme": MSE},
    "2 mse, groups of 32": {"group_size": 32, "k_scheme": MSE, "v_scheme": MSE},
    "keys 3, values ternary": {"k_bits": 3, "v_bits": 1.58},
    "keys 3, values 2 mse": {"k_bits": 3, "v_scheme": MSE},
    "keys 3 mse, values 2 mse": {"k_bits": 3, "k_scheme": MSE, "v_scheme": MSE},
    "keys 2 mse, values 3 mse": {"v_bits": 3, "k_scheme": MSE, "v_scheme": MSE},
    "3": {"k_bits": 3, "v_bits": 3},
    "3 mse": {"k_bits": 3, "v_bits": 3, "k_scheme": MSE, "v_scheme": MSE},
    "4": {"k_bits": 4, "v_bits": 4},
    "4 mse": {"k_bits": 4, "v_bits": 4, "k_scheme": MSE, "v_scheme": MSE},
    "8": {"k_bits": 8, "v_bits": 8},
    "8 symmetric": {"k_bits": 8, "v_bits": 8, "k_scheme": {"symmetric": True}, "v_scheme": {"symmetric": True}},
    "both per channel, 2 mse": {"k_scheme": MSE, "v_scheme": MSE | {"orientation": "per_channel"}},
    "both per token, 2 mse": {"k_scheme": MSE | {"orientation": "per_token"}, "v_scheme": MSE},
    "both per token, keys 3, values 2 mse": {"k_bits": 3, "k_scheme": {"orientation": "per_token"}, "v_scheme": MSE},
    "both per token, 3": {"k_bits": 3, "v_bits": 3, "k_scheme": {"orientation": "per_token"}},
    **{
        f"QLUTATTN K{bits} V{bits}": {
            "k_bits": bits,
            "v_bits": bits,
            "k_scheme": {"orientation": "per_token"},
            "v_scheme": {"orientation": "per_channel"},
        }
        for bits in (1, 2, 4)
    },
}
ROTATIONS = {"both": (True, True), "keys": (True, False), "values": (False, True), "neither": (False, False)}

#: VidKV's documented configurations but for a window of 32 tokens (not 128), as all others have it.
_VIDKV = {"q_group_size": 32, "residual_length": 32, "axis_key": -1, "axis_value": -1}
VIDKV = {
    "VidKV K2 V2": {"backend": "QuantizedCacheLM", "nbits": 2, **_VIDKV},
    "VidKV K1.5 V2": {"backend": "QuantizedCacheVLM", "nbits": [1.5, 2], **_VIDKV},
    "VidKV K1.5 V1.58": {"backend": "QuantizedCacheVLM", "nbits": [1.5, 1.58], **_VIDKV},
    "VidKV K1.5 V1.58, 20% protected": {
        "backend": "QuantizedCacheVLMSTP",
        "nbits": [1.5, 1.58],
        **_VIDKV,
        "vidkv_stp": 0.2,
    },
}


#: Best at about equal bytes, with the side that is rotated; `--recommended` measures them on another text.
RECOMMENDED = {
    "keys 1.5, values ternary": "values",
    "keys 1.5, values 2 mse": "values",
    "both per token, 2 mse": "both",
    "both per token, keys 3, values 2 mse": "both",
    "both per token, 3": "both",
    "4": "both",
}


def drop_in_caches(config: CompareConfig, dense, tokenizer) -> dict:
    """Functions that make a cache for the dense model's own keys and values, by name."""
    exact = QuantScheme(16)
    one_side = {}
    for name, scheme in QLUTATTN.items():
        sides = (scheme, exact) if name[0] == "K" else (exact, scheme)
        one_side[f"QLUTATTN {name}"] = CacheScheme.of(*sides)
    windows = tokenize_windows(load_documents("stdlib:calibration"), tokenizer, 1024)[:32]
    scales = calibrate_int8(dense, windows.split(4))
    sample = create_kivi_cache(16, 16)
    dense(windows[:8], past_key_values=sample)
    by_range = layer_schemes_by_range(layer.states() for layer in sample.layers)
    return {
        "16 bit": partial(create_kivi_cache, 16, 16),
        "2": create_kivi_cache,
        "2 mse": partial(create_kivi_cache, **SCHEMES["2 mse"]),
        "2 mse, rotated": partial(
            create_kivi_cache, k_scheme=MSE | {"rotation": True}, v_scheme=MSE | {"rotation": True}
        ),
        "4": partial(create_kivi_cache, 4, 4),
        **{name: partial(KIVILatentCache, scheme) for name, scheme in one_side.items()},
        "QLUTATTN by range and variance": partial(create_kivi_cache, layer_schemes=by_range),
        **{name: partial(create_kivi_cache, quantization_config=c) for name, c in VIDKV.items()},
        "calibrated INT8": partial(scales.create_cache, residual_length=32),
    }


def main(config: CompareConfig) -> dict:
    """Measure what is not in the output yet; returns the record."""
    names = ("model", "text", "windows", "length", "prefill", "chunk")
    evaluation = EvalConfig(**{name: getattr(config, name) for name in names})
    how = {"share": config.share, "objective": "query_output", "text": ["stdlib:calibration"]}
    calibration = calibrate_model(CalibrationConfig(model=config.model, **how))
    dense = load_model(config.model)[0]
    if config.recommended:
        return _measure_recommended(config, evaluation, calibration, dense)
    file = ResultsFile(config.output, {"config": asdict(config), "results": {}})
    file.require("config", {name: getattr(config, name) for name in (*names, "share")})
    record, done = file.record, file.record["results"]

    def run(part: str, caches: dict) -> None:
        missing = {n: c for n, c in caches.items() if n not in done.get(part, {})}
        if config.only:
            missing = {n: c for n, c in missing.items() if n in config.only}
        schemes = [make_cache().scheme for _, make_cache in caches.values()]
        # A few at a time: each call measures the dense model too, and is lost if it is interrupted.
        for start in range(0, len(missing), 6):
            some = dict(list(missing.items())[start : start + 6])
            measured = measure(evaluation, calibration.tokenizer, dense, some, schemes)
            scored = measured["results"]["dense"]["tokens"]
            if any(result["tokens"] != scored for result in done.get(part, {}).values()):
                file.refuse(f"{part} on other tokens")
            done.setdefault(part, {}).update(measured.pop("results"))
            settings = record.setdefault("settings", {}).setdefault(part, {})
            settings.update(measured.pop("settings"))
            record.update({n: measured[n] for n in ("environment", "text", "dtype")})
            file.save()

    for rotation, (keys, values) in ROTATIONS.items():
        model = calibration.split(k_hadamard=keys, v_hadamard=values).eval()
        schemes = {"16": {"k_bits": 16, "v_bits": 16}, **SCHEMES}
        run(rotation, {n: (model, partial(model.create_kivi_cache, **s)) for n, s in schemes.items()})
    run("drop-in", {n: (dense, make) for n, make in drop_in_caches(config, dense, calibration.tokenizer).items()})
    print(latent_table(record), drop_in_table(record), sep="\n\n")
    return record


def _measure_recommended(config: CompareConfig, evaluation: EvalConfig, calibration, dense) -> dict:
    """`measure` of the recommended schemes and of the defaults."""
    caches = {}
    for name, rotation in {"2": "both", **RECOMMENDED}.items():
        keys, values = ROTATIONS[rotation]
        model = calibration.split(k_hadamard=keys, v_hadamard=values).eval()
        label = f"{name}; {rotation} rotated" + (", the default" if name == "2" else "")
        caches[label] = (model, partial(model.create_kivi_cache, **SCHEMES[name]))
    record = measure(evaluation, calibration.tokenizer, dense, caches)
    print(perplexity_table(record["results"]))
    if config.output:
        write_json(config.output, record)
    return record


def _bits(result: dict) -> str:
    return " / ".join(f"{bits:.2f}" for bits in result["bits_per_element"].values())


def latent_table(record: dict) -> str:
    """Increase of the perplexity by scheme and rotated sides, as Markdown."""
    results = record["results"]
    lines = [
        "| scheme | bits/element, keys / values | smaller at 4k | both rotated | only keys | only values | neither |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results["both"].items():
        if name == "dense":
            continue
        increases = " | ".join(f"{results[r][name]['perplexity_increase']:+.2%}" for r in ROTATIONS)
        lines.append(f"| {name} | {_bits(result)} | {result['ratio']['4096']:.1f}× | {increases} |")
    return "\n".join(lines)


def drop_in_table(record: dict) -> str:
    """Increase of the perplexity with the dense model's own keys and values, as Markdown."""
    lines = [
        "| cache | bits/element, keys / values | smaller at 4k | perplexity | increase | KL mean | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in record["results"]["drop-in"].items():
        if name != "dense":
            lines.append(
                f"| {name} | {_bits(r)} | {r['ratio']['4096']:.1f}× | {r['perplexity']:.3f} | "
                f"{r['perplexity_increase']:+.2%} | {r['kl_mean']:.4f} | {r['top1_agreement']:.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(CompareConfig, __doc__))
