"""A packed KV cache of `transformers`, for latents and for any model; what a layer does is in `cache/layer.py`."""

import copy
import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial

import torch
from transformers import Cache

from configuration_alrd_llama import ALRDLlamaConfig, Projection, QuantScheme, check_choice, check_count
from modules.cache.codecs import block_nbytes
from modules.cache.file import read_cache_file, write_cache_file
from modules.cache.fingerprint import DIGESTS, differences, model_fingerprint
from modules.cache.layer import (
    CacheScheme,
    FixedLatentLayer,
    KIVILatentLayer,
    LayerScales,
    LayerWidths,
    Row,
    TokenScore,
    chosen_rows,
    in_any_mode,
    repeated_rows,
    storage_nbytes,
)
from modules.formats.vidkv import parse_quantization_config
from modules.kernels import BACKENDS
from modules.quant_utils import KIVIQuantizer


class KIVILatentCache(Cache):
    """A `transformers` cache whose history is packed; for the latents of `ALRDLlamaForCausalLM` and for any model.

    Args:
        scheme: What every layer stores.
        widths: Channels of the head groups, per layer; `None` adds layers as they come, one group per head.
        layer_schemes: What single layers store instead, by index; window and sinks must be those of `scheme`.
        static_scales: Calibrated scales of each layer, by index.
        backend: "reference", "triton", or `None`: chosen by the device (`modules/kernels`).
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
        self._measured: set[int] = set()  # layers whose first packed keys have been looked at
        self._told = False  # whether they have given cause for a warning
        self._torn = False  # whether layers of fixed capacity may hold different tokens
        #: Slots that a step will fill, if its model has asked for the sizes of a mask.
        self._announced: int | None = None
        self._last_updated: int | None = None  # layer that `update` fed last
        self._model: Callable | None = None  # weak reference to the decoder that feeds the cache
        self._fingerprint: dict | None = None  # of the model that has filled it, if another object or process
        self.scheme = scheme or CacheScheme()
        self.layer_schemes = dict(layer_schemes or {})
        self.static_scales = dict(static_scales or {})
        self.backend, self.token_score = backend, token_score
        if token_score is not None and token_score != "attention" and not callable(token_score):
            raise ValueError(f"token_score={token_score!r}: must be a function, 'attention' or None")
        for i, other in self.layer_schemes.items():
            check_count("layer_schemes: index of a layer", i)
            if widths is not None and i >= len(widths):
                raise ValueError(f"layer_schemes[{i}]: the model has {len(widths)} layers")
            for name in ("residual_length", "sink_length", "block_length"):
                if getattr(other, name) != getattr(self.scheme, name):
                    raise ValueError(f"layer_schemes[{i}]: {name} must be {getattr(self.scheme, name)} as in scheme")
        check_choice("backend", backend, (*BACKENDS, None))
        super().__init__(layers=[self._new_layer(i, w) for i, w in enumerate(widths or ())])

    def _new_layer(self, layer_idx: int, widths: LayerWidths | None = None) -> KIVILatentLayer:
        arguments = (
            self.layer_schemes.get(layer_idx, self.scheme),
            widths,
            self.static_scales.get(layer_idx),
            self.backend,
            partial(self.token_score, layer_idx) if callable(self.token_score) else self.token_score,
        )
        if self.capacity is not None:
            return FixedLatentLayer(*arguments, capacity=self.capacity)
        return KIVILatentLayer(*arguments)

    def layer(self, layer_idx: int, widths: LayerWidths | None = None) -> KIVILatentLayer:
        """The cache of a layer, added if need be; `widths` are those of the model that asks."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        layer = self.layers[layer_idx]
        if widths is not None and layer.is_initialized and layer.widths != widths:
            raise ValueError(
                f"layer {layer_idx}: holds keys and values of {layer.widths} channels by head group, the model's have "
                f"{widths}"
            )
        layer.given_widths = layer.given_widths or widths
        return layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        layer = self.layer(layer_idx)
        below = next((i for i in range(layer_idx - 1, -1, -1) if self.layers[i].is_initialized), None)
        slots = layer.slots + key_states.shape[2]
        twice = self._last_updated == layer_idx and self._announced == layer.slots
        if twice or (below is not None and slots != self.layers[below].slots):
            other = "it is fed twice in one step" if twice else f"layer {below} holds {self.layers[below].slots}"
            raise ValueError(
                f"past_key_values: layer {layer_idx} would hold {slots} slots, but {other}; must be the same tokens in "
                "all layers, once. An encoder-decoder model needs EncoderDecoderCache(this cache, DynamicCache()); "
                "after an error in a step, crop() or reset() the cache"
            )
        self._last_updated = layer_idx
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        exact = self.scheme.sink_length
        if not self._told and layer_idx not in self._measured and self.scheme.flushed_blocks(keys.shape[2] - exact):
            self._measured.add(layer_idx)
            self._told = _warn_of_turning_keys(layer_idx, keys[:, :, exact:], layer.scheme.keys)
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

    def row_tokens(self) -> list[int]:
        """Tokens that each row holds, pads not counted; empty before the first one."""
        return [row.tokens for row in self.layers[self.first_layer].rows] if self.layers else []

    def row_lengths(self) -> list[int] | torch.Tensor:
        """As `row_tokens`; with a fixed capacity `[B]` int32 on the device, which nothing has waited for."""
        return self.layers[self.first_layer].row_lengths() if self.layers else []

    def held_slots(self) -> torch.Tensor:
        """`[B, slots]` bool on the CPU: true for tokens, false for pads."""
        layer = self.layers[self.first_layer]
        held = torch.ones((len(layer.rows), layer.slots), dtype=torch.bool, device="cpu")
        for row_held, row in zip(held, layer.rows):
            for start, stop in row.pads:
                row_held[start:stop] = False
        return held

    @property
    def first_layer(self) -> int:
        """Index of the first layer that holds tokens: a stage of a pipeline feeds only its own. 0 before."""
        return next((i for i, layer in enumerate(self.layers) if layer.is_initialized), 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx or self.first_layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes = super().get_mask_sizes(query_length, layer_idx or self.first_layer)
        self._announced = sizes[0]
        return sizes

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is appended inside is appended to all layers or, if an error comes through, to none.

        A cache of fixed capacity cannot take an append back: it is refused from then on, until it is reset.

        Raises:
            ValueError: An error has come through before.
        """
        self._check_whole()
        marks = [] if self.capacity is not None else [layer.mark() for layer in self.layers]
        try:
            yield
        except BaseException:
            for i, layer in enumerate(self.layers if self.capacity is None else ()):
                layer.return_to(marks[i] if i < len(marks) else None)
            # A step that was being captured has done nothing yet.
            captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            self._torn = self.capacity is not None and not captured
            raise

    def _check_whole(self) -> None:
        if self._torn:
            raise ValueError(
                f"capacity={self.capacity}: an error came in the middle of a step or an edit, after which the layers "
                "of a cache of fixed capacity may differ; reset() it"
            )

    # ---- editing, of all layers or of none

    def _select(self, indices_of: Callable[[list[Row]], list[int]]) -> None:
        layers = [layer for layer in self.layers if layer.is_initialized]
        for edit in [layer.selection(indices_of(layer.rows)) for layer in layers]:
            edit()

    def _edit_layers(self, edit: str, argument) -> None:
        """Layers of fixed capacity, of which each is edited or left as it was."""
        self._check_whole()
        for i, layer in enumerate(self.layers):
            try:
                getattr(layer, edit)(argument)
            except BaseException:
                self._torn = i > 0
                raise

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`."""
        if self.capacity is None:
            indices = beam_idx.tolist()  # one wait for the device, not one a layer
            self._select(lambda rows: indices)
        else:
            self._edit_layers("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row side by side."""
        if self.capacity is None:
            self._select(lambda rows: repeated_rows(rows, repeats))
        else:
            self._edit_layers("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these indices, or those where a mask is true."""
        if self.capacity is None:
            self._select(lambda rows: chosen_rows(rows, indices))
        else:
            self._edit_layers("batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last slots of the layers that hold tokens; see `KIVILatentLayer.crop`."""
        if self.capacity is not None:
            self._edit_layers("crop", tokens_to_remove)
            return
        for layer in [layer for layer in self.layers if layer.is_initialized] or self.layers:
            layer.crop(tokens_to_remove)

    def take_out(self, attention_mask: torch.Tensor) -> None:
        """Make pads of the tokens at the end of rows that a mask calls pads, as `crop` would: `generate` feeds pads as
        tokens to rows that have ended before the others.

        Args:
            attention_mask: `[B, slots]` or longer, 0 for pads.

        Raises:
            ValueError: The mask has another shape, calls a pad a token, or a token that others follow a pad.
        """
        held = self.held_slots()
        if attention_mask.dim() != 2 or len(attention_mask) != len(held) or attention_mask.shape[1] < held.shape[1]:
            raise ValueError(f"attention_mask: {list(attention_mask.shape)} must be {list(held.shape)} or longer")
        kept = attention_mask[:, : held.shape[1]].cpu() != 0
        if torch.equal(kept, held):
            return
        removed = held & ~kept
        if (kept & (~held | removed.cumsum(1).bool())).any():
            raise ValueError(
                f"attention_mask: rows of {self.row_tokens()} tokens can lose their last ones only, but the mask hides "
                "a token before others, or calls a pad a token; crop() or reset() the cache"
            )
        for layer in [layer for layer in self.layers if layer.is_initialized]:
            layer.take_out(removed.sum(1), kept)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._torn = False

    # ---- sharing, saving

    def growing(self) -> "KIVILatentCache":
        """A cache of no fixed capacity with what this one holds, which it copies.

        Raises:
            ValueError: An error has left the layers of this cache with different tokens.
        """
        self._check_whole()
        grown = copy.copy(self)
        grown.capacity, grown.made_by_generate = None, False
        grown.layers = [grown._new_layer(i, layer.given_widths) for i, layer in enumerate(self.layers)]
        for layer, own in zip(grown.layers, self.layers, strict=True):
            tensors, record = own.export()
            layer.restore(tensors, json.loads(json.dumps(record)))  # as it is read from a file
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
        self._model, self._fingerprint = weakref.ref(decoder), None

    def is_bound_to(self, decoder: torch.nn.Module) -> bool:
        """Whether the decoder feeds the cache; a fixed capacity, whose steps are compiled, knows but the first one."""
        return self._model is not None and (self.capacity is not None or self._model() is decoder)

    def check_model(self, decoder: torch.nn.Module) -> None:
        """Refuse to go on with another model than that which has filled the cache.

        Raises:
            ValueError: The fingerprints differ.
        """
        filled_by = self.fingerprint() if self.get_seq_length() else None
        if filled_by is None:
            return
        if differing := differences(model_fingerprint(decoder, filled_by.get("digest")), filled_by):
            raise ValueError(f"past_key_values: filled by another model than this one: {'; '.join(differing)}")

    def fingerprint(self, digest: str = "all") -> dict | None:
        """Fingerprint of the model that has filled the cache; `None`: not known.

        It is that of the model as it is now, if the model is in this process, else as it was when the cache left it.

        Args:
            digest: As for `model_fingerprint`, where it is taken now.
        """
        decoder = self._model() if self._model is not None else None
        return self._fingerprint if decoder is None else model_fingerprint(decoder, digest)

    def __copy__(self) -> "KIVILatentCache":
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    @in_any_mode
    def __deepcopy__(self, memo: dict) -> "KIVILatentCache":
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __getstate__(self) -> dict:
        """A copy in another process knows the model by its fingerprint."""
        return vars(self) | {"_model": None, "_fingerprint": self.fingerprint()}

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
            exported, record = layer.export()
            tensors.update({f"{i}.{name}": tensor for name, tensor in exported.items()})
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
            return cls._load(header, tensors, device, backend, token_score, model, scheme)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: its header is not that of a cache ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _load(cls, header: dict, tensors: dict, device, backend, token_score, model, scheme) -> "KIVILatentCache":
        stored, found = CacheScheme(**header["scheme"]), header["model"]
        if scheme is not None and scheme != stored:
            raise ValueError(f"another scheme: {'; '.join(differences(asdict(stored), asdict(scheme)))}")
        expected = found if model is None or found is None else model_fingerprint(model, found.get("digest"))
        if differing := differences(found or {}, expected or {}):
            raise ValueError(f"of another model: {'; '.join(differing)}")
        if (header["token_score"] == "function") != (token_score is not None):
            need = "must be given, the function by which the saved cache scored tokens"
            never = f"must not be given, the saved cache had {header['token_score']!r}"
            raise ValueError(f"token_score: {need if token_score is None else never}")
        layer_schemes = {int(i): CacheScheme(**fields) for i, fields in header["layer_schemes"].items()}
        score = token_score or header["token_score"]
        cache = cls(stored, layer_schemes=layer_schemes, backend=backend, token_score=score)
        mine = {i: {} for i in range(len(header["layers"]))}
        for name, tensor in tensors.items():
            i, _, field_name = name.partition(".")
            mine[int(i)][field_name] = tensor
        for i, record in enumerate(header["layers"]):
            place = device or (_layer_device(model, i) if model is not None and mine[i] else "cpu")
            try:
                cache.layer(i).restore({name: tensor.to(place) for name, tensor in mine[i].items()}, record)
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from error
        if (
            len(
                {
                    (layer.slots, *((row.tokens, row.pads) for row in layer.rows))
                    for layer in cache.layers
                    if layer.slots
                }
            )
            > 1
        ):
            raise ValueError("layers: must hold the same tokens")
        cache.static_scales = {i: layer.static_scales for i, layer in enumerate(cache.layers) if layer.static_scales}
        cache._fingerprint = found
        if model is not None:
            cache.bind(model.get_decoder())
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, allocated room and blocks shared with forks included."""
        return self.nbytes_together(self)

    @staticmethod
    def nbytes_together(*caches: "KIVILatentCache") -> int:
        """Bytes of all storages of several caches; what forks share counts once."""
        return storage_nbytes(tensor for cache in caches for layer in cache.layers for tensor in layer.tensors())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, everything counted; the formula is `CacheScheme.layer_nbytes`."""
        return sum(layer.nbytes_used for layer in self.layers)

    @property
    def bits_per_element(self) -> dict[str, float]:
        """True bits per element of the packed keys and values: all that a block takes, over all layers started."""
        bits, elements = dict.fromkeys(("keys", "values"), 0), dict.fromkeys(("keys", "values"), 0)
        for layer in self.layers:
            for side, codec in (layer.pool.codecs if layer.is_initialized else {}).items():
                bits[side] += 8 * block_nbytes(codec)
                elements[side] += layer.scheme.block_length * layer.channels[side]
        return {side: bits[side] / elements[side] for side in bits if elements[side]}

    def __repr__(self) -> str:
        first, tokens = self.layer_schemes.get(0, self.scheme), self.row_tokens()
        s = first if first.keys.tiers or first.values.tiers else self.scheme
        held = f"rows of {tokens} tokens" if tokens else "empty"
        slack = self.nbytes - self.nbytes_used
        backends = sorted({layer.backend_note for layer in self.layers if layer.is_initialized})
        true_bits = " / ".join(f"{bits:.3g}" for bits in self.bits_per_element.values())
        special = f", {len(self.layer_schemes)} layers of their own" if self.layer_schemes else ""
        return (
            f"KIVILatentCache(keys {s.keys}, values {s.values}{special}, "
            f"residual_length={s.residual_length}, sink_length={s.sink_length}"
            f"{'' if self.capacity is None else f', capacity={self.capacity}'}; "
            f"{true_bits + ' true bits; ' if true_bits else ''}"
            f"backend {' and '.join(backends) or self.backend or 'by device'}; "
            f"{len(self.layers)} layers, {held}, {self.nbytes_used:,} bytes used + {slack:,} slack)"
        )


#: Reach of the keys of a drop-in cache beyond which it warns (`_warn_of_turning_keys`).
MOST_REACH = 12.0


def _warn_of_turning_keys(layer_idx: int, keys: torch.Tensor, scheme: QuantScheme) -> bool:
    """Warn, if need be, of keys `[B, H, T, D]` after RoPE with a large bias that turns; returns whether it did.

    RoPE keeps the length of each pair of channels (i, i + D/2), so how much the lengths differ from token to token says
    how much the keys do, whatever turns them; the range that codes must span, in units of that, is some 8 for keys
    without a bias.
    """
    if keys.shape[3] % 2 or scheme.tiers is not None or scheme.bits >= 8:
        return False
    keys = keys[:, :, :128].detach().float()
    low, high = keys.chunk(2, dim=-1)
    length = (low.square() + high.square()).sqrt()
    spread = length.std(dim=(0, 2))
    differ = spread > 1e-5 * length.mean(dim=(0, 2))  # but for tokens that are all the same
    reach = (keys.amax(2) - keys.amin(2)).mean(0).unflatten(-1, (2, -1)).amax(1)
    measure = (reach[differ] / spread[differ]).mean().item() if differ.any() else 0.0
    if measure > MOST_REACH:
        warnings.warn(
            f"layer {layer_idx}: keys after RoPE reach over {measure:.0f} times the spread of their lengths (without a "
            f"bias it is some 8), and codes of {scheme.bits} bits lose what differs from token to token; split the "
            "model (ALRDLlamaForCausalLM caches keys before RoPE, and no bias), or take k_bits=8",
            stacklevel=3,
        )
    return measure > MOST_REACH


def _layer_device(model: torch.nn.Module, layer_idx: int) -> torch.device:
    """Where the states of a layer are computed."""
    layer = model.get_decoder().layers[layer_idx]
    device = next(layer.parameters()).device
    return device if device.type != "meta" else torch.device(layer._hf_hook.execution_device)


def config_widths(config: ALRDLlamaConfig) -> list[LayerWidths]:
    """Channels that each layer of a model caches, by head group; checks the config."""
    config.check_latent_cache()
    return list(map(config.layer_widths, range(config.num_hidden_layers)))


def config_schemes(config: ALRDLlamaConfig, **settings) -> tuple[CacheScheme, dict[int, CacheScheme]]:
    """What the cache of a model stores: the scheme of every layer, and those of layers with width tiers in its place.

    Args:
        config: Of the model.
        settings: Fields of `CacheScheme` in place of the config's. A side whose bits or scheme are given has one width
            for all channels: the config's tiers and scheme, calibrated for each other, are not used for it.
    """
    own = {f.name: getattr(config, f.name) for f in fields(CacheScheme)}
    tiered = {Projection.parse(name).side for name in config.width_tiers}
    for side in tuple(tiered):
        if {f"{side}_bits", f"{side}_scheme"} & set(settings):
            tiered.remove(side)
            own[f"{side}_scheme"] = None
    scheme, layers = CacheScheme(**(own | settings)), {}
    for i in range(config.num_hidden_layers):
        tiers = {side: config.group_tiers(Projection(i, side)) for side in tiered}
        sides = {f"{side}_scheme": {**getattr(scheme, f"{side}_scheme"), "tiers": t} for side, t in tiers.items() if t}
        if sides:
            layers[i] = replace(scheme, **sides)
    return scheme, layers


def create_kivi_cache(
    k_bits: float = 2,
    v_bits: float = 2,
    group_size: int = 128,
    residual_length: int = 32,
    sink_length: int = 4,
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
    widths = None if config is None else config_widths(config)
    return KIVILatentCache(scheme, widths, layer_schemes, static_scales, backend, token_score, capacity)


__all__ = [
    "CacheScheme",
    "FixedLatentLayer",
    "KIVILatentCache",
    "KIVILatentLayer",
    "KIVIQuantizer",
    "config_schemes",
    "config_widths",
    "create_kivi_cache",
]
