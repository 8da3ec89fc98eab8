"""Which records of a run in a bucket are fetched and sent; the bucket is a folder here."""

from laep_jax import mirror
from laep_jax.mirror import Mirror
from laep_jax.storage import open_storage


def test_records_and_ids_of_trackers_are_fetched_and_their_own_files_only_sent(tmp_path, monkeypatch):
    bucket, folder = open_storage(tmp_path / "bucket"), tmp_path / "here"
    folder.mkdir()
    names = ["metrics.jsonl", "trackers.json", "wandb/old.wandb"]
    for name in names:
        bucket.write(name, b"old")
    records = Mirror(bucket, folder)
    assert sorted(path.name for path in folder.iterdir()) == names[:2]
    (folder / "wandb").mkdir()
    for name in ("gone.tmp", "new.wandb"):
        (folder / "wandb" / name).write_bytes(b"new")
    state = mirror._state

    def state_of(path):
        """The tracker removes its temporary file between the listing and here."""
        (folder / "wandb" / "gone.tmp").unlink(missing_ok=True)
        return state(path)

    monkeypatch.setattr(mirror, "_state", state_of)
    records.upload()
    assert sorted(bucket.files("")) == sorted([*names, "wandb/new.wandb"])
