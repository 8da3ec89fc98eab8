"""The address of the public repository: in one place, and as one wherever it is needed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "pyproject.toml", "scripts/set_repository.py")


def addresses(root: Path) -> set[str | None]:
    """Those that the files of a checkout name."""
    found = {tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"].get("Repository")}
    documents = [(root / "README.md").read_text()]
    for path in (root / "notebooks").glob("*.ipynb"):
        title, setup = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"][:2]]
        found |= {address or None for address in re.findall(r'REPOSITORY = "(.*?)"', setup)}
        documents.append(title)
    for text in documents:
        linked = re.search(r"colab\.research\.google\.com/github/(\S+)/blob/main/notebooks/(\w+\.ipynb)\)", text)
        found.add(f"https://github.com/{linked[1]}" if linked else None)
        assert not linked or (root / "notebooks" / linked[2]).is_file()
    return found


def test_all_files_name_the_same_address():
    assert len(addresses(ROOT)) == 1


def test_the_address_is_set_everywhere_and_replaced(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "scripts").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    for address in ("https://github.com/someone/first", "https://github.com/a-b/laep.jax"):
        subprocess.run([sys.executable, tmp_path / FILES[-1], f"{address}.git"], check=True)
        assert addresses(tmp_path) == {address}
        assert (tmp_path / "README.md").read_text().count("Open in Colab") == 1
    before = (tmp_path / "README.md").read_text()
    refused = subprocess.run([sys.executable, tmp_path / FILES[-1], "git@x"], capture_output=True, text=True)
    assert (refused.returncode, (tmp_path / "README.md").read_text()) == (1, before)
    assert refused.stderr == "usage: python scripts/set_repository.py https://github.com/OWNER/NAME\n"
