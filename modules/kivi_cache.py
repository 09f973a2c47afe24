"""A packed KV cache of `transformers`, for latents and for any model; what a layer does is in `cache/layer.py`."""

import copy
import json
import os
from dataclasses import asdict, fields, replace
from functools import partial

import torch

from configuration_alrd_llama import ALRDLlamaConfig, check_choice, check_count
from modules.cache.binding import ModelBinding
from modules.cache.codecs import block_nbytes
from modules.cache.drop_in import UpdateGuard, check_no_latents
from modules.cache.file import export_layer, parse_layer, read_cache_file, write_cache_file
from modules.cache.fingerprint import DIGESTS, differences, model_fingerprint
from modules.cache.fixed import FixedLatentLayer
from modules.cache.growing import KIVILatentLayer
from modules.cache.layer import LatentLayer, TokenScore, in_any_mode, settle_model, storage_nbytes
from modules.cache.pages import needs_whole
from modules.cache.quantization_config import parse_quantization_config
from modules.cache.rows import column
from modules.cache.scheme import SIDES, CacheScheme, LayerScales, LayerWidths, SinkChannels
from modules.cache.transactions import TransactionalCache
from modules.kernels import BACKENDS
from modules.quant_utils import KIVIQuantizer as KIVIQuantizer


class KIVILatentCache(TransactionalCache):
    """A `transformers` cache whose history is packed; for the latents of `ALRDLlamaForCausalLM` and for any model.

    Args:
        scheme: What every layer stores.
        widths: Channels of the head groups, per layer; `None` adds layers as they come, one group per head.
        layer_schemes: What single layers store instead, by index; window and sinks must be those of `scheme`.
        static_scales: Calibrated scales of each layer, by index.
        backend: One of `BACKENDS` (`modules/kernels`); `None`: chosen by the device.
        token_score: For protected tokens: a function `(layer_idx, keys, values) -> [B, L]` of the flat `[B, L, C]`
            states of new tokens; "attention": what they receive in `ALRDLlamaForCausalLM`; `None`: the quantizer's own
            error.
        capacity: Allocate for this many tokens per row when the first ones come, and keep all bookkeeping on the
            device, so that CUDA graphs and `torch.compile` can take a step (`FixedLatentLayer`); `None`: grow.
    """

    def __init__(
        self,
        scheme: CacheScheme | None = None,
        widths: list[LayerWidths] | None = None,
        layer_schemes: dict[int, CacheScheme] | None = None,
        static_scales: dict[int, LayerScales] | None = None,
        backend: str | None = None,
        token_score: TokenScore | str | None = None,
        capacity: int | None = None,
    ):
        self.capacity = capacity
        #: Whether `generate` has chosen the capacity, for one text.
        self.made_by_generate = False
        self._guard = UpdateGuard()
        self._binding = ModelBinding()
        self.scheme = scheme or CacheScheme()
        self.layer_schemes = dict(layer_schemes or {})
        self.static_scales = dict(static_scales or {})
        self.backend, self.token_score = backend, token_score
        if token_score is not None and token_score != "attention" and not callable(token_score):
            raise ValueError(f"token_score={token_score!r}: must be a function, 'attention' or None")
        # Layers of one cache pack the same tokens at the same step, or a table of one would not do for another.
        for i, other in self.layer_schemes.items():
            check_count("layer_schemes: index of a layer", i)
            if widths is not None and i >= len(widths):
                raise ValueError(f"layer_schemes[{i}]: the model has {len(widths)} layers")
            for name in ("residual_length", "sink_length", "block_length"):
                if getattr(other, name) != getattr(self.scheme, name):
                    raise ValueError(f"layer_schemes[{i}]: {name} must be {getattr(self.scheme, name)} as in scheme")
        check_choice("backend", backend, (*BACKENDS, None))
        super().__init__(layers=[self._new_layer(i, w) for i, w in enumerate(widths or ())])

    def _new_layer(self, layer_idx: int, widths: LayerWidths | None = None) -> LatentLayer:
        score = partial(self.token_score, layer_idx) if callable(self.token_score) else self.token_score
        scheme, scales = self.layer_schemes.get(layer_idx, self.scheme), self.static_scales.get(layer_idx)
        return new_layer(scheme, widths, scales, self.backend, score, capacity=self.capacity)

    def layer(
        self, layer_idx: int, widths: LayerWidths | None = None, sliding_window: int | None = None
    ) -> LatentLayer:
        """The cache of a layer, added if need be; `widths` and `sliding_window` are those of the model that asks."""
        # A drop-in cache does not know how many layers the model has.
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        if widths is not None:
            settle_model(layer_idx, self.layers[layer_idx], widths, sliding_window)
        return self.layers[layer_idx]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        layer = self.layer(layer_idx)
        check_no_latents(layer_idx, layer)
        self._guard.check_same_tokens(self.layers, layer_idx, key_states.shape[2])
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        self._guard.look_at_keys(layer_idx, layer, keys)
        return keys, values

    def _refuse_states(self, *args, **kwargs):
        """What layers of other kinds than attention ask of a cache."""
        raise ValueError(
            "past_key_values: a KIVILatentCache holds keys and values only, but this model has layers with other "
            "states (linear attention, state space, convolution or an indexer); leave the cache to the model"
        )

    update_conv_state = get_conv_state = _refuse_states
    update_recurrent_state = get_recurrent_state = _refuse_states
    has_previous_state = update_indexer = _refuse_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx or self.first_layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes = super().get_mask_sizes(query_length, layer_idx or self.first_layer)
        self._guard.announced = sizes[0]
        return sizes

    def growing(self) -> "KIVILatentCache":
        """A cache of no fixed capacity with what this one holds, which it copies.

        Raises:
            ValueError: An error has left the layers of this cache with different tokens.
        """
        self.check_consistent()
        grown = copy.copy(self)
        grown.capacity, grown.made_by_generate = None, False
        grown.layers = [grown._new_layer(i, layer.given_widths) for i, layer in enumerate(self.layers)]
        # As through a file: one way of copying between the two kinds of layers, and the one that is tested most.
        for layer, own in zip(grown.layers, self.layers, strict=True):
            tensors, record = export_layer(own)
            record = json.loads(json.dumps(record))  # as it is read from a file
            layer.restore(parse_layer(tensors, record, layer.scheme, layer.score is not None))
        return grown

    def fork(self) -> "KIVILatentCache":
        """A cache that goes on by itself from here: packed blocks are shared, sinks and window copied.

        Blocks are immutable, so whatever happens to one of the two is not seen by the other; those that nobody refers
        to any more are freed. Two threads may each use a fork.

        Raises:
            ValueError: The cache has a fixed capacity.
        """
        forked = copy.copy(self)
        forked.layers = [layer.fork() for layer in self.layers]
        return forked

    def bind(self, decoder: torch.nn.Module) -> None:
        """Note the decoder that feeds the cache, for the fingerprint of a saved file."""
        self._binding = ModelBinding(decoder)

    def is_bound_to(self, decoder: torch.nn.Module) -> bool:
        """Whether the decoder feeds the cache."""
        return self._binding.is_bound_to(decoder)

    def check_model(self, decoder: torch.nn.Module) -> None:
        """Raise a `ValueError` unless the decoder is that of the model which has filled the cache, or it is empty."""
        if self.get_seq_length():
            self._binding.check(decoder)

    def fingerprint(self, digest: str = "all") -> dict | None:
        """Fingerprint of the model that has filled the cache (`ModelBinding.fingerprint`); `None`: not known."""
        return self._binding.fingerprint(digest)

    def __copy__(self) -> "KIVILatentCache":
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self) | {"_guard": copy.copy(self._guard)})
        return copied

    @in_any_mode
    def __deepcopy__(self, memo: dict) -> "KIVILatentCache":
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if torch.is_inference_mode_enabled():  # in which the tensors have been read
            vars(self).update(vars(copy.deepcopy(self)))

    def save(self, path: str | os.PathLike, model: torch.nn.Module | None = None, digest: str = "all") -> None:
        """Write the cache, packed as it is, to a safetensors file; an interrupted save leaves an old file whole.

        Args:
            path: The file (`modules/cache/file.py`).
            model: The model that has filled the cache, for its fingerprint; an `ALRDLlamaForCausalLM` is known. A file
                without fingerprint is taken for that of any model.
            digest: What the fingerprint, which `load` takes anew, is of: "all" weights, or a "sample" of each, in
                milliseconds (`model_fingerprint`). It is that of the model as it is now: save before you change it.
        """
        check_choice("digest", digest, DIGESTS)
        tensors, layers = {}, []
        if self.static_scales:
            self.layer(max(self.static_scales))  # so that each set of scales has a layer to be written with
        for i, layer in enumerate(self.layers):
            exported, record = export_layer(layer)
            for name, tensor in exported.items():
                tensors[f"{i}.{name}"] = tensor
            layers.append(record)
        header = {
            "model": self.fingerprint(digest) if model is None else model_fingerprint(model, digest),
            "scheme": asdict(self.scheme),
            "token_score": "function" if callable(self.token_score) else self.token_score,
            "layer_schemes": {str(i): asdict(scheme) for i, scheme in self.layer_schemes.items()},
            "layers": layers,
        }
        write_cache_file(path, header, tensors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: torch.device | str | None = None,
        backend: str | None = None,
        token_score: TokenScore | None = None,
        model: torch.nn.Module | None = None,
        scheme: CacheScheme | None = None,
    ) -> "KIVILatentCache":
        """Read a cache that `save` has written.

        Args:
            path: The file.
            device: Where the tensors go; `None`: where the layers of `model` are, or the CPU.
            backend: As for `KIVILatentCache`.
            token_score: The function of a cache that had one; it is not in the file.
            model: The model that is to go on with the cache; without it an `ALRDLlamaForCausalLM` checks the cache at
                its first step.
            scheme: What the cache must have been stored by, if it must; `None`: whatever the file says.

        Raises:
            ValueError: The file is truncated, altered, or of another kind, version, model or scheme; or `token_score`
                is missing. The message starts with the path and names what differs.
            OSError: There is no such file.
        """
        header, tensors = read_cache_file(path)
        try:
            return _from_file(cls, header, tensors, device, backend, token_score, model, scheme)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: its header is not that of a cache ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, allocated room and blocks shared with forks included."""
        return self.nbytes_together(self)

    @staticmethod
    def nbytes_together(*caches: "KIVILatentCache") -> int:
        """Bytes of all storages of several caches; what forks share counts once."""
        tensors = []
        for cache in caches:
            for layer in cache.layers:
                tensors += layer.tensors()
        return storage_nbytes(tensors)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, everything counted; the formula is `CacheScheme.layer_nbytes`."""
        return sum(layer.nbytes_used for layer in self.layers)

    @property
    def bits_per_element(self) -> dict[str, float]:
        """True bits per element of the packed keys and values: all that a block takes, over all layers started."""
        bits, elements = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
        for layer in _started(self):
            for side, codec in layer.pool.codecs.items():
                bits[side] += 8 * block_nbytes(codec)
                elements[side] += layer.scheme.block_length * layer.channels[side]
        return {side: bits[side] / elements[side] for side in SIDES if elements[side]}

    def __repr__(self) -> str:
        return _describe(self)


