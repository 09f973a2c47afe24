"""Configuration of a Llama, or a decoder of its family, with low-rank keys and values and a quantized latent cache."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, PreTrainedConfig

#: Widths that the packed cache can store. 1.58 is ternary; 1.5 has half of the channels at 2 bits and half at 1; 16 is
#: the lossless mode: the model's own dtype, untouched.
SUPPORTED_BITS = (1, 1.5, 1.58, 2, 3, 4, 5, 6, 8, 16)

#: The two sides of an attention that are split and cached, keys and values, as in `k_proj` and `v_bits`.
SIDES = ("k", "v")

#: What a code means: a level of its channel, or with those of the channels before a point (`modules/trellis.py`).
CODES = ("uniform", "trellis")


@dataclass(frozen=True)
class Traits:
    """What an architecture's attention does otherwise than a Llama's; all else is the library's own code.

    Args:
        qkv_bias: Whether q, k and v have biases; o and the MLP then have none. `None`: as the dense configuration's
            fields `attention_bias` and `mlp_bias` say, if it has them.
        has_window: Whether layers have the configuration's `sliding_window`.
        has_layer_types: Whether the dense configuration lists its `layer_types`: only layers of
            `"sliding_attention"` then have the window.
        norm: What `q_norm` and `k_norm`, where an attention has them, take the mean square over: "head", each head by
            itself, or "all" heads together; `None`: there are none.
        heads_first: Whether these norms see `[B, H, L, d]` and not `[B, L, H, d]`.
        fused: Whether `qkv_proj` has queries, keys and values side by side, in place of three projections.
        partial_rotary: Whether RoPE turns only a share of each head's channels, the first ones, as
            `rope_parameters["partial_rotary_factor"]` says.
        neighbours: Whether RoPE turns channel 2i with 2i + 1, and how the library lays out the cosines of the pairs:
            "pairs", each twice, or "halves", all of them twice. `None`: it turns i with i + d/2.
        rope_switch: Attribute of the attention that is false in layers without RoPE; `None`: all layers have it.
    """

    qkv_bias: bool | None = None
    has_window: bool = False
    has_layer_types: bool = False
    norm: str | None = None
    heads_first: bool = False
    fused: bool = False
    partial_rotary: bool = False
    neighbours: str | None = None
    rope_switch: str | None = None

    @property
    def of_outputs(self) -> bool:
        """Whether keys are more than a product of a weight: latents are then made of outputs (`keep_dense`)."""
        return self.norm is not None or self.fused or self.partial_rotary or self.neighbours is not None


#: The dense architectures that can be split, by model type.
ARCHITECTURES = {
    "llama": Traits(),
    "mistral": Traits(qkv_bias=False, has_window=True),
    "qwen2": Traits(qkv_bias=True, has_window=True, has_layer_types=True),
    "qwen3": Traits(norm="head", has_window=True, has_layer_types=True),
    "qwen3_moe": Traits(norm="head", has_window=True),
    "mixtral": Traits(has_window=True),
    "olmo2": Traits(norm="all"),
    "olmoe": Traits(norm="all"),
    "granite": Traits(),
    "granitemoe": Traits(),
    "smollm3": Traits(rope_switch="use_rope", has_window=True, has_layer_types=True),
    "phi3": Traits(fused=True, partial_rotary=True, has_window=True),
    "gemma": Traits(),
    "gemma3_text": Traits(norm="head", heads_first=True, has_window=True, has_layer_types=True),
    "arcee": Traits(),
    "seed_oss": Traits(),
    "starcoder2": Traits(has_window=True),
    "dots1": Traits(norm="head", has_window=True, has_layer_types=True),
    "qwen2_moe": Traits(has_window=True, has_layer_types=True),
    "flex_olmo": Traits(norm="all"),
    "olmo3": Traits(norm="all", has_window=True, has_layer_types=True),
    "olmo": Traits(),
    "mellum": Traits(norm="head", has_window=True, has_layer_types=True),
    "ministral": Traits(has_window=True, has_layer_types=True),
    "jais2": Traits(),
    "hyperclovax": Traits(),
    "granitemoeshared": Traits(),
    "phimoe": Traits(has_window=True),
    "apertus": Traits(norm="head", heads_first=True),
    "hy_v3": Traits(norm="head", heads_first=True),
    "cwm": Traits(has_window=True, has_layer_types=True),
    "solar_open": Traits(),
    "minimax_m2": Traits(norm="all", partial_rotary=True),
    "internlm3": Traits(),
    "iquestcoder": Traits(),
    "aria_text": Traits(),
    "cohere": Traits(norm="head", neighbours="pairs"),
    "cohere2": Traits(neighbours="pairs", rope_switch="sliding_window", has_window=True, has_layer_types=True),
    "ernie4_5": Traits(neighbours="halves"),
    "ernie4_5_moe": Traits(neighbours="halves"),
    "glm": Traits(neighbours="halves", partial_rotary=True),
    "glm4": Traits(neighbours="halves", partial_rotary=True),
    "helium": Traits(neighbours="halves"),
    "glm4_moe": Traits(norm="head", partial_rotary=True),
}

#: Model types of dense checkpoints that can be split.
DENSE_MODEL_TYPES = tuple(ARCHITECTURES)


def architecture(config: PreTrainedConfig) -> Traits:
    """The traits of a model that can be split, or of one that is, by its configuration."""
    return ARCHITECTURES[getattr(config, "dense_model_type", config.model_type)]


def rotary_channels(config: PreTrainedConfig) -> int:
    """Channels of a head that RoPE turns."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not architecture(config).partial_rotary:
        return size
    return int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))


