"""Code and prose of the Python that runs this, in two folders: a large domain and a small one."""

import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PATH = "runs/code_and_prose"
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "tkinter", "unittest", "xml")
LENGTH = 1000  # characters of a piece of prose


def make_corpus(path: Path) -> None:
    """`code`: modules of the standard library, three million bytes. `prose`: what `help()` says of the language."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            if "test" not in file.parts and file.stat().st_size:
                copy = path / "code" / file.relative_to(library)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    (path / "prose").mkdir()
    for name, text in pydoc_data.topics.topics.items():
        for number, part in enumerate(_parts(text)):
            (path / "prose" / f"{name.replace('/', '-')}-{number}.txt").write_text(part, encoding="utf-8")


def _parts(text: str) -> Iterator[str]:
    """Whole paragraphs of together at least LENGTH characters: documents, of which some are for validation."""
    part = ""
    for paragraph in text.split("\n\n"):
        part += paragraph + "\n\n"
        if len(part) >= LENGTH:
            yield part
            part = ""
    if part:
        yield part
