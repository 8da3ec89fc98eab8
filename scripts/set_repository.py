"""Writes the address of the public repository wherever it is needed: `python scripts/set_repository.py ADDRESS`.

ADDRESS is what `git clone` takes, https://github.com/OWNER/NAME. It goes into pyproject.toml, into the first code cell
of each notebook, which installs from it where there is no clone, and into the Colab badges of README.md and the
notebooks. Run again with another address, it replaces the first.
"""

import json
import re
import sys
from pathlib import Path

GITHUB = "https://github.com/"
COLAB = "https://colab.research.google.com"
BADGE = re.compile(rf"\[!\[Open in Colab\]\({COLAB}/[^)]*\)\]\({COLAB}/[^)]*\)\n*")


def badge(address: str, notebook: str) -> str:
    """Markdown that opens a notebook of the main branch in Colab."""
    page = f"{COLAB}/github/{address.removeprefix(GITHUB)}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"


def set_repository(root: Path, address: str) -> None:
    """Writes `address` into the files of a checkout."""
    project = root / "pyproject.toml"
    text = re.sub(r"^Repository = .*\n", "", project.read_text(), flags=re.MULTILINE)
    above, table, below = text.partition("[project.urls]\n")
    assert table, project
    project.write_text(f'{above}{table}Repository = "{address}"\n{below}')
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        notebook = json.loads(path.read_text())
        title, setup = notebook["cells"][:2]
        shown = BADGE.sub("", "".join(title["source"])).rstrip("\n")
        title["source"] = f"{shown}\n\n{badge(address, path.name)}".splitlines(keepends=True)
        code = re.sub(r'REPOSITORY = ".*".*', f'REPOSITORY = "{address}"', "".join(setup["source"]))
        setup["source"] = code.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    readme = root / "README.md"
    heading, rest = BADGE.sub("", readme.read_text()).split("\n\n", 1)
    readme.write_text(f"{heading}\n\n{badge(address, 'laep_walkthrough.ipynb')}\n\n{rest}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not re.fullmatch(rf"{GITHUB}[\w.-]+/[\w.-]+", sys.argv[1]):
        sys.exit(f"usage: python scripts/set_repository.py {GITHUB}OWNER/NAME")
    set_repository(Path(__file__).parents[1], sys.argv[1].removesuffix(".git"))
