"""A budget with a bound on the time of a decode step: every choice is timed on this machine before it is taken.

Time is nearly a straight line in the multiply-adds of attention (`multiply_adds`), whose slope and start depend on the
machine, its back end and the model. So each choice of channels is made into a model and its step measured, and the line
through two of them says how many multiply-adds to allow in the next one.
"""

import math
from dataclasses import replace

import torch

from configuration_alrd_llama import ALRDLlamaConfig
from modeling_alrd_llama import ALRDLlamaForCausalLM
from modules.fit.budget import Calibration, FitConfig, fit_budget, multiply_adds, rebuild_costs
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
    """`fit_budget` with as many multiply-adds as a measured decode step has time for.

    Args:
        config, calibration, budget: As for `fit_budget`, with `config.keep_dense`.
        limit_ms: Most milliseconds of a decode step.
        tokens: In the cache of that step.
        device: Where the split model is timed.

    Returns:
        The calibration, whose `decode` holds the bound, the tokens, the measured time, and the `[multiply-adds, ms]` of
        every choice that was tried.

    Raises:
        ValueError: As `fit_budget`; no choice is fast enough.
    """
    tried: dict[float, float] = {}
    best, bound, least = None, config.max_rebuild, _least_macs(calibration.target)
    while len(tried) < MOST_TRIES:
        fitted = fit_budget(replace(config, max_rebuild=bound), calibration, budget)
        macs = multiply_adds(fitted.target)
        if macs in tried:
            break
        tried[macs] = ms = step_ms(fitted.split().eval().to(device), tokens)
        print(f"budget={budget:g}: {macs:,.0f} multiply-adds per cached token and layer, {ms:.1f} ms a step")
        if ms <= limit_ms and (best is None or macs > best[1]):
            best = (fitted, macs)
        # The first choice had no bound of time: none has more work.
        if NEAR * limit_ms <= ms <= limit_ms or (ms <= limit_ms and len(tried) == 1):
            break
        bound = max(least, min(_next_bound(tried, limit_ms), int(next(iter(tried)))))
    if best is None:
        fastest = min(tried.values())
        raise ValueError(f"decode_ms={limit_ms:g}: must be at least {fastest:.1f}, the fastest step that was measured")
    fitted, macs = best
    return replace(
        fitted,
        decode={"limit_ms": limit_ms, "tokens": tokens, "ms": tried[macs], "tried": list(map(list, tried.items()))},
    )


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
