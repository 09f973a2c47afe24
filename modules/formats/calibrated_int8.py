r"""Calibrated INT8 for the KV cache of any decoder: scales fitted once on text, constant ever after (msModelSlim).

Three phases, driven by the `dynamic_cache` process of a YAML file (`load_process_config`):

1. pre-run: `select_attention_modules` finds the modules named `*self_attn` that the patterns leave in;
2. calibration: `calibrate` runs the model on text; what each module passes to `cache.update` goes through two
   `DynamicCacheQuantizer`s, which keep the range of every channel over *all* batches;
3. deployment: `deploy_fake_quant` puts a `FakeQuantDynamicCache` there instead, and any cache used with the model then
   holds values that INT8 can represent; `CalibratedScales.by_layer` hands the scales to a cache that stores the codes.

States `[B, H, S, D]` become tokens `[B·S, H·D]`, and each of the C = H·D channels has a float32 `scale` and
`zero_point` of its own, in the convention of `modules/quant_utils.py` with 8-bit unsigned codes:

    code = clamp(round((x - zero_point) / scale), 0, 255),    x̂ = code * scale + zero_point

    symmetric:   scale = max|x| / 127,          zero_point = -128 * scale   (the signed code is code - 128)
    asymmetric:  scale = (max - min) / 255,     zero_point = min

Values beyond the calibrated range are clipped. A channel with scale 0 has code 0 and gives its zero point back.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain, product
from numbers import Real
from pathlib import Path

import safetensors.torch
import torch
import yaml
from torch import nn

from configuration_alrd_llama import check_count
from modules.cache.scheme import SIDES
from modules.formats.interception import CacheInterception
from modules.kivi_cache import CacheScheme, KIVILatentCache
from modules.quant_utils import to_finite

#: How attention modules are recognised by their full path.
ATTENTION_PATTERN = "*self_attn"

#: Extreme values per channel and end that a percentile is read from. Ends of this length give the percentile p of up
#: to 2047 / (1 - p / 100) tokens exactly (two million at 99.9) and take 16 KiB per channel.
TAIL_LENGTH = 2048


def _check_keys(where: str, value, required: set[str], optional: set[str] = frozenset()) -> None:
    """Raise a `ValueError` unless `value` is a mapping with all of the required keys and no unknown one."""
    keys = ", ".join(sorted(required | optional))
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r}: must be a mapping with {keys}")
    if unknown := sorted(set(value) - required - optional, key=str):
        raise ValueError(f"{where}: unknown {unknown!r}; the keys are {keys}")
    if missing := sorted(required - set(value)):
        raise ValueError(f"{where}: {', '.join(missing)} must be given")


def _check_percentile(percentile: float | None) -> None:
    is_number = isinstance(percentile, Real) and not isinstance(percentile, bool)
    if percentile is not None and not (is_number and 50 < percentile <= 100):
        raise ValueError(f"percentile={percentile!r}: must be None (min-max), or above 50 and at most 100")


@dataclass(frozen=True)
class DynamicCacheConfig:
    """The `dynamic_cache` process, as msModelSlim documents it, with its defaults.

    Attributes:
        scope, dtype, method: "per_channel", "int8", "minmax"; there are no others.
        symmetric: Whether a channel's range is centred on 0.
        include, exclude: Globs on full module paths; what both match is excluded.

    Raises:
        ValueError: A value is out of range; the message names field, value and rule.
    """

    scope: str = "per_channel"
    dtype: str = "int8"
    symmetric: bool = True
    method: str = "minmax"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        for field, only in (("scope", "per_channel"), ("dtype", "int8"), ("method", "minmax")):
            if getattr(self, field) != only:
                raise ValueError(f"{field}={getattr(self, field)!r}: must be {only!r}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r}: must be true or false")
        for field in ("include", "exclude"):
            patterns = getattr(self, field)
            is_list = isinstance(patterns, (list, tuple))
            if not is_list or not all(isinstance(pattern, str) and pattern for pattern in patterns):
                raise ValueError(f"{field}={patterns!r}: must be a list of patterns, none of them empty")
            # YAML and JSON give lists, which a frozen dataclass should not hold.
            object.__setattr__(self, field, tuple(patterns))
        if not self.include:
            raise ValueError("include=[]: must hold a pattern; '*' takes every attention module")


def load_process_config(source: str | os.PathLike | Mapping) -> DynamicCacheConfig:
    """Read the YAML of a calibration.

    Args:
        source: Path of the file, or its contents: `spec.process` is a list of one process with `type`, `qconfig`
            (`scope`, `dtype`, `symmetric`, `method`), `include` and `exclude`.

    Raises:
        ValueError: Not YAML, a key that is unknown or lacking, or a value out of range; the message names it.
    """
    if not isinstance(source, Mapping):
        try:
            source, path = yaml.safe_load(Path(source).read_text(encoding="utf-8")), source
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: is not YAML: {error}") from error
        if not isinstance(source, Mapping):
            raise ValueError(f"{path}: must be a mapping with spec")
    _check_keys("file", source, {"spec"})
    _check_keys("spec", source["spec"], {"process"})
    processes = source["spec"]["process"]
    # msModelSlim chains processes of many kinds; here there is one.
    if not isinstance(processes, list) or len(processes) != 1:
        raise ValueError(f"spec.process={processes!r}: must be a list of one process")
    process = processes[0]
    _check_keys("spec.process[0]", process, {"type", "qconfig"}, {"include", "exclude"})
    if process["type"] != "dynamic_cache":
        raise ValueError(f"type={process['type']!r}: must be 'dynamic_cache'")
    _check_keys("qconfig", process["qconfig"], set(), {"scope", "dtype", "symmetric", "method"})
    fields = dict(process["qconfig"])
    for field in ("include", "exclude"):
        if field in process:
            fields[field] = process[field]
    return DynamicCacheConfig(**fields)


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(get_close_matches(name, list(names), n=3, cutoff=0)) or "none"


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def select_attention_modules(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Attention modules of a model by their full paths, e.g. "model.layers.0.self_attn", in the model's order.

    Args:
        model: Any model whose attention modules are named `*self_attn`.
        include, exclude: Globs on full paths; a module is selected if it matches one of `include` and none of
            `exclude`.

    Raises:
        ValueError: A pattern matches no attention module (the message lists the nearest paths), or none is selected.
    """
    modules = dict(model.named_modules())
    names = _matching(modules, ATTENTION_PATTERN)
    if not names:
        raise ValueError(f"{type(model).__name__}: has no module named {ATTENTION_PATTERN}")
    matched: dict[str, set[str]] = {}
    for field, patterns in (("include", include), ("exclude", exclude)):
        matched[field] = set()
        for pattern in patterns:
            found = _matching(names, pattern)
            # A pattern without a match is a slip of the pen, which would leave a module in or out unnoticed.
            if not found:
                raise ValueError(f"{field}={pattern!r}: matches no attention module; near: {_nearest(pattern, names)}")
            matched[field].update(found)
    selected = matched["include"] - matched["exclude"]
    if not selected:
        raise ValueError(f"exclude={list(exclude)!r}: must leave one of the modules of include={list(include)!r}")
    return {name: modules[name] for name in names if name in selected}


