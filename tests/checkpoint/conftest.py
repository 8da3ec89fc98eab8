"""Checkpoints on both media: a disk, and a bucket of Cloud Storage as an emulator has it."""

import pytest

from laep_jax.storage import Storage, open_storage
from tests.support.emulator import new_folder


@pytest.fixture(params=["disk", "bucket"])
def storage(request, tmp_path) -> Storage:
    """Where checkpoints are to be; nothing is there yet."""
    if request.param == "disk":
        return open_storage(tmp_path / "a run" / "checkpoints")
    request.getfixturevalue("emulator")
    return open_storage(f"{new_folder()}/a run/checkpoints")