def _started(cache: KIVILatentCache) -> list[LatentLayer]:
    return [layer for layer in cache.layers if layer.is_initialized]


def new_layer(scheme: CacheScheme, *arguments, capacity: int | None) -> LatentLayer:
    """A layer of fixed capacity, or one that grows; the arguments are those of `LatentLayer`."""
    if capacity is None:
        return KIVILatentLayer(scheme, *arguments)
    return FixedLatentLayer(scheme, *arguments, capacity=capacity)


def _describe(cache: KIVILatentCache) -> str:
    """The settings of a cache, and the tokens and bytes that it holds."""
    first, tokens = cache.layer_schemes.get(0, cache.scheme), cache.row_tokens()
    # With width tiers every layer has a scheme of its own, and the shared one does not say what is stored.
    shown = first if first.keys.tiers or first.values.tiers else cache.scheme
    parts = [f"keys {shown.keys}", f"values {shown.values}"]
    if cache.layers and len(cache.layers[0].given_widths or SIDES) == 1:
        parts = [f"keys and values {shown.keys}"]
    if cache.layer_schemes:
        parts.append(f"{len(cache.layer_schemes)} layers of their own")
    window = {"residual_length": shown.residual_length, "sink_length": shown.sink_length, "capacity": cache.capacity}
    parts += [f"{name}={tokens}" for name, tokens in window.items() if tokens is not None]
    settings = ", ".join(parts)

    true_bits = " / ".join(map("{:.3g}".format, cache.bits_per_element.values()))
    if true_bits:
        settings += f"; {true_bits} true bits"
    backends = " and ".join(sorted({layer.backend_note for layer in _started(cache)}))
    held = f"rows of {tokens} tokens" if tokens else "empty"
    used, slack = cache.nbytes_used, cache.nbytes - cache.nbytes_used
    return (
        f"KIVILatentCache({settings}; backend {backends or cache.backend or 'by device'}; "
        f"{len(cache.layers)} layers, {held}, {used:,} bytes used + {slack:,} slack)"
    )


