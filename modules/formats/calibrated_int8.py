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
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSet, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from pathlib import Path

import safetensors.torch
import torch
import yaml
from torch import nn

from configuration_alrd_llama import check_count
from modules.kivi_cache import CacheScheme, KIVILatentCache
from modules.quant_utils import to_finite

SIDES = ("keys", "values")

#: How attention modules are recognised by their full path.
ATTENTION_PATTERN = "*self_attn"

#: Extreme values per channel and end that a percentile is read from. Ends of this length give the percentile p of up
#: to 2047 / (1 - p / 100) tokens exactly (two million at 99.9) and take 16 KiB per channel.
TAIL_LENGTH = 2048

# ---- configuration


def _check_keys(where: str, value, required: set[str], optional: set[str] = frozenset()) -> None:
    """Raise a `ValueError` unless `value` is a mapping with all of the required keys and no unknown one."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r}: must be a mapping with {', '.join(sorted(required | optional))}")
    if unknown := sorted((key for key in value if key not in required | optional), key=str):
        raise ValueError(f"{where}: unknown {unknown!r}; the keys are {', '.join(sorted(required | optional))}")
    if missing := sorted(required - set(value)):
        raise ValueError(f"{where}: {', '.join(missing)} must be given")


def _check_percentile(percentile: float | None) -> None:
    is_number = isinstance(percentile, Real) and not isinstance(percentile, bool)
    if percentile is not None and not (is_number and 50 < percentile <= 100):
        raise ValueError(f"percentile={percentile!r}: must be None (min-max), or above 50 and at most 100")


@dataclass(frozen=True)
class DynamicCacheConfig:
    """The `dynamic_cache` process: what msModelSlim documents, with its defaults.

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
            object.__setattr__(self, field, tuple(patterns))
        if not self.include:
            raise ValueError("include=[]: must hold a pattern; '*' takes every attention module")


