r"""Does the packed cache still know what stood far back? Three tasks, each beside the dense model's score.

    python scripts/eval_retrieval.py --checkpoints build/eighth build/sixteenth --bits 4 2 --output build/copying.json
    python scripts/eval_retrieval.py --task needle --dense meta-llama/Llama-3.1-8B-Instruct --bits 4 2 \
        --lengths 4096 16384 32768 --text essays/ --output build/needle.json
    python scripts/eval_retrieval.py --task ruler --dense build/real/dense --checkpoints build/real/0.125 --chat \
        --lengths 1024 2048 4096 8192 --trials 20 --output build/ruler.json

copying   For any model, the bundled one included. Lines of random words are listed once; a text of --distances tokens
          follows; then the model is asked which of several orders of a line's words it has seen: the likeliest is its
          answer. Nothing but the listing tells them apart. As a control the dense model is asked without the listing.
needle    For capable models: a sentence with a number, hidden at --depths in texts of --lengths tokens, is asked
          for at the end; an answer that contains the number is right.
ruler     RULER's own needle tasks of --variants, made by its generator (scripts/ruler.py) for --lengths; scored as
          there, by the share of what is asked for that the answer contains. With --chat in the model's chat template.
          With --questions N as many needles are hidden at least and asked for, each on a copy of the prefilled cache.

The text is the prefill and the question is fed on top of it, so that it is answered from the packed cache; a distance
at which the answer is not packed yet is refused; RULER hides some of its needles so late, and the record says in how
many questions all of it was packed. Where the dense model itself scores less than --least_dense the task
shows nothing, and the script says so. Results are kept cell by cell; with --output the picture stands beside the JSON.
"""

import copy
import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configuration_alrd_llama import check_positive
from modules.kivi_cache import CacheScheme
from scripts import plots, ruler
from scripts.common import find_model, parse_config
from scripts.compared_caches import ComparedCaches, describe_cache, open_results, packed_tokens
from scripts.corpus import describe, load_documents
from scripts.eval_perplexity import bootstrap_mean

#: Tokens of text before a listing.
LEAD = 40
NEEDLE = "\nThe secret number of {key} is {value}.\n"
QUESTION = "\n\nWhat is the secret number of {key}?\nThe secret number of {key} is"