def _from_file(
    cls: type[KIVILatentCache], header: dict, tensors: dict, device, backend, token_score, model, scheme
) -> KIVILatentCache:
    """`KIVILatentCache.load` of what a file holds."""
    # What a caller asks for is compared first, before anything is allocated.
    stored, found = CacheScheme(**header["scheme"]), header["model"]
    if scheme is not None and scheme != stored:
        raise ValueError(f"another scheme: {'; '.join(differences(asdict(stored), asdict(scheme)))}")
    expected = found if model is None or found is None else model_fingerprint(model, found.get("digest"))
    if differing := differences(found or {}, expected or {}):
        raise ValueError(f"of another model: {'; '.join(differing)}")
    # A function cannot be stored; whoever goes on with other scores would protect other tokens.
    had_function = header["token_score"] == "function"
    if had_function and token_score is None:
        raise ValueError("token_score: must be given, the function by which the saved cache scored tokens")
    if token_score is not None and not had_function:
        raise ValueError(f"token_score: must not be given, the saved cache had {header['token_score']!r}")
    layer_schemes = {int(i): CacheScheme(**fields) for i, fields in header["layer_schemes"].items()}
    score = token_score or header["token_score"]
    cache = cls(stored, layer_schemes=layer_schemes, backend=backend, token_score=score)

    # Tensors are named by their layer and what they are in it: "3.window_keys".
    by_layer: dict[int, dict] = {i: {} for i in range(len(header["layers"]))}
    for name, tensor in tensors.items():
        i, _, field_name = name.partition(".")
        by_layer[int(i)][field_name] = tensor
    for i, own in by_layer.items():
        # Beside the weights of the layer, if a model is given; a model may be spread over devices.
        place = device or "cpu"
        if device is None and model is not None and own:
            place = _layer_device(model, i)
        layer = cache.layer(i)
        own = {name: tensor.to(place) for name, tensor in own.items()}
        try:
            layer.restore(parse_layer(own, header["layers"][i], layer.scheme, layer.score is not None))
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
        if layer.static_scales:
            cache.static_scales[i] = layer.static_scales
        if (found or {}).get("truncation_ranks") is not None and layer.is_initialized:
            layer.given_widths = layer.widths  # latents, which no other model must take for its keys
    if len({_held_tokens(layer) for layer in cache.layers if layer.slots}) > 1:
        raise ValueError("layers: must hold the same tokens")
    cache._binding = ModelBinding(fingerprint=found)
    if model is not None:
        cache.bind(model.get_decoder())
    return cache


