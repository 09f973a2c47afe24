"""`frontier.py`: each point is measured once, bounds are kept, what does not fit is left out, and the table."""

import random
import string

import pytest

from scripts import frontier
from scripts.frontier import FrontierConfig
from tests.helpers import save_byte_tokenizer, tiny_dense

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model and a text."""
    path = tmp_path_factory.mktemp("frontier")
    tiny_dense(vocab_size=300, bos_token_id=0).save_pretrained(path / "dense")
    save_byte_tokenizer(path / "dense")
    (path / "text.txt").write_text("".join(random.Random(0).choices(string.printable[:94], k=6000)))
    return path


def options(place, **fields) -> FrontierConfig:
    how = {"model": str(place / "dense"), "calibration_text": [str(place / "text.txt")], "calibration_windows": 4}
    how |= {"text": [str(place / "text.txt"), "stdlib:test"], "length": 1664, "prefill": 1632, "layers": [2]}
    how |= {"decode_tokens": 300, "steps": 2, "threads": 1, "statistics": str(place / "statistics")}
    how |= {"checkpoints": str(place / "points"), "budgets": [0.3, 0.001], "rebuild": [1.0, 0.5]}
    return FrontierConfig(**how | fields)


@pytest.fixture(scope="module")
def record(place):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("spectra", "widths"):
            patch.setattr(f"scripts.calibrate_svd_ranks.plots.{name}", lambda *args: None)
        yield frontier.main(options(place, output=str(place / "record.json")))


def test_points(record, place):
    """Two shapes with and without a bound; a thousandth of the bytes is too little for either."""
    names = [f"2 layers, {heads}, keys + values, 0.3" for heads in ("all heads", "1 head")]
    assert set(record["points"]) == {*names, *(f"{name}, 0.5 of the multiply-adds" for name in names)}
    for name in names:
        free, bound = record["points"][name], record["points"][f"{name}, 0.5 of the multiply-adds"]
        assert 0.2 < free["share_of_dense"] <= 0.3
        assert bound["multiply_adds"] <= 0.5 * free["multiply_adds"] and bound["added_weights"] < free["added_weights"]
        assert free["predicted_divergence"] > 0 and bound["predicted_divergence"] > 0
        assert set(free["kl"]) == {str(place / "text.txt"), "stdlib:test"}
        assert 0 < free["kl_mean"] < bound["kl_mean"]
        assert sum(free["kl"].values()) / 2 == pytest.approx(free["kl_mean"])
        assert free["speedup"] == pytest.approx(free["dense"]["p50"] / free["ours"]["p50"])
    assert (place / "points" / "2-layers-1-head-keys-values-0-3" / "config.json").is_file()


def test_a_record_goes_on(record, place, monkeypatch):
    monkeypatch.setattr(frontier, "measure_points", lambda *args: pytest.fail("nothing is left to measure"))
    known = options(place, output=str(place / "record.json"), budgets=[0.3])
    assert frontier.main(known)["points"] == record["points"]
    with pytest.raises(ValueError, match=r"other options \(windows\)"):
        frontier.main(options(place, output=str(place / "record.json"), windows=2))


def test_the_table(record):
    """By budget; of one budget the least divergence of the worst text stands first."""
    rows = frontier.surface_table(record).splitlines()[2:]
    assert len(rows) == 4
    worst = [float(row.split("|")[4].split()[0]) for row in rows]
    assert worst == sorted(worst)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rebuild": [1.5]}, r"rebuild=\[1.5\]: must be shares"),
        ({"layers": [0]}, "layers=0: must be above 0"),
        ({"text": []}, "text="),
    ],
    ids=str,
)
def test_refused(place, fields, message):
    with pytest.raises(ValueError, match=message):
        options(place, **fields)
