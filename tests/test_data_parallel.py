"""Two processes started by `accelerate launch` find what one process finds; one that fails ends both."""

import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modules.fit import budget, statistics
from modules.fit.distributed import device_map, gather, is_main, join_processes, on_main, rounds, sum_tensors
from modules.fit.statistics import collect_statistics
from scripts.calibrate_svd_ranks import CalibrationConfig
from scripts.calibrate_svd_ranks import main as calibrate
from scripts.eval_perplexity import EvalConfig
from scripts.eval_perplexity import main as evaluate
from tests.helpers import save_byte_tokenizer, tiny_dense

ROOT = Path(__file__).resolve().parent.parent
TINY = {"vocab_size": 300, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64}
#: Nine windows in batches of two: five batches, the last of one window, over two processes.
CALIBRATION = {
    "tokens": 512,
    "windows": 9,
    "length": 140,
    "batch_size": 2,
    "group_size": 32,
    "budget": 0.2,
    "probe": True,
}
#: Five windows in batches of two, fed so far that blocks of 32 hold nine tenths of the context of the last tokens.
EVALUATION = {"windows": 5, "length": 330, "prefill": 290, "batch_size": 2}
#: Seconds that a launch may take on a busy machine; a process that hangs takes longer.
LIMIT = 240


def launch(*command) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes of one thread on the CPU."""
    how = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    how += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    found = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ALRD_BACKEND")}
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *how, *map(str, command)],
        env=found | here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, errors = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(command, process.returncode, out, errors)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends what it started
        process.communicate()
        raise


def options(fields: dict) -> list[str]:
    """Fields of a config as they are given on the command line."""
    return [str(x) for n, value in fields.items() for x in (f"--{n}", *(value if isinstance(value, list) else [value]))]


class Stop(Exception):
    pass


def interrupt(patch: pytest.MonkeyPatch, after: int) -> list[torch.Tensor]:
    """Let the batch after so many fail; returns the list of those that were begun."""
    run, begun = statistics._run, []

    def counted(model, batch, *rest):
        begun.append(batch)
        if len(begun) > after:
            raise Stop
        run(model, batch, *rest)

    patch.setattr(statistics, "_run", counted)
    return begun


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and a text."""
    path = tmp_path_factory.mktemp("parallel")
    tiny_dense(**TINY, bos_token_id=0).save_pretrained(path / "dense")
    save_byte_tokenizer(path / "dense")
    words = random.Random(0)
    text = " ".join("".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(1500))
    (path / "text.txt").write_text(text)
    return path


def calibration(place: Path, name: str) -> dict:
    """Options of a calibration with an output and statistics of its own."""
    where = {"output": str(place / name), "statistics": str(place / f"{name} statistics")}
    return CALIBRATION | {"model": str(place / "dense"), "text": str(place / "text.txt")} | where


@pytest.fixture(scope="module")
def alone(place, one_thread) -> dict:
    """The report of one process."""
    return calibrate(CalibrationConfig(**calibration(place, "alone")))