def _held_tokens(layer: LatentLayer) -> tuple:
    """What all layers of a cache have in common: slots, and each row's tokens and pads."""
    return layer.slots, column(layer.rows, "tokens"), column(layer.rows, "pads")


def _layer_device(model: torch.nn.Module, layer_idx: int) -> torch.device:
    """Where the states that a layer of a cache holds are computed."""
    decoder = model.get_decoder()
    layer = decoder.layers[layer_idx * getattr(decoder.config, "layer_group_size", 1)]
    device = next(layer.parameters()).device
    return device if device.type != "meta" else torch.device(layer._hf_hook.execution_device)


def config_widths(config: ALRDLlamaConfig) -> list[LayerWidths]:
    """Channels that each layer of a cache of a model holds, by head group; checks the config."""
    config.check_latent_cache()
    return list(map(config.layer_widths, range(0, config.num_hidden_layers, config.layer_group_size)))


def config_windows(config: ALRDLlamaConfig) -> list[int | None]:
    """Sliding window of each layer of a cache of a model; `None` where a query sees all tokens before it."""
    return list(map(config.layer_window, range(0, config.num_hidden_layers, config.layer_group_size)))


def config_sink_channels(config: ALRDLlamaConfig) -> list[SinkChannels | None]:
    """Channels of the sinks of each layer of a cache of a model; `None` where they are those of `config_widths`."""
    if not config.keep_dense:
        return [None] * config.num_cache_layers
    counts = []
    for first in range(0, config.num_hidden_layers, config.layer_group_size):
        layers = min(config.layer_group_size, config.num_hidden_layers - first)
        counts.append(dict.fromkeys(SIDES, layers * config.num_key_value_heads * config.head_dim))
    return counts


