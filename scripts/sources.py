"""Several texts together: `--text speech.txt:2 stdlib:calibration` gives the first twice as many windows as the second.

Each text is one of those that scripts/corpus.py names, alone or with a weight behind a colon; "mixture" stands for the
texts of `MIXTURE` in equal parts. How many windows of text there are in a source does not matter, only its weight.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from scripts.corpus import MIXTURE, Document, describe, evenly_spread, load_documents, tokenize_windows

#: What the option says in the commands that calibrate.
TEXT_HELP = (
    "Texts for statistics: names as in scripts/corpus.py, each with a weight behind a colon where they are not to "
    "count alike (notes.txt:2 stdlib:calibration). mixture: speech, dialogue, nine languages, technical prose and code."
)


@dataclass(frozen=True)
class Source:
    """A text of several.

    Attributes:
        spec: As scripts/corpus.py names it.
        share: Of the windows, above 0; those of all sources add up to 1.
        documents: Its text.
    """

    spec: str
    share: float
    documents: list[Document]


def parse_weight(text: str) -> tuple[str, float]:
    """Name of a text and its weight, 1 where none stands behind it.

    Raises:
        ValueError: The weight is not above 0.
    """
    found = re.fullmatch(r"(.+):([-+]?[\d.]+)", text)
    # A data set's name has up to four parts behind "datasets", which may be numbers too: the weight is the fifth.
    if found is None or (text.startswith("datasets:") and text.count(":") < 5):
        return text, 1.0
    weight = float(found[2])
    if not weight > 0:
        raise ValueError(f"text={text!r}: must have a weight above 0")
    return found[1], weight


def parse_texts(texts: Sequence[str]) -> dict[str, float]:
    """Share of each text by its name, 1 together; the mixture is replaced by its parts, and equal names add up.

    Raises:
        ValueError: There is no text, or a weight is not above 0.
    """
    if not texts:
        raise ValueError("text=[]: must name at least one text")
    weights: dict[str, float] = {}
    for text in texts:
        spec, weight = parse_weight(text)
        parts = MIXTURE if spec == "mixture" else (spec,)
        for part in parts:
            weights[part] = weights.get(part, 0.0) + weight / len(parts)
    total = sum(weights.values())
    return {spec: weight / total for spec, weight in weights.items()}


def list_texts(texts: str | Sequence[str]) -> list[str]:
    """The texts as a list, of one if a single name is given; errors as `parse_texts`."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    parse_texts(listed)
    return listed


def load_sources(texts: Sequence[str]) -> list[Source]:
    """Read texts with weights; errors as `parse_texts` and `load_documents`."""
    return [Source(spec, share, load_documents(spec)) for spec, share in parse_texts(texts).items()]


def divide_windows(sources: Sequence[Source], count: int, field: str = "windows") -> list[int]:
    """Windows of each source: its share of `count`, rounded so that all add up to it (largest remainders).

    Raises:
        ValueError: A source would get none, with `field` as the option that asks for `count`.
    """
    exact = [source.share * count for source in sources]
    # Rounded first, or an even part such as 0.2 · 5 may fall below its whole number.
    counts = [int(round(part, 9)) for part in exact]
    remainders = sorted(range(len(sources)), key=lambda i: counts[i] - exact[i])
    for i in remainders[: count - sum(counts)]:
        counts[i] += 1
    for source, windows in zip(sources, counts, strict=True):
        if windows == 0:
            raise ValueError(
                f"{field}={count}: must be more, or the weight of {source.spec!r} larger: its share of "
                f"{source.share:.3g} is no window of {len(sources)} sources'"
            )
    return counts


def draw_windows(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, length: int, count: int, field: str = "windows"
) -> torch.Tensor:
    """Token windows of all sources, source after source, spread evenly over the text of each.

    Args:
        sources: The texts.
        tokenizer: Of the model.
        length: Tokens per window.
        count: Windows altogether.
        field: The option that asks for `count`, for messages.

    Returns:
        `[count, length]` token ids.

    Raises:
        ValueError: A source gets no window, or has not enough text for those it gets.
    """
    drawn = []
    for source, windows in zip(sources, divide_windows(sources, count, field), strict=True):
        try:
            found = tokenize_windows(source.documents, tokenizer, length)
        except ValueError as error:
            raise ValueError(f"text={source.spec!r}: must be longer: {error}") from None
        if len(found) < windows:
            has = f"{source.spec!r} has only {len(found)} windows of {length} tokens"
            raise ValueError(f"{field}={count}: {has}, not {windows}")
        drawn.append(evenly_spread(found, windows, source.spec))
    return torch.cat(drawn)


def describe_sources(sources: Sequence[Source], length: int, count: int, field: str = "windows") -> dict[str, Any]:
    """Identity of the texts in a report: `describe` of all together, and of each with its share, windows and tokens.

    Arguments and errors as of `draw_windows`.
    """
    documents, each = [], []
    for source, windows in zip(sources, divide_windows(sources, count, field), strict=True):
        documents += source.documents
        drawn = {"text": source.spec, "share": source.share, "windows": windows, "tokens": windows * length}
        each.append(drawn | describe(source.documents))
    return describe(documents) | {"sources": each}


def calibration_table(report: dict[str, Any], shown: Callable[[str], str] = str) -> str:
    """What a checkpoint was calibrated on, in Markdown for its card.

    Args:
        report: Of scripts/calibrate_svd_ranks.py.
        shown: Turns the name of a text into what a reader may see of it.
    """
    settings, text = report["config"], report["text"]
    if text is None:
        return f"Calibrated on no text: the objective `{settings['objective']}` needs none."
    tokens = settings["windows"] * settings["length"]
    # A report of before knows one text, which got all windows.
    one = {"text": settings["text"], "share": 1.0, "windows": settings["windows"], "tokens": tokens, **text}
    lines = ["| calibrated on | share | windows | tokens | SHA-256 |", "|---|---|---|---|---|"]
    for source in text.get("sources", [one]):
        lines.append(
            f"| `{shown(source['text'])}` | {source['share']:.1%} | {source['windows']} | {source['tokens']:,} | "
            f"`{source['sha256']}` |"
        )
    return "\n".join(lines)
