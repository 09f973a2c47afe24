"""Perplexity, KL divergence and top-1 agreement measured *through* the packed cache, with the bytes it takes.

    python scripts/eval_perplexity.py --model build/half --dense models/tiny-python-llama --bits 16 4 2

    python scripts/eval_perplexity.py --model build/half --dense build/dense --text speeches/ stdlib:test book.txt

With several texts each is measured for itself, as many windows of each, and all together; the worst is named.

One forward pass over a window never reads a quantized token, so each window is fed as a prefill and then in
teacher-forced chunks. Only tokens nine tenths of whose context is packed are scored, the same ones for every cache.
The loop also runs with the dense model and with the latent in 16 bits: the loss from the first to the second is due to
the rank, the rest to the bits.

Started by `accelerate launch --multi_gpu --num_processes N` (its name for several processes on one machine, CPUs too),
the processes divide the batches of windows; the record is that of one process.
"""

import math
import re
import time
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DynamicCache

from configuration_alrd_llama import ALRDLlamaConfig, check_choice, parse_json
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.files import write_json
from modules.fit.budget import dense_nbytes
from modules.fit.distributed import device_map, gather, is_main, join_processes, rounds
from modules.kivi_cache import KIVILatentCache
from scripts.common import (
    BUNDLED_MODEL,
    ROPE_HELP,
    environment,
    find_model,
    load_model,
    parse_config,
    stretched,
    whole,
)
from scripts.corpus import describe, document_windows, evenly_spread, load_documents, tokenize_windows


