"""The records of a run in a bucket, on this machine: programs and people read and write files.

Fetched at the start; what changed goes up before each checkpoint counts and at the end, so that a resumed run finds
what it needs: records up to the step of its checkpoint at least.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from laep_jax.errors import UserError, require
from laep_jax.files import MAX_ARRAY
from laep_jax.paths import is_bucket, require_path
from laep_jax.storage import Disk, Storage, open_storage

RECORDS = ("metrics.jsonl", "summary.json", "config.json", "operative.gin", "model.gin", "trackers.json")
FOLDERS = ("loads", "plans", "tensorboard", "figures")


class Mirror:
    """A local folder with the records of a run. folder: empty."""

    def __init__(self, run: Storage, folder: Path):
        self._run, self.folder = run, folder
        self._same: dict[str, tuple[int, int]] = {}  # size and time of each file that is in the bucket
        present = run.entries()
        names = [name for name in RECORDS if name in present]
        names += [f"{top}/{name}" for top in FOLDERS if top in present for name in run.files(top)]
        for name in names:
            require(".." not in name.split("/") and "//" not in name, "name in a run", name, "leads out of its folder")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(run.read(name, MAX_ARRAY))
            self._same[name] = _state(folder / name)

    def upload(self) -> None:
        """Brings the bucket up to date. A file that grows meanwhile may lack its last line there."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        paths = {name: path for name, path in paths.items() if path.is_file() and path.suffix != ".part"}
        for name, path in paths.items():
            with contextlib.suppress(FileNotFoundError):  # a tracker's own file that is gone by now
                state = _state(path)
                if self._same.get(name) != state:
                    self._run.write(name, path.read_bytes())
                    self._same[name] = state
        for name in self._dropped(set(paths)):
            self._run.remove(name)
            del self._same[name]

    def _dropped(self, names: set[str]) -> list[str]:
        """Recorded loads that a resumed run has dropped: the last ones. Others may be gone with a temporary folder."""
        newest = max((name for name in names if _is_loads(name)), default="")
        gone = [name for name in self._same if name not in names and _is_loads(name) and name > newest]
        return gone if "loads/experts.json" in names else []


def _is_loads(name: str) -> bool:
    return name.startswith("loads/") and name.endswith(".npy")


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def local_records(
    run: Storage, require_ours: Callable[[], None] = lambda: None
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder with the records of a run, and what brings those in a bucket up to date; once more at the end.

    require_ours: raises where the run is another process's by now; then nothing goes up.
    """
    if isinstance(run, Disk):
        yield run.root, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="laep_jax-") as folder:
        mirror = Mirror(run, Path(folder))

        def publish() -> None:
            require_ours()
            mirror.upload()
            require_ours()

        try:
            yield mirror.folder, publish
        except BaseException:
            with contextlib.suppress(UserError):  # the error on the way says more
                publish()
            raise
        publish()


@contextlib.contextmanager
def readable(run_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder with the records of a run, for programs that read them and may add some."""
    require_path("RUN", os.fspath(run_dir), bucket=True)
    with local_records(open_storage(run_dir)) as (folder, _):
        if is_bucket(run_dir) and not any(folder.iterdir()):
            raise UserError(f"{run_dir} has no records of a run")
        yield folder