#: Model types that cannot be split, by the reason. As a drop-in, a packed cache serves those models as they are:
#: tried with a small random model of each.
DROP_IN_ONLY = {
    "a bidirectional encoder's layers, positions that are added to the embeddings": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
    ),
    "learned positions, or sinusoids, that are added to the embeddings": (
        "biogpt ctrl gpt-sw3 gpt2 gpt_bigcode opt xglm"
    ),
    "an encoder-decoder, cross-attention": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"
    ),
    "biases by distance (ALiBi) in place of RoPE": "bloom mpt",
    "queries, keys and values fused head by head": "codegen falcon gpt_neox gpt_neox_japanese persimmon",
    "RoPE that turns neighbouring channels": ("cohere2_moe gptj llama4_text"),
    "multi-head latent attention (MLA), which has a latent of its own": (
        "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu"
    ),
    "norms on keys behind RoPE": "hunyuan_v1_dense hunyuan_v1_moe nanochat",
    "RoPE or not by the sliding window of a layer": "exaone4 exaone_moe kolibri1",
    "soft-capped scores": "gemma2 vaultgemma",
    "a gate, a norm or a sum behind attention": "afmoe beam bitnet diffllama doge hrm_text laguna",
    "learned sinks in the softmax": "flint gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
    "queries that are scaled by their positions": "ministral3",
    "a sparse choice of keys": "minimax_m3_vl_text",
    "norms on values, keys that layers share": "gemma4_text gemma4_unified_text",
    "experts or tables of projections in the attention": "jetmoe moshi",
    "an attention of its own form": "nemotron phi stablelm",
}

#: Model types that cannot be split, and of which no packed cache holds what their layers keep, or none was tried.
NOT_CACHED = {
    "state-space, recurrent, convolution or linear-attention layers": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid hy_v4 inkling2_text inkling_text jamba "
        "kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text "
        "qwen3_next qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya"
    ),
    "sparse attention with an index or a compressed state beside keys and values": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa"
    ),
    "several models in one, of text and of images or sound": (
        "blt cohere_compass_text dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 mllama "
        "moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp"
    ),
    "keys and values that are those of another model's or layer's": (
        "gemma3n_text gemma4_assistant gemma4_unified_assistant"
    ),
    "a cache of its own, or none, in the library": "cpmant openai-gpt prophetnet reformer xlm xlnet",
    "attention that is local in some layers or of another kind": "dbrx gpt_neo longcat_flash modernbert-decoder xmod",
}

#: Layer type of a saved split model: no class of the library takes it for one of its own.
LATENT_LAYER_TYPE = "latent_attention of alrd_llama: see README.md of this folder"

#: The same of a layer with a sliding window, in a model that has others too.
LATENT_SLIDING_TYPE = f"sliding {LATENT_LAYER_TYPE}"

#: What the library calls the types of layers that stand for them.
_DENSE_LAYER_TYPES = {LATENT_LAYER_TYPE: "full_attention", LATENT_SLIDING_TYPE: "sliding_attention"}

_PROJECTION_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.([kv])_proj")


class Projection(NamedTuple):
    """The key or value projection of one layer; files and configurations hold its `name`.

    Attributes:
        layer: Index of the layer.
        side: One of `SIDES`.
    """

    layer: int
    side: str

    @property
    def name(self) -> str:
        """Name of the module in a model, e.g. "model.layers.3.self_attn.k_proj"."""
        return f"model.layers.{self.layer}.self_attn.{self.attribute}"

    @property
    def attribute(self) -> str:
        """Name of the module in its attention, e.g. "k_proj"."""
        return f"{self.side}_proj"

    @property
    def settings_side(self) -> str:
        """Whose settings the cache stores it by, one of `SIDES`."""
        return self.side

    def members(self) -> list["Projection"]:
        """The projections that share the latent: itself."""
        return [self]

    @classmethod
    def parse(cls, name: str) -> "Projection":
        """The projection of a name; a `ValueError` if there is none."""
        match = _PROJECTION_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r}: must be the name of a projection, such as {cls(0, 'k').name!r}")
        return cls(int(match[1]), match[2])