@dataclass
class EvalConfig:
    """The caches to measure, the text, and how the tokens are fed."""

    model: str = field(
        metadata={"help": "Split checkpoint, or a dense one, whose full keys and values are then cached."}
    )
    dense: str | None = field(
        default=BUNDLED_MODEL, metadata={"help": "Dense checkpoint to compare with; 'none': compare with 16 bits."}
    )
    bits: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Widths to measure: one for both sides ('2'), keys:values ('3:2'), or 'config', the cache that the "
            "checkpoint asks for. Default: 16 and config for a checkpoint with width tiers, else 16 8 4 3 2."
        },
    )
    group_size: int | None = field(default=None, metadata={"help": "Elements per scale; default: the checkpoint's."})
    residual_length: int | None = field(default=None, metadata={"help": "Window; default: the checkpoint's."})
    sink_length: int | None = field(default=None, metadata={"help": "Sinks; default: the checkpoint's."})
    k_scheme: str | None = field(
        default=None, metadata={"help": 'Other fields of QuantScheme for keys, as JSON, e.g. {"range_method": "mse"}.'}
    )
    v_scheme: str | None = field(default=None, metadata={"help": "The same for values."})
    text: list[str] = field(
        default_factory=lambda: ["stdlib:test"],
        metadata={"help": "Text to measure on, or several of different domains: see scripts/corpus.py."},
    )
    windows: int = field(default=16, metadata={"help": "Windows of each text, spread evenly over it."})
    per_document: bool = field(
        default=False, metadata={"help": "Take the windows from the starts of as many different documents."}
    )
    length: int = field(default=2048, metadata={"help": "Tokens per window."})
    prefill: int = field(default=1664, metadata={"help": "Tokens of a window that are fed at once."})
    chunk: int = field(default=1, metadata={"help": "Tokens per step after the prefill; 1 is decoding."})
    batch_size: int = field(default=8, metadata={"help": "Windows at a time, in each process."})
    rope_parameters: str | None = field(default=None, metadata={"help": ROPE_HELP})
    dtype: str = field(default="auto", metadata={"help": "Type of the models: float32, bfloat16, float16, auto."})
    device: str = field(default="cpu", metadata={"help": "Where they run: cpu or cuda."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        check_choice("device", self.device, ("cpu", "cuda"))
        self.text = text_names(self.text)
        parse_json("rope_parameters", self.rope_parameters)


def text_names(text: str | list[str]) -> list[str]:
    """Names of the texts of an evaluation, of which a single one may stand without a list.

    Raises:
        ValueError: There is none, or one twice.
    """
    names = [text] if isinstance(text, str) else list(text)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"text={names}: must be one or more different texts")
    return names


@dataclass
class Tally:
    """Sums over scored tokens of one cache, and the bytes of the last cache.

    Attributes:
        nll, kl, agree: Of each scored token, batch after batch.
        bytes_used, tokens_held: Summed over batches.
        seconds: The same, of all processes together.
        token_bytes: Bytes per token of the last cache if it held so many tokens.
        bits: Bits per element of it; `None` for a `DynamicCache`.
    """

    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agree: list[torch.Tensor] = field(default_factory=list)
    bytes_used: int = 0
    tokens_held: int = 0
    seconds: float = 0.0
    token_bytes: dict[str, float] = field(default_factory=dict)
    bits: float | None = None

    def score(self, logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor) -> None:
        """Score `[N, V]` logits against `[N]` labels and the reference's `[N, V]` log probabilities."""
        logs = logits.float().log_softmax(-1)
        self.nll.append(-logs.gather(1, labels[:, None]).squeeze(1).cpu())
        self.kl.append((reference.exp() * (reference - logs)).sum(-1).cpu())
        self.agree.append((logs.argmax(-1) == reference.argmax(-1)).float().cpu())

    def add(self, later: "Tally") -> None:
        """Add the tally of later batches."""
        for name in ("nll", "kl", "agree", "bytes_used", "tokens_held", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.token_bytes, self.bits = later.token_bytes, later.bits

    def result(self, windows: int) -> dict:
        """Means over all scored tokens, and those of each of the windows that they come from in equal parts."""
        nll, kl, agree = (torch.cat(x).double() for x in (self.nll, self.kl, self.agree))
        return {
            "perplexity": math.exp(nll.mean()),
            "nll": nll.mean().item(),
            "nll_by_window": nll.view(windows, -1).mean(1).tolist(),
            "kl_mean": kl.mean().item(),
            "kl_by_window": kl.view(windows, -1).mean(1).tolist(),
            "kl_p99": kl.quantile(0.99).item(),
            "top1_agreement": agree.mean().item(),
            "tokens": len(nll),
            "seconds": round(self.seconds, 1),
        }


@torch.no_grad()
def run_through_cache(model, cache, windows: torch.Tensor, prefill: int, chunk: int) -> torch.Tensor:
    """Feed `[B, T]` windows as one prefill and teacher-forced chunks.

    Returns:
        `[B, T - prefill, V]` logits of the tokens from `prefill` on: each predicts the token after it, from the cache.
    """
    model(windows[:, :prefill], past_key_values=cache, logits_to_keep=1)
    pieces = windows[:, prefill:].split(chunk, dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def scored_positions(length: int, prefill: int, chunk: int, schemes: list) -> torch.Tensor:
    """`[T - prefill - 1]` bool: fed tokens after the prefill at least nine tenths of whose context is packed, in every
    scheme. The context of token i is the i + 1 tokens it attends to; what is packed is so before its chunk starts."""
    fed = torch.arange(prefill, length - 1)
    chunk_starts = prefill + (fed - prefill) // chunk * chunk
    scored = torch.ones(len(fed), dtype=torch.bool)
    for s in schemes:
        packed = torch.tensor([s.flushed_blocks(start - s.sink_length) for start in chunk_starts.tolist()])
        scored &= packed * s.block_length >= 0.9 * (fed + 1)
    return scored


def parse_bits(text: str) -> tuple[float, float]:
    """'2' or '3:2' to (k_bits, v_bits)."""
    sides = text.split(":")
    try:
        if len(sides) == 1:
            sides *= 2
        k_bits, v_bits = map(float, sides)
        return whole(k_bits), whole(v_bits)
    except ValueError:
        raise ValueError(f"bits={text!r}: must be a width, or two of them as keys:values") from None


def main(config: EvalConfig) -> dict:
    """Measure every cache; returns the results."""
    processes = join_processes(config.device)
    path, where = find_model(config.model), device_map(processes, config.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    settings = stretched(ALRDLlamaConfig.from_pretrained(path), config.rope_parameters)
    model = ALRDLlamaForCausalLM.from_pretrained(path, config=settings, dtype=config.dtype, device_map=where)
    dense = None
    if config.dense not in (None, "none"):
        settings = stretched(AutoConfig.from_pretrained(find_model(config.dense)), config.rope_parameters)
        dense, _ = load_model(config.dense, config.dtype, where, settings)

    overrides = {n: getattr(config, n) for n in ("group_size", "residual_length", "sink_length")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    for name in ("k_scheme", "v_scheme"):
        if getattr(config, name) is not None:
            overrides[name] = parse_json(name, getattr(config, name))
    settings = {}
    widths = config.bits or (["16", "config"] if model.config.width_tiers else ["16", "8", "4", "3", "2"])
    for bits in dict.fromkeys([*(["16"] if dense is None else []), *widths]):
        if bits == "config":
            settings[bits] = overrides
            continue
        k_bits, v_bits = parse_bits(bits)
        settings[bits] = {"k_bits": k_bits, "v_bits": v_bits, **overrides}
        for side in ("k", "v"):
            if settings[bits][f"{side}_bits"] == 16:
                settings[bits][f"{side}_scheme"] = {}  # its fields are about codes
    caches = {bits: (model, partial(model.create_kivi_cache, **s)) for bits, s in settings.items()}
    record = measure(config, tokenizer, dense, caches, processes=processes)
    if is_main(processes):
        print(perplexity_table(record["results"]))
        if config.output:
            write_json(config.output, record)
    return record


def measure(
    config: EvalConfig,
    tokenizer,
    dense,
    caches: dict[str, tuple],
    others: list | None = None,
    processes: PartialState | None = None,
) -> dict:
    """Measure caches on the same tokens.

    Args:
        config: Text, windows and how they are fed.
        tokenizer: Of the models.
        dense: Model to compare with, through a `DynamicCache`; `None`: the cache called "16".
        caches: By name, a model and a function that makes an empty cache for it: a `KIVILatentCache`, or another one
            with a `scheme` that tells what is packed when (as `scored_positions` asks), `has_packed`, `nbytes_used`,
            `bits_per_element`, and `token_nbytes(length)`, the bytes per token of one row.
        others: Schemes of caches that are measured in other calls: the same tokens are scored if all calls know all.
        processes: Of `modules.fit.distributed`, over which the batches are divided.

    Returns:
        The record, the same in all processes: config, environment, text, and `results` by name. With several texts the
        results are of all their tokens together, and `domains` of each has those of each text.

    Raises:
        ValueError: The text is too short, or no token has nine tenths of its context packed.
    """
    if not 0 < config.prefill < config.length - 1:
        raise ValueError(f"prefill={config.prefill}: must leave at least two of length={config.length} tokens")
    reference_name = "dense" if dense is not None else "16"
    schemes = {name: make_cache().scheme for name, (_, make_cache) in caches.items()}
    any_model = next(iter(caches.values()))[0]

    cut = document_windows if config.per_document else tokenize_windows
    documents, windows = [], {}
    for text in config.text:
        of_text = load_documents(text)
        documents += of_text
        windows[text] = evenly_spread(cut(of_text, tokenizer, config.length), config.windows, text)
    every_scheme = [*schemes.values(), *(others or [])]
    scored = scored_positions(config.length, config.prefill, config.chunk, every_scheme)
    if not scored.any():
        raise ValueError(
            f"length={config.length}: no token has nine tenths of its context packed; take longer windows, a smaller "
            "group_size or a shorter residual_length"
        )

    names = list(caches) if dense is None else ["dense", *caches]
    batches = {text: found.to(any_model.device).split(config.batch_size) for text, found in windows.items()}
    total = len(names) * sum(map(len, batches.values()))
    progress = tqdm(total=total, desc="Batches", disable=not is_main(processes))

    def score(batch: torch.Tensor, many: int) -> dict[str, Tally]:
        """One batch through every cache, while `many` processes do the same."""
        labels = batch[:, config.prefill + 1 :][:, scored].flatten()
        reference, found = None, {}
        for name in names:
            started, tally = time.perf_counter(), Tally()
            model, make_cache = (dense, DynamicCache) if name == "dense" else caches[name]
            cache = make_cache()
            logits = run_through_cache(model, cache, batch, config.prefill, config.chunk)
            logits = logits[:, :-1][:, scored].flatten(0, 1)
            reference = logits.float().log_softmax(-1) if reference is None else reference
            tally.score(logits, labels, reference)
            tally.seconds = time.perf_counter() - started
            tally.tokens_held, tally.bytes_used = batch.numel(), cache_bytes(cache)
            if name != "dense" and not has_packed(cache):
                raise RuntimeError(f"{name}: a layer of the cache has packed nothing; the figures would not measure it")
            for length in (4096, 32768):
                dense_bytes = dense_nbytes(any_model.config, 1, any_model.dtype)
                tally.token_bytes[str(length)] = dense_bytes if name == "dense" else token_bytes(cache, length)
            tally.bits = None if name == "dense" else cache.bits_per_element
            found[name] = tally
            progress.update(many)
        return found

    whole, by_text = {name: Tally() for name in names}, {}
    for text in config.text:
        of_text = by_text[text] = {name: Tally() for name in names}
        for mine, many in rounds(processes, batches[text]):
            for found in gather(processes, [score(batch, many) for batch in mine]):
                for name, tally in found.items():
                    of_text[name].add(tally)
        for name, tally in of_text.items():
            whole[name].add(tally)
    progress.close()

    results = compared({n: t.result(config.windows * len(config.text)) for n, t in whole.items()}, reference_name)
    dense_token = dense_nbytes(any_model.config, 1, torch.float16)  # as budgets are: in 16 bits
    for name, tally in whole.items():
        sizes = {"measured": tally.bytes_used / tally.tokens_held} | tally.token_bytes
        results[name] |= {
            "bytes_per_token": sizes,
            "ratio": {length: dense_token / size for length, size in sizes.items()},
            "bits_per_element": tally.bits,
        }
    if len(config.text) > 1:
        for text, tallies in by_text.items():
            found = compared({n: t.result(config.windows) for n, t in tallies.items()}, reference_name)
            for name, result in found.items():
                results[name].setdefault("domains", {})[text] = result

    return {
        "config": asdict(config),
        "environment": environment(any_model.device, processes),
        "text": describe(documents),
        "dtype": str(any_model.dtype),
        "scored_tokens_per_window": int(scored.sum()),
        "settings": {name: asdict(scheme) for name, scheme in schemes.items()},
        "results": results,
    }


def compared(results: dict[str, dict], reference_name: str) -> dict[str, dict]:
    """The results by cache, with the increase of the perplexity over one of them, and what it is due to."""
    reference = results[reference_name]["perplexity"]
    for name, result in results.items():
        result["perplexity_increase"] = result["perplexity"] / reference - 1
        if reference_name != "16" and "16" in results and name not in (reference_name, "16"):
            result["increase_due_to_rank"] = results["16"]["perplexity"] / reference - 1
            result["increase_due_to_bits"] = result["perplexity"] / results["16"]["perplexity"] - 1
    return results


def cache_bytes(cache) -> int:
    """Bytes that the tokens held in a cache take."""
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache.nbytes_used


def has_packed(cache) -> bool:
    """Whether every layer of the cache holds packed tokens."""
    if isinstance(cache, KIVILatentCache):
        return all(layer.pool.used for layer in cache.layers)
    return cache.has_packed


def token_bytes(cache, length: int) -> float:
    """Bytes per token of the cache if it held one row of `length` tokens, by our formula or as another cache tells."""
    if not isinstance(cache, KIVILatentCache):
        return cache.token_nbytes(length)
    nbytes = 0
    for layer in cache.layers:
        nbytes += layer.scheme.layer_nbytes(length, layer.widths, layer.dtype, layer.sink_channels)
        nbytes += layer.scheme.static_nbytes(layer.widths)
    return nbytes / length


def bootstrap_mean(
    values: list[float], resamples: int = 10_000, level: float = 0.95, seed: int = 0, strata: int = 1
) -> dict[str, float]:
    """The mean of one value per document, and the percentile interval of its bootstrap.

    Args:
        values: Of the documents; the mean of all tokens where each has equally many.
        resamples: Draws, with replacement, of as many documents as there are.
        level: Share of the draws within the interval.
        seed: Of the draws.
        strata: Equal parts of the documents, in their order, from each of which as many are drawn as it has: several
            texts are all there in every draw.

    Returns:
        `mean`, and `low` and `high` ends of its interval.

    Raises:
        ValueError: There are fewer than two documents, or not equally many in each part.
    """
    if len(values) < 2 or len(values) % strata:
        raise ValueError(f"nll_by_window: {len(values)} documents; must be two or more, in {strata} equal parts")
    each, generator = len(values) // strata, torch.Generator().manual_seed(seed)
    drawn = torch.randint(each, (resamples, strata, each), generator=generator)
    drawn = (drawn + each * torch.arange(strata)[:, None]).flatten(1)
    documents = torch.tensor(values, dtype=torch.float64)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = documents[drawn].mean(1).quantile(ends).tolist()
    return {"mean": documents.mean().item(), "low": low, "high": high}


def paired_bootstrap(a: list[float], b: list[float], **how) -> dict[str, float]:
    """How far the perplexity of one cache is from that of another on the same documents, `exp(mean a - mean b)`.

    Args:
        a, b: Mean loss of each document, in nats per token, in the same order and of equally many tokens.
        how: Other arguments of `bootstrap_mean`; the same documents are drawn for both.

    Returns:
        `ratio` of the perplexities, and `low` and `high` ends of its interval.

    Raises:
        ValueError: Not the same number of documents, or fewer than two.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"nll_by_window: {len(a)} and {len(b)} documents; must be the same two or more")
    difference = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    found = bootstrap_mean(difference.tolist(), **how)
    return {"ratio": math.exp(found["mean"]), "low": math.exp(found["low"]), "high": math.exp(found["high"])}


def increase(result: dict, reference: dict) -> dict[str, float] | None:
    """How much larger the perplexity of a result is than that of another, `ratio` - 1, with its interval over windows.

    `None`: there is no interval, as there is a single window of a text, or an old record has none by window.
    """
    strata = len(result.get("domains", [])) or 1
    if len(result.get("nll_by_window", [])) < 2 * strata:
        return None
    found = paired_bootstrap(result["nll_by_window"], reference["nll_by_window"], strata=strata)
    return {name: ratio - 1 for name, ratio in found.items()}


def divergence(result: dict) -> dict[str, float] | None:
    """Mean KL divergence to the dense model in nats per token, with its interval over windows; `None` as `increase`."""
    strata = len(result.get("domains", [])) or 1
    if len(result.get("kl_by_window", [])) < 2 * strata:
        return None
    return bootstrap_mean(result["kl_by_window"], strata=strata)


def increase_cell(result: dict, reference: dict) -> str:
    """The increase of the perplexity as a table shows it, with its interval if there is one."""
    found = None if result is reference else increase(result, reference)
    if found is None:
        return f"{result['perplexity_increase']:+.2%}"
    return f"{found['ratio']:+.2%} [{found['low']:+.2%}, {found['high']:+.2%}]"


def divergence_cell(result: dict) -> str:
    """The mean KL divergence as a table shows it, with its interval if there is one."""
    found = divergence(result)
    # The reference's is zero in every window.
    if found is None or not found["high"]:
        return f"{result['kl_mean']:.4f}"
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def worst_domain(result: dict) -> tuple[str, dict] | None:
    """The text on which a cache loses most perplexity, and its result there; `None` where there is only one text."""
    domains = result.get("domains", {})
    return max(domains.items(), key=lambda item: item[1]["perplexity_increase"], default=None)


def perplexity_table(results: dict) -> str:
    """The results as a Markdown table; bytes are those of a 4,096-token cache, everything counted.

    Several texts have a row each below that of all together, and the worst one of each cache is named at the end.
    """
    lines = [
        "| cache | perplexity | increase | KL mean | KL p99 | top-1 | bytes/token at 4k | smaller at 4k | at 32k |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    # What is compared with stands first: the dense model, or the latent in 16 bits.
    reference, worst = next(iter(results.values())), []
    for name, r in results.items():
        label = f"latent, {name} bit" if re.fullmatch(r"[\d.:]+", name) else name
        lines.append(
            f"| {label} | {_quality_cells(r, reference)} | {r['bytes_per_token']['4096']:,.0f} | "
            f"{r['ratio']['4096']:.1f}× | {r['ratio']['32768']:.1f}× |"
        )
        for text, of_text in r.get("domains", {}).items():
            lines.append(f"| – {text} | {_quality_cells(of_text, reference['domains'][text])} | | | |")
        if r is not reference and (found := worst_domain(r)):
            text, of_text = found
            worst.append(f"{label}: {text}, {of_text['perplexity_increase']:+.2%}, KL {of_text['kl_mean']:.4f}")
    return "\n".join(lines) + ("\n\nWorst text: " + "; ".join(worst) + "." if worst else "")


def _quality_cells(result: dict, reference: dict) -> str:
    cells = [f"{result['perplexity']:.3f}", increase_cell(result, reference), divergence_cell(result)]
    return " | ".join([*cells, f"{result['kl_p99']:.3f}", f"{result['top1_agreement']:.1%}"])


if __name__ == "__main__":
    main(parse_config(EvalConfig, __doc__))