def load_process_config(source: str | os.PathLike | Mapping) -> DynamicCacheConfig:
    """Read the YAML of a calibration.

    Args:
        source: Path of the file, or what it holds: `spec.process` is a list of one process with `type`, `qconfig`
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
    if not isinstance(processes, list) or len(processes) != 1:
        raise ValueError(f"spec.process={processes!r}: must be a list of one process")
    process = processes[0]
    _check_keys("spec.process[0]", process, {"type", "qconfig"}, {"include", "exclude"})
    if process["type"] != "dynamic_cache":
        raise ValueError(f"type={process['type']!r}: must be 'dynamic_cache'")
    _check_keys("qconfig", process["qconfig"], set(), {"scope", "dtype", "symmetric", "method"})
    patterns = {field: process[field] for field in ("include", "exclude") if field in process}
    return DynamicCacheConfig(**process["qconfig"], **patterns)


# ---- phase 1: which modules


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(get_close_matches(name, list(names), n=3, cutoff=0)) or "none"


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
    modules = {name: module for name, module in model.named_modules() if fnmatchcase(name, ATTENTION_PATTERN)}
    if not modules:
        raise ValueError(f"{type(model).__name__}: has no module named {ATTENTION_PATTERN}")
    matched = {}
    for field, patterns in (("include", include), ("exclude", exclude)):
        matched[field] = set()
        for pattern in patterns:
            found = {name for name in modules if fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(
                    f"{field}={pattern!r}: matches no attention module; near: {_nearest(pattern, modules)}"
                )
            matched[field] |= found
    selected = matched["include"] - matched["exclude"]
    if not selected:
        raise ValueError(f"exclude={list(exclude)!r}: must leave one of the modules of include={list(include)!r}")
    return {name: module for name, module in modules.items() if name in selected}


# ---- the quantizers


def int8_parameters(minimum: torch.Tensor, maximum: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` and `zero_point` (module docstring) of channels with these ranges; all four float32 `[C]`."""
    if symmetric:
        scale = torch.maximum(minimum.abs(), maximum.abs()) / 127
        return scale, -128 * scale
    return (maximum - minimum) / 255, minimum


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, C]` to INT8 and back (module docstring), in float32, returned in the type of `x`."""
    codes = torch.where(scale > 0, (x.float() - zero_point) / scale, 0).clamp_(0, 255)
    codes = (codes + 0.5).floor_()  # nearest, halves up, as the packed cache does it
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
        name: What errors call it.

    Attributes:
        minimum, maximum: float32 `[C]` over all tokens; `None` before the first.
        tokens: How many tokens have been seen.
    """

    def __init__(self, symmetric: bool = True, percentile: float | None = None, name: str = "states"):
        super().__init__()
        _check_percentile(percentile)
        self.symmetric, self.percentile, self.name, self.tokens = symmetric, percentile, name, 0
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
            ValueError: Of other shapes than before, or NaN or Inf.
        """
        tokens = _to_tokens(x)
        if real is not None and real.shape != (x.shape[0], x.shape[2]):
            raise ValueError(f"{self.name}: mask of {list(real.shape)} must be {[x.shape[0], x.shape[2]]}, the tokens")
        self._observe(tokens.detach().float() if real is None else tokens.detach()[real.flatten()].float())
        return _from_tokens(fake_quantize(tokens, *self.scale_and_zero_point()), x.shape) if self.tokens else x

    def _observe(self, x: torch.Tensor) -> None:
        if not len(x):
            return
        if not torch.isfinite(x).all():
            raise ValueError(f"{self.name}: states to calibrate on must be finite; NaN or Inf was found")
        minimum, maximum = torch.aminmax(x, dim=0)
        if self.tokens:
            if minimum.shape != self.minimum.shape:
                raise ValueError(f"{self.name}: {len(minimum)} channels must be {len(self.minimum)}, as at first")
            minimum, maximum = torch.minimum(self.minimum, minimum), torch.maximum(self.maximum, maximum)
        self.minimum, self.maximum = minimum, maximum
        self.tokens += len(x)
        if self.percentile is not None:
            self.lower_tail, self.upper_tail = self._extended(self.lower_tail, -x), self._extended(self.upper_tail, x)

    @staticmethod
    def _extended(tail: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """The largest values of the channels of both, `[at most TAIL_LENGTH, C]`, descending."""
        x = x if tail is None else torch.cat([tail, x])
        return x.topk(min(TAIL_LENGTH, len(x)), dim=0).values

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper end of each channel's range so far, float32 `[C]`.

        Raises:
            ValueError: The percentile lies outside the kept tails.
        """
        if self.percentile is None:
            return self.minimum, self.maximum
        share = (100 - self.percentile) / 100
        position = share * (self.tokens - 1)
        first = math.floor(position)
        second = min(first + 1, self.tokens - 1)
        if second >= TAIL_LENGTH:
            raise ValueError(
                f"percentile={self.percentile!r}: {self.name} has had {self.tokens:,} tokens, must be at most "
                f"{math.floor((TAIL_LENGTH - 1) / share):,} at this percentile"
            )
        lower, upper = (t[first].lerp(t[second], position - first) for t in (self.lower_tail, self.upper_tail))
        return -lower, upper

    def scale_and_zero_point(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters of the range so far, float32 `[C]` each; errors as `range`."""
        return int8_parameters(*self.range(), self.symmetric)


class FakeQuantDynamicCache(nn.Module):
    """Rounds the states of one side of a layer to what INT8 with these constant parameters can represent.

    Args:
        scale, zero_point: float32 `[C]`.
        name: What errors call it.
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
        if self.scale.device != x.device:
            self.to(x.device)
        return _from_tokens(fake_quantize(tokens, self.scale, self.zero_point), x.shape)


# ---- interception of cache.update


class _CacheProxy:
    """A cache as one attention module sees it in one call: everything is the real cache's own, but for `update`."""

    # The names are long so as not to hide an attribute of the cache.
    __slots__ = ("_proxy_cache", "_proxy_is_updated", "_proxy_module_name", "_proxy_owner")

    def __init__(self, cache, owner: "CacheInterception", module_name: str):
        for slot, value in zip(self.__slots__, (cache, False, module_name, owner), strict=True):
            object.__setattr__(self, slot, value)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        states = self._proxy_owner.quantize(self._proxy_module_name, layer_idx, key_states, value_states)
        object.__setattr__(self, "_proxy_is_updated", True)
        return self._proxy_cache.update(*states, layer_idx, *args, **kwargs)

    @property
    def __class__(self):
        return type(self._proxy_cache)

    def __getattr__(self, name):
        return getattr(self._proxy_cache, name)

    def __setattr__(self, name, value):
        setattr(self._proxy_cache, name, value)

    def __delattr__(self, name):
        delattr(self._proxy_cache, name)

    # Python looks operators up on the type, past `__getattr__`.

    def __len__(self):
        return len(self._proxy_cache)

    def __bool__(self):
        return bool(self._proxy_cache)

    def __iter__(self):
        return iter(self._proxy_cache)

    def __getitem__(self, index):
        return self._proxy_cache[index]


def _unwrap(value):
    return value._proxy_cache if type(value) is _CacheProxy else value


def _is_cache(value) -> bool:
    """Whether a value has a callable `update` that is not the one of a dictionary or a set."""
    return callable(getattr(value, "update", None)) and not isinstance(value, (MutableMapping, MutableSet, type))


class CacheInterception:
    """Hooks that pass the states of some attention modules through a function on their way to the cache.

    A module's forward is given a stand-in for its cache argument; the cache itself is not touched and may be of any
    type with a callable `update(key_states, value_states, layer_idx, ...)`. Remove the hooks by `remove`, or use the
    object as a context manager.

    Args:
        model: The model; a forward of it in which a module was passed by is an error (`RuntimeError`).
        modules: Attention modules of the model by name.
        quantize: Function of (module name, layer_idx, key states, value states) to the states to store.
        thread: Identifier of the only thread whose calls are intercepted; `None`: all.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], quantize: Callable, thread: int | None = None):
        self.quantize, self.thread = quantize, thread
        self._not_yet = set(modules)
        self._handles = [model.register_forward_hook(self._after_model)]
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(self._after, name), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "CacheInterception":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def _is_foreign(self) -> bool:
        return self.thread not in (None, threading.get_ident())

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict):
        if self._is_foreign():
            return None

        def wrapped(value):
            # A module inside another selected one is handed that one's stand-in: the innermost quantizes.
            value = _unwrap(value)
            return _CacheProxy(value, self, name) if _is_cache(value) else value

        return tuple(wrapped(value) for value in args), {key: wrapped(value) for key, value in kwargs.items()}

    def _after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output):
        if self._is_foreign():
            return None
        proxies = [value for value in (*args, *kwargs.values()) if type(value) is _CacheProxy]
        if not any(proxy._proxy_owner is self and proxy._proxy_is_updated for proxy in proxies):
            found = ", ".join(type(_unwrap(proxy)).__name__ for proxy in proxies) or "none"
            raise RuntimeError(
                f"{name}: its forward stored nothing through cache.update (cache arguments: {found}), so nothing would "
                "be quantized; use_cache must be on and the cache an argument of the module, it must call "
                "cache.update(key_states, value_states, layer_idx), and no other interception may be installed; or "
                "exclude the module"
            )
        self._not_yet.discard(name)
        # Some attention modules return their cache.
        return type(output)(map(_unwrap, output)) if type(output) in (tuple, list) else _unwrap(output)

    def _after_model(self, model: nn.Module, args: tuple, output) -> None:
        if self._not_yet and not self._is_foreign():
            raise RuntimeError(
                f"{', '.join(sorted(self._not_yet))}: not called in a forward of {type(model).__name__}, so nothing "
                "would be quantized there; exclude what is not in use (hooks do not see a direct call of `.forward`)"
            )


# ---- phase 2: calibration

#: Fields of a model's configuration that must agree between calibration and deployment.
_GEOMETRY = ("model_type", "num_hidden_layers", "num_key_value_heads", "head_dim")


def _describe_model(model: nn.Module) -> dict[str, str | int | None]:
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return {field: getattr(config, field, None) for field in ("name_or_path", *_GEOMETRY)}


def _model_inputs(model: nn.Module, batch) -> dict:
    if isinstance(batch, torch.Tensor) and batch.dim() == 2:
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        found = list(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ValueError(f"batches: {found} must be [B, S] input_ids or a mapping of model inputs")
    device = getattr(model, "device", None)
    inputs = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
    # Models whose forward has another signature than the library's get the batch as it is.
    return {"use_cache": True, **inputs} if hasattr(model, "config") else inputs


def _real_tokens(inputs: dict) -> torch.Tensor | None:
    """`[B, S]` bool of a batch's `attention_mask`, false for pads."""
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: {found} must be [B, S], 0 for pads")
    return None if mask is None else mask.bool()


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
        config: What to quantize; default: every attention module, symmetric.
        percentile: Our addition to the documented min-max: see `DynamicCacheQuantizer`.

    Raises:
        ValueError: A bad argument, NaN or Inf in a state (with module and side), or no token.
        RuntimeError: Nothing was intercepted in a selected module.
    """
    config = config or DynamicCacheConfig()
    modules = select_attention_modules(model, config.include, config.exclude)
    quantizers = {
        name: {side: DynamicCacheQuantizer(config.symmetric, percentile, f"{name} {side}") for side in SIDES}
        for name in modules
    }
    layers: dict[str, int] = {}
    real = None

    def observe(name: str, layer_idx: int, *states: torch.Tensor) -> list[torch.Tensor]:
        check_count(f"{name}: layer_idx", layer_idx)
        if layers.setdefault(name, layer_idx) != layer_idx:
            raise ValueError(f"{name}: layer_idx={layer_idx} must be {layers[name]}, as before; exclude the module")
        masks = [None if real is None else real[:, -x.shape[2] :].to(x.device) for x in states]
        return [quantizers[name][side](x, mask) for side, x, mask in zip(SIDES, states, masks, strict=True)]

    with CacheInterception(model, modules, observe, thread=threading.get_ident()):
        for batch in batches:
            inputs = _model_inputs(model, batch)
            real = _real_tokens(inputs)
            model(**inputs)

    tokens = min(quantizer.tokens for sides in quantizers.values() for quantizer in sides.values())
    if not tokens:
        raise ValueError("batches: must hold at least one token that is no pad")
    fitted = {
        name: ModuleScales(layers[name], *(sides[side].scale_and_zero_point() for side in SIDES))
        for name, sides in quantizers.items()
    }
    return CalibratedScales(fitted, config, percentile, tokens, _describe_model(model))


# ---- the result

_RECORD_FILE, _TENSOR_FILE = "int8_scales.json", "int8_scales.safetensors"

#: Kind and version of the saved record.
_FORMAT = {"kind": "calibrated_int8", "version": 1}

#: The tensors of one side, in the order of the tuples of `ModuleScales`.
_PARAMETERS = ("scale", "zero_point")


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
    """What a calibration has found.

    Attributes:
        modules: Constants by the full path of the attention module.
        config: What was asked for.
        percentile: See `DynamicCacheQuantizer`; `None`: min-max.
        tokens: Tokens that every module has seen.
        model: Of the model: its name, type, number of layers and key/value heads, head size.

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
                scale, zero_point = getattr(module, side)
                for parameter, x in zip(_PARAMETERS, (scale, zero_point), strict=True):
                    if x.dtype != torch.float32 or x.shape != (len(scale),) or not torch.isfinite(x).all():
                        raise ValueError(
                            f"{name}.{side}.{parameter}: {list(x.shape)} in {x.dtype} must be finite float32, one per "
                            "channel"
                        )
                if (scale < 0).any():
                    raise ValueError(f"{name}.{side}.scale: {scale.min().item()} must be at least 0")

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
            layers[module.layer_idx] = {side: getattr(module, side) for side in SIDES}
        return layers

    def create_cache(
        self, group_size: int = 128, residual_length: int = 0, sink_length: int = 0, **options
    ) -> KIVILatentCache:
        """A packed INT8 `KIVILatentCache` for the calibrated model; layers that were excluded stay in full precision.

        Args:
            group_size: Tokens per block: up to `group_size - 1` of the newest ones wait in full precision.
            residual_length, sink_length: As for `create_kivi_cache`; the document's cache keeps no token exact.
            options: `backend` of `KIVILatentCache`.
        """
        last = max(module.layer_idx for module in self.modules.values())
        layers = self.by_layer(self.model["num_hidden_layers"] or last + 1)
        window = (group_size, residual_length, sink_length)
        static = {"static": True, "orientation": "per_channel"}
        exact = CacheScheme(16, 16, *window)
        return KIVILatentCache(
            CacheScheme(8, 8, *window, k_scheme=static, v_scheme=static),
            layer_schemes={i: exact for i, layer in enumerate(layers) if layer is None},
            static_scales={i: layer for i, layer in enumerate(layers) if layer is not None},
            **options,
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tensors and the record, which holds the SHA-256 of the tensors' file, into a folder.

        Each file is replaced at once; if only one of two could be, `load` refuses them.
        """
        tensors = {
            f"{name}.{side}.{parameter}": x.contiguous()
            for name, module in self.modules.items()
            for side in SIDES
            for parameter, x in zip(_PARAMETERS, getattr(module, side), strict=True)
        }
        packed = safetensors.torch.save(tensors)
        record = {
            **_FORMAT,
            "config": asdict(self.config),
            "percentile": self.percentile,
            "tokens": self.tokens,
            "model": self.model,
            "modules": {name: module.layer_idx for name, module in self.modules.items()},
            "sha256": hashlib.sha256(packed).hexdigest(),
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partials = {folder / file: folder / f"{file}.{os.getpid()}.part" for file in (_TENSOR_FILE, _RECORD_FILE)}
        try:
            for partial_file, content in zip(partials.values(), (packed, text.encode()), strict=True):
                partial_file.write_bytes(content)
            for file, partial_file in partials.items():
                os.replace(partial_file, file)
        finally:
            for partial_file in partials.values():
                partial_file.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "CalibratedScales":
        """Read what `save` has written; the tensors are on the CPU.

        Raises:
            ValueError: The files are of another kind or version, damaged, or do not belong together.
            FileNotFoundError: One of them is not there.
        """
        record_file, tensor_file = (Path(folder) / file for file in (_RECORD_FILE, _TENSOR_FILE))
        try:
            record = json.loads(record_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{record_file}: is not JSON: {error}") from error
        fields = {"config", "percentile", "tokens", "model", "modules", "sha256"}
        _check_keys(str(record_file), record, {*_FORMAT, *fields})
        for field, expected in _FORMAT.items():
            if record[field] != expected:
                raise ValueError(f"{record_file}: {field}={record[field]!r} must be {expected!r}")
        packed = tensor_file.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        if digest != record["sha256"]:
            raise ValueError(f"{tensor_file}: sha256={digest} must be {record['sha256']}, that of {_RECORD_FILE}")
        tensors = safetensors.torch.load(packed)
        _check_keys("config", record["config"], set(asdict(DynamicCacheConfig())))
        _check_keys("model", record["model"], {"name_or_path", *_GEOMETRY})
        if not isinstance(record["modules"], Mapping):
            raise ValueError(f"{record_file}: modules={record['modules']!r} must map modules to layers")
        names = [f"{name}.{side}.{p}" for name in record["modules"] for side in SIDES for p in _PARAMETERS]
        _check_keys(str(tensor_file), tensors, set(names))
        modules = {
            name: ModuleScales(layer, *(tuple(tensors[f"{name}.{side}.{p}"] for p in _PARAMETERS) for side in SIDES))
            for name, layer in record["modules"].items()
        }
        config = DynamicCacheConfig(**record["config"])
        return cls(modules, config, record["percentile"], record["tokens"], record["model"])


# ---- phase 3: deployment


def deploy_fake_quant(model: nn.Module, scales: CalibratedScales) -> CacheInterception:
    """Fake-quantize what the calibrated modules of a model store, whatever cache it is used with.

    Args:
        model: The model that was calibrated, on any device and in any type.
        scales: Result of the calibration.

    Returns:
        A handle with `remove`, which is a context manager too. While it is installed, a forward in which a calibrated
        module does not update a cache raises `RuntimeError`.

    Raises:
        ValueError: The model is of another type or size, or lacks a module.
    """
    found = _describe_model(model)
    for field in _GEOMETRY:
        if found[field] != scales.model[field]:
            raise ValueError(f"{field}={found[field]!r}: must be {scales.model[field]!r}, as calibrated")
    present = dict(model.named_modules())
    for name in scales.modules:
        if name not in present:
            raise ValueError(f"{name}: was calibrated, is not in the model; near: {_nearest(name, present)}")
    quantizers = {
        name: [FakeQuantDynamicCache(*getattr(module, side), f"{name} {side}") for side in SIDES]
        for name, module in scales.modules.items()
    }

    def quantize(name: str, layer_idx: int, *states: torch.Tensor) -> list[torch.Tensor]:
        expected = scales.modules[name].layer_idx
        if layer_idx != expected:
            raise ValueError(f"{name}: layer_idx={layer_idx} must be {expected}, as calibrated")
        return [quantizer(x) for quantizer, x in zip(quantizers[name], states, strict=True)]

    return CacheInterception(model, {name: present[name] for name in scales.modules}, quantize)


__all__ = [
    "CacheInterception",
    "CalibratedScales",
    "DynamicCacheConfig",
    "DynamicCacheQuantizer",
    "FakeQuantDynamicCache",
    "ModuleScales",
    "calibrate",
    "deploy_fake_quant",
    "fake_quantize",
    "int8_parameters",
    "load_process_config",
    "select_attention_modules",
]