@pytest.fixture(scope="module")
def together(place, alone) -> subprocess.CompletedProcess:
    """Two processes go on with what one process began: two batches of five, and the first of four rates."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        interrupt(patch, after=2)
        patch.setattr(budget, "collect_statistics", partial(collect_statistics, save_seconds=0))
        calibrate(CalibrationConfig(**calibration(place, "together")))
    (rates,) = (place / "alone statistics").glob("*.rates.json")
    record = json.loads(rates.read_text())
    record["rates"] = dict(list(record["rates"].items())[:1])
    (place / "together statistics" / rates.name).write_text(json.dumps(record))
    assert batches_of(statistics_file(place, "together")) == 2
    return launch(ROOT / "scripts" / "calibrate_svd_ranks.py", *options(calibration(place, "together")))


def statistics_file(place: Path, name: str) -> Path:
    (path,) = (place / f"{name} statistics").glob("????????????????.safetensors")
    return path


def batches_of(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["batches"])


def check_sums(found: Path, expected: Path, batches: int = 5) -> None:
    """Whole files of statistics: samples, and their gradients, the same to the bit, sums to rounding."""
    assert found.name == expected.name and batches_of(found) == batches_of(expected) == batches
    sums, others = load_file(found), load_file(expected)
    assert sums.keys() == others.keys() and len(sums) == 22
    for name, x in sums.items():
        assert x.dtype == others[name].dtype and x.shape == others[name].shape
        tolerance = 0 if name.endswith(("sample", "gradient")) else 1e-13
        assert (x - others[name]).abs().max() <= tolerance * x.abs().max(), name


def bars(process: subprocess.CompletedProcess, label: str) -> int:
    """Progress bars with this label that were begun."""
    return len(re.findall(rf"{label}: +\d+%\|[^|]*\| \d+/\d+ \[00:00<\?", process.stderr))


# ---- calibration


def test_calibration_is_that_of_one_process(place, alone, together):
    assert together.returncode == 0, together.stderr
    report = json.loads((place / "together" / "report.json").read_text())
    assert report["environment"] == alone["environment"] | {"processes": 2} and alone["environment"]["processes"] == 1
    for name in ("budget", "nbytes", "text", "truncation_ranks", "width_tiers", "energy_kept"):
        assert report[name] == alone[name], name
    assert list(report["rates"]) == list(alone["rates"]) and len(report["rates"]) == 4
    assert report["rates"] == pytest.approx(alone["rates"], rel=1e-9)
    for name in ("predicted_divergence", "independent_divergence"):
        assert report[name] == pytest.approx(alone[name], rel=1e-9)
    found, expected = (load_file(place / name / "model.safetensors") for name in ("together", "alone"))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.allclose(x, expected[name], rtol=1e-5, atol=1e-6), name


def test_statistics_have_the_names_and_sums_of_one_process(place, alone, together):
    check_sums(statistics_file(place, "together"), statistics_file(place, "alone"))
    names = [{f.name for f in (place / f"{name} statistics").iterdir()} for name in ("together", "alone")]
    assert names[0] == names[1] and len(names[0]) == 4  # statistics, their record, rates and costs; no part of a file


def test_one_process_uses_what_two_have_found(place, together, monkeypatch):
    begun = interrupt(monkeypatch, after=0)
    monkeypatch.setattr(budget, "measure_costs", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(budget, "probe_rates", partial(known_rates, budget.probe_rates))
    report = calibrate(CalibrationConfig(**calibration(place, "together") | {"output": str(place / "again")}))
    assert not begun and report["nbytes"] == json.loads((place / "together" / "report.json").read_text())["nbytes"]


def known_rates(probe_rates, *args, known: dict, **how):
    assert len(known) == 4
    return probe_rates(*args, known=known, **how)


def test_one_process_shows_progress_and_prints(together):
    labels = ("Loading weights", "Statistics", "Sensitivity", "Distortion")
    assert [bars(together, label) for label in labels] == [1, 1, 1, 1]
    assert together.stdout.count("bytes at 512 tokens") == len(together.stdout.splitlines()) == 1


# ---- evaluation


def test_evaluation_is_that_of_one_process(place, alone, tmp_path):
    how = EVALUATION | {"model": str(place / "alone"), "dense": str(place / "dense"), "text": str(place / "text.txt")}
    process = launch(ROOT / "scripts" / "eval_perplexity.py", *options(how), "--output", tmp_path / "record.json")
    assert process.returncode == 0, process.stderr
    record, expected = json.loads((tmp_path / "record.json").read_text()), evaluate(EvalConfig(**how))
    results, others = record.pop("results"), expected.pop("results")
    expected["config"]["output"] = str(tmp_path / "record.json")
    expected["environment"]["processes"] = 2
    assert record == expected and list(results) == list(others) == ["dense", "16", "config"]
    for name, found in results.items():
        other = others[name]
        assert found.keys() == other.keys()
        for exact in ("tokens", "bytes_per_token", "ratio", "bits_per_element"):
            assert found[exact] == other[exact], (name, exact)
        for measured in ("perplexity", "nll", "kl_mean", "kl_p99", "top1_agreement", "nll_by_window"):
            assert found[measured] == pytest.approx(other[measured], rel=1e-6, abs=1e-9), (name, measured)
        assert len(set(found["nll_by_window"])) == 5
    assert results["config"]["kl_mean"] > results["16"]["kl_mean"] > results["dense"]["kl_mean"] == 0
    assert results["config"]["bytes_per_token"]["measured"] < results["16"]["bytes_per_token"]["measured"]
    assert bars(process, "Batches") == 1 and process.stdout.count("| dense |") == 1


# ---- failures


def collect(folder: Path, **how) -> None:
    """Statistics of a tiny model on 13 windows in seven batches, kept in a folder."""
    text = torch.randint(1, 300, (13, 40), generator=torch.Generator().manual_seed(0))
    collect_statistics(tiny_dense(**TINY), text, sample=16, batch_size=2, folder=folder, **how)


def collect_and_fail(folder: Path) -> None:
    """What one of two processes does in the test below: the second one fails in its third batch."""
    processes = join_processes("cpu")
    (folder / f"{os.getpid()}.pid").touch()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=2 if processes.process_index == 1 else 7)
        collect(folder, processes=processes, save_seconds=0)
    (folder / "came to the end").touch()


def test_a_process_that_fails_ends_both_and_what_is_kept_serves_one(tmp_path, one_thread, monkeypatch):
    process = launch(__file__, tmp_path)
    assert process.returncode != 0 and re.search(r"^(\[rank1\]: )?.*Stop$", process.stderr, re.M), process.stderr
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2 and not (tmp_path / "came to the end").exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    (path,) = tmp_path.glob("*.safetensors")
    assert batches_of(path) == 4  # saved twice
    collect(tmp_path / "whole")
    begun = interrupt(monkeypatch, after=7)
    collect(tmp_path)
    assert len(begun) == 3
    check_sums(path, tmp_path / "whole" / path.name, 7)


@pytest.mark.slow
def test_a_refusal_of_the_main_process_ends_both(place, together):
    how = calibration(place, "together") | {"budget": 0.001, "output": str(place / "refused")}
    process = launch(ROOT / "scripts" / "calibrate_svd_ranks.py", *options(how))
    assert process.returncode != 0
    assert len(re.findall("ValueError: budget=0.001 of ", process.stderr)) == 1, process.stderr
    assert not (place / "refused").exists()


# ---- one process


class TestAlone:
    def test_there_is_no_process_group(self, alone):
        assert join_processes("cpu") is join_processes("cuda") is None
        assert not torch.distributed.is_initialized()

    def test_a_launch_of_one_in_place_of_several_is_refused(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        assert join_processes("cpu") is None  # --num_processes 1
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(ValueError, match="accelerate launch --cpu: starts one process whatever --num_processes is"):
            join_processes("cpu")

    def test_functions_of_processes(self):
        calls = []
        assert is_main(None) and on_main(None, calls.append, 3) is None and calls == [3]
        assert list(rounds(None, range(2, 4))) == [(range(2, 3), 1), (range(3, 4), 1)]
        assert gather(None, [1, 2]) == [1, 2]
        sums = {"x": torch.ones(2)}
        sum_tensors(None, sums)
        assert sums["x"].tolist() == [1, 1]
        assert device_map(None, "cpu") is None and device_map(None, "cuda") == "cuda"

    def test_rounds_over_three_processes(self):
        class Third:
            process_index, num_processes = 2, 3

        assert list(rounds(Third, "abcdefgh")) == [("c", 3), ("f", 3), ("", 2)]

    def test_device(self):
        with pytest.raises(ValueError, match="device='gpu'"):
            EvalConfig("model", device="gpu")


if __name__ == "__main__":
    collect_and_fail(Path(sys.argv[1]))