class Block(NamedTuple):
    """The projections that share a latent which is made of their outputs; files and configurations hold its `name`.

    Attributes:
        first, last: Its layers, both ends included.
        side: "k", "v", or "kv" for keys and values together.
    """

    first: int
    last: int
    side: str

    @property
    def name(self) -> str:
        """Its name in `truncation_ranks` and `width_tiers`, e.g. "model.layers.3.self_attn.kv_latent"."""
        return f"model.layers.{self.first}.self_attn.{self.attribute}"

    @property
    def attribute(self) -> str:
        """The end of the name, e.g. "kv_latent"."""
        return f"{self.side}_latent"

    @property
    def settings_side(self) -> str:
        """Whose settings the cache stores it by, one of `SIDES`: those of the keys for keys and values together."""
        return self.side[0]

    def members(self) -> list[Projection]:
        """The projections that share the latent, layer by layer."""
        members = []
        for layer in range(self.first, self.last + 1):
            for side in self.side:
                members.append(Projection(layer, side))
        return members


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _filled_list(value: Any, rule: str) -> list | tuple:
    """`value`; a `ValueError` with a `rule` unless it is a list, and not empty."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(rule)
    return value


def _shortest(bits: float) -> float:
    """A width as a Python int where it is whole: 2.0 is stored and printed as 2."""
    return int(bits) if bits == int(bits) else bits


def _channels(tiers: tuple[tuple[int, float], ...]) -> int:
    """Channels of all tiers of a head group."""
    return sum(channels for channels, _ in tiers)


def check_bits(field: str, value: float) -> None:
    """Raise a `ValueError` naming `field` unless `value` is one of `SUPPORTED_BITS`, of a type that JSON keeps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in SUPPORTED_BITS:
        widths = ", ".join(map(str, SUPPORTED_BITS))
        raise ValueError(f"{field}={value!r}: must be one of {widths} bits, an int or a float of Python")


def check_count(field: str, value: int) -> None:
    """Raise a `ValueError` naming `field` unless `value` is an int of at least 0."""
    if not _is_int(value) or value < 0:
        raise ValueError(f"{field}={value!r}: must be an integer of at least 0")


