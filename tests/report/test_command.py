import shutil
import subprocess
import sys

import numpy as np
import pytest

from laep_jax.errors import UserError
from laep_jax.report.command import COMPARISON, FIGURES, REPORT, main
from laep_jax.report.page import REFRESH_SECONDS


def test_draws_every_figure_and_prints_its_path(run_dir, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main([str(run_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in (*FIGURES, REPORT)]
    assert (out / REPORT).read_text().startswith("<!doctype html>")
    for name in FIGURES:
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_draws_into_the_run_directory_also_without_a_prune(unpruned_dir):
    assert main([str(unpruned_dir)]) == 0
    assert {path.name for path in (unpruned_dir / "figures").iterdir()} == set(FIGURES)
    assert "<title>unpruned</title>" in (unpruned_dir / REPORT).read_text()


def test_two_runs_make_a_page_of_both_and_three_none(run_dir, unpruned_dir, tmp_path, capsys):
    assert main([str(run_dir), str(unpruned_dir), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [COMPARISON]
    assert capsys.readouterr().out == f"{tmp_path}/{COMPARISON}\n"
    assert "<title>small and unpruned</title>" in (tmp_path / COMPARISON).read_text()
    same = shutil.copytree(unpruned_dir, tmp_path / "small")
    assert main([str(run_dir), str(same), "--out", str(tmp_path)]) == 0
    assert f"<title>{run_dir} and {same}</title>" in (tmp_path / COMPARISON).read_text()
    with pytest.raises(UserError, match="RUN=3 runs: one is drawn, or two side by side"):
        main([str(run_dir)] * 3)


def test_a_page_is_renewed_until_the_run_is_complete(make, tmp_path, capsys, monkeypatch):
    """First nothing is saved, then half of it, then all."""
    whole, growing = make(tmp_path / "whole", num_steps=60, cut_step=None), tmp_path / "run"
    growing.mkdir()
    pages = []

    def time_passes(seconds):
        assert seconds == REFRESH_SECONDS
        assert len(pages) < 3
        report = growing / REPORT
        pages.append(report.read_text() if report.exists() else "")
        shutil.copytree(whole, growing, dirs_exist_ok=True)
        loads = np.load(whole / "loads" / "000000001.npy")
        np.save(growing / "loads" / "000000001.npy", loads[:30] if len(pages) == 1 else loads)
        if len(pages) == 2:
            (growing / "summary.json").write_text('{"steps": 60}')

    monkeypatch.setattr("time.sleep", time_passes)
    assert main([str(growing), "--follow"]) == 0
    waiting, page = capsys.readouterr().out.splitlines()
    assert "has no metrics.jsonl" in waiting
    assert page == str(growing / REPORT)
    assert pages[0] == ""
    assert "30 of 60 steps saved" in pages[1]
    assert 'http-equiv="refresh"' in pages[1]
    last = (growing / REPORT).read_text()
    assert "60 steps, complete" in last
    assert 'http-equiv="refresh"' not in last
    assert not (growing / "figures").exists()


def test_what_cannot_be_followed_is_refused(tmp_path):
    for run in (str(tmp_path / "none"), "gs://bucket/run"):
        with pytest.raises(UserError, match=f"--follow='{run}' is no directory on this machine"):
            main([run, "--follow"])


def test_ctrl_c_ends_following(run_dir, tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    assert main([str(run_dir), "--follow", "--out", str(tmp_path)]) == 0
    assert (tmp_path / REPORT).exists()


def test_nothing_is_made_for_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory: it has no metrics\.jsonl$"):
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
