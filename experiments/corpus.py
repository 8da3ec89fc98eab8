"""Code and prose of the Python that runs this, in two folders: a large domain and a small one."""

import pydoc_data.topics
import sysconfig
from pathlib import Path

PATH = "runs/code_and_prose"
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def make_corpus(path: Path) -> None:
    """`code`: modules of the standard library, two million bytes. `prose`: what `help()` says of the language."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            if "test" not in file.parts and file.stat().st_size:
                copy = path / "code" / file.relative_to(library)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    (path / "prose").mkdir()
    for name, text in pydoc_data.topics.topics.items():
        (path / "prose" / f"{name.replace('/', '-')}.txt").write_text(text, encoding="utf-8")
