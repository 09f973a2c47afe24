"""Loading and saving of weights: from dense ones to factors and back, checks, shards of tensor-parallel ranks.

`from_pretrained` splits a dense checkpoint weight by weight, by conversions that the library applies
(`register_dense_conversion`); `from_dense` splits a model in memory (`factored_state`).
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from configuration_alrd_llama import (
    SIDES,
    ALRDLlamaConfig,
    Block,
    Projection,
    architecture,
    check_tiers,
    check_width_beside_tiers,
)
from modules.cache.fingerprint import weights_at_hand
from modules.projections import DenseLayer, dense_layer, projection_name
from modules.svd_linear import (
    BlockFactors,
    LatentFactors,
    SVDLinear,
    factor_block,
    factor_groups,
    join_factors,
    member_states,
)

#: Held while a model is loaded: the library keeps conversions per model type, ours differ per configuration.
lock = threading.Lock()

#: Style of a tensor-parallel plan by which every rank has all outputs of a projection.
_GATHERED = "colwise_gather_output"

#: `README.md` of a saved folder, for a person who opens it without the project.
_FOLDER_README = """# A model with low-rank keys and values (alrd_llama)

The key and value projections are stored as factors, which the classes of transformers do not know: `LlamaForCausalLM`
refuses this folder, and the auto classes know it only after the project is imported. From a checkout of the project:

    from modeling_alrd_llama import ALRDLlamaForCausalLM

    model = ALRDLlamaForCausalLM.from_pretrained("path of this folder")

`model.save_pretrained(folder, save_original_format=True)` writes the plain dense model for any other program;
`python scripts/export_hub.py --model FOLDER --output OTHER` writes a folder that loads without the project, by
`trust_remote_code=True`.
"""

#: Arguments of `from_pretrained` that say where a checkpoint is.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")


class SplitProjection(ConversionOps):
    """Factor one dense weight while it is loaded: plain SVD per head group, the rotation folded in."""

    def __init__(self, ranks: tuple[int, ...], rotate: bool, tiers: list | None = None):
        self.ranks, self.rotate, self.tiers = ranks, rotate, tiers

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        weight = input_dict[source_patterns[0]]
        if isinstance(weight, list):
            weight = weight[0]
        a, b = join_factors(factor_groups(weight, self.ranks), self.rotate, weight.dtype, self.tiers)
        return {target_patterns[0]: b, target_patterns[1]: a}


def split_projections(config: ALRDLlamaConfig) -> Iterator[tuple[Projection | Block, tuple[int, ...], bool]]:
    """The projections, or blocks of them, that a configuration splits, layer by layer, with their group ranks and
    whether a Hadamard rotation is folded into their factors."""
    for part in config.parts():
        ranks = config.group_ranks(part)
        if ranks is not None:
            yield part, ranks, getattr(config, f"{part.settings_side}_hadamard")


def register_dense_conversion(config: ALRDLlamaConfig) -> None:
    """Tell the library how the dense weights of a checkpoint become those of a model with this configuration."""
    # Those of the dense model come first, which fuse the weights of experts, say.
    conversions = get_checkpoint_conversion_mapping(config.dense_model_type) or []
    for projection, ranks, rotate in split_projections(config):
        if config.keep_dense:
            break  # `from_pretrained` splits a model in memory, since the members of a block are several weights
        # The library's names of weights begin below the model that holds the layers.
        name = projection.name.removeprefix("model.")
        factors = [f"{name}.BLinear.weight", f"{name}.ALinear.weight"]
        split = SplitProjection(ranks, rotate, config.group_tiers(projection))
        conversions.append(WeightConverter(f"{name}.weight", factors, [split]))
        conversions.append(WeightRenaming(f"{name}.bias", f"{name}.ALinear.bias"))
    register_checkpoint_conversion_mapping(config.model_type, conversions, overwrite=True)


def state_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a model's `state_dict`, by name; what is offloaded is there for its turn."""
    for name in sorted(model.state_dict()):
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        with weights_at_hand(module):
            yield name, module.state_dict()[leaf].detach()


