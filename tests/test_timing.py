"""How benchmarks time: a cold cache, turns, and one spread, beside records of before that hold another."""

from types import SimpleNamespace

import pytest
import torch

from scripts import timing
from scripts.timing import bounds, bounds_name, bounds_note, in_turns, milliseconds, percentiles, ratios, times_faster


def test_the_l2_is_cold_before_the_clock_starts(monkeypatch):
    order = []
    events = iter(["start", "end"] * 2)

    def event(enable_timing: bool) -> SimpleNamespace:
        name = next(events)
        return SimpleNamespace(
            record=lambda: order.append(name), synchronize=lambda: None, elapsed_time=lambda other: 2.0
        )

    buffer = SimpleNamespace(zero_=lambda: order.append("flush"))
    monkeypatch.setattr(timing, "_larger_than_l2", lambda device: buffer)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    for cold in (True, False):
        assert timing.timed(lambda: order.append("call"), torch.device("cuda"), cold)[0] == 0.002
    assert order == ["flush", "sleep", "start", "call", "end", "sleep", "start", "call", "end"]


def test_the_host_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda"):
        seconds, result = timing.timed_by_host(lambda: 7, torch.device(name))
        assert seconds > 0 and result == 7
    assert waited == [torch.device("cuda")]


def test_turns_change_their_order_and_stop_in_time():
    order = []
    steps = {name: lambda n=name: order.append(n) for name in "ab"}
    seconds = in_turns(steps, 50, before=lambda name: order.append("-"), limit_s=1e-9)
    assert [len(s) for s in seconds.values()] == [5, 5]
    assert "".join(order) == "aabb" + "-b-a-a-b" * 2 + "-b-a"


def test_every_round_has_each_contender_once():
    order = []
    steps = {name: lambda n=name: order.append(n) for name in "abc"}
    seconds = in_turns(steps, 7, warm_up=0)
    assert [len(s) for s in seconds.values()] == [7, 7, 7]
    assert "".join(order) == "cbaabc" * 3 + "cba"


def test_percentiles():
    values = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0]
    assert percentiles(values) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}
    assert percentiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high", "name"), [("p20", "p80", "20th and 80th percentile"), ("p25", "p75", "quartiles")]
)
def test_records_of_before_are_read_as_what_they_are(low, high, name):
    spread = {low: 0.9e-3, "p50": 1e-3, high: 1.1e-3}
    assert bounds(spread) == (0.9e-3, 1.1e-3) and bounds_name(spread) == name
    assert bounds_note({"a": {"gate": 1.0, "way": {"seconds": spread}}}) == f"In brackets: {name}."
    assert milliseconds(spread) == "1.00 [0.90–1.10]"
    assert times_faster(2.5, {low: 2.4, "p50": 2.6, high: 2.7}) == "2.50× [2.40–2.70]"


def test_milliseconds_have_three_digits_or_so():
    shown = [milliseconds({"p20": s, "p50": s, "p80": s}) for s in (0.0012345, 0.012345, 0.12345, 12.345)]
    assert shown == ["1.23 [1.23–1.23]", "12.3 [12.3–12.3]", "123 [123–123]", "12,345 [12,345–12,345]"]
