"""Logs of other programs, written here as they write them: the counts that come of them, and what is refused."""

import io
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from laep_jax.errors import UserError
from laep_jax.importers.command import main
from laep_jax.importers.torch_file import read_torch
from laep_jax.laep import command as plan_command
from laep_jax.laep.counts import read_counts

LAYERS, EXPERTS, STEPS, TOKENS, TOP_K = 3, 8, 4, 50, 2
RNG = np.random.default_rng(0)
IDS_NLTK = np.argsort(RNG.random((STEPS, LAYERS, TOKENS, EXPERTS)) * np.arange(1, EXPERTS + 1), axis=-1)[..., :TOP_K]
COUNTS_NLE = np.stack([[np.bincount(ids_TK.ravel(), minlength=EXPERTS) for ids_TK in layers] for layers in IDS_NLTK])


def lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def megatron(folder: Path) -> list[str]:
    """Two ranks with half of the experts each, two microbatches a step."""
    files = []
    for rank in range(2):
        own = slice(rank * 4, rank * 4 + 4)
        records = []
        for step in range(STEPS):
            for layer in range(LAYERS):
                first_E = COUNTS_NLE[step, layer, own] // 3
                halves = [first_E.tolist(), (COUNTS_NLE[step, layer, own] - first_E).tolist()]
                records.append({"iter": 10 * (step + 1), "block": "decoder", "layer": layer, "tpe": halves})
        files.append(lines(folder / f"rank{rank}.jsonl", records))
    return files


def megatron_trace(folder: Path) -> list[str]:
    """Two ranks with half of the tokens each."""
    return [
        lines(
            folder / f"trace{rank}.jsonl",
            [
                {"step": s, "layer": layer, "topk": TOP_K, "top_indices": IDS_NLTK[s, layer, rank::2].tolist()}
                for s in range(STEPS)
                for layer in range(LAYERS)
            ],
        )
        for rank in range(2)
    ]


def csv_files(folder: Path, head: str = "layer,expert,count") -> list[str]:
    files = []
    for step, counts_LE in enumerate(COUNTS_NLE):
        rows = [f"{layer},{expert},{count}" for (layer, expert), count in np.ndenumerate(counts_LE) if count]
        (folder / f"{step}.csv").write_text("\n".join([head, *rows]) + "\n")
        files.append(str(folder / f"{step}.csv"))
    return files


def vllm(folder: Path) -> list[str]:
    for step in range(STEPS):
        np.save(folder / f"ids{step}.npy", IDS_NLTK[step].swapaxes(0, 1).astype(np.int16))
    return [str(folder / f"ids{step}.npy") for step in range(STEPS)]


def router_logits(folder: Path) -> list[str]:
    """The chosen ones have the largest logits."""
    for step in range(STEPS):
        logits = RNG.normal(size=(LAYERS, TOKENS, EXPERTS)).astype(np.float32)
        np.put_along_axis(logits, IDS_NLTK[step], 10 + RNG.random(IDS_NLTK[step].shape), axis=-1)
        np.savez(folder / f"logits{step}.npz", *logits)
    return [str(folder / f"logits{step}.npz") for step in range(STEPS)]


class Storage:
    """Stands in a pickle for a storage that lies beside it."""

    def __init__(self, kind: str, key: str, size: int):
        self.pid = "storage", kind, key, "cpu", size