def execution_device(module: nn.Module) -> torch.device:
    """Where a module, or a model its tokens, is computed. Weights that accelerate has offloaded are on no device; its
    hook knows theirs."""
    if isinstance(module, PreTrainedModel):
        module = module.get_input_embeddings()
    found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if found is None else torch.device(found)


def factored_state(
    dense: PreTrainedModel,
    config: ALRDLlamaConfig,
    splits: list[dict[str, dict]] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The `state_dict` of a split model, which shares no weight with the dense one.

    Args:
        dense, config, splits: As for `ALRDLlamaForCausalLM.from_dense`.
        dtype, device: Of the weights that are not factored.
    """
    if splits:
        _check_splits(config, splits)
    state = {}
    # A model of blocks has dense projections, and beside them factors that others take the place of.
    factors = tuple([f"{name}." for name, module in dense.named_modules() if isinstance(module, LatentFactors)])
    for name, tensor in state_tensors(dense):
        if not name.startswith(factors):
            state[name] = tensor.to(device, dtype, copy=True)
    if config.keep_dense:
        return state | _block_states(dense, config, splits or [])
    for projection, ranks, rotate in split_projections(config):
        layer, name = projection.layer, projection.name
        arguments = splits[layer][projection.attribute] if splits else {}
        tiers = config.group_tiers(projection)
        if tiers is None and getattr(config, f"{projection.side}_mean_split"):
            # A rotation must not spread the mean, the first channel of a group, over the other channels.
            tiers = list(map(_mean_and_rest, ranks))
        linear = dense.get_submodule(name)
        with weights_at_hand(linear):
            split = SVDLinear.from_linear(linear, ranks, config.num_key_value_heads, rotate, tiers, **arguments)
        _replace_module(state, name, split.state_dict())
    return state


def _check_splits(config: ALRDLlamaConfig, splits: list[dict[str, dict]]) -> None:
    """Raise a `ValueError` unless `splits` have arguments for all that a configuration splits."""
    for part, _, _ in split_projections(config):
        layer = part.members()[0].layer
        given = sorted(splits[layer]) if layer < len(splits) else []
        if part.attribute not in given:
            raise ValueError(
                f"splits: of layer {layer} name {given}; must have {part.attribute!r} too, for truncation_ranks names "
                f"{part.name!r}"
            )


def _block_states(dense: PreTrainedModel, config: ALRDLlamaConfig, splits: list[dict[str, dict]]) -> dict:
    """The tensors of all `LatentFactors`; `splits` have at a block's first layer arguments of `member_states`."""
    state = {}
    for block, ranks, rotate in split_projections(config):
        arguments, members, linears = {}, block.members(), []
        if splits:
            arguments |= splits[block.first][block.attribute]
        with ExitStack() as stack:
            for member in members:
                attention = dense.model.layers[member.layer].self_attn
                for module in attention.children():
                    stack.enter_context(weights_at_hand(module))
                linears.append(dense_layer(attention, member.side))
            if "factors" not in arguments:
                factors = factor_block([linear.weight for linear in linears], ranks)
                arguments["factors"] = _with_gains(factors, linears)
            states = member_states(linears=linears, rotate=rotate, tiers=config.group_tiers(block), **arguments)
        for member, tensors in zip(members, states, strict=True):
            name = f"model.layers.{member.layer}.self_attn.{member.side}_latent"
            _replace_module(state, name, tensors)
    return state


def _with_gains(groups: list[BlockFactors], linears: list[DenseLayer]) -> list[BlockFactors]:
    """Factors of outputs whose channels a norm multiplies, from those of the outputs without: of all its channels, the
    latent holds what they have in common, however large some of them are made."""
    for i, group in enumerate(groups):
        a, project = [], []
        for linear, rows, columns in zip(linears, group.a, group.project, strict=True):
            gain = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
            if linear.gain is not None:
                gain = linear.gain.chunk(len(groups))[i].to(rows)
                gain = torch.where(gain == 0, 1.0, gain)
            a.append(rows * gain[:, None])
            project.append(columns / gain)
        groups[i] = group._replace(a=a, project=project)
    return groups


def _mean_and_rest(rank: int) -> list[tuple[int, int]]:
    """Lossless tiers of the mean's channel and of the others, if there are any."""
    if rank == 1:
        return [(1, 16)]
    return [(1, 16), (rank - 1, 16)]


def _replace_module(state: dict[str, torch.Tensor], name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of another module in place of those that a state holds of the module `name`."""
    for key in list(state):
        if key.startswith(f"{name}."):
            del state[key]
    for key, tensor in tensors.items():
        state[f"{name}.{key}"] = tensor


@torch.no_grad()
def dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the config's `dense_model_type` with the products of a split model's factors.

    Raises:
        ValueError: The model is distributed.
    """
    check_all_layers(model, "to_dense")
    # A rank holds the rows of its own heads.
    if (model.tp_size or 1) > 1:
        raise ValueError(f"to_dense: a rank of {model.tp_size} has some of the heads only; load the model on one")
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LatentFactors):
            _replace_module(state, name, {})  # the dense layers beside them are the model's own
        elif isinstance(module, SVDLinear):
            merged = {"weight": module.dense_weight()}
            if module.ALinear.bias is not None:
                merged["bias"] = state[f"{name}.ALinear.bias"]
            _replace_module(state, name, merged)
    # The class of the dense model, with the products in the factors' places.
    dense = AutoModelForCausalLM.from_config(model.config.to_dense()).to(model.dtype)
    dense.load_state_dict(state)
    dense.generation_config = model.generation_config
    return dense.to(model.device).eval()


def write_folder_readme(folder: str | os.PathLike) -> None:
    """Say in the `README.md` of a folder with factors how it is loaded, unless there is one."""
    with suppress(FileExistsError), open(os.path.join(folder, "README.md"), "x") as readme:
        readme.write(_FOLDER_README)


def check_same_model_type(stored: ALRDLlamaConfig, config: ALRDLlamaConfig) -> None:
    """Reject a configuration whose dense model type differs from the checkpoint's; its biases would be dropped."""
    if stored.dense_model_type != config.dense_model_type:
        raise ValueError(
            f"dense_model_type={config.dense_model_type!r}: must be {stored.dense_model_type!r}, as the weights are; "
            "make the config from that of the checkpoint"
        )


def check_plain(dense: nn.Module) -> None:
    """Reject a model whose weights are not its own: with adapters, wrapped, compiled or quantized."""
    kind, adapted = type(dense).__name__, []
    for name, module in dense.named_modules():
        if hasattr(module, "base_layer"):
            adapted.append(name)
    if adapted:
        raise ValueError(
            f"dense: {kind} has PEFT adapters, of {adapted[0]} and {len(adapted) - 1} more: must be merged first, by "
            "PEFT's merge_and_unload()"
        )
    if hasattr(dense, "peft_config"):
        raise ValueError(f"dense: {kind} has PEFT prompts: must be without them, as dense.get_base_model() is")
    # Wrappers rename the weights, quantizers change their type.
    weights, traits = dense.state_dict(), architecture(dense.config)
    for layer in range(dense.config.num_hidden_layers):
        for projection in (*[projection_name(traits, side) for side in ("q", *SIDES)], "o_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            weight = weights.get(name)
            if weight is None:
                found = "no such weight"
            elif not weight.is_floating_point() or weight.itemsize == 1:
                found = f"a weight in {weight.dtype}"
            else:
                continue
            raise ValueError(f"dense: {kind} must be a plain model, not wrapped, not quantized; {name}: {found}")


def check_stored_model(path, config: PreTrainedConfig | str | None, arguments: dict) -> ALRDLlamaConfig | None:
    """Reject a configuration whose model type or factors differ from those that a checkpoint stores.

    Args:
        path: The checkpoint.
        config: The configuration asked for, or where it is; `None`: the checkpoint's own.
        arguments: The other keyword arguments of `from_pretrained`, among them fields of the configuration.

    Returns:
        The configuration, if it makes blocks of a dense checkpoint, which the library's conversions cannot; else
        `None`.

    Raises:
        ValueError: They differ; the message names the field.
    """
    hub_arguments = _chosen(arguments, _HUB_ARGUMENTS)
    if not isinstance(config, PreTrainedConfig):
        # As the library will: fields by keyword take the place of those in the folder.
        given = _chosen(arguments, ALRDLlamaConfig.__dataclass_fields__)
        config = ALRDLlamaConfig.from_pretrained(path if config is None else config, **hub_arguments, **given)
    stored = ALRDLlamaConfig.from_pretrained(path, **hub_arguments)
    check_same_model_type(stored, config)
    if not stored.truncation_ranks:
        for field in ("k_mean_split", "v_mean_split"):
            if getattr(config, field):
                raise ValueError(f"{field}=True: the mean is known to calibrated factors only; {path!r} is dense")
        return config if config.keep_dense else None
    for field in ("keep_dense", "layer_group_size", "joint_kv"):
        asked, has = getattr(config, field), getattr(stored, field)
        if asked != has:
            raise ValueError(f"{field}={asked}: must be {has} as stored; split the dense checkpoint again to change it")
    for projection in config.parts():
        _check_stored_ranks(stored, config, projection)
        _check_stored_tiers(stored, config, projection)


def _chosen(arguments: dict, names: Iterable[str]) -> dict:
    """The arguments that have one of the names."""
    return {name: arguments[name] for name in names if name in arguments}


def _check_stored_ranks(stored: ALRDLlamaConfig, config: ALRDLlamaConfig, projection: Projection | Block) -> None:
    # Factors cannot be given other ranks, nor another rotation, without the dense weight.
    ranks, asked = stored.group_ranks(projection), config.group_ranks(projection)
    if ranks != asked:
        raise ValueError(
            f"truncation_ranks: {projection.attribute} of layer {projection.members()[0].layer} is stored with group "
            f"ranks {ranks}, the given config asks for {asked}; split the dense checkpoint again to change them"
        )
    rotation = f"{projection.settings_side}_hadamard"
    if ranks is not None and getattr(stored, rotation) != getattr(config, rotation):
        raise ValueError(
            f"{rotation}={getattr(config, rotation)}: the checkpoint's factors are stored with "
            f"{rotation}={getattr(stored, rotation)}; split the dense checkpoint again to change it"
        )


def _check_stored_tiers(stored: ALRDLlamaConfig, config: ALRDLlamaConfig, projection: Projection | Block) -> None:
    """Reject other width tiers than the factors are calibrated for, or none where calibrated scales need them."""
    side, tiers, asked = projection.settings_side, stored.group_tiers(projection), config.group_tiers(projection)
    if tiers is None:
        return
    if asked is not None:
        check_width_beside_tiers(side, getattr(config, f"{side}_bits"), getattr(stored, f"{side}_bits"))
        fits = check_tiers(asked) == check_tiers(tiers)
    else:
        # Without tiers the latents are quantized at one width, which needs no calibration but for static scales.
        fits = not config.is_static(side)
    if not fits:
        raise ValueError(
            f"width_tiers[{projection.name!r}]={asked}: the checkpoint is calibrated for {tiers}; for one width give "
            f"create_kivi_cache() {side}_bits, or calibrate the dense checkpoint again"
        )


def check_all_loaded(path, info: dict) -> None:
    """Reject a model of which a weight stayed at its random initialisation, by the library's `loading_info`."""
    unloaded = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if unloaded:
        raise ValueError(
            f"{path}: the checkpoint has no fitting weights for {', '.join(unloaded)}; they would be random"
        )


def check_tensor_parallel(config: ALRDLlamaConfig, size: int, other_sizes: int) -> None:
    """Reject a number of ranks over which the heads, or their groups, cannot be dealt out whole."""
    counts = {"num_key_value_heads": config.num_key_value_heads}
    if config.num_head_groups > 1 and config.truncation_ranks:
        counts[f"the head groups of head_group_size={config.head_group_size}"] = config.num_head_groups
        # Several groups can be on several ranks only where each has scales of its own.
        if not config.use_kivi:
            raise ValueError(
                f"tp_size={size}: the simple scheme (use_kivi=False) rounds the latents of all head groups together, "
                "so they cannot be on several ranks; head_group_size must be None"
            )
    for name, count in counts.items():
        if count % size:
            raise ValueError(f"tp_size={size}: must divide {name}, {count}: a rank caches whole ones")
    if other_sizes > 1:
        raise ValueError(f"tp_size={size}: cannot be combined with FSDP (over {other_sizes} ranks)")


def gathers_outputs(config: ALRDLlamaConfig) -> bool:
    """Whether the library's plan gives every rank the outputs of all heads: for a norm over them, or fused ones."""
    return _GATHERED in (config.base_model_tp_plan or {}).values()


def check_tensor_parallel_plan(config: ALRDLlamaConfig, plan: dict[str, str]) -> None:
    """Reject a tensor-parallel plan, style by layer name, of which a rank does not get its heads."""
    style = _GATHERED if gathers_outputs(config) else "colwise"
    # Fused ones have one name.
    for projection in dict.fromkeys([projection_name(config.traits, side) for side in ("q", *SIDES)]):
        styles = {found for name, found in plan.items() if name.endswith(f"self_attn.{projection}")}
        if styles != {style}:
            raise ValueError(
                f"tp_plan: {projection} must be {style!r}, as the cache is split with its heads; got {styles or None}"
            )


def check_all_layers(model: PreTrainedModel, what: str) -> None:
    """Reject the operation `what` on a stage of a pipeline."""
    if getattr(model, "_pp_stage", None) is not None:
        raise ValueError(f"{what}: a stage of a pipeline has some of the layers only; load the model without it")


def check_exit(config: ALRDLlamaConfig, layers: int) -> None:
    """Reject an early exit after so many layers that it is inside a block."""
    if layers % config.layer_group_size:
        raise ValueError(
            f"layer_group_size={config.layer_group_size}: an exit after {layers} layers is inside a block, whose last "
            "layer completes the latents; it must be at a multiple of it"
        )


def check_whole_blocks(config: ALRDLlamaConfig, devices: dict[int, torch.device]) -> None:
    """Reject a model that has some layers of a block only, or has them on several devices.

    Args:
        config: Of the model.
        devices: Of each layer that this process has, by index.
    """
    size = config.layer_group_size
    for first in range(0, config.num_hidden_layers, size):
        layers = range(first, min(first + size, config.num_hidden_layers))
        held = sorted(set(layers) & set(devices))
        places = sorted({str(devices[layer]) for layer in held})
        if held and (len(held) < len(layers) or len(places) > 1):
            raise ValueError(
                f"layer_group_size={size}: layers {first} to {layers[-1]} share their latents and must be on one "
                f"device, in one stage of a pipeline; here are layers {held} on {', '.join(places)}; place them by a "
                f"device_map, or a plan, that cuts at multiples of {size}"
            )


def gathered_factors(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole factors, on the CPU, for the entries of `state` of which a rank holds a shard; every rank must call it."""
    whole = {}
    for module_name, module in model.named_modules():
        if isinstance(module, SVDLinear):
            process_group = module.BLinear.process_group
        else:
            process_group = isinstance(module, LatentFactors) and module.process_group
        if not process_group:
            continue
        for name, tensor in module.gathered_state().items():
            # `state` has some of the weights only if the caller asked for these.
            key = f"{module_name}.{name}"
            if key in state:
                whole[key] = tensor.cpu()
    return whole
