import subprocess
import sys

import pytest

from laep_jax.errors import UserError
from laep_jax.report.command import FIGURES, main


def test_draws_every_figure_and_prints_its_path(run_dir, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main([str(run_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in FIGURES]
    for name in FIGURES:
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_draws_into_the_run_directory_also_without_a_prune(unpruned_dir):
    assert main([str(unpruned_dir)]) == 0
    assert {path.name for path in (unpruned_dir / "figures").iterdir()} == set(FIGURES)


def test_nothing_is_made_for_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: No such file"):
        main([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(run_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*file/inside cannot be written: Not a directory"):
        main([str(run_dir), "--out", str(tmp_path / "file" / "inside")])


def test_a_reader_that_is_gone_is_not_taken_for_the_folder(run_dir, tmp_path):
    command = f"{sys.executable} -m laep_jax report {run_dir} --out {tmp_path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{tmp_path}/{next(iter(FIGURES))}\n", "")


def test_imports_neither_jax_nor_training_code():
    code = (
        "import sys, laep_jax.report.command as _;"
        "print([m for m in sys.modules if m == 'jax' or m.startswith('laep_jax.training') or m == 'matplotlib.pyplot'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
