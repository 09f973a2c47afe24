r"""Perplexity and KL divergence through the caches of other projects and of ours, every byte counted.

    python scripts/compare_peers.py --model build/real/dense --checkpoints build/real/0.125 build/real/0.0625 \
        --text build/real/text/test stdlib:test --calibration_text build/real/text/calibration \
        --parts transformers KIVI Palu checkpoints --no_per_document --output build/frontier.json

The peers: `transformers.QuantizedCache` with quanto and with hqq (where they are installed; the table says where not),
and, as configurations of our own engine and named so, KIVI on full keys and values, Palu and plain ASVD. All
read the same tokens of the same model. --before names checkpoints of an earlier method, to stand beside those that came
after them, neither ours of now nor peers. Windows are the starts of different documents, or with --no_per_document
spread evenly over each text, and intervals come from a paired bootstrap over these. At the bytes of each of our
checkpoints the best peer is interpolated. Results are kept as they come, four caches at a time, and a run that was
interrupted goes on where it stopped. The figure is drawn beside the output.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from itertools import count, product
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.objectives import OBJECTIVES
from modules.fit.rank_search import (
    asvd_ranks,
    asvd_sensitivity,
    asvd_statistics,
    fisher_information,
    fisher_ranks,
    mean_absolute_inputs,
)
from modules.fit.statistics import collect_statistics
from modules.kivi_cache import CacheScheme, KIVILatentCache, config_widths
from scripts import plots
from scripts.common import find_model, folder_sha256, installed_version, load_model, parse_config
from scripts.corpus import describe, load_documents
from scripts.eval_perplexity import (
    EvalConfig,
    divergence_cell,
    increase,
    increase_cell,
    measure,
    scored_positions,
    text_names,
    worst_domain,
)
from scripts.records import ResultsFile
from scripts.sources import draw_windows, load_sources

PARTS = ("transformers", "KIVI", "Palu", "ASVD", "before", "checkpoints")

#: Parts that are folders of split checkpoints, and what stands before the folder's name.
FOLDERS = {"before": "before, ", "checkpoints": ""}


@dataclass
class PeersConfig:
    """The model, the text, and which peers to measure."""

    model: str = field(metadata={"help": "Dense model: a local folder, a GGUF file or a hub name."})
    text: list[str] = field(
        metadata={"help": "Text to measure on, or several of different domains: see scripts/corpus.py."}
    )
    calibration_text: str = field(metadata={"help": "Text for the peers' statistics and searches."})
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Split checkpoints of ours, each with the cache that its config says."}
    )
    before: list[str] = field(
        default_factory=list, metadata={"help": "Split checkpoints of an earlier method, to show beside them."}
    )
    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"Measure these: {', '.join(PARTS)}."}
    )
    windows: int = field(default=15, metadata={"help": "Windows of each text."})
    per_document: bool = field(
        default=True, metadata={"help": "They are the first tokens of different documents; else spread evenly."}
    )
    length: int = field(default=2048, metadata={"help": "Tokens per window."})
    prefill: int = field(default=1792, metadata={"help": "Tokens of a window that are fed at once."})
    chunk: int = field(default=1, metadata={"help": "Tokens per step after the prefill; 1 is decoding."})
    batch_size: int = field(default=5, metadata={"help": "Windows at a time."})
    calibration_windows: int = field(default=32, metadata={"help": "Windows of the calibration text."})
    calibration_length: int = field(default=1024, metadata={"help": "Tokens per window of it."})
    statistics: str = field(default="build/statistics", metadata={"help": "Folder where statistics are kept."})
    sensitivity_windows: int = field(default=8, metadata={"help": "Windows of it that ASVD's search measures on."})
    rank_multiple: int = field(default=8, metadata={"help": "Ranks are multiples of this."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        if not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts={self.parts}: must be among {', '.join(PARTS)}")
        self.text = text_names(self.text)
        if self.windows < 2:
            raise ValueError(f"windows={self.windows}: must be 2 or more, as intervals are over windows")
        for part in FOLDERS:
            folders = getattr(self, part)
            names = {Path(folder).resolve().name for folder in folders}
            if len(names) < len(folders):
                raise ValueError(f"{part}={folders}: must differ in the names of their folders")


#: What the back ends of `QuantizedCache` need, and the axis that its documentation recommends for each.
BACKENDS = {"quanto": ("optimum-quanto", 0), "hqq": ("hqq", 1)}


@dataclass(frozen=True)
class FlushScheme:
    """Packed tokens of a `QuantizedCache` at each length, in terms of `CacheScheme` as `scored_positions` asks.

    The prompt is packed at once, to its last token. Each step's tokens then join the residual, and once it is full a
    step packs the whole history anew, itself included.
    """

    backend: str
    nbits: int
    axis: int
    prefill: int
    chunk: int
    q_group_size: int = 64
    residual_length: int = 128
    sink_length: ClassVar[int] = 0
    block_length: ClassVar[int] = 1

    def flushed_blocks(self, tokens: int) -> int:
        """Packed tokens of the `tokens` held before a step."""
        period = _flush_period(self.residual_length, self.chunk)
        return self.prefill + (tokens - self.prefill) // period * period


class _UnquantizedLayer(QuantizedLayer):
    """The library's layer with states that stay as they are, to watch when it packs them."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


