"""A JSON file of results that a long run goes on from: opened or resumed, checked, and written after each result."""

import json
from pathlib import Path
from typing import Any, NoReturn

from modules.files import write_json


class ResultsFile:
    """The record of a run, and the file that keeps it.

    Args:
        output: Path of the JSON file; `None`: the record is kept in memory only.
        fresh: The record of a run that begins: what it holds if there is no such file.
        holds: The plural noun for what is measured one by one, as messages call it.

    Attributes:
        path: `output` as a path.
        record: What the file held, or `fresh`; the run adds its results here.
    """

    def __init__(self, output: str | None, fresh: dict[str, Any], holds: str = "results"):
        self.path = Path(output) if output else None
        self.holds, self.record = holds, fresh
        if self.path and self.path.exists():
            self.record = json.loads(self.path.read_text())

    def require(self, section: str, settings: dict[str, Any]) -> None:
        """Check that the record was made with these settings, which stand in the section `section`.

        Raises:
            ValueError: A setting of the record differs, or is not in it.
        """
        held = self.record[section]
        differing = [name for name, value in settings.items() if held.get(name) != value]
        if differing:
            self.refuse(f"other options ({', '.join(differing)})")

    def refuse(self, origin: str) -> NoReturn:
        """Raise the `ValueError` of a file whose results have another origin than the run: options, a text, weights."""
        raise ValueError(f"output={str(self.path)!r}: holds {self.holds} of {origin}; name another file")

    def save(self) -> None:
        """Write the record as it is now, if there is a file."""
        if self.path:
            write_json(self.path, self.record)
