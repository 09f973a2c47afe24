"""Files of results that runs go on from: resumed, refused when the settings differ, written when asked for."""

import json

import pytest

from scripts.records import ResultsFile


def test_a_new_file_is_written_when_it_is_saved(tmp_path):
    path = tmp_path / "folder" / "record.json"
    file = ResultsFile(str(path), {"key": {"seed": 0}, "cases": {}})
    file.record["cases"]["a"] = 1
    assert not path.exists()
    file.save()
    assert json.loads(path.read_text()) == {"key": {"seed": 0}, "cases": {"a": 1}}


def test_a_run_goes_on_from_what_the_file_holds(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"key": {"seed": 0, "old": 1}, "cases": {"a": 1}}))
    file = ResultsFile(str(path), {"key": {"seed": 0}, "cases": {}}, holds="cases")
    file.require("key", {"seed": 0})
    assert file.record["cases"] == {"a": 1}
    with pytest.raises(ValueError, match=r"record\.json': holds cases of other options \(seed, bits\); name another"):
        file.require("key", {"seed": 1, "bits": 2})
    with pytest.raises(ValueError, match=r"record\.json': holds cases of another text; name another file"):
        file.refuse("another text")


@pytest.mark.parametrize("output", [None, ""])
def test_without_an_output_nothing_is_written(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ResultsFile(output, {"results": {}})
    file.save()
    assert file.path is None and not list(tmp_path.iterdir())
