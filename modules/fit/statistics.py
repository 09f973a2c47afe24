"""Statistics of a dense model on text: all that the choice of factors, ranks and widths needs, in one pass.

For every key and value projection the moments of its outputs, the Fisher information of the model with respect to them,
and a sample of them in runs of consecutive tokens. The first tokens of a text are attention sinks, whose keys and
values are outliers; the cache keeps them exact, and they take no part in any of it. Sums are kept in float64. The pass
is written to a file as it goes and goes on from there, with the same bits, when it is started again.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from configuration_alrd_llama import SIDES, Block, Projection
from modules.cache.fingerprint import weights_at_hand
from modules.files import save_tensors
from modules.fit.distributed import is_main, on_main, rounds, sum_tensors
from modules.loading import execution_device, state_tensors
from modules.projections import source, stored_form

#: Version of the files; part of their key.
FILE_VERSION = 3

#: Fields of a configuration that change no number.
_UNRELATED = ("_name_or_path", "architectures", "dtype", "transformers_version")

#: Ends of the names of what is kept by window and token; all else is summed up.
_BY_WINDOW = (".sample", ".gradient")

#: Tokens whose logits are held at once.
_LOGITS_TOKENS = 256


@dataclass
class ProjectionStatistics:
    """Moments of the outputs y of one key or value projection, n = H_kv * d.

    They are y = W x, a bias left out, or where the architecture has a norm on keys what this norm gives.
    Means are over the tokens behind the first `sinks` of each window.

    Attributes:
        covariance: `[n, n]` float64, `E[y yᵀ]`, uncentred.
        mean: `[n]` float64, `E[y]`.
        fisher: `[n, n]` float64, `E[g gᵀ]` of the gradients g of `-log p(token)` with respect to the y of one token,
            the next tokens drawn from the model itself. `None` if it was not asked for.
        sample: `[windows, S, n]`, outputs of consecutive tokens from `sample_start` on, in the type of the model.
        gradient: `[windows, S, n]` bfloat16, g of the same tokens. `None` without the Fisher information.
    """

    covariance: torch.Tensor
    mean: torch.Tensor
    fisher: torch.Tensor | None
    sample: torch.Tensor
    gradient: torch.Tensor | None


@dataclass
class LayerStatistics:
    """Statistics of one attention layer.

    Attributes:
        k_proj, v_proj: Of its projections.
        query_covariance: `[H_q, d, d]` float64, `E[q qᵀ]` of each query head before RoPE, bias and norm included.
    """

    k_proj: ProjectionStatistics
    v_proj: ProjectionStatistics
    query_covariance: torch.Tensor

    @property
    def query_energy(self) -> torch.Tensor:
        """`[H_q, d/2]`, `E|q_f|²` of each head and frequency."""
        return self.query_covariance.diagonal(dim1=1, dim2=2).unflatten(-1, (2, -1)).sum(1)


def model_digest(model: nn.Module) -> str:
    """SHA-256 of the names, types and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    # In the order of their names, which does not depend on how the model was built.
    for name, tensor in state_tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def statistics_record(
    model: PreTrainedModel, tokens: torch.Tensor, fisher: bool, sample: int, sinks: int, batch_size: int, seed: int
) -> dict:
    """All that the statistics depend on: model, tokens, settings, versions."""
    # Fields that change no number would only keep a file from being found again.
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in _UNRELATED:
        config.pop(name, None)
    return {
        "version": FILE_VERSION,
        "model": model_digest(model),
        "config": config,
        "tokens": hashlib.sha256(tokens.cpu().contiguous().numpy()).hexdigest(),
        "shape": list(tokens.shape),
        "dtype": str(model.dtype),
        "device": execution_device(model).type,
        "fisher": fisher,
        "sample": sample,
        "sinks": sinks,
        "batch_size": batch_size,
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def record_key(record: dict) -> str:
    """Name of the file for a record: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def collect_statistics(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    fisher: bool = True,
    sample: int = 256,
    sinks: int = 4,
    batch_size: int = 4,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    about: dict | None = None,
    save_seconds: float = 60.0,
    processes: PartialState | None = None,
) -> list[LayerStatistics]:
    """Run a dense model (`ARCHITECTURES`) over text once, forwards and, for the Fisher information, backwards.

    The backward pass recomputes each layer (gradient checkpointing), so that beside the weights only the hidden states
    of a batch and one layer's activations are held; the sums live on the CPU.

    Args:
        model: The dense model, on any device, or some of it offloaded by accelerate.
        tokens: `[windows, T]` token ids without pads.
        fisher: Collect the Fisher information too, at about three times the cost of the forward pass.
        sample: Consecutive tokens of each window that are kept as they are, from `sample_start` on.
        sinks: First tokens of a window that the cache will keep exact, left out of every statistic.
        batch_size: Windows at a time.
        seed: Of the tokens that the model draws for the Fisher information.
        folder: Where the statistics are kept, in a file named by a key that contains everything they depend on; a
            file that is there is used, a part of one is completed. `None`: not kept.
        about: What a reader of the file's record may want to know beside its key: names of model and text, commit.
        save_seconds: Time between two saves of a pass that is under way.
        processes: Of `distributed`, over which the batches are divided. Each draws what it would draw alone;
            only the rounding of the sums differs from those of one process. The main one alone uses the `folder`.

    Returns:
        One `LayerStatistics` per layer, the same bits in all processes.

    Raises:
        ValueError: The text is too short: no token, or windows shorter than `sinks` and `sample`, one token at least.
    """
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens: {list(tokens.shape)} must be [windows, T] with at least one token")
    behind = max(sample, 1)
    if tokens.shape[1] < sinks + behind:
        raise ValueError(f"tokens: windows of {tokens.shape[1]} must hold {sinks} sinks and {behind} sampled tokens")
    record = statistics_record(model, tokens, fisher, sample, sinks, batch_size, seed)
    path = None if folder is None else Path(folder) / f"{record_key(record)}.safetensors"
    sums, batches = _empty_sums(model, fisher, sample, len(tokens)), tokens.split(batch_size)

    def due() -> bool:
        return time.monotonic() - saved > save_seconds

    def save() -> None:
        # Samples are kept by window: those of batches to come are not there yet.
        held, windows = dict(sums), min(done * batch_size, len(tokens))
        for name, tensor in sums.items():
            if name.endswith(_BY_WINDOW):
                held[name] = tensor[:windows]
        save_tensors(path, held, {"batches": str(done)})
        text = json.dumps(record | {"about": about or {}}, indent=2) + "\n"
        path.with_suffix(".json").write_text(text, encoding="utf-8")

    kept = done = on_main(processes, _load, path, sums)
    saved = time.monotonic()
    if kept < len(batches):
        progress = tqdm(desc="Statistics", initial=kept, total=len(batches), disable=not is_main(processes))
        with progress, _observed(model, fisher, sinks, sample, sums) as next_batch:
            for indices, count in rounds(processes, range(kept, len(batches))):
                for i in indices:
                    next_batch(i * batch_size)
                    # The draw of a batch depends on its index alone, so that a pass can be divided and gone on with.
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
                    _run(model, batches[i].to(execution_device(model)), fisher, generator)
                done += count
                progress.update(count)
                if path is not None and done < len(batches) and on_main(processes, due):
                    sum_tensors(processes, sums)
                    on_main(processes, save)
                    saved = time.monotonic()
                    if not is_main(processes):  # what was summed is with the main process now
                        for x in sums.values():
                            x.zero_()
    # Now every process has the sums of all.
    sum_tensors(processes, sums)
    if path is not None and kept < len(batches):
        on_main(processes, save)
    return _to_layers(model, sums, tokens[:, sinks:].numel())


def sample_start(window: int, length: int, sample: int, sinks: int) -> int:
    """First token that is sampled of a window of `length` tokens.

    Starts are spread evenly over the windows, by multiples of the golden section: of windows that follow each other,
    often of one document, any few are sampled at places far apart.
    """
    share = window * (math.sqrt(5) - 1) / 2 % 1
    return sinks + int(share * (length - sinks - sample + 1))


def member_samples(
    statistics: list[LayerStatistics], part: Projection | Block, groups: int, field: str = "sample"
) -> list[torch.Tensor]:
    """Outputs of the sampled tokens, for each of `groups` head groups, those of the members of a block side by side.

    Args:
        statistics: Of every layer.
        part: A projection, or a block, whose outputs are returned less their mean.
        groups: Head groups.
        field: "sample"; or "gradient".

    Returns:
        For each head group `[windows, S, members * out]`.
    """
    members = []
    for projection in part.members():
        of_member = getattr(statistics[projection.layer], projection.attribute)
        states = getattr(of_member, field)
        if field == "sample" and isinstance(part, Block):
            states = states.float() - of_member.mean.float()
        members.append(states.chunk(groups, dim=-1))
    return list(map(partial(torch.cat, dim=-1), zip(*members, strict=True)))


def _empty_sums(model: PreTrainedModel, fisher: bool, sample: int, windows: int) -> dict[str, torch.Tensor]:
    """Zeros for the sums of a pass, by layer, projection and field of `ProjectionStatistics`, and for the queries."""
    sums, float64 = {}, {"dtype": torch.float64, "device": "cpu"}
    for i, layer in enumerate(model.model.layers):
        attention, heads = layer.self_attn, model.config.num_attention_heads
        sums[f"{i}.query"] = torch.zeros(heads, attention.head_dim, attention.head_dim, **float64)
        for side in SIDES:
            n, prefix = model.config.num_key_value_heads * attention.head_dim, f"{i}.{side}_proj"
            sums[f"{prefix}.covariance"] = torch.zeros(n, n, **float64)
            sums[f"{prefix}.mean"] = torch.zeros(n, **float64)
            sums[f"{prefix}.sample"] = torch.zeros(windows, sample, n, dtype=model.dtype, device="cpu")
            if fisher:
                sums[f"{prefix}.fisher"] = torch.zeros(n, n, **float64)
                sums[f"{prefix}.gradient"] = torch.zeros(windows, sample, n, dtype=torch.bfloat16, device="cpu")
    return sums


@contextlib.contextmanager
def _observed(
    model: PreTrainedModel, fisher: bool, sinks: int, sample: int, sums: dict[str, torch.Tensor]
) -> Iterator[Callable[[int], None]]:
    """Add the outputs of each layer's projections, and their gradients, to the sums; yields a function that must be
    called before each batch, with the number of its first window.

    With the Fisher information the weights are frozen, and each layer is recomputed in the backward pass.
    """
    seen: set[str] = set()
    window = 0

    def next_batch(first: int) -> None:
        nonlocal window
        seen.clear()
        window = first

    def behind_sinks(x: torch.Tensor) -> torch.Tensor:
        # `[tokens, n]`, where the model is: only sums go to the CPU.
        return x[:, sinks:].flatten(0, 1).double()

    def watch(name: str, attention: nn.Module, side: str):
        def keep_sample(field: str, states: torch.Tensor) -> None:
            for i, of_window in enumerate(states, start=window):
                start = sample_start(i, len(of_window), sample, sinks)
                sums[f"{name}.{field}"][i] = of_window[start : start + sample].cpu()

        def forward(module, inputs, output):
            if output.requires_grad and side != "q":
                output.register_hook(backward)
            if name in seen:  # the backward pass computes a layer again
                return
            seen.add(name)
            y = stored_form(attention, side, output.detach())
            if side == "q":
                # `[H_q, tokens, d]`: each head has a second moment of its own.
                heads = behind_sinks(y).unflatten(-1, (model.config.num_attention_heads, -1)).transpose(0, 1)
                sums[name] += (heads.transpose(1, 2) @ heads).cpu()
                return
            with weights_at_hand(module):  # after its forward an offloaded one is away again
                bias = getattr(module, "bias", None)
                if bias is not None:
                    y = y - stored_form(attention, side, bias.detach())
            keep_sample("sample", y)
            y = behind_sinks(y)
            sums[f"{name}.covariance"] += (y.T @ y).cpu()
            sums[f"{name}.mean"] += y.sum(0).cpu()

        def backward(gradient):
            # An error of the sinks costs nothing, for there is none.
            gradient = stored_form(attention, side, gradient.detach())
            keep_sample("gradient", gradient)
            g = behind_sinks(gradient)
            sums[f"{name}.fisher"] += (g.T @ g).cpu()

        return forward

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers, handles = model.model.layers, []
    forwards = [vars(layer).get("forward") for layer in layers]  # accelerate puts its own there when it offloads
    for i, layer in enumerate(layers):
        for side, name in (("q", "query"), ("k", "k_proj"), ("v", "v_proj")):
            attention = layer.self_attn
            hook = watch(f"{i}.{name}", attention, side)
            handles.append(source(attention, side).register_forward_hook(hook))
    try:
        # Only what a layer takes in is kept for the backward pass, which runs the layer again.
        if fisher:
            model.requires_grad_(False)
            for layer in layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield next_batch
    finally:
        for handle in handles:
            handle.remove()
        if fisher:
            for layer, before in zip(layers, forwards):
                del layer.forward  # the one of its class is behind it
                if before is not None:
                    layer.forward = before
        for parameter in trained:
            parameter.requires_grad_()


def _run(model: PreTrainedModel, batch: torch.Tensor, fisher: bool, generator: torch.Generator) -> None:
    """One batch forwards and, if asked for, backwards from tokens that the model draws."""
    if not fisher:
        with torch.no_grad():
            model.model(batch, use_cache=False)
        return
    # With frozen weights a gradient reaches the layers through the embeddings.
    embeds = model.get_input_embeddings()(batch).detach().requires_grad_()
    with torch.enable_grad():
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state.flatten(0, 1)
        shares = torch.rand(len(hidden), dtype=torch.float64, generator=generator, device="cpu").to(hidden.device)
        gradients = []
        # The logits of a whole batch would be larger than all else: a few tokens have theirs at a time.
        for piece, some in zip(hidden.detach().split(_LOGITS_TOKENS), shares.split(_LOGITS_TOKENS)):
            logits = _logits(model, piece.requires_grad_()).float()
            loss = nn.functional.cross_entropy(logits, _drawn(logits.detach(), some), reduction="sum")
            gradients += torch.autograd.grad(loss, piece)
        hidden.backward(torch.cat(gradients))


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, V]` of last hidden states `[tokens, C]`, by the model's own head, scaled as it says."""
    decoder, before = model.model, vars(model.model).get("forward")
    # The model is asked with a decoder that knows the answer.
    decoder.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def _drawn(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """`[tokens]`, those at which the cumulative probabilities of `[tokens, V]` logits pass `shares` in [0, 1)."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    passed = torch.searchsorted(cumulative, shares[:, None] * cumulative[:, -1:], right=True)
    return passed[:, 0].clamp(max=logits.shape[-1] - 1)


def _to_layers(model: PreTrainedModel, sums: dict[str, torch.Tensor], tokens: int) -> list[LayerStatistics]:
    """The statistics of each layer: the sums over `tokens` tokens, divided by their number in place."""
    layers = []
    for i in range(len(model.model.layers)):
        sides = []
        for side in SIDES:
            found = {}
            for field in fields(ProjectionStatistics):
                found[field.name] = sums.get(f"{i}.{side}_proj.{field.name}")
                if f".{field.name}" not in _BY_WINDOW and found[field.name] is not None:
                    found[field.name].div_(tokens)
            sides.append(ProjectionStatistics(**found))
        layers.append(LayerStatistics(*sides, sums[f"{i}.query"].div_(tokens)))
    return layers


def _load(path: Path | None, sums: dict[str, torch.Tensor]) -> int:
    """Fill in the sums of a file, if there is one; returns how many batches they are of."""
    if path is None or not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                sums[name][: len(tensor)] = tensor
            return int(file.metadata()["batches"])
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged, delete it to collect the statistics anew ({error})") from None