def check_tiers(tiers: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    """`tiers` as tuples: for each head group the (channels, bits) of its width tiers.

    Raises:
        ValueError: It has another form, a tier has no channel, or a width is not one that the cache stores.
    """
    rule = f"tiers={tiers!r}: must be for each head group a list of [channels, bits]"
    # JSON has lists where a scheme, which is hashed, needs tuples.
    groups = []
    for group in _filled_list(tiers, rule):
        pairs = []
        for tier in _filled_list(group, rule):
            if len(_filled_list(tier, rule)) != 2:
                raise ValueError(rule)
            channels, bits = tier
            check_count("tiers: channels", channels)
            if channels == 0:
                raise ValueError(f"tiers={tiers!r}: a tier must have a channel")
            check_bits("tiers: bits", bits)
            pairs.append((channels, _shortest(bits)))
        groups.append(tuple(pairs))
    return tuple(groups)


def check_choice(field: str, value, choices: tuple) -> None:
    """Raise a `ValueError` naming `field` unless `value` is one of `choices`, and of the same type."""
    # `True == 1`, so the type is compared too.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}")


def check_positive(name: str, *values: float) -> None:
    """Raise a `ValueError` naming the field `name` unless all `values` are above 0."""
    for value in values:
        if not value > 0:
            raise ValueError(f"{name}={value!r}: must be above 0")


def parse_json(name: str, text: str | None) -> Any:
    """The value of the option `name`, which is JSON or not given."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: must be JSON ({error})") from None


def check_dense_model_type(field: str, value: str | None) -> None:
    """Raise a `ValueError` naming `field` and the reason unless `value` is one of `DENSE_MODEL_TYPES`."""
    if value in DENSE_MODEL_TYPES:
        return
    found = "this project does not know its layers"
    for reason, types in chain(DROP_IN_ONLY.items(), NOT_CACHED.items()):
        if value in types.split():
            found = reason
    choices = ", ".join(map(repr, DENSE_MODEL_TYPES))
    raise ValueError(f"{field}={value!r}: must be one of {choices}; not split: {found}")


@dataclass(frozen=True)
class QuantScheme:
    """Quantization of one side of the cache, keys or values; `to_dict` gives JSON types.

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
        static: Scales per channel come from calibration, by a budget (`modules/fit/budget.py`) or for keys and values
            as they are (`modules/formats/calibrated_int8.py`), and are stored once per layer.
        token_scale: With static scales, each token has a scale of its own, an 8-bit power of 2 in sixteenths for each
            head group: the calibrated steps are multiplied by it, the middle of their range is not
            (`modules/cache/codecs.py`). For texts in which tokens, not channels, differ from what was calibrated.
        code: "uniform": a code is a level of its channel. "trellis", with static scales and up to 6 bits: the codes of
            the channels before say which level it is (`modules/trellis.py`); less error for the same bits, and more
            work. Codes of 8 bits are uniform with either.
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
    token_scale: bool = False
    code: str = "uniform"
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
        check_choice("token_scale", self.token_scale, (True, False))
        check_choice("code", self.code, CODES)
        is_number = _is_int(self.protected) or isinstance(self.protected, float)
        if not is_number or not 0 <= self.protected < 1:
            raise ValueError(f"protected={self.protected!r}: must be a share in [0, 1)")
        check_bits("protected_bits", self.protected_bits)
        if self.quantizer is not None and not isinstance(self.quantizer, str):
            raise ValueError(f"quantizer={self.quantizer!r}: must be the name of a registered quantizer, or None")
        # One form of each value, so that schemes that mean the same are equal.
        object.__setattr__(self, "bits", _shortest(self.bits))
        object.__setattr__(self, "protected", float(self.protected))
        # Codes of less than two bits have no level to spare for a range's extremes; with tiers `bits` says nothing.
        narrow = self.bits < 2 and self.tiers is None
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", narrow and self.bits != 1.5)
        if self.range_method is None:
            object.__setattr__(self, "range_method", "mse" if narrow else "minmax")
        self._check_combinations()

    @property
    def _tier_bits(self) -> list[float]:
        """Widths of the tiers, each once, the widest first."""
        return sorted({bits for _, bits in chain.from_iterable(self.tiers)}, reverse=True)

    def at_width(self, bits: float) -> "QuantScheme":
        """The scheme of one width tier."""
        # What a scheme leaves to the width is chosen again for the tier's; 16 bits are the states themselves.
        if bits == 16:
            by_width = {"symmetric": None, "range_method": None}
            by_width |= {"static": False, "token_scale": False, "code": "uniform"}
        elif self.static:
            by_width = {"symmetric": False}
        else:
            by_width = {"symmetric": None, "range_method": None}
        if bits <= 2 and self.range_method == "mse":
            by_width["range_method"] = "mse"
        return replace(self, bits=bits, tiers=None, **by_width)

    def _check_tiers(self) -> None:
        object.__setattr__(self, "tiers", check_tiers(self.tiers))
        if self.rotation or self.protected or self.quantizer is not None:
            raise ValueError(
                "tiers: give each channel its width, so rotation, protected and quantizer must not be set; got "
                f"rotation={self.rotation}, protected={self.protected}, quantizer={self.quantizer!r}"
            )
        if self.token_scale and 16 in self._tier_bits:
            raise ValueError("token_scale=True: multiplies calibrated steps, which a tier of 16 bits does not have")
        # The scheme of each tier checks itself.
        for bits in self._tier_bits:
            self.at_width(bits)

    def _check_combinations(self) -> None:
        if self.token_scale and not self.static:
            raise ValueError("token_scale=True: must go with static=True, whose calibrated steps it multiplies")
        if self.code == "trellis" and (not self.static or (self.symmetric and self.tiers is None)):
            raise ValueError("code='trellis': must go with static=True and symmetric=False, calibrated scales")
        if self.tiers is not None:
            # Each width is checked by a scheme of its own.
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
            and self.bits in (1, 2, 3, 4, 5, 6, 8)
            and not (self.symmetric and self.bits == 1)
            and not self.rotation
            and not self.protected
        ):
            raise ValueError(
                "static=True: calibrated scales are per_channel, of 1 (not symmetric) to 6 or 8 whole bits, without "
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
        orientation = self.orientation.replace("_", " ")
        if self.tiers:
            text = f"{'/'.join(map(str, self._tier_bits))}-bit tiers {orientation}"
            calibrated = [note for note in self._notes() if note in ("static", "token scale", "trellis")]
            return f"{text} ({', '.join(calibrated)})" if calibrated else text
        text, notes = f"{self.bits}-bit {orientation}", self._notes()
        if self.group_size:
            text += f" in groups of {self.group_size}"
        return f"{text} ({', '.join(notes)})" if notes else text

    def _notes(self) -> list[str]:
        """The settings that differ from the defaults of the width."""
        notes = (
            (self.range_method, self.range_method != ("mse" if self.bits < 2 else "minmax")),
            ("symmetric", self.symmetric and self.bits >= 2),
            ("asymmetric", self.bits == 1 and not self.symmetric),
            ("static", self.static),
            ("token scale", self.token_scale),
            ("trellis", self.code == "trellis"),
            ("rotation", self.rotation),
            (f"{self.protected:.0%} of tokens at {self.protected_bits} bits", self.protected),
            (self.quantizer, self.quantizer),
        )
        return [note for note, holds in notes if holds]


#: Keys have channels that are large in all tokens, values have not (KIVI, arXiv:2402.02750).
_ORIENTATIONS = {"k": "per_channel", "v": "per_token"}


def side_scheme(side: str, bits: float, group_size: int, fields: dict | None) -> QuantScheme:
    """The `QuantScheme` of one side of a cache, from the cache's settings.

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
    names = list(QuantScheme.__dataclass_fields__)
    # The width is a setting of its own, not among the other fields.
    names.remove("bits")
    if not isinstance(fields, dict) or not set(fields) <= set(names):
        raise ValueError(f"{side}_scheme={fields!r}: must be a dictionary with keys among {', '.join(names)}")
    base = QuantScheme(orientation=_ORIENTATIONS[side], group_size=group_size)
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
    # Whoever gives other tiers, or none, may give another width with them.
    tiers = stored.get("width_tiers") or {}
    if "width_tiers" in given:
        return
    for side in SIDES:
        field, endings = f"{side}_bits", (f"{side}_proj", f".{side}_latent", f".{side}v_latent")
        if field in given and any(name.endswith(endings) for name in tiers):
            check_width_beside_tiers(side, given[field], stored.get(field, getattr(ALRDLlamaConfig, field)))


class LatentParts:
    """What has a latent of its own by the fields of an `ALRDLlamaConfig`: projections or blocks, ranks and widths."""

    def projections(self) -> Iterator[Projection]:
        """All key and value projections, layer by layer."""
        for layer in range(self.num_hidden_layers):
            for side in SIDES:
                yield Projection(layer, side)

    def blocks(self) -> list[Block]:
        """All blocks of projections of a model with `keep_dense`, group of layers by group of layers."""
        blocks, sides = [], ("kv",) if self.joint_kv else SIDES
        for first in range(0, self.num_hidden_layers, self.layer_group_size):
            last = min(first + self.layer_group_size, self.num_hidden_layers) - 1
            for side in sides:
                blocks.append(Block(first, last, side))
        return blocks

    def parts(self) -> "list[Projection] | list[Block]":
        """What has a latent of its own, and so a name in `truncation_ranks`: the blocks, or the projections."""
        return self.blocks() if self.keep_dense else list(self.projections())

    def part(self, name: str) -> "Projection | Block":
        """The projection or the block of a name in `truncation_ranks`; a `ValueError` if there is none."""
        for part in self.parts():
            if part.name == name:
                return part
        raise ValueError(f"{name!r}: no such projection or block")

    def cache_layer(self, layer: int) -> int:
        """Index of the layer of a cache that holds the latents of a model's layer: one for each group of layers."""
        return layer // self.layer_group_size

    @property
    def num_cache_layers(self) -> int:
        """Layers of a cache of this model."""
        return self.cache_layer(self.num_hidden_layers - 1) + 1

    @property
    def num_head_groups(self) -> int:
        """Groups of key/value heads that share one latent."""
        return self.num_key_value_heads // (self.head_group_size or self.num_key_value_heads)

    @property
    def group_outputs(self) -> int:
        """Outputs of a projection for one head group."""
        return self.num_key_value_heads * self.head_dim // self.num_head_groups

    @property
    def full_group_rank(self) -> int:
        """Largest rank of one head group of a projection: the smaller side of its part of the weight."""
        # A group's part of the weight is [outputs of its heads, hidden_size].
        return min(self.group_outputs, self.hidden_size)

    def full_rank(self, part: Projection | Block) -> int:
        """Largest rank of one head group: `full_group_rank`, of a block the outputs of all its members."""
        return len(part.members()) * self.group_outputs if self.keep_dense else self.full_group_rank

    def group_ranks(self, projection: Projection | Block) -> tuple[int, ...] | None:
        """Ranks of the head groups of a projection or a block; `None` if it stays dense."""
        rank = self.truncation_ranks.get(projection.name)
        if rank is None:
            return None
        if not isinstance(rank, int):
            return tuple(rank)
        # A total rank is spread evenly; the first groups take the remainder.
        groups = self.num_head_groups
        share, remainder = divmod(rank, groups)
        return (share + 1,) * remainder + (share,) * (groups - remainder)

    def group_tiers(self, projection: Projection | Block) -> list | None:
        """Width tiers of the head groups of a projection or a block; `None` if its channels have one width."""
        return self.width_tiers.get(projection.name)

    def cached_widths(self, projection: Projection | Block) -> tuple[int, ...]:
        """Channels that the cache stores per token, by group: the latent's ranks, or one head size per dense head."""
        return self.group_ranks(projection) or (self.head_dim,) * self.num_key_value_heads

    def layer_parts(self, layer: int) -> list[Projection] | list[Block]:
        """What stores the keys and the values of a layer in the cache, one for each side of the cache's layer."""
        if not self.keep_dense:
            return [Projection(layer, side) for side in SIDES]
        return [block for block in self.blocks() if block.first <= layer <= block.last]

    def layer_widths(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """`cached_widths` of the keys and the values of a layer, or those of the one latent of both."""
        return tuple(map(self.cached_widths, self.layer_parts(layer)))

    def layer_window(self, layer: int) -> int | None:
        """Tokens that a query of a layer sees at most, its own included; `None`: it sees all before it."""
        types = getattr(self, "layer_types", None)
        if not self.traits.has_window or (self.traits.has_layer_types and types and types[layer] == "full_attention"):
            return None
        return getattr(self, "sliding_window", None) or None  # some write 0 for none

    def group_windows(self, size: int) -> list[list[int | None]]:
        """`layer_window` of the layers of each group of so many; the last group may be shorter."""
        windows = list(map(self.layer_window, range(self.num_hidden_layers)))
        return [windows[first : first + size] for first in range(0, len(windows), size)]

    def is_static(self, side: str) -> bool:
        """Whether the cache quantizes a side by calibrated scales."""
        fields = getattr(self, f"{side}_scheme") or {}
        return bool(fields.get("static"))

    def tiered_scheme(self, projection: Projection | Block) -> QuantScheme | None:
        """The scheme by which the cache stores what has width tiers; `None` if it has none."""
        tiers, side = self.group_tiers(projection), projection.settings_side
        if tiers is None:
            return None
        fields = {**(getattr(self, f"{side}_scheme") or {}), "tiers": tiers}
        return side_scheme(side, getattr(self, f"{side}_bits"), self.group_size, fields)


class ALRDLlamaConfig(LatentParts, LlamaConfig):
    r"""A `LlamaConfig` plus the ranks of the split projections and the settings of their KV cache.

    ALRD stands for adaptive low-rank decomposition: each projection is split at a rank of its own.

    It also describes the other models of `ARCHITECTURES`, whose fields that a Llama does not have are kept for the way
    back. Where an architecture has windows, all layers have the `sliding_window`, or those that `layer_types` calls
    `"sliding_attention"` (`layer_window`).

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
        keep_dense (`bool`, defaults to `False`):
            Whether the dense projections stay beside the factors, and latents are made of their outputs, by *blocks*
            of projections (`Block`). `truncation_ranks` and `width_tiers` then name blocks,
            `"model.layers.{first}.self_attn.{k,v,kv}_latent"`, all of them or none yet.
        layer_group_size (`int`, defaults to 1):
            Layers whose projections share a block; the last group may be shorter. Above 1 with `keep_dense` only.
        joint_kv (`bool`, defaults to `False`):
            Whether the keys and the values of a block share one latent, with `keep_dense` only. It is stored as keys
            are, by `k_bits`, `k_scheme` and `k_hadamard`; `v_bits` and `v_hadamard` say nothing then.

    Raises:
        ValueError: A field, or a combination, is out of range. The message names field, value and rule. Fields that
            are assigned later are checked by `check_latent_cache`, which models and caches call.
    """

    model_type = "alrd_llama"

    # The dense model, and how its projections are split.
    dense_model_type: str = "llama"
    truncation_ranks: dict | None = None
    head_group_size: int | None = None
    # How the cache stores their latents.
    use_kivi: bool = True
    k_bits: int | float = 2
    v_bits: int | float = 2
    group_size: int = 128
    residual_length: int = 32
    sink_length: int = 4
    k_scheme: dict | None = None
    v_scheme: dict | None = None
    width_tiers: dict | None = None
    # What the factors were made for.
    k_mean_split: bool = False
    v_mean_split: bool = False
    k_hadamard: bool = True
    v_hadamard: bool = True
    # Which projections share a latent.
    keep_dense: bool = False
    layer_group_size: int = 1
    joint_kv: bool = False

    def __post_init__(self, **kwargs):
        marks = kwargs.get("layer_types") or ()
        if marks and set(marks) <= set(_DENSE_LAYER_TYPES):
            # The marks of a saved split model are taken off again.
            del kwargs["layer_types"]
            if self.traits.has_layer_types:
                kwargs["layer_types"] = list(map(_DENSE_LAYER_TYPES.__getitem__, marks))
        # A dense model's dictionary brings its own model_type; kept, it would hide our weight conversion.
        source = kwargs.pop("model_type", self.model_type)
        if source != self.model_type:
            check_dense_model_type("model_type", source)
            self.dense_model_type = source
        if self.traits.qkv_bias is not None:
            self.attention_bias, self.mlp_bias = self.traits.qkv_bias, False
        # The library's plan of tensor parallelism, which it does not write to files, is that of the dense class.
        self.base_model_tp_plan = CONFIG_MAPPING[self.dense_model_type].base_model_tp_plan
        if self.traits.has_window:
            kwargs.setdefault("sliding_window", None)  # left out, it would be exported as Mistral's default
        if self.truncation_ranks is None:
            self.truncation_ranks = {}
        if self.width_tiers is None:
            self.width_tiers = {}
        default_rope = self.rope_parameters is None and not {"rope_theta", "rope_scaling"} & set(kwargs)
        super().__post_init__(**kwargs)
        self._take_over_derived(default_rope)
        self.check_latent_cache()

    def _take_over_derived(self, default_rope: bool) -> None:
        """Set what the library's code of the dense model reads where it was not given, or follows from other fields:
        layer types, say, a window that is switched off, a field by another name, or, with `default_rope`, RoPE."""
        if self.dense_model_type == LlamaConfig.model_type:
            return
        if default_rope:
            self.rope_parameters = None  # a Llama's, until here
        dense = self.to_dense()
        own = set(type(self).__dataclass_fields__) - {"rope_parameters"}  # those may be by layer type
        for name in {*vars(dense), *dense.attribute_map} - own:
            if not name.startswith("_"):
                setattr(self, name, getattr(dense, name))

    def convert_rope_params_to_dict(self, **kwargs) -> dict:
        """The library's hook. What is by layer type has its form already, from the dense model's class."""
        rope = self.rope_parameters or {}
        if rope and all(isinstance(of_layers, dict) for of_layers in rope.values()):
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

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
        """The configuration of a dense or split model's `config` with the given `fields` of this class set."""
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
        # The fields of this class, and those of a Llama that the dense class has not.
        foreign = set(type(self).__dataclass_fields__) - set(dense_class.__dataclass_fields__)
        if self.head_dim != self.hidden_size // self.num_attention_heads:
            foreign.discard("head_dim")  # a Qwen2 reads it, though it is no field of its class
        foreign |= {"model_type", "architectures"}
        return dense_class(**{name: value for name, value in self.to_dict().items() if name not in foreign})

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are written to `config.json`."""
        written = super().to_diff_dict()
        if self.truncation_ranks:
            types = getattr(self, "layer_types", None) or ["full_attention"] * self.num_hidden_layers
            marks = {dense: mark for mark, dense in _DENSE_LAYER_TYPES.items()}
            written["layer_types"] = list(map(marks.__getitem__, types))
        return written

    @property
    def traits(self) -> Traits:
        """Differences of the dense architecture from a Llama; a `ValueError` for a model type that cannot be split."""
        check_dense_model_type("dense_model_type", self.dense_model_type)
        return ARCHITECTURES[self.dense_model_type]

    def check_latent_cache(self) -> None:
        """Check the fields of this class; see the class docstring for the rules."""
        check_dense_model_type("dense_model_type", self.dense_model_type)
        _check_full_attention(self)
        for side in SIDES:
            scheme = side_scheme(side, getattr(self, f"{side}_bits"), self.group_size, getattr(self, f"{side}_scheme"))
            # The simple scheme rounds each token as it comes: it knows no block, no tier and no other field.
            if not self.use_kivi and getattr(self, f"{side}_scheme"):
                raise ValueError(
                    f"{side}_scheme: the simple scheme (use_kivi=False) reads {side}_bits and group_size only"
                )
            if not self.use_kivi and scheme.bits == 1.5:
                raise ValueError(f"{side}_bits=1.5: the simple scheme (use_kivi=False) rounds each token by itself")
        for field in ("residual_length", "sink_length"):
            check_count(field, getattr(self, field))
        switches = ("use_kivi", "k_hadamard", "v_hadamard", "k_mean_split", "v_mean_split", "keep_dense", "joint_kv")
        for field in switches:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r}: must be True or False")

        # Groups come before the ranks that they have, and ranks before their tiers.
        size, heads = self.head_group_size, self.num_key_value_heads
        if size is not None and (not _is_int(size) or size < 1 or heads % size):
            raise ValueError(f"head_group_size={size!r}: must divide num_key_value_heads={heads}")
        _check_blocks(self)
        if not isinstance(self.truncation_ranks, dict):
            raise ValueError(f"truncation_ranks={self.truncation_ranks!r}: must map projection names to ranks")
        parts = {part.name: part for part in self.parts()}
        for name, rank in self.truncation_ranks.items():
            _check_rank(self, name, rank, parts)
        missing = sorted(set(parts) - set(self.truncation_ranks))
        if self.keep_dense and self.truncation_ranks and missing:
            raise ValueError(f"truncation_ranks: must name all blocks with keep_dense=True; missing {missing[0]!r}")
        if not isinstance(self.width_tiers, dict):
            raise ValueError(f"width_tiers={self.width_tiers!r}: must map projection names to tiers")
        if self.width_tiers and not self.use_kivi:
            raise ValueError("width_tiers: the simple scheme (use_kivi=False) has one width for all channels")
        for name in self.width_tiers:
            self._check_tiers(name, parts)

    def _check_tiers(self, name: str, parts: dict[str, Projection | Block]) -> None:
        field = f"width_tiers[{name!r}]"
        if name not in self.truncation_ranks:
            raise ValueError(f"{field}: must be a projection that truncation_ranks names")
        projection = parts[name]
        ranks = self.group_ranks(projection)
        try:
            check_tiers(self.width_tiers[name])
            groups = self.tiered_scheme(projection).tiers
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        channels = list(map(_channels, groups))
        if channels != list(ranks):
            raise ValueError(f"{field}: tiers of {channels} channels must fill the group ranks {list(ranks)}")


def _check_full_attention(config: ALRDLlamaConfig) -> None:
    """Refuse a model in which a token does not attend to all tokens up to it."""
    alike = "every token attends to all tokens up to it, in all layers alike"
    for field, right, reason in (
        ("is_causal", True, alike),
        ("attention_chunk_size", None, alike),
        ("is_heterogeneous", False, alike),
        ("use_bidirectional_attention", False, alike),
        ("attn_logit_softcapping", None, "scores are not soft-capped"),
        ("clip_qkv", None, "keys and values are not clipped"),
    ):
        value = getattr(config, field, None)
        if value not in (right, None):
            raise ValueError(f"{field}={value!r}: must be {right!r}; {reason}")
    window = getattr(config, "sliding_window", None)
    if window == 0 and config.traits.has_layer_types:
        window = None  # what a Qwen2-MoE writes for none
    if window is not None and (not _is_int(window) or window < 1):
        raise ValueError(f"sliding_window={window!r}: must be None or an integer of at least 1")
    # A Llama of the library reads no window, and its layers are all alike.
    if window is not None and not config.traits.has_window and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window={window!r}: must be None or at least max_position_embeddings="
            f"{config.max_position_embeddings} for a {config.dense_model_type!r}, which has no sliding window"
        )
    known = {"full_attention"}
    if config.traits.has_layer_types:
        known.add("sliding_attention")
    types = getattr(config, "layer_types", None) or ()
    others = sorted(set(types) - known)
    if others:
        raise ValueError(
            f"layer_types: must all be {' or '.join(map(repr, sorted(known)))}; not supported: {', '.join(others)}"
        )
    if types and len(types) < config.num_hidden_layers:  # an early exit runs the first layers only
        raise ValueError(f"layer_types: must be {config.num_hidden_layers}, one for each layer, not {len(types)}")
    if "sliding_attention" in types and window is None:
        raise ValueError("sliding_window=None: must be an integer where layer_types has 'sliding_attention'")


def _check_blocks(config: ALRDLlamaConfig) -> None:
    """Refuse fields that do not go with blocks, or that need them."""
    size = config.layer_group_size
    if not _is_int(size) or not 1 <= size <= config.num_hidden_layers:
        raise ValueError(
            f"layer_group_size={size!r}: must be an integer from 1 to num_hidden_layers={config.num_hidden_layers}"
        )
    if not config.keep_dense:
        if config.traits.of_outputs and config.truncation_ranks:
            raise ValueError(
                f"keep_dense=False: must be True to split a {config.dense_model_type!r}, whose keys are not a product "
                "of one weight: latents are made of outputs"
            )
        for field, value in (("layer_group_size", 1), ("joint_kv", False)):
            if getattr(config, field) != value:
                raise ValueError(
                    f"{field}={getattr(config, field)}: must be {value} without keep_dense=True, for a latent of "
                    "several projections is made of their outputs"
                )
        return
    for field, value, reason in (
        ("use_kivi", True, "without a packed cache the dense projections serve, and there is no latent to round"),
        ("k_mean_split", False, "the mean stands in the biases of the factors"),
        ("v_mean_split", False, "the mean stands in the biases of the factors"),
    ):
        if getattr(config, field) != value:
            raise ValueError(f"{field}={getattr(config, field)}: must be {value} with keep_dense=True; {reason}")
    for i, windows in enumerate(config.group_windows(size)):
        if len(set(windows)) > 1:
            raise ValueError(
                f"layer_group_size={size}: must not put layers of different sliding windows into one block; those of "
                f"layers {i * size} to {i * size + len(windows) - 1} are {', '.join(map(str, windows))}"
            )
    # What is not given has the default of its field.
    if config.joint_kv and config.v_bits not in (config.k_bits, ALRDLlamaConfig.v_bits):
        raise ValueError(f"v_bits={config.v_bits!r}: must be k_bits or left out with joint_kv=True")
    if config.joint_kv and config.v_scheme:
        raise ValueError("v_scheme: must be None with joint_kv=True, whose latents are stored by k_bits and k_scheme")


def _check_rank(
    config: ALRDLlamaConfig, name: str, rank: int | list[int], parts: dict[str, Projection | Block]
) -> None:
    """Refuse a rank that a projection or a block cannot have."""
    field = f"truncation_ranks[{name!r}]"
    if name not in parts:
        if config.keep_dense:
            raise ValueError(f"{field}: no such block with keep_dense=True; names are {', '.join(map(repr, parts))}")
        raise ValueError(
            f"{field}: no such projection; names are 'model.layers.{{i}}.self_attn.k_proj' and '….v_proj' with i "
            f"from 0 to {config.num_hidden_layers - 1}"
        )
    # A list has one rank for each head group, an int is the total of all of them.
    groups, full = config.num_head_groups, config.full_rank(parts[name])
    per_group = isinstance(rank, (list, tuple))
    if per_group:
        ranks, least, most, note = rank, 1, full, " per head group"
    else:
        ranks, least, most, note = [rank], groups, groups * full, f" ({groups} head groups of at most {full})"
    if not all(map(_is_int, ranks)):
        raise ValueError(f"{field}={rank!r}: must be an int or a list of ints")
    if per_group and len(rank) != groups:
        raise ValueError(f"{field}={rank!r}: must have one rank for each of {groups} head groups")
    for one in ranks:
        if not least <= one <= most:
            raise ValueError(f"{field}={rank!r}: must be from {least} to the full rank {most}{note}")


AutoConfig.register(ALRDLlamaConfig.model_type, ALRDLlamaConfig, exist_ok=True)
