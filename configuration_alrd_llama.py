"""Configuration of a Llama model with low-rank key/value projections and a quantized latent KV cache."""

import re
from numbers import Real

from transformers import AutoConfig, LlamaConfig

#: Widths that the packed cache can store. 16 is the lossless mode: the model's own dtype, untouched.
SUPPORTED_BITS = (2, 3, 4, 8, 16)

_PROJECTION_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.([kv]_proj)")


def check_bits(field: str, value: Real) -> None:
    """Raise a `ValueError` naming `field` unless `value` is one of `SUPPORTED_BITS`."""
    if isinstance(value, bool) or not isinstance(value, Real) or value not in SUPPORTED_BITS:
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(str, SUPPORTED_BITS))} bits")


def check_count(field: str, value: int) -> None:
    """Raise a `ValueError` naming `field` unless `value` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field}={value!r}: must be an integer of at least 0")


class ALRDLlamaConfig(LlamaConfig):
    r"""A `LlamaConfig` plus the ranks of the split projections and the settings of their KV cache.

    Args:
        truncation_ranks (`dict[str, int | list[int]]`, defaults to `{}`):
            Rank of each split projection by its name, `"model.layers.{i}.self_attn.{k,v}_proj"`. An int is the
            projection's total rank, spread evenly over its head groups (the first groups take the remainder); a list
            gives one rank per group. A projection that is not named stays dense.
        head_group_size (`int`, *optional*):
            Key/value heads that share one latent; must divide `num_key_value_heads`. `None` means all of them
            (joint), 1 means one SVD per head.
        use_kivi (`bool`, defaults to `True`):
            Whether the model makes a packed `KIVILatentCache` when it needs a cache and is given none. `False` is
            the simple scheme: latents are rounded per token and full keys and values go to a stock cache.
        k_bits, v_bits (`int` or `float`, default to 2): Width of a cached key or value code, one of 2, 3, 4, 8, 16.
        group_size (`int`, defaults to 128):
            Elements that share a scale. 0: one scale per channel and block of 128 tokens for keys, one per token
            over the whole rank of a head group for values.
        residual_length (`int`, defaults to 32): At least this many of the newest tokens stay in full precision.
        sink_length (`int`, defaults to 4): The first tokens of a row that stay in full precision.
        k_hadamard, v_hadamard (`bool`, default to `True`):
            Whether the latent is rotated by an orthogonal Hadamard matrix, folded into the factors when a dense
            weight is split. Stored factors are never rotated again.

    Raises:
        ValueError: A field, or a combination, is out of range. The message names field, value and rule. Fields that
            are assigned later are checked by `check_latent_cache`, which models and caches call.
    """

    model_type = "alrd_llama"

    truncation_ranks: dict | None = None
    head_group_size: int | None = None
    use_kivi: bool = True
    k_bits: int | float = 2
    v_bits: int | float = 2
    group_size: int = 128
    residual_length: int = 32
    sink_length: int = 4
    k_hadamard: bool = True
    v_hadamard: bool = True

    def __post_init__(self, **kwargs):
        # A plain Llama's dictionary brings its own model_type; kept, it would hide our weight conversion.
        kwargs.pop("model_type", None)
        if self.truncation_ranks is None:
            self.truncation_ranks = {}
        super().__post_init__(**kwargs)
        self.check_latent_cache()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in ("llama", cls.model_type):
            raise ValueError(
                f"model_type={model_type!r} of {pretrained_model_name_or_path!r}: must be 'llama' or {cls.model_type!r}"
            )
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_llama(cls, config: LlamaConfig, **fields) -> "ALRDLlamaConfig":
        """Return the configuration of `config`'s model with the given `fields` of this class set."""
        return cls(**{**config.to_dict(), **fields})

    @property
    def num_head_groups(self) -> int:
        """Groups of key/value heads that share one latent."""
        return self.num_key_value_heads // (self.head_group_size or self.num_key_value_heads)

    @property
    def full_group_rank(self) -> int:
        """Largest rank of one head group: the smaller side of its part of the weight."""
        return min(self.num_key_value_heads * self.head_dim // self.num_head_groups, self.hidden_size)

    def group_ranks(self, layer_idx: int, projection: str) -> tuple[int, ...] | None:
        """Ranks of the head groups of `projection` ("k_proj" or "v_proj") in a layer; `None` if it stays dense."""
        rank = self.truncation_ranks.get(f"model.layers.{layer_idx}.self_attn.{projection}")
        if rank is None:
            return None
        if isinstance(rank, int):
            share, remainder = divmod(rank, self.num_head_groups)
            return tuple(share + (i < remainder) for i in range(self.num_head_groups))
        return tuple(rank)

    def cached_widths(self, layer_idx: int, projection: str) -> tuple[int, ...]:
        """Channels that the cache stores per token, by group: the latent's ranks, or one head size per dense head."""
        return self.group_ranks(layer_idx, projection) or (self.head_dim,) * self.num_key_value_heads

    def check_latent_cache(self) -> None:
        """Check the fields of this class; see the class docstring for the rules."""
        for field in ("k_bits", "v_bits"):
            check_bits(field, getattr(self, field))
        for field in ("group_size", "residual_length", "sink_length"):
            check_count(field, getattr(self, field))
        for field in ("use_kivi", "k_hadamard", "v_hadamard"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r}: must be True or False")

        size, heads = self.head_group_size, self.num_key_value_heads
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1 or heads % size):
            raise ValueError(f"head_group_size={size!r}: must divide num_key_value_heads={heads}")
        if not isinstance(self.truncation_ranks, dict):
            raise ValueError(f"truncation_ranks={self.truncation_ranks!r}: must map projection names to ranks")
        for name, rank in self.truncation_ranks.items():
            self._check_rank(name, rank)

    def _check_rank(self, name: str, rank: int | list[int]) -> None:
        field = f"truncation_ranks[{name!r}]"
        match = _PROJECTION_NAME.fullmatch(str(name))
        if match is None or int(match[1]) >= self.num_hidden_layers:
            raise ValueError(
                f"{field}: no such projection; names are 'model.layers.{{i}}.self_attn.k_proj' and '….v_proj' with i "
                f"from 0 to {self.num_hidden_layers - 1}"
            )
        ranks = rank if isinstance(rank, (list, tuple)) else [rank]
        if any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
            raise ValueError(f"{field}={rank!r}: must be an int or a list of ints")
        if ranks is rank and len(rank) != self.num_head_groups:
            raise ValueError(f"{field}={rank!r}: must have one rank for each of {self.num_head_groups} head groups")
        groups = 1 if ranks is rank else self.num_head_groups
        if any(not groups <= r <= groups * self.full_group_rank for r in ranks):
            raise ValueError(
                f"{field}={rank!r}: must be from {groups} to the full rank {groups * self.full_group_rank}"
                + (" per head group" if ranks is rank else f" ({groups} head groups of at most {self.full_group_rank})")
            )


AutoConfig.register(ALRDLlamaConfig.model_type, ALRDLlamaConfig, exist_ok=True)

__all__ = ["SUPPORTED_BITS", "ALRDLlamaConfig"]