def torch_save(path: Path, values: dict, storages: dict[str, bytes]) -> str:
    """A file as `torch.save` writes it. values: with `tensor`s in it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.pid if isinstance(value, Storage) else None

    text = io.BytesIO()
    Pickler(text, protocol=2).dump(values)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dump/data.pkl", text.getvalue())
        for key, content in storages.items():
            archive.writestr(f"dump/data/{key}", content)
    return str(path)


@pytest.fixture
def tensor(monkeypatch):
    """Makes what pickles as a tensor does."""
    module = types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_):
        raise AssertionError("only named")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    module._rebuild_tensor_v2 = _rebuild_tensor_v2
    torch = types.ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", module)
    for kind in ("LongStorage", "FloatStorage"):
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

    class Tensor:
        def __init__(self, storage, offset, shape, strides):
            self.arguments = storage, offset, shape, strides, False, {}

        def __reduce__(self):
            return _rebuild_tensor_v2, self.arguments

    def make(array: np.ndarray, key: str, **changes):
        kind = getattr(torch, {"i": "LongStorage", "f": "FloatStorage"}[array.dtype.kind])
        strides = tuple(stride // array.itemsize for stride in array.strides)
        parts = {"offset": 0, "shape": array.shape, "strides": strides} | changes
        return Tensor(Storage(kind, key, array.size), *parts.values())

    return make


def counted(form: str, files: list[str], *options: str, folder: Path) -> list[np.ndarray]:
    assert main(["--from", form, *files, "--out", str(folder / "out.npz"), *options]) == 0
    return read_counts(folder / "out.npz")


@pytest.mark.parametrize(
    ("form", "write", "options"),
    [
        ("megatron", megatron, []),
        ("megatron-trace", megatron_trace, []),
        ("csv", csv_files, []),
        ("sglang", lambda folder: csv_files(folder, "layer_id,expert_id,count"), []),
        ("vllm-ids", vllm, []),
        ("hf-router-logits", router_logits, [f"--top-k={TOP_K}"]),
    ],
)
def test_counts_are_what_the_program_counted(form, write, options, tmp_path, capsys):
    counts = counted(form, write(tmp_path), *options, folder=tmp_path)
    np.testing.assert_array_equal(np.stack(counts, axis=1), COUNTS_NLE)
    assert capsys.readouterr().out.startswith(f"{LAYERS} layers x {EXPERTS} experts, {STEPS} iterations\n")
    plan = ["--counts", str(tmp_path / "out.npz"), "--expert-parallel=2", f"--top-k={TOP_K}"]
    assert plan_command.main(plan) == 0
    assert f"{STEPS} iterations of {TOKENS} tokens x top {TOP_K}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_dumps_of_sglang_are_read_without_torch_and_dense_layers_left_out(tensor, dtype, tmp_path, capsys):
    tokens_NLE = np.insert(COUNTS_NLE, 0, 0, axis=1).astype(dtype)
    values = {"rank": 0, "logical_count": tensor(tokens_NLE, "0"), "average_utilization_rate_over_window": None}
    file = torch_save(tmp_path / "dump.pt", values, {"0": tokens_NLE.tobytes()})
    counts = counted("sglang", [file], folder=tmp_path)
    np.testing.assert_array_equal(np.stack(counts, axis=1), COUNTS_NLE)
    assert "left out, since they have no tokens: layers 0\n" in capsys.readouterr().out


def test_a_tensor_is_read_as_its_strides_say(tensor, tmp_path):
    base = np.arange(24).reshape(4, 6)
    part = tensor(base, "7", offset=1, shape=(3, 2), strides=(2, 6))
    torch_save(tmp_path / "a.pt", {"part": part, "n": 3}, {"7": base.tobytes()})
    values = read_torch(tmp_path / "a.pt", "a")
    np.testing.assert_array_equal(values["part"], base[:2, 1:6:2].T)
    assert values["n"] == 3


class Executes:
    def __init__(self, folder: Path):
        self.file = folder / "executed"

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_pickle_is_executed(tmp_path):
    torch_save(tmp_path / "bad.pt", {"logical_count": Executes(tmp_path)}, {})
    with pytest.raises(UserError, match=r"does not read as a file of torch\.save with tensors: .* names posix\.mkdir"):
        counted("sglang", [str(tmp_path / "bad.pt")], folder=tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "changes",
    [{"offset": 23}, {"shape": (4, 7)}, {"strides": (600, 1)}, {"strides": (-6, 1)}, {"shape": (2**40, 2**40)}],
)
def test_a_tensor_beyond_its_storage_is_refused(tensor, changes, tmp_path):
    base = np.arange(24).reshape(4, 6)
    torch_save(tmp_path / "a.pt", {"x": tensor(base, "0", **changes)}, {"0": base.tobytes()})
    with pytest.raises(UserError, match=r"beyond its storage|shape is none"):
        read_torch(tmp_path / "a.pt", "a")


def megatron_line(**changes) -> str:
    return json.dumps({"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1, 2]]} | changes) + "\n"


HOSTILE = [
    ("megatron", "", "has no lines"),
    ("megatron", megatron_line()[:-9], "line 1 is not JSON"),
    ("megatron", "[1]\n", "line 1=.* must be a JSON object"),
    ("megatron", megatron_line(tpe=[[1, 2], [3]]), "line 1: tpe is no array of numbers"),
    ("megatron", megatron_line(tpe=[[1, -2]]), r"\[0, 0, 1\]=-2 must not be negative"),
    ("megatron", megatron_line(tpe=[[1, 2.5]]), "are no whole numbers"),
    ("megatron", megatron_line().replace("2", "NaN"), "line 1 is not JSON"),
    ("megatron", megatron_line(tpe="many"), "must be numbers of 2 dimensions"),
    ("megatron", megatron_line(layer=-1), "layer=-1 must be a number from 0 on"),
    ("megatron", megatron_line() * 2, "stands twice in the file"),
    ("megatron", megatron_line() + megatron_line(layer=1) + megatron_line(iter=2), "iterations of layer decoder 1=1"),
    ("megatron", megatron_line() + megatron_line(iter=2, tpe=[[1, 2, 3]]), "experts of layer decoder 0=.* differ"),
    ("megatron-trace", '{"step": 1, "layer": 0, "top_indices": [[1, 70000]]}\n', "highest expert=70000 is not below"),
    ("megatron-trace", '{"step": 1, "layer": 0, "top_indices": [[-1, -1]]}\n', "highest expert=-1"),
    ("csv", "a,b,c\n1,2,3\n", "columns of .* lack layer, expert or count"),
    ("csv", "layer,expert,count\n", "has no rows"),
    ("csv", 'layer,expert,count\r0,0,"\r', "count='.*' must be a whole number|does not read as csv"),
    ("csv", "layer,expert,count\n0,0,-1\n", "count='-1' must be a whole number"),
    ("csv", "layer,expert,count\n0,0,1\n0,0,1\n", "is none, or stands twice"),
    ("csv", "layer,expert,count\n0,0,0\n", "layers with tokens=0 are too few"),
    ("vllm-ids", "no array", "does not read as a .npy or .npz file"),
    ("sglang", "no archive", "does not read as a file of torch.save"),
]


@pytest.mark.parametrize(("form", "text", "message"), HOSTILE)
def test_what_is_no_log_is_refused_in_one_line(form, text, message, tmp_path):
    (tmp_path / "log").write_text(text)
    with pytest.raises(UserError, match=message):
        counted(form, [str(tmp_path / "log")], folder=tmp_path)
    assert not (tmp_path / "out.npz").exists()


def test_ranks_of_different_lengths_are_refused(tmp_path):
    first, second = megatron(tmp_path)
    Path(second).write_text("".join(Path(second).read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"iterations and layers of .*rank1\.jsonl=11 are not those of"):
        counted("megatron", [first, second], folder=tmp_path)


def test_layers_come_by_their_numbers_and_have_one_width(tmp_path):
    """Not in the order of the archive, nor as wide as each one's highest logged expert."""
    logits = {f"layer_{layer}": np.eye(3)[[layer % 3] * 4] for layer in (10, 11, 2, 1)}
    np.savez(tmp_path / "logits.npz", **logits)
    counts = counted("hf-router-logits", [str(tmp_path / "logits.npz")], "--top-k=1", folder=tmp_path)
    assert [int(tokens_NE.argmax()) for tokens_NE in counts] == [1, 2, 10 % 3, 11 % 3]
    (tmp_path / "excel.csv").write_text("\ufefflayer,expert,count\n0,0,5\n1,0,3\n1,2,2\n", encoding="utf-8")
    counts = counted("csv", [str(tmp_path / "excel.csv")], folder=tmp_path)
    assert [tokens_NE.tolist() for tokens_NE in counts] == [[[5, 0, 0]], [[3, 0, 2]]]
    with pytest.raises(UserError, match="--num-experts=4 is not for --from megatron"):
        counted("megatron", megatron(tmp_path), "--num-experts=4", folder=tmp_path)


def test_router_logits_need_top_k(tmp_path):
    with pytest.raises(UserError, match="--top-k=None is needed"):
        counted("hf-router-logits", router_logits(tmp_path), folder=tmp_path)
