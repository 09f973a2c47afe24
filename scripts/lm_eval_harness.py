"""Tasks of lm-evaluation-harness scored *through* the packed cache, beside the dense model's scores.

    python scripts/lm_eval_harness.py --tasks stdlib_next_lines --checkpoints build/sixteenth --output build/tasks.json
    python scripts/lm_eval_harness.py --dense meta-llama/Llama-3.1-8B --bits 4 2 --tasks hellaswag --num_fewshot 10

The harness's own `hf` model scores a text in one forward pass, which never reads a quantized token: whatever the bits,
it gives the score of the full-precision latent. Here the context but for its last token is the prefill, and the rest is
fed in chunks, so that every scored token is predicted from the cache as decoding finds it. A score comes with the
settings and true bytes of its cache, and with the share of its tokens that had a packed context; a task in which
nothing was packed is refused. Tasks are the harness's, those of scripts/lm_eval_tasks, and those in --include_path.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from configuration_alrd_llama import check_positive
from scripts.common import ROOT, find_model, parse_config
from scripts.compared_caches import ComparedCaches, PackedContext, describe_cache, open_results

#: The tasks of this repository, made of what is on every machine.
TASKS = ROOT / "scripts" / "lm_eval_tasks"


@dataclass
class HarnessConfig(ComparedCaches):
    """The tasks, the caches, and how the tokens are fed."""

    tasks: list[str] = field(
        default_factory=lambda: ["stdlib_next_lines"], metadata={"help": "Names of tasks or groups of the harness."}
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder with the YAML files of more tasks."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the context. None: the task's."})
    limit: int | None = field(default=None, metadata={"help": "Score only the first questions of each task."})
    chunk: int = field(default=1, metadata={"help": "Tokens per step after the prefill; 1 is decoding."})
    batch_size: int = field(default=8, metadata={"help": "Continuations at a time."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a text, the last ones. None: the positions of the model."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive("chunk", self.chunk)
        check_positive("batch_size", self.batch_size)
        if not self.tasks:
            raise ValueError("tasks=[]: must name at least one")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"include_path={self.include_path!r}: must be an existing folder")
        if self.max_length is not None:
            self.check_length(self.max_length)


@dataclass(frozen=True)
class Continuation:
    """One text to score: `prefix` is prefilled, `fed` is fed in steps, and each of its tokens predicts a `target`."""

    prefix: tuple[int, ...]
    fed: tuple[int, ...]
    targets: tuple[int, ...]


class ThroughCacheLM(HFLM):
    """The harness's model, with every score read from a cache of its own.

    Args:
        model: Dense or split.
        tokenizer: Of the model.
        make_cache: Makes an empty cache for it.
        chunk: Tokens per step after the prefill.
        batch_size: Continuations at a time.
        max_length: Tokens of a text, the last ones; `None`: the positions of the model.

    Attributes:
        lengths: Tokens that the rows held in the end.
        context: How much of the scored tokens' context was packed.
        last_cache: The cache of the last batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        make_cache: Callable[[], Cache],
        chunk: int = 1,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        super().__init__(model, "causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.make_cache, self.chunk = make_cache, chunk
        self.lengths: list[int] = []
        self.context = PackedContext(getattr(make_cache(), "scheme", None))
        self.last_cache: Cache | None = None

    @torch.no_grad()
    def _feed(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, **how) -> torch.Tensor:
        """Logits `[B, L, V]` of `[B, L]` tokens on top of a cache; `mask`: `[B, past + L]`, 0 for pads."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        how |= {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return self.model(ids, **how).logits

    def _padded(self, rows: Iterable[tuple[int, ...]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, L]` padded on one side, and their mask."""
        rows = list(rows)
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids, mask = [], []
        for row in rows:
            padding = [0] * (width - len(row))
            mask.append(padding + [1] * len(row) if left else [1] * len(row) + padding)
            filler = [pad] * len(padding)
            ids.append(filler + list(row) if left else list(row) + filler)
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _score(self, batch: list[Continuation]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens is the likeliest."""
        prefixes = list(dict.fromkeys(c.prefix for c in batch))
        rows = torch.tensor([prefixes.index(c.prefix) for c in batch], device=self.device)
        cache = self.make_cache()
        ids, mask = self._padded(prefixes, left=True)
        if ids.shape[1]:
            self._feed(ids, mask, cache, logits_to_keep=1)
            cache.batch_select_indices(rows)  # continuations of one context share its packed blocks
        mask = mask[rows]

        fed, _ = self._padded((c.fed for c in batch), left=False)
        targets, scored = self._padded((c.targets for c in batch), left=False)
        total = torch.zeros(len(batch), device=self.device)
        greedy = torch.ones(len(batch), dtype=torch.bool, device=self.device)
        for start in range(0, fed.shape[1], self.chunk):
            step = slice(start, start + self.chunk)
            # Behind the end of a continuation pads are fed as tokens: nothing that is scored comes after them.
            mask = torch.cat([mask, torch.ones_like(fed[:, step])], dim=1)
            logs = self._feed(fed[:, step], mask, cache).float().log_softmax(-1)
            real = scored[:, step].bool()
            found = logs.gather(2, targets[:, step, None]).squeeze(2)
            total += found.masked_fill(~real, 0.0).sum(1)
            greedy &= ((logs.argmax(-1) == targets[:, step]) | ~real).all(1)
        for c in batch:
            self.context.add_steps(len(c.prefix), len(c.fed), self.chunk)
        self.lengths += [len(c.prefix) + len(c.fed) for c in batch]
        self.last_cache = cache
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """As `HFLM` has it: scores of `(texts, context tokens, continuation tokens)`, in their order."""
        continuations = []
        for _, context, continuation in requests:
            count = len(continuation)
            if not 0 < count <= self.max_length:
                raise ValueError(f"a continuation of {count} tokens: must have 1 to {self.max_length}")
            kept = tuple((list(context) + list(continuation))[-(self.max_length + 1) :])
            continuations.append(Continuation(kept[: -count - 1], kept[-count - 1 : -1], kept[-count:]))
        # Alike prefixes side by side: they are prefilled once, and rows of one length need no pads.
        order = sorted(range(len(requests)), key=lambda i: (len(continuations[i].prefix), continuations[i].prefix))
        scores: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Continuations")
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._score([continuations[i] for i in batch]), strict=True):
                scores[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
            progress.update(len(batch))
        progress.close()
        return [scores[i] for i in range(len(requests))]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **how) -> torch.Tensor:
        """Generate from left-padded `[B, L]` tokens; the prompt but for its last token is prefilled."""
        mask, cache = how["attention_mask"], self.make_cache()
        if context.shape[1] > 1:
            self._feed(context[:, :-1], mask[:, :-1], cache, logits_to_keep=1)
        tokens = super()._model_generate(context, max_length, stop, past_key_values=cache, **how)
        new = tokens[:, context.shape[1] :]
        for prompt, count in zip(mask.sum(1).tolist(), (new != self.tokenizer.pad_token_id).sum(1).tolist()):
            self.context.add_steps(prompt - 1, count, 1)
            self.lengths.append(prompt - 1 + count)
        self.last_cache = cache
        return tokens

    def report(self) -> dict:
        """The cache that scores were read from: settings, bytes, and how much of the context was packed."""
        return {**self.context.record(), **describe_cache(self.model, self.last_cache, self.lengths)}


def find_tasks(config: HarnessConfig) -> TaskManager:
    """Task manager over our folders; falls back to the harness's full (slow) index if a task is missing."""
    folders = [str(TASKS), *([config.include_path] if config.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(config.tasks) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=folders)
    unknown = sorted(set(config.tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"tasks: {', '.join(unknown)} must be tasks of the harness or in {', '.join(folders)}")
    return manager


def measure(config: HarnessConfig, name: str, task: str, manager: TaskManager) -> dict:
    """Scores of one task through the cache of this name.

    Raises:
        ValueError: The cache is a packed one, and no scored token had a packed context.
    """
    model, make_cache = config.open(name)
    tokenizer = AutoTokenizer.from_pretrained(find_model(config.dense))
    lm = ThroughCacheLM(model, tokenizer, make_cache, config.chunk, config.batch_size, config.max_length)
    found = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, num_fewshot=config.num_fewshot, limit=config.limit, log_samples=False
    )
    report = lm.report()
    if report.get("tokens_with_packed_context") == 0:
        raise ValueError(
            f"tasks: no token that {task!r} scores has a packed context in {name!r}: its score would be that of "
            "full precision; take longer contexts (num_fewshot), a smaller group_size or a shorter residual_length"
        )
    scores = {part: _numbers(metrics) for part, metrics in found["results"].items()}
    return {"scores": scores, "samples": found["n-samples"], **report}


def _numbers(metrics: dict) -> dict[str, float]:
    """The metrics that are numbers, not names or notes."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def main(config: HarnessConfig) -> dict:
    """Measure what is not in the output yet, the dense model first; returns the record."""
    file = open_results(config)
    record = file.record
    record["environment"]["lm_eval"] = lm_eval.__version__
    manager = find_tasks(config)
    for task in config.tasks:
        done = record["results"].setdefault(task, {})
        for name in config.names():
            if name not in done:
                done[name] = measure(config, name, task, manager)
                file.save()
    print(scores_table(record))
    return record


def scores_table(record: dict) -> str:
    """Scores beside the dense model's as Markdown, a row per task, metric and cache."""
    lines = [
        "| task, metric | cache | score | less the dense model's | bytes of dense, as scored | at 4k "
        "| tokens with packed context | packed share of it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for caches in record["results"].values():
        for part, metrics in caches["dense"]["scores"].items():
            for metric in metrics:
                if "_stderr" in metric or metric == "sample_len":
                    continue
                for name in caches:
                    cells = [f"{part}, {metric.removesuffix(',none')}", name, *_score_cells(caches, name, part, metric)]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _score_cells(caches: dict, name: str, part: str, metric: str) -> list[str]:
    """Cells of the cache `name`, from its score on."""
    measured, dense = caches[name], caches["dense"]
    score = measured["scores"][part][metric]
    error = measured["scores"][part].get(metric.replace(",", "_stderr,"))
    shown = f"{score:.4f} ± {error:.4f}" if error else f"{score:.4f}"
    sizes = [f"{1 / measured['ratio'][length]:.2%}" for length in ("measured", "4096")]
    if name == "dense":
        return [shown, "–", *sizes, "–", "–"]
    loss = score - dense["scores"][part][metric]
    packed = measured["tokens_with_packed_context"] / measured["scored_tokens"]
    return [shown, f"{loss:+.4f}", *sizes, f"{packed:.1%}", f"{measured['packed_share_of_context']:.1%}"]


if __name__ == "__main__":
    main(parse_config(HarnessConfig, __doc__))
