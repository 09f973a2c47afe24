"""Configuration of a Llama, Mistral or Qwen2 with low-rank key/value projections and a quantized latent KV cache."""

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, PreTrainedConfig

#: Widths that the packed cache can store. 1.58 is ternary; 1.5 has half of the channels at 2 bits and half at 1; 16 is
#: the lossless mode: the model's own dtype, untouched.
SUPPORTED_BITS = (1, 1.5, 1.58, 2, 3, 4, 8, 16)

#: Model types of dense checkpoints that can be split: decoders of Llama's layers.
DENSE_MODEL_TYPES = ("llama", "mistral", "qwen2")

#: What other decoders would need that a Llama does not have; only for the error message.
_NOT_SUPPORTED = {
    "gemma": "scaled embeddings and norms of weight 1 + w",
    "gemma2": "soft-capped scores, sliding windows, scaled embeddings and norms of weight 1 + w",
    "gemma3_text": "normalised queries and keys (q_norm, k_norm), sliding windows and scaled embeddings",
    "mixtral": "a mixture of experts",
    "olmo2": "normalised queries and keys (q_norm, k_norm)",
    "phi3": "fused projections (qkv_proj, gate_up_proj)",
    "qwen2_moe": "a mixture of experts",
    "qwen3": "normalised queries and keys (q_norm, k_norm)",
    "qwen3_moe": "normalised queries and keys (q_norm, k_norm) and a mixture of experts",
}

#: What the layers of a saved split model are: no class of the library takes it for one of its own types.
LATENT_LAYER_TYPE = "latent_attention of alrd_llama: see README.md of this folder"

_PROJECTION_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.([kv]_proj)")


def check_bits(field: str, value: float) -> None:
    """Raise a `ValueError` naming `field` unless `value` is one of `SUPPORTED_BITS`, of a type that JSON keeps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in SUPPORTED_BITS:
        widths = ", ".join(map(str, SUPPORTED_BITS))
        raise ValueError(f"{field}={value!r}: must be one of {widths} bits, an int or a float of Python")


def check_count(field: str, value: int) -> None:
    """Raise a `ValueError` naming `field` unless `value` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field}={value!r}: must be an integer of at least 0")


