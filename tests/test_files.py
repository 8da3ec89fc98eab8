"""Files that nobody vouches for: what they hold, or one line; never a wait, never more memory than the limits."""

import io
import json
import os
import zipfile

import numpy as np
import pytest

from laep_jax import files
from laep_jax.errors import MAX_MESSAGE, UserError, short
from laep_jax.files import open_regular, parse_json, read_array, read_arrays, read_bytes, read_records, refuse_links


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "zero"):
        with pytest.raises(UserError, match="x is not a regular file"):
            open_regular(path, "x")
    for name, message in (("none", "No such file"), ("a\0b", "null")):
        with pytest.raises(UserError, match=f"x cannot be read: .*{message}"):
            open_regular(tmp_path / name, "x")


def test_files_above_their_limit_are_refused_before_they_are_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=f"size of x={2**40} is above {2**26} bytes"):
        read_bytes(tmp_path / "sparse", "x", 2**26)
    with pytest.raises(UserError):
        read_array(tmp_path / "sparse", "x", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        ("NaN", "'NaN' is not a finite number"),
        ("-Infinity", "'-Infinity' is not a finite number"),
        ("[1e999]", "'1e999' is not a finite number"),
        ("9" * 5000, "4300 digits"),
        (b"\xff", "codec can't decode"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_none(text, message):
    with pytest.raises(UserError, match=rf"^x is not JSON: .*{message}"):
        parse_json(text, "x")


def test_any_bytes_are_json_or_refused(fuzz):
    valid = json.dumps({"a": [1, 2.5, "x", None], "b": {"c": True}}).encode()
    fuzz(lambda data: fuzz.reads(lambda: parse_json(data.draw(fuzz.bytes(valid)), "x")))


def test_any_bytes_are_records_or_refused(fuzz, tmp_path):
    valid = [{"kind": "train", "step": step, "loss": 1.5, "when": None} for step in range(3)]
    path = tmp_path / "metrics.jsonl"

    def check(data):
        lines = "".join(json.dumps(fuzz.json(data.draw, record)) + "\n" for record in valid).encode()
        path.write_bytes(data.draw(fuzz.bytes(lines)))
        for record in fuzz.reads(lambda: list(read_records(path))) or ():
            assert isinstance(record["kind"], str)
            assert record["step"] >= 0

    fuzz(check)


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 100)
    (tmp_path / "x").write_bytes(b"1" * 10_000)
    with pytest.raises(UserError, match=r"length of .*line 1=101 is above 100 bytes"):
        list(read_records(tmp_path / "x"))


def test_records_have_no_other_limit_and_those_that_are_not_asked_for_are_not_parsed(tmp_path):
    (tmp_path / "x").write_text('not parsed\n{"kind": "prune", "step": 1, "lineage": []}\n' * 3 + "torn")
    assert [record["step"] for record in read_records(tmp_path / "x", '"lineage"')] == [1, 1, 1]
    with pytest.raises(UserError, match="line 1 is not JSON"):
        list(read_records(tmp_path / "x"))


def npz(save=np.savez, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array", [np.arange(24).reshape(2, 3, 4), np.float32([[1.5]]), np.int64(3), np.zeros((0, 3), bool)]
)
def test_arrays_come_back(tmp_path, array, save):
    (tmp_path / "x").write_bytes(npz(save, a=np.asfortranarray(array), b=np.arange(2)))
    got = read_arrays(tmp_path / "x", "x", ["a"])["a"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    np.save(tmp_path / "y.npy", np.asfortranarray(array))
    np.testing.assert_array_equal(read_array(tmp_path / "y.npy", "y", "a"), array)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


HEADERS = [
    "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 1000000), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 1), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (-1, -1), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (0, 10**30), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (0, 1000000000000000000000000000000), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<U0', 'fortran_order': False, 'shape': (10,), }",
    "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }",
    "__import__('os').abort()",
    "(" * 5000,
    "{}",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_believed_only_where_it_fits_the_bytes(tmp_path, header):
    data = npy(header, b"\0" * 8)
    (tmp_path / "x.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(UserError, match="x does not read"):
            read_array(tmp_path / name, "x", "a")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x", "w", method) as archive:
        archive.writestr("a.npy", npy(HEADERS[0]))
    with pytest.raises(UserError, match="compressed as NumPy does not"):
        read_array(tmp_path / "x", "x", "a")


def test_what_unpacks_to_more_than_an_array_may_have_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(npz(np.savez_compressed, a=np.zeros(10**6, np.int8)))
    assert (tmp_path / "x").stat().st_size < 2000
    assert read_array(tmp_path / "x", "x", "a").size == 10**6
    monkeypatch.setattr(files, "MAX_ARRAY", 10**6)
    with pytest.raises(UserError, match="size of the arrays in x=1000128 is above 1000000 bytes"):
        read_array(tmp_path / "x", "x", "a")


def test_any_bytes_are_arrays_or_refused(fuzz, tmp_path):
    forms = [npz(a=np.arange(6)), npz(np.savez_compressed, a=np.ones((2, 3))), npy("{'descr': '<i8'}", b"\0" * 8)]

    def check(data):
        for valid in forms:
            (tmp_path / "x").write_bytes(data.draw(fuzz.bytes(valid)))
            array = fuzz.reads(lambda: read_array(tmp_path / "x", "x", "a"))
            assert array is None or array.dtype.kind in "biuf"

    fuzz(check)


@pytest.mark.parametrize("name", ["plans", "metrics.jsonl", "checkpoints/7"])
def test_a_link_in_a_run_directory_is_refused(tmp_path, name):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    refuse_links(run)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    refuse_links(run)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{name} is a link; a run writes"):
        refuse_links(run)


def test_messages_are_one_line_of_bounded_length():
    message = str(UserError("a\nb\x1b[31m" + "x" * 10**6 + "\u2028end"))
    assert message.startswith(r"a\nb\x1b[31mxx")
    assert message.endswith(r"x\u2028end")
    assert message.isprintable()
    assert len(message) < MAX_MESSAGE + 50
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, [0] * 10**6, "x" * 10**6, 1 << 10**6, {i: i for i in range(10**4)}):
        assert len(short(value)) < MAX_MESSAGE
