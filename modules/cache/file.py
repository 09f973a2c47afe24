"""The file of a saved cache: a safetensors file whose header and tensors have checksums, and which says its version.

The metadata holds the header as JSON under `kivi_latent_cache` and that text's SHA-256 under `sha256`. The header has
the `version`, what the cache says of itself (`KIVILatentCache.save`), and the SHA-256 of the bytes of each tensor.
"""

import hashlib
import json
import os
from itertools import chain
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modules.cache.exact import ExactTokens
from modules.cache.growing import SavedLayer
from modules.cache.layer import LatentLayer, in_any_mode
from modules.cache.rows import Row, column
from modules.cache.scheme import SIDES, CacheScheme
from modules.files import save_tensors

KEY, CHECKSUM, VERSION = "kivi_latent_cache", "sha256", 4

#: Tensors of the calibrated scales of a side.
STATIC_NAMES = ("scale", "zero_point")

#: What a layer's record has only where sinks are not as wide as the window, or where there is a sliding window.
OPTIONAL_FIELDS = ("sink_channels", "sliding_window")

#: Types that states can have.
STATE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _sha256(tensor: torch.Tensor) -> str:
    # A tensor of one element counts as contiguous with any stride, but is no bytes then.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()


def write_cache_file(path: str | os.PathLike, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write header (JSON types) and tensors; an interruption leaves an old file as it was."""
    checksums = {name: _sha256(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, **header, "tensors": checksums})
    save_tensors(path, tensors, {KEY: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()})


def read_cache_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors (on the CPU) of a file that `write_cache_file` has written.

    Raises:
        ValueError: The file is truncated, altered, of another kind or version; the message says which.
        OSError: There is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    text = metadata.get(KEY)
    if text is None:
        raise ValueError(f"{path}: not a saved cache; its metadata must have {KEY!r}")
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: altered; its header must be a JSON object with a version") from None
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r} must be {VERSION}")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get(CHECKSUM):
        raise ValueError(f"{path}: altered; the header is not that of its checksum")
    checksums = header.get("tensors")
    if not isinstance(checksums, dict) or set(checksums) != set(names):
        raise ValueError(f"{path}: altered; its tensors are not those that the header names")
    altered = sorted(name for name in names if _sha256(tensors[name]) != checksums[name])
    if altered:
        raise ValueError(f"{path}: altered; the contents of {', '.join(altered)} are not those of their checksums")
    return header, tensors


def export_layer(layer: LatentLayer) -> tuple[dict[str, torch.Tensor], dict]:
    """The tokens that a layer holds: tensors without slack, and the bookkeeping as JSON types."""
    tensors = {}
    for side, pair in layer.static_scales.items():
        for name, tensor in zip(STATIC_NAMES, pair, strict=True):
            tensors[f"static.{side}.{name}"] = tensor.clone()
    if not layer.rows:  # nothing was fed, or a layer of fixed capacity was reset
        return tensors, {"slots": 0}
    with layer.pool.lock:
        rows = layer.rows
        # Blocks by their slots, each once; rows then refer to places among them.
        live = sorted(set(chain.from_iterable(column(rows, "blocks"))))
        for side, fields in layer.pool.storage.items():
            for name, tensor in fields.items():
                tensors[f"{side}.{name}"] = tensor[live]
    # A layer of fixed capacity has a longer window; a file has that of a layer that grows.
    lengths = exact_lengths(layer.scheme)
    for name, tensor in layer.exact.named().items():
        tensors[name] = tensor[:, : lengths[name.partition("_")[0]]]
    places = {slot: i for i, slot in enumerate(live)}
    records = [row.moved(places)._asdict() for row in rows]
    record = {"slots": layer.slots, "widths": layer.widths, "rows": records}
    # Named only where there is such a thing, so that other files stay as they were.
    for row in records:
        if not row["dropped"]:
            del row["dropped"]
    for name in OPTIONAL_FIELDS:
        if getattr(layer, name) is not None:
            record[name] = getattr(layer, name)
    return tensors, record


def exact_lengths(scheme: CacheScheme) -> dict[str, int]:
    """Tokens of sinks and windows in a file."""
    return {"sink": scheme.sink_length, "window": scheme.longest_window + 1}


@in_any_mode
def parse_layer(tensors: dict[str, torch.Tensor], record: dict, scheme: CacheScheme, scored: bool) -> SavedLayer:
    """Inverse of `export_layer`; the tensors are copied.

    Args:
        tensors: Of the layer, by their names in it.
        record: The bookkeeping.
        scheme: Of the layer.
        scored: Whether the tokens of its windows have scores.

    Raises:
        ValueError: Tensors and record are not those of a layer of this scheme.
    """
    tensors = dict(tensors)
    is_fed = "rows" in record
    optional = set(OPTIONAL_FIELDS) if is_fed else set()
    if set(record) - optional not in ({"slots"}, {"slots", "widths", "rows"}):
        raise ValueError(f"record: {sorted(record)} must be slots, and widths and rows unless nothing was fed")
    _check_integers("slots", [record["slots"]], 0, 2**62 if is_fed else 0)
    # Whatever is taken out of `tensors` is accounted for; what is left at the end does not belong to a layer.
    saved = SavedLayer({}, record["slots"])
    for side in _static_sides(tensors):
        channels = tuple(tensors[f"static.{side}.scale"].shape)
        scale, zero_point = (f"static.{side}.{name}" for name in STATIC_NAMES)
        saved.static_scales[side] = (
            _take(tensors, scale, channels, torch.float32),
            _take(tensors, zero_point, channels, torch.float32),
        )
    if is_fed:
        _parse_tokens(saved, tensors, record, scheme, scored)
    if tensors:
        raise ValueError(f"{', '.join(sorted(tensors))}: no such tensor in a layer of this scheme")
    return saved


def _static_sides(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Sides of which tensors hold calibrated scales, named "static.keys.scale"."""
    sides = []
    for name in tensors:
        kind, _, rest = name.partition(".")
        if kind == "static" and rest.endswith(".scale"):
            sides.append(rest.partition(".")[0])
    return sides


def _parse_tokens(saved: SavedLayer, tensors: dict, record: dict, scheme: CacheScheme, scored: bool) -> None:
    """Take what a layer that was fed holds."""
    # The window says batch, type and channels; everything else is checked against it and the scheme.
    window, widths, rows = tensors.get("window_keys"), record["widths"], record["rows"]
    if window is None or window.dim() != 3 or not len(window) or window.dtype not in STATE_DTYPES:
        raise ValueError("window_keys: must be [rows, tokens, channels] floats")
    if not isinstance(widths, list) or len(widths) not in (1, 2):
        raise ValueError("widths: must be those of keys and values")
    for side in widths:
        _check_integers("widths", side, 1, 2**31)
    if not isinstance(rows, list) or len(rows) != len(window):
        raise ValueError(f"rows: must be the {len(window)} of window_keys")
    saved.widths = tuple(map(tuple, widths))
    channels = dict(zip(SIDES, map(sum, widths)))
    saved.sink_channels = record.get("sink_channels")
    if saved.sink_channels is not None:
        if set(saved.sink_channels) != set(SIDES):
            raise ValueError("sink_channels: must be those of keys and values")
        _check_integers("sink_channels", list(saved.sink_channels.values()), 1, 2**31)
    saved.sliding_window = record.get("sliding_window")
    if saved.sliding_window is not None:
        _check_integers("sliding_window", [saved.sliding_window], 1, 2**62)
    for side, (scale, _) in saved.static_scales.items():
        if scale.shape != (channels.get(side),):
            raise ValueError(f"static.{side}.scale: {list(scale.shape)} must be one for each channel")

    exact, lengths = {}, exact_lengths(scheme)
    for place, by_side in (("sink", saved.sink_channels or channels), ("window", channels)):
        for side, count in by_side.items():
            name = f"{place}_{side}"
            exact[name] = _take(tensors, name, (len(window), lengths[place], count), window.dtype)
    if scored:
        exact["window_score"] = _take(tensors, "window_score", tuple(window.shape[:2]), torch.float32)
    saved.exact = ExactTokens.from_named(exact)

    codecs = scheme.codecs(saved.widths, window.dtype, None, saved.static_scales)
    # Blocks are counted by the first field of the keys, and all other fields must have as many.
    count = len(tensors.get(f"keys.{next(iter(codecs['keys'].fields()))}", ()))
    saved.rows = [parse_row(row, scheme, record["slots"], count) for row in rows]
    if any(row.sees_dropped(saved.sliding_window) for row in saved.rows):
        raise ValueError(f"row: dropped must be tokens behind sliding_window={saved.sliding_window}")
    for side, codec in codecs.items():
        saved.blocks[side] = {}
        for name, (shape, dtype) in codec.fields().items():
            saved.blocks[side][name] = _take(tensors, f"{side}.{name}", (count, *shape), dtype)


def parse_row(record: dict, scheme: CacheScheme, slots: int, blocks: int) -> Row:
    """Inverse of `Row._asdict`, for a row of so many slots of a layer of so many packed blocks.

    Raises:
        ValueError: The record is not that of such a row.
    """
    if not isinstance(record, dict) or set(record) | {"dropped"} != set(Row._fields):
        raise ValueError(f"row: must have {', '.join(sorted(Row._fields))}")
    _check_integers("row: sinks", [record["sinks"]], 0, scheme.sink_length)
    _check_integers("row: window", [record["window"]], 0, scheme.longest_window)
    _check_integers("row: blocks", record["blocks"], 0, blocks - 1)
    _check_integers("row: counts", record["counts"], 1, scheme.block_length)
    if not isinstance(record["pads"], list):
        raise ValueError("row: pads must be a list")
    for pad in record["pads"]:
        _check_integers("row: pads", pad, 0, slots)
    # Rising and disjoint ranges are those whose edges rise.
    edges = list(chain.from_iterable(record["pads"]))
    if edges != sorted(edges) or any(len(pad) != 2 for pad in record["pads"]):
        raise ValueError("row: pads must be rising ranges")
    if len(record["blocks"]) != len(record["counts"]):
        raise ValueError("row: blocks and counts must be as many")
    pads, dropped = tuple(map(tuple, record["pads"])), record.get("dropped", 0)
    _check_integers("row: dropped", [dropped], 0, slots)
    row = Row(record["sinks"], record["window"], tuple(record["blocks"]), tuple(record["counts"]), pads, dropped)
    if row.slots != slots:
        raise ValueError(f"row: tokens and pads must be its {slots} slots")
    return row


def _take(tensors: dict, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Remove a tensor from `tensors`; returns a copy."""
    tensor = tensors.pop(name, None)
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
        found = "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
        raise ValueError(f"{name}: {found}, must be {list(shape)} of {dtype}")
    return tensor.clone()


def _check_integers(name: str, values: list, low: int, high: int) -> None:
    if not isinstance(values, list) or not all(type(x) is int and low <= x <= high for x in values):
        raise ValueError(f"{name}={values!r}: must be integers from {low} to {high}")