def check_tiers(tiers: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    """`tiers` as tuples: for each head group the (channels, bits) of its width tiers.

    Raises:
        ValueError: It has another form, a tier has no channel, or a width is not one that the cache stores.
    """
    form = "for each head group a list of [channels, bits]"
    if not isinstance(tiers, (list, tuple)) or not tiers or not all(isinstance(g, (list, tuple)) and g for g in tiers):
        raise ValueError(f"tiers={tiers!r}: must be {form}")
    for tier in (tier for group in tiers for tier in group):
        if not isinstance(tier, (list, tuple)) or len(tier) != 2:
            raise ValueError(f"tiers={tiers!r}: must be {form}")
        check_count("tiers: channels", tier[0])
        if tier[0] == 0:
            raise ValueError(f"tiers={tiers!r}: a tier must have a channel")
        check_bits("tiers: bits", tier[1])
    return tuple(tuple((n, int(b) if b == int(b) else b) for n, b in group) for group in tiers)


def check_choice(field: str, value, choices: tuple) -> None:
    """Raise a `ValueError` naming `field` unless `value` is one of `choices`, and of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}")


def check_positive(name: str, *values: float) -> None:
    """Raise a `ValueError` naming the field `name` unless all `values` are above 0."""
    for value in values:
        if not value > 0:
            raise ValueError(f"{name}={value!r}: must be above 0")


def parse_json(name: str, text: str | None) -> Any:
    """The value of the option `name`, which is JSON or not given."""
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: must be JSON ({error})") from None


def check_dense_model_type(field: str, value: str | None) -> None:
    """Raise a `ValueError` naming `field` and what is missing unless `value` is one of `DENSE_MODEL_TYPES`."""
    if value not in DENSE_MODEL_TYPES:
        missing = _NOT_SUPPORTED.get(value, "other decoders' attention and layers")
        choices = ", ".join(map(repr, DENSE_MODEL_TYPES))
        raise ValueError(f"{field}={value!r}: must be one of {choices}; not supported: {missing}")


@dataclass(frozen=True)
class QuantScheme:
    """How one side of the cache, keys or values, is quantized; `to_dict` gives JSON types.

    Args:
        bits: Width of a code, one of `SUPPORTED_BITS`.
        orientation: "per_channel": one scale per channel and group of tokens; "per_token": one per token and group of
            channels.
        group_size: Elements that share a scale. 0: per channel the 128 tokens of a block, per token a whole head group.
        symmetric: Levels around 0, no zero point is stored. `None`: below two bits only. Ternary is always symmetric.
        range_method: "minmax": the levels span the group's range; "mse": the range of least measured squared error.
            `None`: "minmax", below two bits "mse".
        rotation: Rotate each head group by a Hadamard matrix before quantizing and back on reading. For the states of
            other models: the latents of a split model are rotated by their factors (`k_hadamard`, `v_hadamard`).
        static: Scales per channel come from calibration (`modules/formats/calibrated_int8.py`) and are stored once per
            layer.
        protected: Share of the tokens of a block, in [0, 1), that is kept at `protected_bits`.
        protected_bits: Width of a protected token, above `bits`.
        quantizer: Name under which a quantizer of your own is registered (`modules/cache/codecs.py`); `None`: by
            `bits`.
        tiers: For each head group the (channels, bits) of its width tiers, in the order of the channels; `bits` then
            says nothing. `None`: one width.

    Raises:
        ValueError: A field, or a combination, is out of range; the message names field, value and rule.
    """

    bits: float = 2
    orientation: str = "per_channel"
    group_size: int = 128
    symmetric: bool | None = None
    range_method: str | None = None
    rotation: bool = False
    static: bool = False
    protected: float = 0.0
    protected_bits: float = 4
    quantizer: str | None = None
    tiers: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def __post_init__(self):
        check_bits("bits", self.bits)
        check_choice("orientation", self.orientation, ("per_channel", "per_token"))
        check_count("group_size", self.group_size)
        check_choice("symmetric", self.symmetric, (True, False, None))
        check_choice("range_method", self.range_method, ("minmax", "mse", None))
        check_choice("rotation", self.rotation, (True, False))
        check_choice("static", self.static, (True, False))
        share = isinstance(self.protected, (int, float)) and not isinstance(self.protected, bool)
        if not share or not 0 <= self.protected < 1:
            raise ValueError(f"protected={self.protected!r}: must be a share in [0, 1)")
        check_bits("protected_bits", self.protected_bits)
        if self.quantizer is not None and not isinstance(self.quantizer, str):
            raise ValueError(f"quantizer={self.quantizer!r}: must be the name of a registered quantizer, or None")
        if self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "protected", float(self.protected))
        narrow = self.bits < 2 and self.tiers is None  # with tiers `bits` says nothing
        by_width = narrow and self.bits != 1.5
        object.__setattr__(self, "symmetric", by_width if self.symmetric is None else self.symmetric)
        object.__setattr__(self, "range_method", self.range_method or ("mse" if narrow else "minmax"))
        self._check_combinations()

    def at_width(self, bits: float) -> "QuantScheme":
        """The scheme of one width tier."""
        by_width = {"symmetric": False} if self.static else {"symmetric": None, "range_method": None}
        if bits == 16:
            by_width = {"symmetric": None, "range_method": None, "static": False}
        elif self.range_method == "mse" and bits <= 2:
            by_width["range_method"] = "mse"
        return replace(self, bits=bits, tiers=None, **by_width)

    def _check_tiers(self) -> None:
        object.__setattr__(self, "tiers", check_tiers(self.tiers))
        if self.rotation or self.protected or self.quantizer is not None:
            raise ValueError(
                "tiers: give each channel its width, so rotation, protected and quantizer must not be set; got "
                f"rotation={self.rotation}, protected={self.protected}, quantizer={self.quantizer!r}"
            )
        for bits in {bits for group in self.tiers for _, bits in group}:
            self.at_width(bits)

    def _check_combinations(self) -> None:
        if self.tiers is not None:
            return self._check_tiers()
        if self.bits == 1.58 and not self.symmetric:
            raise ValueError("symmetric=False: ternary codes (bits=1.58) are symmetric")
        if self.bits == 1.5 and (self.symmetric or not self.per_channel):
            raise ValueError(
                f"bits=1.5: keeps the channels of widest range at 2 bits, so it must be per_channel and not symmetric, "
                f"got orientation={self.orientation!r}, symmetric={self.symmetric}"
            )
        if self.range_method == "minmax" and self.symmetric and self.bits < 2:
            raise ValueError(
                f"range_method='minmax': symmetric codes of {self.bits} bits have no level at zero or none at the "
                "extremes; their scale is chosen by 'mse'"
            )
        if self.static and not (
            self.per_channel
            and self.bits in (1, 2, 3, 4, 8)
            and not (self.symmetric and self.bits == 1)
            and not self.rotation
            and not self.protected
        ):
            raise ValueError(
                "static=True: calibrated scales are per_channel, of 1 (not symmetric), 2, 3, 4 or 8 bits, without "
                f"rotation or protected tokens; got {self.orientation}, {self.bits} bits, symmetric={self.symmetric}, "
                f"rotation={self.rotation}, protected={self.protected}"
            )
        if self.protected and not self.bits < self.protected_bits:
            raise ValueError(f"protected_bits={self.protected_bits}: must be above bits={self.bits}")
        if self.protected and self.protected_bits == 1.5 and not self.per_channel:
            raise ValueError("protected_bits=1.5: mixes two widths by channel, so it must be per_channel")
        if self.static and self.quantizer is not None:
            raise ValueError(f"quantizer={self.quantizer!r}: static=True has a quantizer of its own")

    @property
    def per_channel(self) -> bool:
        return self.orientation == "per_channel"

    def to_dict(self) -> dict:
        """The fields, in types that JSON keeps; `QuantScheme(**d)` is the way back."""
        return asdict(self)

    def __str__(self) -> str:
        """E.g. `2-bit per channel in groups of 128 (mse)`, what differs from the defaults of the width in brackets."""
        if self.bits == 16 and self.quantizer is None and not self.tiers:
            return "16-bit"  # the states themselves, whatever the other fields say
        notes = [self.range_method] if self.range_method != ("mse" if self.bits < 2 else "minmax") else []
        notes += ["symmetric"] if self.symmetric and self.bits >= 2 else []
        notes += ["asymmetric"] if self.bits == 1 and not self.symmetric else []
        notes += [name for name in ("static", "rotation") if getattr(self, name)]
        notes += [f"{self.protected:.0%} of tokens at {self.protected_bits} bits"] if self.protected else []
        notes += [self.quantizer] if self.quantizer else []
        if self.tiers:
            widths = "/".join(map(str, sorted({b for group in self.tiers for _, b in group}, reverse=True)))
            return f"{widths}-bit tiers {self.orientation.replace('_', ' ')}" + (" (static)" if self.static else "")
        reach = f" in groups of {self.group_size}" if self.group_size else ""
        notes = f" ({', '.join(notes)})" if notes else ""
        return f"{self.bits}-bit {self.orientation.replace('_', ' ')}{reach}{notes}"


def side_scheme(side: str, bits: float, group_size: int, fields: dict | None) -> QuantScheme:
    """The `QuantScheme` that the settings of a cache mean.

    Args:
        side: "k": keys, per channel unless `fields` say otherwise; "v": values, per token.
        bits: The setting `k_bits` or `v_bits`.
        group_size: The setting `group_size`.
        fields: The setting `k_scheme` or `v_scheme`: other fields of `QuantScheme` by name.

    Raises:
        ValueError: As for `QuantScheme`; the message begins with the setting.
    """
    check_bits(f"{side}_bits", bits)
    check_count("group_size", group_size)
    fields = {} if fields is None else fields
    names = [name for name in QuantScheme.__dataclass_fields__ if name != "bits"]
    if not isinstance(fields, dict) or not set(fields) <= set(names):
        raise ValueError(f"{side}_scheme={fields!r}: must be a dictionary with keys among {', '.join(names)}")
    base = QuantScheme(orientation="per_channel" if side == "k" else "per_token", group_size=group_size)
    try:
        # `None` stands for a default that follows from the width.
        return replace(base, **{"symmetric": None, "range_method": None, **fields, "bits": bits})
    except ValueError as error:
        raise ValueError(f"{side}_scheme, with {side}_bits={bits}: {error}") from None


def check_width_beside_tiers(side: str, given: float, stored: float) -> None:
    """Refuse another width for a side of a stored configuration whose width tiers take its place."""
    if given != stored:
        raise ValueError(
            f"{side}_bits={given!r}: must be {stored} as stored, for the width_tiers of {side}_proj take its place; "
            f"for one width give {side}_bits to create_kivi_cache(), or width_tiers={{}} too"
        )


def _check_given_widths(stored: dict, given: dict) -> None:
    """`check_width_beside_tiers` of a stored configuration and the fields that are given beside it."""
    for side in ("k", "v"):
        field, tiers = f"{side}_bits", stored.get("width_tiers") or {}
        if field in given and "width_tiers" not in given and any(name.endswith(f"{side}_proj") for name in tiers):
            check_width_beside_tiers(side, given[field], stored.get(field, getattr(ALRDLlamaConfig, field)))


class ALRDLlamaConfig(LlamaConfig):
    r"""A `LlamaConfig` plus the ranks of the split projections and the settings of their KV cache.

    ALRD stands for adaptive low-rank decomposition: each projection is split at a rank of its own.

    It also describes a split Mistral or Qwen2, whose fields that a Llama does not have are kept for the way back. As
    every token is cached and attended to, `sliding_window` must be `None` or at least `max_position_embeddings`, and
    the model then refuses a text beyond it; `use_sliding_window` must be off and `layer_types`, if given,
    `"full_attention"`.

    A saved `config.json` of split projections calls its layers `LATENT_LAYER_TYPE`, so that `LlamaForCausalLM` refuses
    the folder, whose keys and values it would make up.

    Args:
        dense_model_type (`str`, defaults to `"llama"`):
            Model type of the dense checkpoint, one of `DENSE_MODEL_TYPES`: what `to_dense` gives back. A Mistral has
            no biases, a Qwen2 has them on q, k and v: for these two `attention_bias` and `mlp_bias` follow from it.
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
        k_bits, v_bits (`int` or `float`, default to 2): Width of a cached key or value code, one of `SUPPORTED_BITS`.
        group_size (`int`, defaults to 128):
            Elements that share a scale. 0: one scale per channel and block of 128 tokens for keys, one per token
            over the whole rank of a head group for values.
        residual_length (`int`, defaults to 32): At least this many of the newest tokens stay in full precision.
        sink_length (`int`, defaults to 4): The first tokens of a row that stay in full precision.
        k_scheme, v_scheme (`dict`, *optional*):
            Other fields of `QuantScheme` for keys or values, e.g. `{"range_method": "mse"}` or `{"group_size": 64}`.
        width_tiers (`dict[str, list]`, defaults to `{}`):
            Widths by channel of the latents of split projections, by name as in `truncation_ranks`: for each head group
            a list of `[channels, bits]` in the order of its channels, e.g. `[[[1, 16], [24, 4], [60, 2]]]`. A side
            whose projection is named has these widths in place of `k_bits` or `v_bits`.
        k_mean_split, v_mean_split (`bool`, default to `False`):
            Whether calibrated factors have the mean of the keys or values in a channel of its own, the first of each
            head group, with width tiers in the tier of its width; the others then average to zero (`factor_weight`).
        k_hadamard, v_hadamard (`bool`, default to `True`):
            Whether the latent is rotated by an orthogonal Hadamard matrix, folded into the factors when a dense
            weight is split. Stored factors are never rotated again.

    Raises:
        ValueError: A field, or a combination, is out of range. The message names field, value and rule. Fields that
            are assigned later are checked by `check_latent_cache`, which models and caches call.
    """

    model_type = "alrd_llama"

    dense_model_type: str = "llama"
    truncation_ranks: dict | None = None
    head_group_size: int | None = None
    use_kivi: bool = True
    k_bits: int | float = 2
    v_bits: int | float = 2
    group_size: int = 128
    residual_length: int = 32
    sink_length: int = 4
    k_scheme: dict | None = None
    v_scheme: dict | None = None
    width_tiers: dict | None = None
    k_mean_split: bool = False
    v_mean_split: bool = False
    k_hadamard: bool = True
    v_hadamard: bool = True

    def __post_init__(self, **kwargs):
        if set(kwargs.get("layer_types") or ()) == {LATENT_LAYER_TYPE}:
            del kwargs["layer_types"]
            if self.dense_model_type == "qwen2":
                kwargs["layer_types"] = ["full_attention"] * self.num_hidden_layers
        # A dense model's dictionary brings its own model_type; kept, it would hide our weight conversion.
        source = kwargs.pop("model_type", self.model_type)
        if source != self.model_type:
            check_dense_model_type("model_type", source)
            self.dense_model_type = source
        if self.dense_model_type != "llama":
            self.attention_bias, self.mlp_bias = self.dense_model_type == "qwen2", False
            kwargs.setdefault("sliding_window", None)  # left out, it would be exported as Mistral's default
        if self.truncation_ranks is None:
            self.truncation_ranks = {}
        if self.width_tiers is None:
            self.width_tiers = {}
        super().__post_init__(**kwargs)
        self.check_latent_cache()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            check_dense_model_type(f"{pretrained_model_name_or_path}: model_type", model_type)
            # A missing key means the default of the dense model's own class.
            config_dict = cls.from_llama(AutoConfig.for_model(**config_dict)).to_dict()
        return config_dict, kwargs

    @classmethod
    def from_llama(cls, config: PreTrainedConfig, **fields) -> "ALRDLlamaConfig":
        """Return the configuration of a dense or split model's `config` with the given `fields` of this class set."""
        stored = config.to_dict()
        _check_given_widths(stored, fields)
        return cls(**{**stored, **fields})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        _check_given_widths(config_dict, kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dense(self) -> PreTrainedConfig:
        """The configuration of the dense model, of its own class."""
        dense_class = CONFIG_MAPPING[self.dense_model_type]
        foreign = set(type(self).__dataclass_fields__) - set(dense_class.__dataclass_fields__)
        if self.head_dim != self.hidden_size // self.num_attention_heads:
            foreign.discard("head_dim")  # a Qwen2 reads it, though it is no field of its class
        foreign |= {"model_type", "architectures"}
        return dense_class(**{name: value for name, value in self.to_dict().items() if name not in foreign})

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to `config.json`."""
        latent = {"layer_types": [LATENT_LAYER_TYPE] * self.num_hidden_layers} if self.truncation_ranks else {}
        return super().to_diff_dict() | latent

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

    def tiered_scheme(self, layer_idx: int, projection: str) -> QuantScheme | None:
        """What the cache stores of `projection` ("k_proj" or "v_proj") in a layer, if it has width tiers."""
        tiers, side = self.width_tiers.get(f"model.layers.{layer_idx}.self_attn.{projection}"), projection[0]
        if tiers is None:
            return None
        fields = {**(getattr(self, f"{side}_scheme") or {}), "tiers": tiers}
        return side_scheme(side, getattr(self, f"{side}_bits"), self.group_size, fields)

    def check_latent_cache(self) -> None:
        """Check the fields of this class; see the class docstring for the rules."""
        check_dense_model_type("dense_model_type", self.dense_model_type)
        self._check_full_attention()
        for side in ("k", "v"):
            scheme = side_scheme(side, getattr(self, f"{side}_bits"), self.group_size, getattr(self, f"{side}_scheme"))
            if not self.use_kivi and getattr(self, f"{side}_scheme"):
                raise ValueError(
                    f"{side}_scheme: the simple scheme (use_kivi=False) reads {side}_bits and group_size only"
                )
            if not self.use_kivi and scheme.bits == 1.5:
                raise ValueError(f"{side}_bits=1.5: the simple scheme (use_kivi=False) rounds each token by itself")
        for field in ("residual_length", "sink_length"):
            check_count(field, getattr(self, field))
        for field in ("use_kivi", "k_hadamard", "v_hadamard", "k_mean_split", "v_mean_split"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r}: must be True or False")

        size, heads = self.head_group_size, self.num_key_value_heads
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1 or heads % size):
            raise ValueError(f"head_group_size={size!r}: must divide num_key_value_heads={heads}")
        if not isinstance(self.truncation_ranks, dict):
            raise ValueError(f"truncation_ranks={self.truncation_ranks!r}: must map projection names to ranks")
        for name, rank in self.truncation_ranks.items():
            self._check_rank(name, rank)
        if not isinstance(self.width_tiers, dict):
            raise ValueError(f"width_tiers={self.width_tiers!r}: must map projection names to tiers")
        if self.width_tiers and not self.use_kivi:
            raise ValueError("width_tiers: the simple scheme (use_kivi=False) has one width for all channels")
        for name in self.width_tiers:
            self._check_tiers(name)

    def _check_tiers(self, name: str) -> None:
        field, match = f"width_tiers[{name!r}]", _PROJECTION_NAME.fullmatch(str(name))
        if match is None or name not in self.truncation_ranks:
            raise ValueError(f"{field}: must be a projection that truncation_ranks names")
        ranks = self.group_ranks(int(match[1]), match[2])
        try:
            check_tiers(self.width_tiers[name])
            channels = tuple(sum(n for n, _ in group) for group in self.tiered_scheme(int(match[1]), match[2]).tiers)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        if channels != ranks:
            raise ValueError(f"{field}: tiers of {list(channels)} channels must fill the group ranks {list(ranks)}")

    def _check_full_attention(self) -> None:
        for field, right in (("is_causal", True), ("attention_chunk_size", None), ("is_heterogeneous", False)):
            if getattr(self, field, right) != right:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}: must be {right!r}; every token attends to all tokens up to it, "
                    "in all layers alike"
                )
        if getattr(self, "use_sliding_window", False):
            raise ValueError("use_sliding_window=True: must be False; attention over a sliding window is not supported")
        window, longest = getattr(self, "sliding_window", None), self.max_position_embeddings
        if window is not None and window < longest:
            raise ValueError(
                f"sliding_window={window!r}: must be None or at least max_position_embeddings={longest}; attention "
                "over a sliding window is not supported"
            )
        others = sorted(set(getattr(self, "layer_types", None) or ()) - {"full_attention"})
        if others:
            raise ValueError(f"layer_types: must all be 'full_attention'; not supported: {', '.join(others)}")

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

__all__ = ["DENSE_MODEL_TYPES", "SUPPORTED_BITS", "ALRDLlamaConfig", "QuantScheme"]
