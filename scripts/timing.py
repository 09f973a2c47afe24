"""One way to time a benchmark: warm-up, rounds in which contenders take turns, the device's own clock, one spread.

The spread of a time, and of a ratio of times, is its median with the 20th and the 80th percentile (`percentiles`).
Records of before, which are not measured again, may hold the quartiles instead: `bounds` reads both, and `bounds_name`
says which a record has.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch

CPU = torch.device("cpu")

#: Rounds that are measured at least, however long they take.
FEWEST_ROUNDS = 5

#: The statistics of a spread, as the key of a record names them.
SPREAD = "p20, p50, p80"

#: Keys of the lower and the upper end of a spread, and what a table calls the two: today's, and those of old records.
_BOUNDS = {("p20", "p80"): "20th and 80th percentile", ("p25", "p75"): "quartiles"}


@lru_cache
def _larger_than_l2(device: torch.device) -> torch.Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def timed(call: Callable[[], Any], device: torch.device = CPU, cold: bool = True) -> tuple[float, Any]:
    """Seconds of a call, and what it returns; on CUDA by the device's own clock, with a cold L2.

    Args:
        cold: On CUDA, whether the L2 is filled with other bytes first, as when the layers of a model take turns.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        result = call()
        return time.perf_counter() - started, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cold:
        _larger_than_l2(device).zero_()
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead: its launches are not in the time
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def timed_by_host(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds by the host's clock until the device has done all that a call asks of it, and what the call returns."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def turns(names: Iterable[str], rounds: int, limit_s: float = math.inf) -> Iterator[str]:
    """Names of contenders in the order in which they are measured: each once in a round, every second round reversed.

    Args:
        limit_s: No round begins after so many seconds, but the first `FEWEST_ROUNDS`.
    """
    order = list(names)
    started = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - started > limit_s:
            return
        order.reverse()
        yield from order


def in_turns(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device = CPU,
    *,
    before: Callable[[str], None] | None = None,
    cold: bool = True,
    limit_s: float = math.inf,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each step, once in every round (`turns`).

    Args:
        steps: The contenders by name.
        before: Called with the name of a step before each that is timed.
        cold: As for `timed`.
        limit_s: As for `turns`.
        warm_up: Calls of each step that are not timed: allocators, threads, code caches, compilation.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in turns(steps, rounds, limit_s):
        if before is not None:
            before(name)
        seconds[name].append(timed(steps[name], device, cold)[0])
    return seconds


def least_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """The shortest of several runs: what the machine can do, whatever else it does meanwhile."""
    return min(in_turns({"call": call}, repeats, device, warm_up=1)["call"])


def ratios(over: list[float], under: list[float]) -> list[float]:
    """The ratio of two contenders' times in each round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile; of a single value, that value."""
    doubled = values * 2 if len(values) == 1 else values
    fifths = statistics.quantiles(doubled, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def bounds(spread: dict[str, float]) -> tuple[float, float]:
    """Lower and upper end of a recorded spread, of today or of before."""
    low, high = _bounds_keys(spread)
    return spread[low], spread[high]


def bounds_name(spread: dict[str, float]) -> str:
    """Name of the ends of a recorded spread."""
    return _BOUNDS[_bounds_keys(spread)]


def _bounds_keys(spread: dict[str, float]) -> tuple[str, str]:
    return next(keys for keys in _BOUNDS if keys[0] in spread)


def bounds_note(results: dict[str, Any]) -> str:
    """A sentence for below a table: what its brackets hold. All spreads of a record are of one kind.

    Args:
        results: Of a record; spreads stand anywhere in them.
    """
    waiting = [results]
    while waiting:
        node = waiting.pop()
        if "p50" in node:
            return f"In brackets: {bounds_name(node)}."
        waiting += [child for child in node.values() if isinstance(child, dict)]
    raise ValueError("results: must hold a spread, with the key 'p50'")


def milliseconds(seconds: dict[str, float]) -> str:
    """A spread of times as a cell, `median [low–high]`, in milliseconds."""
    median = seconds["p50"]
    if median < 0.01:
        digits = 2
    elif median < 0.1:
        digits = 1
    else:
        digits = 0
    low, high = bounds(seconds)
    return f"{1e3 * median:,.{digits}f} [{1e3 * low:,.{digits}f}–{1e3 * high:,.{digits}f}]"


def times_faster(ratio: float, spread: dict[str, float]) -> str:
    """A ratio of median times as a cell, with the ends of the spread of the rounds' ratios: `2.50× [2.40–2.60]`."""
    low, high = bounds(spread)
    return f"{ratio:.2f}× [{low:.2f}–{high:.2f}]"