@dataclass
class RetrievalConfig(ComparedCaches):
    """The task, the caches, and the distances."""

    task: Literal["copying", "needle", "ruler"] = field(default="copying", metadata={"help": "See above."})
    text: str = field(default="stdlib:test", metadata={"help": "Text to hide things in: see scripts/corpus.py."})
    distances: list[int] = field(
        default_factory=lambda: [200, 400, 600, 800],
        metadata={"help": "copying: tokens between the listing and the question."},
    )
    lines: int = field(default=8, metadata={"help": "copying: lines in a listing, each asked for."})
    words: int = field(default=8, metadata={"help": "copying: words in a line, one token each."})
    choices: int = field(default=8, metadata={"help": "copying: orders to choose from."})
    lengths: list[int] = field(
        default_factory=lambda: [1024, 2048], metadata={"help": "needle, ruler: tokens of text and question together."}
    )
    depths: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9], metadata={"help": "needle: where it is hidden, 0 … 1."}
    )
    variants: list[str] = field(
        default_factory=lambda: ["niah_single_1", "niah_single_2"],
        metadata={"help": f"ruler: its tasks, among {', '.join(ruler.VARIANTS)}."},
    )
    questions: int = field(
        default=1,
        metadata={"help": "ruler: needles of a text to ask for, one by one: RULER's own, then others."},
    )
    chat: bool = field(default=False, metadata={"help": "ruler: ask in the chat template of the model's tokenizer."})
    new_tokens: int = field(default=ruler.ANSWER_TOKENS, metadata={"help": "ruler: tokens of an answer at most."})
    trials: int = field(
        default=4, metadata={"help": "Texts per distance, per length and depth, or per variant and length."}
    )
    chunk: int = field(default=1, metadata={"help": "Tokens per step of the question; 1 is decoding."})
    least_dense: float = field(
        default=0.8, metadata={"help": "Below this score of the dense model a cell shows nothing about a cache."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of words, numbers and places in the text."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("lines", "words", "trials", "chunk", "new_tokens", "questions"):
            check_positive(name, getattr(self, name))
        check_positive("distances", *self.distances)
        check_positive("lengths", *self.lengths)
        if self.choices < 2:
            raise ValueError(f"choices={self.choices}: must be 2 or more")
        if self.words < 3:
            raise ValueError(f"words={self.words}: must be 3 or more, or there are too few orders of them")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: must be within 0 and 1")
        if not self.variants or not set(self.variants) <= set(ruler.VARIANTS):
            raise ValueError(f"variants={self.variants}: must be among {', '.join(ruler.VARIANTS)}")
        if not 0 < self.least_dense <= 1:
            raise ValueError(f"least_dense={self.least_dense!r}: must be within 0 and 1")

    def cells(self) -> list[tuple]:
        """Cells of the task: `(distance,)`, `(length, depth)`, or `(length, variant)`."""
        if self.task == "copying":
            return [(distance,) for distance in self.distances]
        return list(itertools.product(self.lengths, self.depths if self.task == "needle" else self.variants))


@dataclass(frozen=True)
class Question:
    """A text to prefill, and the questions on top.

    Attributes:
        prefilled: Tokens of the text.
        answer_end: Of these, the tokens up to the end of what is asked for.
        asked: Tokens of the questions: for each line its orders of words, the listed one first; or a row for each.
        values: What the answer to each question is to contain: the needle's number, or all that a task of RULER asks
            for. Empty for orders of words.
    """

    prefilled: list[int]
    answer_end: int
    asked: list[list[int]]
    values: tuple[list[str], ...] = ()


class Text:
    """Tokens to hide things in, and words of one token; `generator` draws from both."""

    def __init__(self, config: RetrievalConfig, tokenizer: PreTrainedTokenizerBase):
        # RULER brings texts of its own.
        documents = [] if config.task == "ruler" else load_documents(config.text)
        self.tokenizer, self.description = tokenizer, describe(documents)
        if config.task == "ruler":
            self.description = {"generator": ruler.WHEELS["long_context_eval"]}
        self.tokens = []
        for document in documents:
            self.tokens += self.encode(document.text)
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.line_end = self.encode("\n")
        common = [token for token, count in Counter(self.tokens).most_common() if count >= 20]
        self.words = [token for token in common if re.fullmatch(r" [a-z]{3,}", tokenizer.decode([token]))]
        needed = {"copying": 4 * config.words, "needle": 1, "ruler": 0}[config.task]
        if len(self.words) < needed:
            raise ValueError(f"text={config.text!r}: has {len(self.words)} common words of one token, not {needed}")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def piece(self, length: int, generator: random.Random) -> list[int]:
        """So many consecutive tokens of the text."""
        if length > len(self.tokens):
            raise ValueError(f"text: {len(self.tokens)} tokens are too few for a piece of {length}")
        start = generator.randrange(len(self.tokens) - length + 1)
        return self.tokens[start : start + length]


def copying_question(config: RetrievalConfig, text: Text, cell: tuple, trial: int, listed: bool = True) -> Question:
    """A listing and the orders of each of its lines; without `listed` the listing is of other words: the control."""
    generator = random.Random(f"{config.seed} {cell} {trial}")
    lines = [generator.sample(text.words, config.words) for _ in range(config.lines)]
    others = [generator.sample(text.words, config.words) for _ in range(config.lines)]
    prefilled = text.start + text.piece(LEAD, generator) + text.line_end
    for line in lines if listed else others:
        prefilled += line + text.line_end
    asked = []
    for line in lines:
        orders = [line]
        while len(orders) < config.choices:
            order = generator.sample(line, len(line))
            if order not in orders:
                orders.append(order)
        asked += [text.line_end + order for order in orders]
    return Question(prefilled + text.piece(cell[0], generator), len(prefilled), asked)


def needle_question(config: RetrievalConfig, text: Text, cell: tuple, trial: int) -> Question:
    """A needle in a text, which has as many tokens as the cell says with the question."""
    length, depth = cell
    generator = random.Random(f"{config.seed} {cell} {trial}")
    key = text.tokenizer.decode([generator.choice(text.words)]).strip()
    value = str(generator.randrange(1_000_000, 10_000_000))
    needle, asked = text.encode(NEEDLE.format(key=key, value=value)), text.encode(QUESTION.format(key=key))
    room = length - len(text.start) - len(needle) - len(asked)
    if room < 0:
        raise ValueError(f"lengths={length}: must have room for needle and question, {length - room} tokens")
    filler = text.piece(room, generator)
    cut = round(depth * room)
    head = text.start + filler[:cut] + needle
    return Question(head + filler[cut:], len(head), [asked], ([value],))


@lru_cache(maxsize=64)
def ruler_samples(
    variant: str, length: int, count: int, tokenizer_path: str, seed: int, needles: int
) -> list[ruler.Sample]:
    """`ruler.samples`, made once for all caches."""
    return ruler.samples(variant, length, count, tokenizer_path, 42 + seed, needles)


def ruler_question(config: RetrievalConfig, text: Text, cell: tuple, trial: int) -> Question:
    """A sample of one of RULER's tasks; its context is the text, and the question goes with the answer's beginning."""
    length, variant = cell
    tokenizer = text.tokenizer

    def message(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    # What the model needs beside the sample counts to its length; a chat template brings its own start of a text.
    start = [] if config.chat else text.start
    extra = len(text.encode(message(""))) if config.chat else len(start)
    how = (config.trials, tokenizer.name_or_path, config.seed, config.questions)
    sample = ruler_samples(variant, length - extra, *how)[trial]
    samples = [sample] if config.questions == 1 else ruler.ask_each(sample, config.questions)
    asked, ends = [], []
    for sample in samples:
        whole = sample.context + sample.question
        head, question, tail = (message(whole) if config.chat else whole).rpartition(sample.question)
        asked.append(text.encode(question + tail + sample.prefix))
        for answer in sample.answers:
            ends.append(head.rindex(answer) + len(answer))
    answer_end = len(start) + len(text.encode(head[: max(ends)]))
    return Question(start + text.encode(head), answer_end, asked, tuple([sample.answers for sample in samples]))


@torch.no_grad()
def answer_copying(config: RetrievalConfig, text: Text, question: Question, model, cache) -> tuple[int, int, float]:
    """Right answers, questions, and the mean loss of the listed orders in nats per word."""
    model(torch.tensor([question.prefilled], device=model.device), past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(len(question.asked))
    asked = torch.tensor(question.asked, device=model.device)
    pieces = asked[:, :-1].split(config.chunk, dim=1)
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    start = len(text.line_end)
    logs = logits[:, start - 1 :].float().log_softmax(-1)
    likelihood = logs.gather(2, asked[:, start:, None]).sum((1, 2)).view(config.lines, config.choices)
    right = (likelihood.argmax(1) == 0).sum().item()
    return right, config.lines, -likelihood[:, 0].mean().item() / config.words


@torch.no_grad()
def answer_needle(config: RetrievalConfig, text: Text, question: Question, model, cache) -> tuple[int, int, None]:
    """How many of the questions' values are in what the model goes on with, and how many there are."""
    prefilled = torch.tensor([question.prefilled], device=model.device)
    model(prefilled, past_key_values=cache, logits_to_keep=1)
    right = 0
    for asked, values in zip(question.asked, question.values, strict=True):
        ids = torch.cat([prefilled, torch.tensor([asked], device=model.device)], dim=1)
        # The number and a little more, or as many tokens as RULER's answers have.
        room = config.new_tokens if config.task == "ruler" else len(text.encode(values[0])) + 4
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=text.tokenizer.pad_token_id or text.tokenizer.eos_token_id,
        )
        said = text.tokenizer.decode(output[0, ids.shape[1] :]).lower()
        right += sum(value.lower() in said for value in values)
    return right, sum(map(len, question.values)), None


#: How each task makes its questions, and how they are answered.
ASK = {
    "copying": (copying_question, answer_copying),
    "needle": (needle_question, answer_needle),
    "ruler": (ruler_question, answer_needle),
}


def packed_answer(scheme: CacheScheme, question: Question) -> bool:
    """Whether all that is asked for lies in the sinks or in packed blocks once the text is prefilled."""
    return scheme.sink_length + packed_tokens(scheme, len(question.prefilled)) >= question.answer_end


def check_questions(config: RetrievalConfig, text: Text) -> None:
    """Refuse cells that no model could be asked.

    Raises:
        ValueError: A text is longer than the model's positions, or what is asked for would not be packed yet.
    """
    for cell in config.cells():
        question = ASK[config.task][0](config, text, cell, 0)
        answer = config.new_tokens if config.task == "ruler" else 0
        config.check_length(len(question.prefilled) + max(map(len, question.asked)) + answer)
        for name, scheme in config.schemes().items():
            if config.task != "ruler" and not packed_answer(scheme, question):
                raise ValueError(
                    f"{'distances' if config.task == 'copying' else 'depths'}: at {_key(cell)} what is asked for would "
                    f"not be packed yet in {name!r}; it must lie further back"
                )


def main(config: RetrievalConfig) -> dict:
    """Ask what is not in the output yet, the dense model first; returns the record."""
    file = open_results(config)
    record = file.record
    text = Text(config, AutoTokenizer.from_pretrained(find_model(config.dense)))
    if record.setdefault("text", text.description) != text.description:
        file.refuse("another text")
    check_questions(config, text)
    make_question, answer = ASK[config.task]
    schemes = config.schemes()
    every_cell = itertools.product(config.names(), config.cells())
    asked = [(name, _key(cell), cell, {}) for name, cell in every_cell]
    if config.task == "copying":
        asked.insert(len(config.cells()), ("dense", "control", config.cells()[0], {"listed": False}))
    for name, key, cell, how in tqdm(asked, desc="Cells"):
        done = record["results"].setdefault(name, {"cells": {}})
        if key in done["cells"]:
            continue
        model, make_cache = config.open(name)
        found, packed = [], 0
        for trial in range(config.trials):
            question, cache = make_question(config, text, cell, trial, **how), make_cache()
            found.append(answer(config, text, question, model, cache))
            packed += name != "dense" and packed_answer(schemes[name], question)
        right, questions = (sum(x) for x in list(zip(*found))[:2])
        done["cells"][key] = {"right": right, "questions": questions, "score": right / questions}
        done["cells"][key]["right_by_text"] = [x[0] for x in found]
        if config.task == "ruler" and name != "dense":
            done["cells"][key]["packed"] = packed
        if config.task == "copying":
            done["cells"][key]["loss_per_word"] = sum(x[2] for x in found) / len(found)
        done |= describe_cache(model, cache, [len(question.prefilled)])
        file.save()
    record["verdict"] = verdict(record)
    file.save()
    if file.path:
        plots.retrieval(record, file.path.with_suffix(".png"))
    print(retrieval_table(record))
    print(f"\n{record['verdict']}")
    return record


def _key(cell: tuple) -> str:
    return " ".join(map(format_part, cell))


def format_part(part: float | str) -> str:
    """One part of a cell's key: a distance, length or depth, or the name of a variant."""
    return part if isinstance(part, str) else f"{part:g}"


def told_apart(record: dict) -> list[str]:
    """The cells in which the dense model scores enough for a cache to be judged."""
    cells = record["results"]["dense"]["cells"]
    return [key for key, x in cells.items() if key != "control" and x["score"] >= record["config"]["least_dense"]]


def verdict(record: dict) -> str:
    """Say in words what the scores show of the caches, and what they do not."""
    least, shown = record["config"]["least_dense"], told_apart(record)
    cells = record["results"]["dense"]["cells"]
    weak = [key for key in cells if key not in (*shown, "control")]
    if not shown:
        best = max(cells[key]["score"] for key in weak)
        return (
            f"The dense model scores {best:.2f} at best, less than {least:g} everywhere: this task shows nothing about "
            "the caches with this model."
        )
    said = f"The dense model scores {least:g} or more in {len(shown)} of {len(shown) + len(weak)} cells."
    if "control" in cells:
        said += f" Without the listing it scores {cells['control']['score']:.2f}."
    if weak:
        said += f" In the others ({', '.join(weak)}) it is too weak itself for the caches to be judged."
    return said


def difference(record: dict, name: str) -> dict[str, float] | None:
    """Mean score of a cache less the dense model's, with its interval over the texts, which both have read.

    Over the cells in which the dense model scores enough. `None`: there are none, or a single text in each.
    """
    shown, paired = told_apart(record), []
    for key in shown:
        mine, dense = record["results"][name]["cells"][key], record["results"]["dense"]["cells"][key]
        each = dense["questions"] / len(dense["right_by_text"])
        for a, b in zip(mine["right_by_text"], dense["right_by_text"], strict=True):
            paired.append((a - b) / each)
    if len(paired) < 2 * max(1, len(shown)):
        return None
    return bootstrap_mean(paired, strata=len(shown))


def retrieval_table(record: dict) -> str:
    """Scores by cache and cell as Markdown; means are over the cells in which the dense model scores enough."""
    shown, results = told_apart(record), record["results"]
    cells = [key for key in results["dense"]["cells"] if key != "control"]
    copying = record["config"]["task"] == "copying"
    heads = ["cache", "bytes of dense at 4k"]
    for key in cells:
        heads.append(key if key in shown else f"{key} (dense too weak)")
    heads += ["mean", "loss over dense, nats per word" if copying else "less than dense [95%]"]

    def mean(name: str, field: str) -> float:
        return sum(results[name]["cells"][key][field] for key in shown) / len(shown) if shown else float("nan")

    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in results.items():
        row = [name, f"{1 / found['ratio']['4096']:.2%}", *(f"{found['cells'][key]['score']:.2f}" for key in cells)]
        row.append(f"{mean(name, 'score'):.3f}")
        if copying:
            row.append(f"{mean(name, 'loss_per_word') - mean('dense', 'loss_per_word'):+.3f}")
        elif name != "dense" and (less := difference(record, name)) is not None:
            row.append(f"{less['mean']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]")
        else:
            row.append("–")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_config(RetrievalConfig, __doc__))