@cache
def _flush_period(residual_length: int, chunk: int) -> int:
    """Tokens from one packing to the next in steps of `chunk`, as the library does it: releases differ.

    5.17 packs in the step after the residual has come to `residual_length - 1`, 5.23 in the step that fills it.
    """
    layer, states = _UnquantizedLayer(residual_length=residual_length), torch.zeros(1, 1, chunk, 1)
    layer.update(states, states)  # the prompt
    for steps in count(1):
        layer.update(states, states)
        if not layer.keys.numel():
            return steps * chunk


class CountedQuantizedCache(QuantizedCache):
    """`QuantizedCache` as it is, and what `measure` reads.

    Args:
        scheme: Back end, width and groups.
        config: Of the model.
    """

    def __init__(self, scheme: FlushScheme, config: LlamaConfig):
        axes = {"axis_key": scheme.axis, "axis_value": scheme.axis}
        groups = {"q_group_size": scheme.q_group_size, "residual_length": scheme.residual_length}
        super().__init__(scheme.backend, config, scheme.nbits, **axes, **groups)
        self.scheme, self.model_config = scheme, config

    @property
    def has_packed(self) -> bool:
        # In transformers 5.17 a layer has nothing of that name before its first states.
        return all(stored_nbytes(getattr(layer, "_quantized_keys", None)) > 0 for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        return sum(stored_nbytes(vars(layer)) for layer in self.layers)

    def filled_layer(self, length: int):
        """A layer of one row of `length` random tokens; the residual is half full, as it is on average."""
        layer = CountedQuantizedCache(self.scheme, self.model_config).layers[0]
        dtype, residual = self.layers[0].dtype, self.scheme.residual_length // 2
        for tokens in (length - residual, residual):
            shape = (1, self.model_config.num_key_value_heads, tokens, self.model_config.head_dim)
            layer.update(*torch.randn(2, *shape).to(dtype))
        return layer

    def token_nbytes(self, length: int) -> float:
        """Bytes per token of a row of `length` tokens: all tensors that a layer filled with random tokens holds."""
        return len(self.layers) * stored_nbytes(vars(self.filled_layer(length))) / length

    @property
    def bits_per_element(self) -> dict[str, float]:
        """Bits per element of the packed keys and values, scales and shifts included."""
        layer, tokens = self.filled_layer(4096), 4096 - self.scheme.residual_length // 2
        elements = tokens * self.model_config.num_key_value_heads * self.model_config.head_dim
        packed = {"keys": layer._quantized_keys, "values": layer._quantized_values}
        return {side: 8 * stored_nbytes(states) / elements for side, states in packed.items()}


def stored_nbytes(stored) -> int:
    """Bytes of the storages of all tensors in nested containers and tensor subclasses, each storage once."""
    storages = {}

    def visit(item) -> None:
        if hasattr(item, "__tensor_flatten__"):
            visit([getattr(item, name) for name in item.__tensor_flatten__()[0]])
        elif isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            visit(list(item.values()))
        elif isinstance(item, list | tuple):
            for inner in item:
                visit(inner)

    visit(stored)
    return sum(storages.values())


class Models:
    """The dense model, and splits as other projects make them; each statistic is measured when first asked for."""

    def __init__(self, config: PeersConfig):
        self.config = config
        self.dense, self.tokenizer = load_model(config.model)
        self.exact = load_model(config.model, torch.float32)[0]

    @cached_property
    def calibration(self) -> torch.Tensor:
        """`[windows, length]` token ids, spread over the calibration text."""
        c = self.config
        sources = load_sources([c.calibration_text])
        return draw_windows(sources, self.tokenizer, c.calibration_length, c.calibration_windows, "calibration_windows")

    def batches(self, of: str) -> tqdm:
        return tqdm(self.calibration.split(1), desc=of)

    def target(self, heads_per_group: int | None = None, **fields) -> ALRDLlamaConfig:
        """Configuration of a split: in groups of so many heads, or as many as divide the model's."""
        heads = self.dense.config.num_key_value_heads
        size = max(n for n in range(1, min(heads_per_group or heads, heads) + 1) if heads % n == 0)
        return ALRDLlamaConfig.from_llama(self.dense.config, head_group_size=size, **fields)

    def split(self, target: ALRDLlamaConfig, ranks: dict, statistics: list) -> ALRDLlamaForCausalLM:
        target.truncation_ranks = ranks
        return ALRDLlamaForCausalLM.from_dense(self.exact, target, statistics, self.dense.dtype)

    @cached_property
    def moments(self) -> list:
        return collect_statistics(self.exact, self.calibration, fisher=False, sample=0, folder=self.config.statistics)

    @cached_property
    def scaled(self) -> list:
        """Statistics to which ASVD's factors are fitted."""
        return asvd_statistics(self.exact, mean_absolute_inputs(self.exact, self.batches("Input scales")))

    @cached_property
    def sensitivity(self) -> dict:
        print("Sensitivity: one projection truncated at a time")
        few = list(self.calibration[: self.config.sensitivity_windows].split(1))
        return asvd_sensitivity(self.exact, few, self.target(), self.scaled, multiple=self.config.rank_multiple)

    @cached_property
    def fisher(self) -> dict:
        return fisher_information(self.exact, self.batches("Fisher information"), self.target(4))

    def palu(self, share: float) -> ALRDLlamaForCausalLM:
        """Groups of four heads, SVD whitened by the input covariance, Fisher ranks, Hadamard-rotated latents."""
        whitened = [OBJECTIVES["input"](self.exact, i, stats) for i, stats in enumerate(self.moments)]
        target = self.target(4, k_hadamard=True, v_hadamard=True)
        ranks = fisher_ranks(self.fisher, target, share, self.config.rank_multiple)
        return self.split(target, ranks, whitened)

    def asvd(self, share: float) -> ALRDLlamaForCausalLM:
        """Activation-aware scaling, ranks by perplexity sensitivity and binary search."""
        target = self.target(k_hadamard=False, v_hadamard=False)
        return self.split(target, asvd_ranks(self.sensitivity, target, share), self.scaled)


@dataclass(frozen=True)
class Peer:
    """A cache to measure: its scheme, the function that makes its model, and whose engine runs it."""

    part: str
    scheme: CacheScheme | FlushScheme
    model: Callable[[Models], LlamaForCausalLM]
    engine: str = "ours"
    missing: str | None = None  # package that is not installed
    sha256: str | None = None  # of a checkpoint

    def new_cache(self, model: LlamaForCausalLM):
        if isinstance(self.scheme, FlushScheme):
            return CountedQuantizedCache(self.scheme, model.config)
        if self.part in FOLDERS:
            return model.create_kivi_cache()
        return KIVILatentCache(
            self.scheme, config_widths(model.config) if isinstance(model, ALRDLlamaForCausalLM) else None
        )


def peers(config: PeersConfig) -> dict[str, Peer]:
    """All peers by name, also of parts that are not asked for: the scored tokens depend on every peer."""
    found, engine = {}, f"transformers {transformers.__version__} QuantizedCache"
    for backend, (package, axis) in BACKENDS.items():
        has = installed_version(package)
        for bits in (4, 2):
            scheme = FlushScheme(backend, bits, axis, config.prefill, config.chunk)
            ran_by = f"{engine}, {backend} {has or ''}".strip()
            found[f"QuantizedCache, {backend} {bits} bit"] = Peer(
                "transformers", scheme, lambda models: models.dense, ran_by, None if has else package
            )
    # KIVI, arXiv:2402.02750: groups of 32, a window of 128 tokens. Ours is never shorter than that, theirs is for keys.
    for bits in (4, 2):
        for group_size, window in ((32, 128), (128, 32)):
            note = "" if group_size == 32 else f", groups of {group_size}, window of {window}"
            scheme = CacheScheme(bits, bits, group_size, window, sink_length=0)
            found[f"KIVI, {bits} bit{note} (our engine)"] = Peer("KIVI", scheme, lambda models: models.dense)
    # Palu, arXiv:2407.21118: one scale per token and latent of a head group, every token of the latent.
    for share in (0.7, 0.5, 0.3, 0.2):
        model = memoized(partial(Models.palu, share=share))
        for bits in (4, 3):
            scheme = CacheScheme(bits, bits, 0, 0, 0, k_scheme={"orientation": "per_token"})
            found[f"Palu, {share:.0%} of ranks, {bits} bit (our engine)"] = Peer("Palu", scheme, model)
    exact = CacheScheme(16, 16)
    for share in (0.5, 0.25):
        name = f"ASVD, {share:.0%} of ranks, 16 bit (our engine)"
        found[name] = Peer("ASVD", exact, memoized(partial(Models.asvd, share=share)))
    for part, prefix in FOLDERS.items():
        for folder in getattr(config, part):
            path = find_model(folder)
            scheme = CacheScheme.from_config(ALRDLlamaConfig.from_pretrained(path))
            load = memoized(lambda models, path=path: ALRDLlamaForCausalLM.from_pretrained(path, dtype="auto").eval())
            found[prefix + Path(folder).resolve().name] = Peer(part, scheme, load, sha256=folder_sha256(path))
    return found


def memoized(make: Callable) -> Callable:
    """`make`, which is called once for several peers."""
    made = []

    def once(models: Models):
        if not made:
            made.append(make(models))
        return made[0]

    return once


def record_key(config: PeersConfig, schemes: list) -> dict:
    """Settings that two runs must share for their results to stand in one file.

    Args:
        config: Options of the run.
        schemes: Of all peers, measured or not.
    """
    scored = scored_positions(config.length, config.prefill, config.chunk, schemes)
    options, documents = asdict(config), []
    for text in config.text:
        documents += load_documents(text)
    calibration = []
    for source in load_sources([config.calibration_text]):
        calibration += source.documents
    for name in (*FOLDERS, "parts", "statistics", "output"):  # which to measure and where, not how
        del options[name]
    return {
        **options,
        "model_sha256": folder_sha256(find_model(config.model)),
        "text_sha256": describe(documents)["sha256"],
        "calibration_sha256": describe(calibration)["sha256"],
        "scored_sha256": hashlib.sha256(bytes(scored.tolist())).hexdigest(),
        "threads": torch.get_num_threads(),  # moves the rounding of bfloat16 products
        "versions": {p: installed_version(p) for p in ("torch", "transformers", "optimum-quanto", "hqq")},
    }


def main(config: PeersConfig) -> dict:
    """Measure what is not in the output yet; returns the record."""
    everything = peers(config)
    schemes = [peer.scheme for peer in everything.values()]
    key = record_key(config, schemes)
    file = ResultsFile(config.output, {"key": key, "results": {}})
    file.require("key", key)
    record, results = file.record, file.record["results"]
    names = ("model", "text", "windows", "per_document", "length", "prefill", "chunk", "batch_size")
    evaluation = EvalConfig(**{name: getattr(config, name) for name in names})
    missing = {
        name: peer
        for name, peer in everything.items()
        if peer.part in config.parts
        and ("perplexity" not in results.get(name, {}) or results[name].get("sha256") != peer.sha256)
    }
    absent = {name: peer for name, peer in missing.items() if peer.missing}
    for name, peer in absent.items():
        results[name] = {"part": peer.part, "engine": peer.engine, "not_installed": peer.missing}
        print(f"{name}: not measured, {peer.missing} is not installed")
    ready = [item for item in missing.items() if item[0] not in absent]
    models = Models(config) if ready else None
    # A few at a time: each call measures the dense model too, and is lost if it is interrupted.
    for start in range(0, len(ready), 4):
        some = dict(ready[start : start + 4])
        caches = {name: (model := peer.model(models), partial(peer.new_cache, model)) for name, peer in some.items()}
        scores = measure(evaluation, models.tokenizer, models.dense, caches, schemes)
        reference = {"engine": "transformers DynamicCache", "weight_nbytes": models.dense.get_memory_footprint()}
        results.setdefault("dense", {**scores["results"]["dense"], **reference})
        for name, peer in some.items():
            results[name] = {
                **scores["results"][name],
                "part": peer.part,
                "engine": peer.engine,
                "sha256": peer.sha256,
                "settings": scores["settings"][name],
                "truncation_ranks": getattr(caches[name][0].config, "truncation_ranks", None),
                "weight_nbytes": caches[name][0].get_memory_footprint(),
            }
        record.update({n: scores[n] for n in ("environment", "text", "dtype")})
        file.save()
    order = ["dense", *everything, *results]  # of the peers, whatever the order in which they were measured
    record["results"] = dict(sorted(results.items(), key=lambda item: order.index(item[0])))
    file.save()
    if file.path:
        plots.curve(series(record), file.path.with_suffix(".png"))
    print(peers_table(record), frontier_table(record), equal_bytes_table(record), sep="\n\n")
    if measured(record, "before"):
        print("", before_table(record), sep="\n")
    return record


#: Whose a result is, by its part; those of the other parts are the peers'.
WHOSE = {"checkpoints": "ours", "before": "before"}


def measured(record: dict, whose: str | None = None) -> dict[str, dict]:
    """The results that were measured, but for the dense one: all, "ours", those of "before", or the "peers"."""
    results = {n: r for n, r in record["results"].items() if n != "dense" and "perplexity" in r}
    return {n: r for n, r in results.items() if whose in (None, WHOSE.get(r["part"], "peers"))}


def share(result: dict) -> float:
    """Bytes at 4,096 tokens, as a share of the dense cache's."""
    return 1 / result["ratio"]["4096"]


def smaller_from(result: dict, dense: dict) -> int:
    """Tokens of a row from which weights and cache together take fewer bytes than those of the dense model."""
    added = result["weight_nbytes"] - dense["weight_nbytes"]
    saved = (1 - share(result)) * dense["bytes_per_token"]["4096"]
    return max(0, math.ceil(added / saved))


def series(record: dict) -> dict[str, dict]:
    """Results by the line of the figure that they belong to."""
    lines: dict[str, dict] = {"ours": measured(record, "ours")}
    if earlier := measured(record, "before"):
        lines["ours, before"] = earlier
    for name, result in measured(record, "peers").items():
        label = name.split(",")[0] + (" (our engine)" if result["engine"] == "ours" else "")
        if label.startswith(("QuantizedCache", "Palu")):
            backend, bits = name.split(",")[1].split()[0], name.split(",")[-1].split()[0]
            label = f"QuantizedCache, {backend}" if label.startswith("Q") else f"Palu, {bits} bit (our engine)"
        if label.startswith("KIVI") and "groups of 128" in name:
            label = "KIVI, groups of 128 (our engine)"
        lines.setdefault(label, {})[name] = result
    return lines


def frontier_table(record: dict) -> str:
    """Each of our checkpoints beside the peer whose bytes are the nearest at or above its own, as Markdown."""
    dense, peers_found = record["results"]["dense"], measured(record, "peers")
    lines = [
        "| ours, bytes of dense | smaller | perplexity | increase [95%] | nearest peer at or above, bytes of dense | "
        "increase [95%] | ours / peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, r in sorted(measured(record, "ours").items(), key=lambda item: -share(item[1])):
        above = {n: p for n, p in peers_found.items() if share(p) >= share(r)}
        mine, cells = increase(r, dense), ["no peer", "", ""]
        if above:
            nearest = min(share(p) for p in above.values())
            # Of peers of the same size the best.
            alike = {n: p for n, p in above.items() if share(p) <= 1.02 * nearest}
            name = min(alike, key=lambda n: alike[n]["perplexity"])
            theirs = increase(alike[name], dense)
            ratio = f"{mine['ratio'] / theirs['ratio']:.2f}" if theirs["low"] > 0 else "peer within noise"
            cells = [f"{name}, {share(alike[name]):.1%}", increase_cell(alike[name], dense), ratio]
        ours = [f"{share(r):.2%}", f"{1 / share(r):.1f}×", f"{r['perplexity']:.3f}", increase_cell(r, dense)]
        cells = [*ours, *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_equal_bytes(record: dict, size: float) -> dict | None:
    """The best that the peers reach with so many bytes, by the KL divergence.

    Peers with fewer bytes count as they are. Between one of these and one above the size, the logarithm of the KL
    divergence and the loss in nats go in a straight line over the logarithm of the bytes. The least divergence of all
    these counts.

    Args:
        record: Of `main`.
        size: Bytes, as a share of the dense cache's.

    Returns:
        `{"kl", "increase", "peers"}`: the two figures, and the names of the one or two peers that they come from.
        `None`: no peer is as small.
    """
    found, best = measured(record, "peers"), None
    for (small, a), (large, b) in product(found.items(), repeat=2):
        low, high, place = math.log(share(a)), math.log(share(b)), math.log(size)
        if low > place or (small != large and not low < place < high):
            continue
        weight = 0.0 if small == large else (place - low) / (high - low)
        kl = math.exp(_between(weight, *(math.log(max(peer["kl_mean"], 1e-12)) for peer in (a, b))))
        if best is None or kl < best["kl"]:
            ratio = math.exp(_between(weight, a["nll"], b["nll"]) - record["results"]["dense"]["nll"])
            best = {"kl": kl, "increase": ratio - 1, "peers": list(dict.fromkeys([small, large]))}
    return best


def _between(weight: float, a: float, b: float) -> float:
    return (1 - weight) * a + weight * b


def equal_bytes_table(record: dict) -> str:
    """Each of our checkpoints beside the best peer, interpolated at its bytes, as Markdown.

    Where no peer is as small, the one with the fewest bytes stands there with its size: at ours it would be worse.
    """
    dense, others = record["results"]["dense"], measured(record, "peers")
    lines = [
        "| ours, bytes of dense | smaller | perplexity [95%] | KL, nats per token [95%] | KL p99 | worst text | "
        "best peer at equal bytes | perplexity | KL | peer's KL / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, r in sorted(measured(record, "ours").items(), key=lambda item: -share(item[1])):
        cells = [f"{share(r):.2%}", f"{1 / share(r):.1f}×", increase_cell(r, dense), divergence_cell(r)]
        cells += [f"{r['kl_p99']:.3f}", _worst_cell(r)]
        peer = at_equal_bytes(record, share(r))
        if peer is not None:
            ratio = f"{peer['kl'] / r['kl_mean']:.1f}"
            cells += [" – ".join(peer["peers"]), f"{peer['increase']:+.2%}", f"{peer['kl']:.4f}", ratio]
        elif others:
            name = min(others, key=lambda name: share(others[name]))
            least = others[name]
            cells += [f"none as small; {name}, {share(least):.1%}", increase_cell(least, dense)]
            cells += [divergence_cell(least), f"over {least['kl_mean'] / r['kl_mean']:.1f}"]
        else:
            cells += ["no peer measured", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def before_table(record: dict) -> str:
    """Each checkpoint of before, and how many times its divergence is that of ours of the nearest size, as Markdown."""
    dense, ours = record["results"]["dense"], measured(record, "ours")
    lines = [
        "| before, bytes of dense | perplexity [95%] | KL, nats per token [95%] | KL p99 | worst text | "
        "KL, before / now |",
        "|---|---|---|---|---|---|",
    ]
    for _, r in sorted(measured(record, "before").items(), key=lambda item: -share(item[1])):
        cells = [f"{share(r):.2%}", increase_cell(r, dense), divergence_cell(r), f"{r['kl_p99']:.3f}", _worst_cell(r)]
        now = min(ours.values(), key=lambda mine: abs(math.log(share(mine) / share(r))), default=None)
        # Another size says nothing about this one.
        alike = now is not None and abs(share(now) / share(r) - 1) < 0.02
        cells.append(f"{r['kl_mean'] / now['kl_mean']:.1f}" if alike else "none of this size")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _worst_cell(result: dict) -> str:
    """Name, increase and KL divergence of the text on which a cache loses most."""
    found = worst_domain(result)
    if found is None:
        return "one text"
    text, there = found
    return f"{text}: {there['perplexity_increase']:+.2%}, KL {there['kl_mean']:.4f}"


def peers_table(record: dict) -> str:
    """All results by falling size, as Markdown; bytes count everything, intervals are over windows."""
    dense = record["results"]["dense"]
    several = bool(dense.get("domains"))
    heads = ["cache", "bytes/token at 4k", "of dense", "increase [95%]", "KL mean", "KL p99", "top-1"]
    heads += ["worst text"] * several
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, r in sorted(measured(record).items(), key=lambda item: -share(item[1])):
        label = f"**ours, {name}**" if r["part"] == "checkpoints" else name
        label = f"ours, {name}" if r["part"] == "before" else label
        cells = [label, f"{r['bytes_per_token']['4096']:,.0f}", f"{share(r):.1%}", increase_cell(r, dense)]
        cells += [divergence_cell(r), f"{r['kl_p99']:.3f}", f"{r['top1_agreement']:.1%}"]
        cells += [_worst_cell(r)] * several
        lines.append(f"| {' | '.join(cells)} |")
    for name, r in record["results"].items():
        if "not_installed" in r:
            cells = [name, f"not installed: {r['not_installed']}", *[""] * (len(heads) - 2)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(PeersConfig, __doc__))
