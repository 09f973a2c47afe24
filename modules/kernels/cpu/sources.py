"""Text of the C++ kernels by file name; in a folder for a hub, which takes Python only, they are constants here."""

from pathlib import Path

SOURCES = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted(Path(__file__).resolve().parent.iterdir())
    if path.suffix in (".cpp", ".h")
}
