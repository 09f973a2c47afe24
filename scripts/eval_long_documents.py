r"""Perplexity by position over long documents, measured *through* the packed cache, and the bytes it holds on the way.

    python scripts/eval_long_documents.py --checkpoints build/eighth build/sixteenth --output build/long_documents.json
    python scripts/eval_long_documents.py --dense meta-llama/Llama-3.1-8B --bits 4 2 --length 32768 --chunk 16 \
        --text datasets:emozilla/pg19-test::test --output build/pg19.json

Every document is fed from its first token on, in steps of --chunk tokens, so that every prediction reads the cache as
decoding finds it; the dense model gets the same tokens in the same steps. A loss that piles up as a text grows longer,
because errors of old tokens are read again and again, shows as a rising line. Results are kept batch by batch and a run
that was interrupted goes on where it stopped; with --output the picture is written beside the JSON.
"""

import math
import operator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from configuration_alrd_llama import check_positive
from scripts import plots
from scripts.common import find_model, human_bytes, parse_config
from scripts.compared_caches import ComparedCaches, describe_cache, open_results, packed_tokens
from scripts.corpus import describe, document_windows, load_documents
from scripts.eval_perplexity import cache_bytes, paired_bootstrap


@dataclass
class LongDocumentsConfig(ComparedCaches):
    """The documents, the caches, and how the tokens are fed."""

    text: str = field(default="stdlib:test", metadata={"help": "Text to measure on: see scripts/corpus.py."})
    documents: int = field(default=15, metadata={"help": "Documents, the first ones that are long enough."})
    length: int = field(default=2048, metadata={"help": "Tokens of each document, from its start."})
    buckets: int = field(default=8, metadata={"help": "Equal parts of the length whose perplexities are reported."})
    chunk: int = field(default=1, metadata={"help": "Tokens per step; 1 is decoding."})
    batch_size: int = field(default=8, metadata={"help": "Documents at a time."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("documents", "length", "buckets", "chunk", "batch_size"):
            check_positive(name, getattr(self, name))
        if self.length % (self.buckets * self.chunk):
            raise ValueError(
                f"length={self.length}: must be whole steps of chunk={self.chunk} in each of {self.buckets}"
            )
        self.check_length(self.length)
        for name, scheme in self.schemes().items():
            if not packed_tokens(scheme, self.length - self.chunk):
                raise ValueError(f"length={self.length}: nothing would be packed in {name!r}; take longer documents")


@torch.no_grad()
def read_through_cache(model, cache, windows: torch.Tensor, chunk: int, marks: list[int]) -> tuple:
    """Feed `[B, T]` documents in steps.

    Returns:
        `[B, T - 1]` losses in nats, of each token after the first; and the bytes of the cache per row, when it holds
        as many tokens as each of `marks`.
    """
    losses, sizes = [], []
    labels = windows[:, 1:]
    for start in tqdm(range(0, windows.shape[1], chunk), desc="Steps", mininterval=5):
        logits = model(windows[:, start : start + chunk], past_key_values=cache).logits
        wanted = labels[:, start : start + chunk]
        logs = logits[:, : wanted.shape[1]].float().log_softmax(-1)
        losses.append(-logs.gather(2, wanted[..., None]).squeeze(2))
        if start + chunk in marks:
            sizes.append(cache_bytes(cache) / len(windows))
    return torch.cat(losses, dim=1), sizes


def main(config: LongDocumentsConfig) -> dict:
    """Measure what is not in the output yet; returns the record."""
    file = open_results(config)
    record = file.record
    documents = load_documents(config.text)
    tokenizer = AutoTokenizer.from_pretrained(find_model(config.dense))
    windows = document_windows(documents, tokenizer, config.length, config.documents)
    if record.setdefault("text", describe(documents)) != describe(documents):
        file.refuse("another text")
    width = config.length // config.buckets
    marks = [width * (i + 1) for i in range(config.buckets)]
    for name in config.names():
        done = record["results"].setdefault(name, {"nll": []})
        for batch in windows[len(done["nll"]) :].split(config.batch_size):
            if not len(batch):
                continue
            model, make_cache = config.open(name)
            cache = make_cache()
            losses, done["bytes_held"] = read_through_cache(model, cache, batch.to(model.device), config.chunk, marks)
            done["nll"] += _bucket_means(losses, width)
            done |= describe_cache(model, cache, [config.length])
            file.save()
    schemes = config.schemes()
    for name, scheme in schemes.items():
        shares = [_packed_share(scheme, end - width, end, config.chunk) for end in marks]
        record["results"][name]["packed_share_of_context"] = shares
    file.save()
    if file.path:
        plots.long_documents(summary(record), file.path.with_suffix(".png"))
    print(long_documents_table(record))
    return record


def _bucket_means(losses: torch.Tensor, width: int) -> list[list[float]]:
    """Mean of `[B, T - 1]` losses by row and bucket; token t, whose loss stands at t - 1, is in bucket t // width."""
    # The first bucket is one token short: nothing predicts a document's first token.
    edges = list(range(width - 1, losses.shape[1], width))
    means = [bucket.mean(1) for bucket in losses.double().cpu().tensor_split(edges, dim=1)]
    return torch.stack(means, dim=1).tolist()


def _packed_share(scheme, start: int, stop: int, chunk: int) -> float:
    """Mean packed share of the contexts from which the tokens `start` to `stop` are predicted."""
    fed = range(max(start - 1, 0), stop - 1)
    return sum(packed_tokens(scheme, i // chunk * chunk) / (i + 1) for i in fed) / len(fed)


def summary(record: dict) -> dict:
    """By cache: perplexity of each bucket, and how far it is from the dense model's, with 95% intervals.

    Returns:
        `{"ends": [bucket ends in tokens], "caches": {name: {"perplexity", "increase", "low", "high", "bytes_held",
        "ratio"}}}`; the last value of the lists is that of the whole documents. No intervals for a single document.
    """
    c = record["config"]
    width = c["length"] // c["buckets"]
    sizes = [width - 1] + [width] * (c["buckets"] - 1)

    def columns(nll: list[list[float]]) -> list[list[float]]:
        whole = [sum(map(operator.mul, row, sizes)) / sum(sizes) for row in nll]
        return [*map(list, zip(*nll)), whole]

    dense = columns(record["results"]["dense"]["nll"])
    caches = {}
    for name, found in record["results"].items():
        mine = columns(found["nll"])
        shown: dict = {"perplexity": [math.exp(sum(x) / len(x)) for x in mine]}
        if len(dense[0]) > 1:
            compared = [paired_bootstrap(a, b) for a, b in zip(mine, dense)]
            shown |= {"low": [x["low"] - 1 for x in compared], "high": [x["high"] - 1 for x in compared]}
        expected = [math.exp(sum(x) / len(x)) for x in dense]
        shown["increase"] = [a / b - 1 for a, b in zip(shown["perplexity"], expected)]
        caches[name] = {**shown, "bytes_held": found["bytes_held"], "ratio": found["ratio"]}
    return {"ends": [width * (i + 1) for i in range(c["buckets"])], "caches": caches}


def long_documents_table(record: dict) -> str:
    """Perplexity of the dense model and increases over it by position, as Markdown."""
    found = summary(record)
    ends = found["ends"]
    ranges = [f"{end - ends[0]:,}–{end - 1:,}" for end in ends]
    lines = [
        "| cache | bytes held at the end | of dense | " + " | ".join(ranges) + " | whole documents [95%] |",
        "|---" * (len(ends) + 4) + "|",
    ]
    dense_bytes = found["caches"]["dense"]["bytes_held"][-1]
    for name, cache in found["caches"].items():
        if name == "dense":
            cells = [f"{x:.2f}" for x in cache["perplexity"]]
        else:
            cells = [f"{x:+.2%}" for x in cache["increase"]]
            if "low" in cache:
                cells[-1] += f" [{cache['low'][-1]:+.2%}, {cache['high'][-1]:+.2%}]"
        held = cache["bytes_held"][-1]
        lines.append(f"| {name} | {human_bytes(held)} | {held / dense_bytes:.2%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(LongDocumentsConfig, __doc__))
