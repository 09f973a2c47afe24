"""Tiny models for the tests, with weights large enough that a wrong key or value changes the result."""

from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.kernels.packed import LatentQuery

#: Fields of the tiny Llama: 3 layers, head size 16, 8 query heads on 4 key/value heads. No token ends a text.
TINY_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}

#: Fields of a model whose figures are checked by hand: two layers, four query heads of 8 on two key/value heads.
SMALL_LLAMA = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@torch.no_grad()
def randomize_vectors(model: torch.nn.Module) -> None:
    """Give norm weights and biases, which the library sets to one and zero, values that matter."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))


def tiny_dense(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    """A random Llama; the same one for the same arguments.

    Args:
        seed: Of the weights.
        dtype: Of the weights.
        overrides: Fields of `LlamaConfig`, e.g. `num_key_value_heads=8` for MHA or `attention_bias=True`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **overrides}))
        randomize_vectors(model)
    return model.to(dtype).eval()


def save_byte_tokenizer(path: Path) -> None:
    """A tokenizer of bytes: 257 tokens, the first of them `<s>`."""
    alphabet = ["<s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)


def all_ranks(num_layers: int, ranks: int | dict[str, int | list[int]]) -> dict[str, int | list[int]]:
    """`truncation_ranks` with the same rank in every layer, for both projections or by `"k_proj"` and `"v_proj"`."""
    by_projection = ranks if isinstance(ranks, dict) else {"k_proj": ranks, "v_proj": ranks}
    return {
        f"model.layers.{i}.self_attn.{projection}": rank
        for i in range(num_layers)
        for projection, rank in by_projection.items()
    }


def tiny_split(
    tmp_path: Path,
    ranks: int | dict[str, int | list[int]] = 32,
    head_group_size: int | None = None,
    dense: LlamaForCausalLM | None = None,
    **config_fields,
) -> ALRDLlamaForCausalLM:
    """Save a dense model and load it split.

    Args:
        tmp_path: A directory of the test; the dense model is saved in its `dense`.
        ranks: One rank for all projections, or ranks by `"k_proj"` and `"v_proj"`, or by full names.
        head_group_size: Key/value heads per latent.
        dense: The model to split; default: `tiny_dense()`.
        config_fields: Other fields of `ALRDLlamaConfig`.
    """
    dense = tiny_dense() if dense is None else dense
    dense.save_pretrained(tmp_path / "dense")
    full_names = isinstance(ranks, dict) and any(name.startswith("model.") for name in ranks)
    config = ALRDLlamaConfig.from_llama(
        dense.config,
        truncation_ranks=ranks if full_names else all_ranks(dense.config.num_hidden_layers, ranks),
        head_group_size=head_group_size,
        **config_fields,
    )
    return ALRDLlamaForCausalLM.from_pretrained(tmp_path / "dense", config=config, dtype=dense.dtype).eval()


def tiny_blocks(
    dense: LlamaForCausalLM | None = None, share: float = 1.0, splits: list[dict] | None = None, **config_fields
) -> ALRDLlamaForCausalLM:
    """Split a dense model into blocks of projections.

    Args:
        dense: The model to split; default: `tiny_dense()`.
        share: Of the full rank, kept in every head group.
        splits: As for `ALRDLlamaForCausalLM.from_dense`.
        config_fields: Fields of `ALRDLlamaConfig`, e.g. `layer_group_size=2`, `joint_kv=True`.
    """
    dense = tiny_dense() if dense is None else dense
    config = ALRDLlamaConfig.from_llama(dense.config, keep_dense=True, **config_fields)
    for block in config.blocks():
        rank = max(1, round(share * config.full_rank(block)))
        config.truncation_ranks.setdefault(block.name, [rank] * config.num_head_groups)
    return ALRDLlamaForCausalLM.from_dense(dense, config, splits)


def magnitudes(length: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks `[8, length, channels]` of the largest, smallest, constant and mixed values that `dtype` allows."""
    limit, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    noise = torch.rand(length, channels) * 2 - 1
    blocks = [
        torch.zeros(length, channels),
        torch.full((length, channels), -7.3),
        noise * 0.99 * limit,
        noise * limit / 100 + 0.9 * limit,
        noise * 3 * tiny,
        noise * tiny / 64,  # subnormal
        torch.where(noise > 0.8, 1e4, 1e-4 * noise),
        torch.where(noise > 0, limit, -limit),
    ]
    return torch.stack(blocks).clamp(-limit, limit).to(dtype)


def attend(attention: Callable, *options, query: torch.Tensor, cache, **fields):
    """Call a `latent_attention` by keywords: the states of a `LatentQuery`, its other fields, and the cache."""
    return attention(LatentQuery(query, **fields), cache, *options)


def assert_same(actual, expected) -> None:
    """Check that all tensors are equal and of one type; `expected` is on the CPU, and may hold `None`."""
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
        else:
            assert (a.dtype, a.shape) == (e.dtype, e.shape)
            assert torch.equal(a.cpu(), e)
