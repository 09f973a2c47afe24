"""A budget with a bound on the time of a decode step: every choice is timed on this machine before it is taken.

More layers to a latent are quality for work, so their number comes down first. Then time is nearly a straight line in
the multiply-adds of attention (`multiply_adds`), whose slope and start depend on the machine, its back end and the
model. So each choice of channels is made into a model and its step measured, and the line through two of them says how
many multiply-adds to allow in the next one.
"""

import math
from dataclasses import replace
from functools import partial

import torch

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.budget import Calibration, FitConfig, fit_budget, multiply_adds, rebuild_costs, regroup
from scripts.benchmark_decode import DecodeBenchmarkConfig, Decoder, Subject
from scripts.timing import percentiles

#: Choices that are timed at most, and steps of each.
MOST_TRIES, STEPS = 6, 16

#: A choice between this share of the allowed time and all of it is good enough.
NEAR = 0.95


def step_ms(model: ALRDLlamaForCausalLM, tokens: int) -> float:
    """Median milliseconds of a greedy decode step of one row, with the packed cache of so many random tokens."""
    subject = Subject(DecodeBenchmarkConfig(device=str(model.device)), "fitted", checkpoint="fitted")
    # In place of a checkpoint that is loaded.
    subject.latent = model
    decoder = Decoder(model, lambda: subject.latent_cache(tokens, 1, None), 1)
    decoder.run(STEPS)
    return 1000 * percentiles(decoder.seconds)["p50"]


def fit_in_time(
    config: FitConfig, calibration: Calibration, budget: float, limit_ms: float, tokens: int, device: torch.device
) -> Calibration:
    """`fit_budget` with as much work as a measured decode step has time for.

    Fewer layers to a latent come first, if their number is left open (`config.layer_group_size`): they cost less
    quality than fewer channels of larger width, which come then.

    Args:
        config, calibration, budget: As for `fit_budget`, with `config.keep_dense`.
        limit_ms: Most milliseconds of a decode step.
        tokens: In the cache of that step.
        device: Where the split model is timed.

    Returns:
        The calibration, whose `decode` holds the bound, the tokens, the layers to a latent, the measured time, and the
        `[multiply-adds, ms]` of every choice that was tried.

    Raises:
        ValueError: As `fit_budget`; no choice is fast enough.
    """
    tried: list[list[float]] = []

    def timed(shape: Calibration, bound: int | None) -> tuple[Calibration, float]:
        """A choice and its multiply-adds, whose time is among those tried."""
        fitted = fit_budget(replace(config, max_rebuild=bound), shape, budget)
        macs, layers = multiply_adds(fitted.target), fitted.target.layer_group_size
        if macs not in dict(tried):
            ms = step_ms(fitted.split().eval().to(device), tokens)
            tried.append([macs, ms])
            print(
                f"budget={budget:g}: layer_group_size={layers}, {macs:,.0f} multiply-adds per cached token and layer, "
                f"{ms:.1f} ms a step"
            )
        return fitted, macs

    def chosen(fitted: Calibration, macs: float) -> Calibration:
        about = {"limit_ms": limit_ms, "tokens": tokens, "layer_group_size": fitted.target.layer_group_size}
        return replace(fitted, decode=about | {"ms": dict(tried)[macs], "tried": tried})

    most = calibration.target.layer_group_size
    counts = [most]
    if config.layer_group_size is None:
        counts += filter(partial(_may_share, calibration.target), range(most - 1, 0, -1))
    for layers in counts:
        shape = calibration if layers == most else regroup(calibration, layers)
        fitted, macs = timed(shape, config.max_rebuild)
        if dict(tried)[macs] <= limit_ms:
            return chosen(fitted, macs)

    # Fewer channels of the shape that has least work.
    first, best, least = len(tried) - 1, None, _least_macs(shape.target)
    while len(tried) - first < MOST_TRIES:
        bound = max(least, min(_next_bound(dict(tried[first:]), limit_ms), int(tried[first][0])))
        before = len(tried)
        fitted, macs = timed(shape, bound)
        if len(tried) == before:
            break
        ms = dict(tried)[macs]
        if ms <= limit_ms and (best is None or macs > best[1]):
            best = (fitted, macs)
        if NEAR * limit_ms <= ms <= limit_ms:
            break
    if best is None:
        fastest = min(ms for _, ms in tried)
        raise ValueError(f"decode_ms={limit_ms:g}: must be at least {fastest:.1f}, the fastest step that was measured")
    return chosen(*best)


def _may_share(config: ALRDLlamaConfig, layers: int) -> bool:
    """Whether blocks of so many layers have one sliding window each."""
    return all([len(set(windows)) == 1 for windows in config.group_windows(layers)])


def _least_macs(config: ALRDLlamaConfig) -> int:
    """Multiply-adds of one channel in every head group."""
    return math.ceil(sum(rebuild_costs(config).values()) * config.num_head_groups)


def _next_bound(tried: dict[float, float], limit_ms: float) -> int:
    """Multiply-adds for a little less than the allowed time, by the two choices nearest to it."""
    nearest = sorted(tried.items(), key=lambda point: abs(point[1] - limit_ms))[:2]
    macs, ms = nearest[0]
    if len(nearest) == 1:
        return int(macs / 2)
    other_macs, other_ms = nearest[1]
    slope = (other_ms - ms) / (other_macs - macs)
    # A loaded machine may say that more work takes less time.
    return int(macs + ((1 + NEAR) / 2 * limit_ms - ms) / slope if slope > 0 else macs / 2)