def config_schemes(config: ALRDLlamaConfig, **settings) -> tuple[CacheScheme, dict[int, CacheScheme]]:
    """What the cache of a model stores: the scheme of every layer, and those of layers with width tiers in its place.

    Args:
        config: Of the model.
        settings: Fields of `CacheScheme` in place of the config's. A side whose bits or scheme are given has one width
            for all channels: the config's tiers and scheme, calibrated for each other, are not used for it.

    Raises:
        ValueError: A setting is out of range, or of values alone where they are stored with the keys.
    """
    for name in ("bits", "scheme") if config.joint_kv else ():
        value = settings.get(f"v_{name}")
        if value is not None and value != settings.get(f"k_{name}"):
            raise ValueError(
                f"v_{name}={value!r}: must be k_{name} or left out with joint_kv=True, whose latents are stored by "
                "k_bits and k_scheme"
            )
    own = {f.name: getattr(config, f.name) for f in fields(CacheScheme)}
    tiered = {part.settings_side for part in config.parts() if part.name in config.width_tiers}
    for side in tuple(tiered):
        if {f"{side}_bits", f"{side}_scheme"} & set(settings):
            tiered.remove(side)
            own[f"{side}_scheme"] = None
    scheme, layers = CacheScheme(**(own | settings)), {}
    for part in config.parts():
        tiers, side = config.group_tiers(part), part.settings_side
        if not tiers or side not in tiered:
            continue
        # A layer of the cache holds what all layers of a model's group have in common.
        i = config.cache_layer(part.members()[0].layer)
        field = f"{side}_scheme"
        layers[i] = replace(layers.get(i, scheme), **{field: {**getattr(scheme, field), "tiers": tiers}})
    return scheme, layers


def page_schemes(config: ALRDLlamaConfig) -> list[CacheScheme]:
    """What each layer of a cache stores in the pages of a serving engine.

    Raises:
        ValueError: The model keeps no packed latents.
    """
    if not config.use_kivi:
        raise ValueError("use_kivi=False: must be True, for pages hold packed latents")
    shared, layers = config_schemes(config)
    return [layers.get(i, shared) for i in range(config.num_cache_layers)]


def needs_whole_pages(config: ALRDLlamaConfig) -> bool:
    """Whether some layer of a cache packs pages when they are full, as all of them do then."""
    sides = [scheme.keys for scheme in page_schemes(config)]
    # A latent of keys and values is stored as keys are.
    if not config.joint_kv:
        sides += [scheme.values for scheme in page_schemes(config)]
    return any(map(needs_whole, sides))


def check_token_score(config: ALRDLlamaConfig, token_score: TokenScore | str | None) -> None:
    """Raise a `ValueError` for scores of tokens whose latents are those of several layers."""
    if config.keep_dense and token_score is not None:
        raise ValueError(
            f"token_score={token_score!r}: must be None with keep_dense=True, for the latents of a block are those of "
            "several layers"
        )


def create_kivi_cache(
    k_bits: float = CacheScheme.k_bits,
    v_bits: float = CacheScheme.v_bits,
    group_size: int = CacheScheme.group_size,
    residual_length: int = CacheScheme.residual_length,
    sink_length: int = CacheScheme.sink_length,
    config: ALRDLlamaConfig | None = None,
    *,
    k_scheme: dict | None = None,
    v_scheme: dict | None = None,
    quantization_config: dict | str | None = None,
    layer_schemes: dict[int, CacheScheme] | None = None,
    static_scales: dict[int, LayerScales] | None = None,
    backend: str | None = None,
    token_score: TokenScore | str | None = None,
    capacity: int | None = None,
) -> KIVILatentCache:
    """Make an empty `KIVILatentCache`.

    Args:
        k_bits, v_bits: One of `SUPPORTED_BITS`; 16 is the lossless mode.
        group_size: Elements per scale; 0: one per channel and block of 128 tokens, one per token and head group.
        residual_length: At least this many of the newest tokens stay in full precision.
        sink_length: This many of the first tokens stay in full precision.
        config: The latent model that will use the cache (its settings are not read, only its ranks); `None` makes a
            drop-in cache for any model.
        k_scheme, v_scheme: Other fields of `QuantScheme` for keys or values.
        quantization_config: VidKV's dictionary or string instead of the settings above (`modules/formats/vidkv.py`).
        layer_schemes, static_scales, backend, token_score, capacity: As for `KIVILatentCache`.

    Raises:
        ValueError: A setting is out of range; the message names field, value and rule.
    """
    scheme = CacheScheme(k_bits, v_bits, group_size, residual_length, sink_length, k_scheme or {}, v_scheme or {})
    if quantization_config is not None:
        if scheme != CacheScheme():
            raise ValueError("quantization_config: stands for all settings of the cache; give no others beside it")
        scheme = CacheScheme(**parse_quantization_config(quantization_config))
    widths = None
    if config is not None:
        check_token_score(config, token_score)
        widths = config_widths(config)
    return KIVILatentCache(scheme, widths, layer_schemes, static_scales, backend, token_score, capacity)
