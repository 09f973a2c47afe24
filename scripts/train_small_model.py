"""Train the small Llama in `models/tiny-python-llama` on the source code of the Python standard library.

The model has the shape that cache compression cares about (head size 64, 8 query and 4 key/value heads,
context 2,048) at 8.7 M parameters, so that quality can be measured on any machine, without a hub. The
recipe is a fixed number of steps: about an hour on two cores. Every choice that affects the weights is an
option below or a constant, and the order of the data depends on the seed alone, so a run that
was interrupted goes on to the same result when the same command is given again.

    OMP_WAIT_POLICY=PASSIVE nohup nice -n 5 python scripts/train_small_model.py > train.log 2>&1 &

A passive wait policy matters where other processes share the cores: threads that spin while they wait for
each other slow training several times over. Progress is in the output and, one line per ten steps, in
`build/train/log.jsonl`.
"""

import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scripts.common import cpu_name, parse_config
from scripts.corpus import Document, describe, stdlib_documents, tokenize_windows

BOS, PAD = "<|endoftext|>", "<|pad|>"
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    # About 1 / sqrt(hidden_size); with the usual 0.02 short trials learned more slowly (LOG.md).
    "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# A conversation as one Python file, the only kind of text that the model has seen: what the assistant says is code, all
# else docstrings. (After a comment the model writes comments, without end.)
CHAT_TEMPLATE = r'''
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role in ("system", "user") %}
        {{- '"""' + message.content | trim + '"""\n\n\n' }}
    {%- elif message.role == "assistant" %}
        {{- message.content + "\n\n\n" }}
    {%- else %}
        {{- raise_exception("role " + message.role + ": must be system, user or assistant") }}
    {%- endif %}
{%- endfor %}
'''.lstrip()
POSITION_BUCKETS = ((0, 256), (256, 512), (512, 1024), (1024, 2048))
# Options that may differ between the parts of an interrupted run: they do not affect the weights.
FREE_OPTIONS = ("output", "work_dir", "save_every", "evaluate_every", "threads")


