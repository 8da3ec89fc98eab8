"""Small corpora of text files, and configs that keep their cache in the test's own folder."""

import pytest

from laep_jax.config import DataConfig
from laep_jax.data.corpus import is_validation


@pytest.fixture
def folder(tmp_path):
    """40 files in two folders, of 30 to 400 letters; at a fraction of 0.25 some are for validation."""
    root = tmp_path / "texts"
    for i in range(40):
        path = root / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}: " + "".join(chr(97 + (i * j) % 26) for j in range(10 + 9 * i)))
    return root


@pytest.fixture
def config(folder, tmp_path):
    """DataConfig of those files, with changes."""

    def make(**changes) -> DataConfig:
        fields = {
            "source": "text",
            "path": str(folder),
            "sequence_length": 16,
            "batch_size": 8,
            "validation_fraction": 0.25,
        }
        return DataConfig(**fields | {"cache_dir": str(tmp_path / "cache")} | changes)

    return make


@pytest.fixture
def texts(folder):
    """(training, validation) texts of the folder, read and split by other means."""
    sides = ([], [])
    for path in sorted(folder.rglob("*.txt")):
        sides[is_validation(path.relative_to(folder).as_posix(), 0.25)].append(path.read_bytes())
    return sides