def int8_parameters(minimum: torch.Tensor, maximum: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` and `zero_point` (module docstring) of channels with these ranges; all four float32 `[C]`."""
    if symmetric:
        # 127 steps on either side of the signed code 0; the signed code -128 is not used.
        scale = torch.maximum(minimum.abs(), maximum.abs()) / 127
        return scale, -128 * scale
    return (maximum - minimum) / 255, minimum


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, C]` to INT8 and back (module docstring), in float32, returned in the type of `x`."""
    # A channel that was constant has scale 0: division would give NaN.
    codes = torch.where(scale > 0, (x.float() - zero_point) / scale, 0).clamp_(0, 255)
    # To the nearest code, halves up, as the packed cache rounds.
    codes = (codes + 0.5).floor_()
    return to_finite(codes * scale + zero_point, x.dtype)


def _to_tokens(states: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` to `[B·S, H·D]`."""
    return states.transpose(1, 2).flatten(0, 1).flatten(1)


def _from_tokens(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Inverse of `_to_tokens` for states of this shape."""
    batch, heads, length, size = shape
    return tokens.view(batch, length, heads, size).transpose(1, 2)


class DynamicCacheQuantizer(nn.Module):
    """Keeps the range of each channel of one side of a layer over all calls; returns fake-quantized states.

    Args:
        symmetric: How a range becomes a scale (module docstring).
        percentile: `None` takes the smallest and largest value of all calls. A p in (50, 100] takes the percentiles
            100 - p and p of all tokens, as `numpy.percentile` defines them; they are exact, read from the
            `TAIL_LENGTH` smallest and largest values of each channel, and refused when these do not reach that far.
        name: Name of the side in errors.

    Attributes:
        minimum, maximum: float32 `[C]` over all tokens; `None` before the first.
        tokens: Count of the tokens so far.
    """

    def __init__(self, symmetric: bool = True, percentile: float | None = None, name: str = "states"):
        super().__init__()
        _check_percentile(percentile)
        self.symmetric, self.percentile, self.name, self.tokens = symmetric, percentile, name, 0
        # Buffers, so that they move to another device with the module.
        for buffer in ("minimum", "maximum", "lower_tail", "upper_tail"):
            self.register_buffer(buffer, None)

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """Count states in, then round them with the parameters of all states so far.

        Args:
            x: `[B, H, S, D]` states.
            real: `[B, S]` bool, false for pads, which do not count; `None`: no pads.

        Returns:
            `[B, H, S, D]` in the type of `x`.

        Raises:
            ValueError: `x` has another number of channels than before, or holds NaN or Inf; or `real` is not `[B, S]`.
        """
        tokens = _to_tokens(x)
        counted = tokens.detach()
        if real is not None:
            expected = (x.shape[0], x.shape[2])
            if real.shape != expected:
                raise ValueError(f"{self.name}: mask of {list(real.shape)} must be {list(expected)}, the tokens")
            counted = counted[real.flatten()]
        self._observe(counted.float())
        if not self.tokens:  # nothing but pads yet
            return x
        return _from_tokens(fake_quantize(tokens, *self.scale_and_zero_point()), x.shape)

    def _observe(self, x: torch.Tensor) -> None:
        if not len(x):
            return
        if not torch.isfinite(x).all():
            raise ValueError(f"{self.name}: states to calibrate on must be finite; NaN or Inf was found")
        minimum, maximum = torch.aminmax(x, dim=0)
        # The range of all calls so far can only widen.
        if self.tokens:
            if minimum.shape != self.minimum.shape:
                raise ValueError(f"{self.name}: {len(minimum)} channels must be {len(self.minimum)}, as at first")
            minimum, maximum = torch.minimum(self.minimum, minimum), torch.maximum(self.maximum, maximum)
        self.minimum, self.maximum = minimum, maximum
        self.tokens += len(x)
        if self.percentile is not None:
            # The lower tail is kept with its sign turned, so that both hold the largest values.
            self.lower_tail, self.upper_tail = self._extended(self.lower_tail, -x), self._extended(self.upper_tail, x)

    @staticmethod
    def _extended(tail: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """The largest values of each channel in `tail` and `x`, `[at most TAIL_LENGTH, C]`, descending."""
        if tail is not None:
            x = torch.cat([tail, x])
        return x.topk(min(TAIL_LENGTH, len(x)), dim=0).values

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper end of each channel's range so far, float32 `[C]`.

        Raises:
            ValueError: The percentile lies outside the kept tails.
        """
        if self.percentile is None:
            return self.minimum, self.maximum
        # `position` counts from the extreme value. Between two values numpy interpolates.
        share = (100 - self.percentile) / 100
        position = share * (self.tokens - 1)
        first = math.floor(position)
        second = min(first + 1, self.tokens - 1)
        if second >= TAIL_LENGTH:
            raise ValueError(
                f"percentile={self.percentile!r}: {self.name} has had {self.tokens:,} tokens, must be at most "
                f"{math.floor((TAIL_LENGTH - 1) / share):,} at this percentile"
            )
        lower = self.lower_tail[first].lerp(self.lower_tail[second], position - first)
        upper = self.upper_tail[first].lerp(self.upper_tail[second], position - first)
        return -lower, upper

    def scale_and_zero_point(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters of the range so far, float32 `[C]` each; errors as `range`."""
        return int8_parameters(*self.range(), self.symmetric)


class FakeQuantDynamicCache(nn.Module):
    """Rounds the states of one side of a layer to the values of INT8 with these constant parameters.

    Args:
        scale, zero_point: float32 `[C]`.
        name: Name of the side in errors.
    """

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor, name: str = "states"):
        super().__init__()
        self.name = name
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, S, D]` states to the same shape and type.

        Raises:
            ValueError: H·D is not the C that was calibrated.
        """
        tokens = _to_tokens(x)
        if tokens.shape[1] != len(self.scale):
            raise ValueError(f"{self.name}: {tokens.shape[1]} channels must be {len(self.scale)}, as calibrated")
        # A model may be spread over devices: the constants go where the states of their layer are.
        if self.scale.device != x.device:
            self.to(x.device)
        return _from_tokens(fake_quantize(tokens, self.scale, self.zero_point), x.shape)


#: Fields of a model's configuration that must agree between calibration and deployment.
_GEOMETRY = ("model_type", "num_hidden_layers", "num_key_value_heads", "head_dim")


def _describe_model(model: nn.Module) -> dict[str, str | int | None]:
    config = getattr(model, "config", None)
    # A model with other parts, a vision tower say, has the decoder's fields one level down.
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return {field: getattr(config, field, None) for field in ("name_or_path", *_GEOMETRY)}


def _shape_or_type(value) -> list[int] | str:
    """The shape of a tensor, the type of anything else, for an error."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    return type(value).__name__


def _model_inputs(model: nn.Module, batch) -> dict:
    """Arguments of the model's forward, its tensors on the model's device, for a batch of either kind."""
    if isinstance(batch, torch.Tensor) and batch.dim() == 2:
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise ValueError(f"batches: {_shape_or_type(batch)} must be [B, S] input_ids or a mapping of model inputs")
    inputs = dict(batch)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            inputs[key] = value.to(getattr(model, "device", None))
    # Models whose forward has another signature than the library's get the batch as it is.
    if hasattr(model, "config"):
        inputs.setdefault("use_cache", True)
    return inputs


def _real_tokens(inputs: dict) -> torch.Tensor | None:
    """`[B, S]` bool of a batch's `attention_mask`, false for pads."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(f"attention_mask: {_shape_or_type(mask)} must be [B, S], 0 for pads")
    return mask.bool()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Mapping],
    config: DynamicCacheConfig | None = None,
    percentile: float | None = None,
) -> "CalibratedScales":
    """Run a model on text and fit the scales of its cache to all of it.

    Only what this thread runs counts. While it runs, the model sees fake-quantized states.

    Args:
        model: Any decoder whose attention modules call `cache.update(key_states, value_states, layer_idx, ...)`.
        batches: `[B, S]` input_ids, or mappings of the arguments of the model's forward. Pads, which are 0 in an
            `attention_mask` `[B, S]`, do not count. A mapping may bring its own cache as `past_key_values`.
        config: The process; default: every attention module, symmetric.
        percentile: Our addition to the documented min-max: see `DynamicCacheQuantizer`.

    Raises:
        ValueError: A bad argument, NaN or Inf in a state (with module and side), or no token.
        RuntimeError: Nothing was intercepted in a selected module.
    """
    config = config or DynamicCacheConfig()
    modules = select_attention_modules(model, config.include, config.exclude)
    quantizers: dict[str, list[DynamicCacheQuantizer]] = {}
    for name in modules:
        quantizers[name] = [DynamicCacheQuantizer(config.symmetric, percentile, f"{name} {side}") for side in SIDES]
    layers: dict[str, int] = {}
    real = None

    def observe(name: str, layer_idx: int, *states: torch.Tensor) -> list[torch.Tensor]:
        check_count(f"{name}: layer_idx", layer_idx)
        # The hook knows a module by its name only; the cache's layer is known when the module first updates it.
        if layers.setdefault(name, layer_idx) != layer_idx:
            raise ValueError(f"{name}: layer_idx={layer_idx} must be {layers[name]}, as before; exclude the module")
        rounded = []
        for quantizer, x in zip(quantizers[name], states, strict=True):
            mask = real
            # A mask covers the tokens of a cache that the batch has brought, too; the new ones are the last.
            if mask is not None:
                mask = mask[:, -x.shape[2] :].to(x.device)
            rounded.append(quantizer(x, mask))
        return rounded

    # The states flow on rounded, so a layer is calibrated on the inputs that it gets when the layers below are INT8.
    # Other threads may use the model meanwhile and see nothing of this.
    with CacheInterception(model, modules, observe, thread=threading.get_ident()):
        for batch in batches:
            inputs = _model_inputs(model, batch)
            real = _real_tokens(inputs)
            model(**inputs)

    fitted, tokens = {}, math.inf
    for name, (keys, values) in quantizers.items():
        tokens = min(tokens, keys.tokens, values.tokens)
        if not tokens:
            raise ValueError("batches: must hold at least one token that is no pad")
        fitted[name] = ModuleScales(layers[name], keys.scale_and_zero_point(), values.scale_and_zero_point())
    return CalibratedScales(fitted, config, percentile, tokens, _describe_model(model))


_RECORD_FILE, _TENSOR_FILE = "int8_scales.json", "int8_scales.safetensors"

#: Kind and version of the saved record.
_FORMAT = {"kind": "calibrated_int8", "version": 1}

#: The tensors of one side, in the order of the tuples of `ModuleScales`.
_PARAMETERS = ("scale", "zero_point")


def _tensor_names(name: str) -> list[str]:
    """Names of the four saved tensors of a module: scale and zero point of the keys, then of the values."""
    return [f"{name}.{side}.{parameter}" for side, parameter in product(SIDES, _PARAMETERS)]


@dataclass(frozen=True)
class ModuleScales:
    """Constants of one attention module.

    Attributes:
        layer_idx: The layer of the cache that it updates.
        keys, values: `scale` and `zero_point`, float32 `[C]` each, for unsigned codes (module docstring).
    """

    layer_idx: int
    keys: tuple[torch.Tensor, torch.Tensor]
    values: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CalibratedScales:
    """The result of a calibration.

    Attributes:
        modules: Constants by the full path of the attention module.
        config: The process.
        percentile: See `DynamicCacheQuantizer`; `None`: min-max.
        tokens: Tokens that every module has seen.
        model: Name and type of the model, number of its layers and of its key/value heads, size of a head.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    modules: dict[str, ModuleScales]
    config: DynamicCacheConfig
    percentile: float | None
    tokens: int
    model: dict[str, str | int | None]

    def __post_init__(self):
        _check_percentile(self.percentile)
        check_count("tokens", self.tokens)
        if not isinstance(self.modules, Mapping) or not self.modules:
            raise ValueError(f"modules={self.modules!r}: must map at least one module to its constants")
        for name, module in self.modules.items():
            check_count(f"{name}: layer_idx", module.layer_idx)
            for side in SIDES:
                self._check_side(f"{name}.{side}", *getattr(module, side))

    @staticmethod
    def _check_side(where: str, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        for parameter, x in zip(_PARAMETERS, (scale, zero_point), strict=True):
            if x.dtype != torch.float32 or x.shape != (len(scale),) or not torch.isfinite(x).all():
                raise ValueError(
                    f"{where}.{parameter}: {list(x.shape)} in {x.dtype} must be finite float32, one per channel"
                )
        if (scale < 0).any():
            raise ValueError(f"{where}.scale: {scale.min().item()} must be at least 0")

    def by_layer(self, num_layers: int) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]] | None]:
        """The constants as a packed cache takes them.

        Args:
            num_layers: Layers of the cache.

        Returns:
            For each layer `{"keys": (scale, zero_point), "values": (scale, zero_point)}`, float32 `[C]` each, or
            `None` if it is not quantized.

        Raises:
            ValueError: Two modules update one layer, or one is beyond `num_layers`.
        """
        layers: list[dict | None] = [None] * num_layers
        for name, module in self.modules.items():
            if module.layer_idx >= num_layers:
                raise ValueError(f"num_layers={num_layers}: {name} updates layer {module.layer_idx}")
            if layers[module.layer_idx] is not None:
                raise ValueError(f"{name}: layer_idx={module.layer_idx} must not be another module's; exclude one")
            layers[module.layer_idx] = {"keys": module.keys, "values": module.values}
        return layers

    def create_cache(
        self, group_size: int = 128, residual_length: int = 0, sink_length: int = 0, **options
    ) -> KIVILatentCache:
        """A packed INT8 `KIVILatentCache` for the calibrated model; layers that were excluded stay in full precision.

        Args:
            group_size: Tokens per block: up to `group_size - 1` of the newest ones wait in full precision.
            residual_length, sink_length: As for `create_kivi_cache`; msModelSlim's cache keeps no token exact.
            options: `backend` of `KIVILatentCache`.
        """
        # A model without a configuration does not tell its layers; those above the last calibrated one are not needed.
        last = max(module.layer_idx for module in self.modules.values())
        layers = self.by_layer(self.model["num_hidden_layers"] or last + 1)
        window = (group_size, residual_length, sink_length)
        static = {"static": True, "orientation": "per_channel"}
        scheme = CacheScheme(8, 8, *window, k_scheme=static, v_scheme=static)
        exact = CacheScheme(16, 16, *window)
        # A layer without scales was excluded.
        layer_schemes, static_scales = {}, {}
        for i, scales in enumerate(layers):
            if scales is None:
                layer_schemes[i] = exact
            else:
                static_scales[i] = scales
        return KIVILatentCache(scheme, layer_schemes=layer_schemes, static_scales=static_scales, **options)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tensors and the record, which holds the SHA-256 of the tensors' file, into a folder.

        Each file is replaced at once; if only one of two could be, `load` refuses them.
        """
        tensors, layers = {}, {}
        for name, module in self.modules.items():
            layers[name] = module.layer_idx
            for tensor_name, x in zip(_tensor_names(name), (*module.keys, *module.values), strict=True):
                tensors[tensor_name] = x.contiguous()
        packed = safetensors.torch.save(tensors)
        record = {
            **_FORMAT,
            "config": asdict(self.config),
            "percentile": self.percentile,
            "tokens": self.tokens,
            "model": self.model,
            "modules": layers,
            "sha256": hashlib.sha256(packed).hexdigest(),
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Both files are written in full before either takes the place of an old one.
        partials: dict[Path, Path] = {}
        try:
            for file, content in ((_TENSOR_FILE, packed), (_RECORD_FILE, text.encode())):
                partial_file = folder / f"{file}.{os.getpid()}.part"
                partials[folder / file] = partial_file
                partial_file.write_bytes(content)
            for file, partial_file in partials.items():
                os.replace(partial_file, file)
        finally:
            for partial_file in partials.values():
                partial_file.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "CalibratedScales":
        """Read the files of `save`; the tensors are on the CPU.

        Raises:
            ValueError: The files are of another kind or version, damaged, or do not belong together.
            FileNotFoundError: One of the files is not there.
        """
        record_file, tensor_file = Path(folder) / _RECORD_FILE, Path(folder) / _TENSOR_FILE
        try:
            record = json.loads(record_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{record_file}: is not JSON: {error}") from error
        fields = {"config", "percentile", "tokens", "model", "modules", "sha256"}
        _check_keys(str(record_file), record, {*_FORMAT, *fields})
        for field, expected in _FORMAT.items():
            if record[field] != expected:
                raise ValueError(f"{record_file}: {field}={record[field]!r} must be {expected!r}")
        # The digest tells tensors of another calibration, whose names would be the same.
        packed = tensor_file.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        if digest != record["sha256"]:
            raise ValueError(f"{tensor_file}: sha256={digest} must be {record['sha256']}, that of {_RECORD_FILE}")
        tensors = safetensors.torch.load(packed)
        _check_keys("config", record["config"], set(asdict(DynamicCacheConfig())))
        _check_keys("model", record["model"], {"name_or_path", *_GEOMETRY})
        if not isinstance(record["modules"], Mapping):
            raise ValueError(f"{record_file}: modules={record['modules']!r} must map modules to layers")
        names = chain.from_iterable(map(_tensor_names, record["modules"]))
        _check_keys(str(tensor_file), tensors, set(names))
        modules = {}
        for name, layer in record["modules"].items():
            k_scale, k_zero, v_scale, v_zero = map(tensors.get, _tensor_names(name))
            modules[name] = ModuleScales(layer, (k_scale, k_zero), (v_scale, v_zero))
        config = DynamicCacheConfig(**record["config"])
        return cls(modules, config, record["percentile"], record["tokens"], record["model"])


def deploy_fake_quant(model: nn.Module, scales: CalibratedScales) -> CacheInterception:
    """Fake-quantize the states that the calibrated modules of a model store, whatever cache it is used with.

    Args:
        model: The model that was calibrated, on any device and in any type.
        scales: Result of the calibration.

    Returns:
        A handle with `remove`, which is a context manager too. While it is installed, a forward in which a calibrated
        module does not update a cache raises `RuntimeError`.

    Raises:
        ValueError: The model is of another type or size, or lacks a module.
    """
    # Modules have the same names in many models, so the fields of the configuration are compared, too.
    found = _describe_model(model)
    for field in _GEOMETRY:
        if found[field] != scales.model[field]:
            raise ValueError(f"{field}={found[field]!r}: must be {scales.model[field]!r}, as calibrated")
    present = dict(model.named_modules())
    modules, quantizers = {}, {}
    for name, module in scales.modules.items():
        if name not in present:
            raise ValueError(f"{name}: was calibrated, is not in the model; near: {_nearest(name, present)}")
        modules[name] = present[name]
        quantizers[name] = [FakeQuantDynamicCache(*getattr(module, side), f"{name} {side}") for side in SIDES]

    def quantize(name: str, layer_idx: int, *states: torch.Tensor) -> list[torch.Tensor]:
        expected = scales.modules[name].layer_idx
        if layer_idx != expected:
            raise ValueError(f"{name}: layer_idx={layer_idx} must be {expected}, as calibrated")
        return [quantizer(x) for quantizer, x in zip(quantizers[name], states, strict=True)]

    return CacheInterception(model, modules, quantize)