@dataclass
class TrainingConfig:
    """Options of the run; the defaults are the recipe of the checkpoint in the repository."""

    output: str = field(
        default="models/tiny-python-llama",
        metadata={"help": "Directory for checkpoint, tokenizer, model card and training_report.json."},
    )
    work_dir: str = field(
        default="build/train",
        metadata={
            "help": "Directory for what a rerun resumes from (tokenizer, state.pt) and for log.jsonl. "
            "Delete it to start again."
        },
    )
    steps: int = field(default=3600, metadata={"help": "Optimizer steps."})
    tokens_per_step: int = field(
        default=2048, metadata={"help": "Tokens per optimizer step; a multiple of --micro_batch_tokens."}
    )
    micro_batch_tokens: int = field(
        default=2048,
        metadata={"help": "Tokens per forward pass; a multiple of --long_length. Sets memory use only."},
    )
    short_length: int = field(
        default=512, metadata={"help": "Tokens per sequence of the first phase; divides --long_length."}
    )
    long_length: int = field(
        default=2048, metadata={"help": "Tokens per sequence of the last phase; at most the context, 2048."}
    )
    long_fraction: float = field(
        default=0.3,
        metadata={"help": "Part of the steps, the last ones, with long sequences and decaying learning rate."},
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up to the peak."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of matrices; norms have none."})
    clip_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    seed: int = field(default=0, metadata={"help": "Seed of initial weights and data order."})
    bf16: bool = field(
        default=True, metadata={"help": "Compute in bfloat16, with float32 weights; --no_bf16: in float32."}
    )
    threads: int = field(default=2, metadata={"help": "CPU threads of PyTorch."})
    save_every: int = field(default=200, metadata={"help": "Steps between saves of what a rerun resumes."})
    evaluate_every: int = field(default=600, metadata={"help": "Steps between held-out losses in the log."})

    def __post_init__(self) -> None:
        for part, whole in (
            ("short_length", "long_length"),
            ("long_length", "micro_batch_tokens"),
            ("micro_batch_tokens", "tokens_per_step"),
        ):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} must be a multiple of {part}: {self}")
        if self.long_length > MODEL["max_position_embeddings"]:
            raise ValueError(f"long_length={self.long_length} exceeds the context of the model")

    @property
    def long_start(self) -> int:
        """First step with long sequences."""
        return round(self.steps * (1 - self.long_fraction))


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer that puts the beginning-of-text token before every text, as Llama's does."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=[BOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def deal(blocks: torch.Tensor, config: TrainingConfig) -> list[torch.Tensor]:
    """Sequences of every step, each [sequences, length], as a function of the seed alone.

    `blocks` [n, long_length] are dealt out in a new random order each epoch, so that no token comes twice
    before all have come once. Those of the first phase are cut into short sequences and shuffled again: the
    sequences of a step then come from different modules, which makes its gradient less noisy.
    """
    generator = torch.Generator().manual_seed(config.seed)
    per_step = config.tokens_per_step // config.long_length
    epochs = math.ceil(config.steps * per_step / len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
    boundary = config.long_start * per_step
    short = blocks[order[:boundary]].view(-1, config.short_length)
    short = short[torch.randperm(len(short), generator=generator)]
    long = blocks[order[boundary : config.steps * per_step]]
    return [*short.split(config.tokens_per_step // config.short_length), *long.split(per_step)]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Warm-up, constant, then linear decay to zero over the phase of long sequences."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    decay = min(1.0, (config.steps - step) / max(1, config.steps - config.long_start))
    return config.learning_rate * warmup * decay


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Cross-entropy in nats of all tokens but the first, [sequences, length - 1]; ids [sequences, length]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, windows: torch.Tensor, bf16: bool) -> dict[str, Any]:
    """Mean loss in nats per token of windows [n, length]: overall, and by position of the predicted token."""
    losses = torch.cat([token_losses(model, window[None], bf16) for window in windows])
    # Column j predicts position j + 1.
    by_position = {
        f"{start}-{end - 1}": losses[:, max(start - 1, 0) : end - 1].mean().item() for start, end in POSITION_BUCKETS
    }
    return {"loss": losses.mean().item(), "windows": len(windows), "loss_by_position": by_position}


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """Save `state` so that `path` holds either the old state or the new one, whenever the process ends."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    config: TrainingConfig, blocks: torch.Tensor, selection: torch.Tensor, text: dict[str, Any]
) -> tuple[LlamaForCausalLM, float]:
    """Train from the saved state if there is one, else from scratch; the model and the seconds it took.

    Args:
        blocks: training tokens, [n, long_length].
        selection: held-out tokens, [m, context], for the losses in the log.
        text: description of the training text; a state saved with another text or recipe is refused.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    recipe = {key: value for key, value in asdict(config).items() if key not in FREE_OPTIONS} | {"text": text}
    state_path, log_path = Path(config.work_dir, "state.pt"), Path(config.work_dir, "log.jsonl")
    first, seconds, rows = 0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path)
        if state["recipe"] != recipe:
            raise ValueError(f"{state_path} has another recipe or text: delete it or change --work_dir")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first, seconds, rows = state["step"], state["seconds"], state["rows"]
    # Rows logged after the last save are dropped: those steps are run again.
    log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = deal(blocks, config)
    started, losses = time.time() - seconds, []
    progress = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", mininterval=5)
    for step in progress:
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_started = time.time()
        micro_batches = batches[step].split(config.micro_batch_tokens // batches[step].shape[1])
        for micro_batch in micro_batches:
            loss = token_losses(model, micro_batch, config.bf16).mean() / len(micro_batches)
            loss.backward()
            losses.append(loss.item() * len(micro_batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        speed = config.tokens_per_step / (time.time() - step_started)
        evaluating = done % config.evaluate_every == 0 or done == config.steps
        if done % 10 == 0 or evaluating:
            row = {
                "step": done,
                "tokens": done * config.tokens_per_step,
                "loss": sum(losses) / len(losses),
                "learning_rate": rate,
                "tokens_per_second": round(speed),
                "seconds": round(time.time() - started, 1),
            }
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {done}")
            progress.set_postfix(loss=f"{row['loss']:.3f}", tokens_per_second=row["tokens_per_second"])
            if evaluating:
                row["selection"] = evaluate(model, selection, config.bf16)
            rows.append(row)
            losses = []
            with log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if done % config.save_every == 0 or done == config.steps:
            seconds = time.time() - started
            state = {
                "step": done,
                "seconds": seconds,
                "rows": rows,
                "recipe": recipe,
                "rng": torch.get_rng_state(),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            write_atomically(state_path, state)
    return model, seconds


def model_card(report: dict[str, Any]) -> str:
    """README.md of the checkpoint, from the report that lies beside it."""
    recipe, machine, texts = report["recipe"], report["machine"], report["text"]
    kinds = {"train": "training", "selection": "held out, watched", "test": "held out, reported only"}
    text_rows = "\n".join(
        f"| {split} | {kinds[split]} | {text['documents']:,} | {text['characters']:,} | `{text['sha256']}` |"
        for split, text in texts.items()
    )
    loss_rows = ""
    for split, result in report["held_out"].items():
        cells = [f"{loss:.3f}" for loss in (result["loss"], *result["loss_by_position"].values())]
        loss_rows += f"| {split} | {' | '.join(cells)} | {result['windows']} |\n"
    loss_rows = loss_rows.rstrip("\n")
    curve = "\n".join(
        f"| {row['step']:,} | {row['tokens']:,} | {row['loss']:.3f} | {row['selection']['loss']:.3f} |"
        for row in report["curve"]
    )
    buckets = " | ".join(f"{start}–{end - 1}" for start, end in POSITION_BUCKETS)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    speed = report["training_tokens"] / report["training_seconds"]
    short_steps = round(recipe["steps"] * (1 - recipe["long_fraction"]))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python, test-model]
---

# tiny-python-llama

A Llama of {report["parameters"] / 1e6:.2f} M parameters, trained from scratch on the source code of the
Python standard library. It is a toy for testing key/value-cache compression on any machine, with real
weights and no download: not a code assistant. What it writes looks like Python and means little.

This card is written by `scripts/train_small_model.py`, as is `training_report.json`, which holds the same
figures unrounded.

## Model

{MODEL["num_hidden_layers"]} layers, hidden size {MODEL["hidden_size"]}, MLP {MODEL["intermediate_size"]},
{MODEL["num_attention_heads"]} query and {MODEL["num_key_value_heads"]} key/value heads of size
{MODEL["head_dim"]}, context {MODEL["max_position_embeddings"]:,}, tied embeddings, weights in bfloat16.
Byte-level BPE of {MODEL["vocab_size"]:,} tokens: nothing is unknown to it. The tokenizer puts `{BOS}`
before a text, as Llama's does; the same token ends one. The chat template writes a conversation as one Python
file: the assistant's messages as code, the others as docstrings.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/tiny-python-llama")
tokenizer = AutoTokenizer.from_pretrained("models/tiny-python-llama")
```

## Held-out loss

Cross-entropy in nats per token of the files here (weights and computation in bfloat16), over consecutive
windows of {MODEL["max_position_embeddings"]:,} tokens of modules that are not in the training text; by
position of the predicted token in its window. Later positions have more context: where their loss is lower,
the model uses it.

| split | all | {buckets} | windows |
|---|---|{"---|" * len(POSITION_BUCKETS)}---|
{loss_rows}

While training (the loss on the training text is the mean of the last ten steps):

| step | tokens | training | selection |
|---|---|---|---|
{curve}

## Text

The standard library of Python {texts["train"]["python"]}, split by module name (the rule is in
`scripts/corpus.py`); the `test` package serves for training only. SHA-256 is over names and texts. A third
held-out split, `calibration`, is not used here.

| split | use | files | characters | SHA-256 |
|---|---|---|---|---|
{text_rows}

## Recipe

    {report["command"]}

{report["training_tokens"]:,} tokens ({report["epochs"]:.2f} epochs) in {recipe["steps"]:,} steps of
{recipe["tokens_per_step"]:,}: {short_steps:,} steps with sequences of {recipe["short_length"]}, then
{recipe["steps"] - short_steps:,} with sequences of {recipe["long_length"]:,}. AdamW (betas 0.9 and 0.95,
weight decay {recipe["weight_decay"]} on matrices), gradients clipped to norm {recipe["clip_norm"]};
learning rate {recipe["learning_rate"]}, warmed up over {recipe["warmup_steps"]} steps, constant, then
linear to zero over the phase of long sequences. Computed in {
        "bfloat16 with float32 weights" if recipe["bf16"] else "float32"
    }; seed {recipe["seed"]}.

It took {report["training_seconds"] / 60:.0f} minutes ({speed:,.0f} tokens/s) on {machine["threads"]}
threads of {machine["cpu"]}, with other work on the machine; {versions}.

## Licence

Weights and tokenizer: Apache-2.0. The training text is the Python standard library, under the PSF licence
(https://docs.python.org/3/license.html).
"""


def main(config: TrainingConfig) -> None:
    """Train, or go on training, then write checkpoint, tokenizer, card and report to `config.output`."""
    torch.set_num_threads(config.threads)
    work, output = Path(config.work_dir), Path(config.output)
    work.mkdir(parents=True, exist_ok=True)
    documents = {split: stdlib_documents(split) for split in ("train", "selection", "test")}
    texts = {split: describe(found) for split, found in documents.items()}
    tokenizer_path = work / "tokenizer"
    if not tokenizer_path.exists():
        train_tokenizer(documents["train"]).save_pretrained(tokenizer_path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    blocks = tokenize_windows(documents["train"], tokenizer, config.long_length)
    context = MODEL["max_position_embeddings"]
    windows = {name: tokenize_windows(documents[name], tokenizer, context) for name in ("selection", "test")}
    training_tokens = config.steps * config.tokens_per_step
    print(f"{blocks.numel():,} tokens in the training text; {training_tokens:,} to train on", flush=True)

    model, seconds = train(config, blocks, windows["selection"], texts["train"])
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The figures are those of the files as a user loads them: weights and computation in bf16.
    shipped = AutoModelForCausalLM.from_pretrained(output)
    report = {
        "parameters": shipped.num_parameters(),
        "model": MODEL,
        "recipe": {key: value for key, value in asdict(config).items() if key not in ("output", "work_dir")},
        "training_tokens": training_tokens,
        "epochs": training_tokens / blocks.numel(),
        "text": texts,
        "held_out": {split: evaluate(shipped, windows[split], bf16=False) for split in windows},
        "curve": [row for row in map(json.loads, (work / "log.jsonl").open()) if "selection" in row],
        "training_seconds": round(seconds, 1),
        "machine": {"cpu": cpu_name(), "threads": config.threads, "system": platform.system()},
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, tokenizers)},
        "command": shlex.join(["python", "scripts/train_small_model.py", *sys.argv[1:]]),
    }
    (output / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "README.md").write_text(model_card(report), encoding="utf-8")


if __name__ == "__main__":
    main(parse_config(TrainingConfig, __doc__))
