"""Folders that the package `datasets` of Hugging Face wrote: which of their files hold rows.

`Dataset.save_to_disk` writes Arrow streams and a state.json that names them, `DatasetDict.save_to_disk` such a folder
for each split, and a dataset_dict.json beside them. Of splits `train` is read; the others are there to measure with,
and a run names them. Several folders below one path are all read. The package itself is not needed.
"""

from collections.abc import Sequence
from typing import Any

from laep_jax.config import DataConfig
from laep_jax.data.bucket import on_disk
from laep_jax.data.listing import File, corpus_text
from laep_jax.errors import UserError, require
from laep_jax.files import read_json

STATE, SPLITS, TRAIN = "state.json", "dataset_dict.json", "train"


def skipped_splits(files: Sequence[File]) -> list[str]:
    """Folders of splits that are not read, in their order."""
    tops = _folders(files, SPLITS)
    return [
        folder.rstrip("/")
        for folder in _folders(files, STATE)
        if any(folder.startswith(top) and folder != f"{top}{TRAIN}/" for top in tops)
    ]


def arrow_files(files: Sequence[File], config: DataConfig) -> list[File]:
    """Those with rows, in the order of each state.json. `UserError` where none is there, or a file that it names."""
    folders, skipped = _folders(files, STATE), skipped_splits(files)
    rule = f"holds no {STATE}, so it is no folder that Dataset.save_to_disk wrote"
    require(bool(folders), "DataConfig.path", config.path, rule)
    for top in _folders(files, SPLITS):
        rule = f"has no split {TRAIN}; name the folder of one split: {', '.join(skipped)}"
        require(f"{top}{TRAIN}/" in folders, "DataConfig.path", config.path, rule)
    by_name = {file.name: file for file in files}
    found = []
    for folder in folders:
        if folder.rstrip("/") not in skipped:
            state = by_name[f"{folder}{STATE}"]
            names = [f"{folder}{name}" for name in _data_files(state, config)]
            missing = [name for name in names if name not in by_name]
            require(not missing, "DataConfig.path", config.path, f"lacks {missing}, which {state.path} names")
            found += [by_name[name] for name in names]
    return found


def _folders(files: Sequence[File], name: str) -> list[str]:
    """Those with a file called `name`, each with its slash; the top has no name."""
    return [file.name.removesuffix(name) for file in files if file.name.rpartition("/")[2] == name]


def _data_files(file: File, config: DataConfig) -> list[str]:
    where = f"{corpus_text(config)}: {file.path}"
    with on_disk(file.path) as path:
        state: dict[str, Any] = read_json(path, where)
    if state.get("_indices_data_files") or state.get("_indices_files"):  # by early versions
        rule = "selects rows by an index; save it again after dataset.flatten_indices()"
        raise UserError(f"{where} {rule}")
    try:
        return [each["filename"] for each in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} names no files: it is not from Dataset.save_to_disk") from error
