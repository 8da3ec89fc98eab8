"""Every source reads what was written, in one order, and refuses what it cannot read."""

import bz2
import codecs
import gzip
import importlib
import json
import lzma
import sys

import numpy as np
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import strategies as st

from laep_jax.config import DataConfig
from laep_jax.data import sources
from laep_jax.data.sources import read_documents
from laep_jax.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = ["one", "zwei\nüber", "三 💡", "four" * 1000]


def documents(source, path, **changes):
    return [document[:2] for document in read_documents(DataConfig(source, str(path), **changes))]


def write_jsonl(path, values):
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_standard_library():
    found = [document[:2] for document in read_documents(DataConfig())]
    names = [name for name, _ in found]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    left_out = ("site-packages/", "test/", "idlelib/", "_sysconfigdata", "config-")
    assert not [name for name in names if name.startswith(left_out) or "/test" in name]
    assert 5e6 < sum(len(text) for _, text in found) < 12e6
    assert b"class ArgumentParser" in dict(found)["argparse.py"]


def test_jsonl_plain_and_compressed(tmp_path):
    values = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    plain = documents("jsonl", write_jsonl(tmp_path / "x.jsonl", values))
    assert plain == [(f"x.jsonl#{i}", text.encode()) for i, text in enumerate(TEXTS, 1)]
    assert documents("jsonl", write_jsonl(tmp_path / "x.jsonl.gz", values)) == plain


def test_jsonl_with_another_field_blank_lines_and_empty_texts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "a"}\n\n{"body": ""}\n   \n{"body": "b"}')
    assert documents("jsonl", path, text_field="body") == [("x.jsonl#1", b"a"), ("x.jsonl#5", b"b")]


def test_the_domain_from_a_field(tmp_path):
    values = [{"text": "a", "topic": "law"}, {"text": "b", "topic": "(other)"}, {"text": "c", "topic": "x\n"}]
    lines = write_jsonl(tmp_path / "x.jsonl", values)
    table = write_parquet(tmp_path / "x.parquet", topic=[v["topic"] for v in values], text=["a", "b", "c"])
    for source, path in (("jsonl", lines), ("parquet", table)):
        found = list(read_documents(DataConfig(source, str(path), domain_field="topic")))
        assert [(text, domain) for _, text, domain in found] == [(b"a", "law"), (b"b", "./(other)"), (b"c", r"x\n")]
        assert {document.domain for document in read_documents(DataConfig(source, str(path)))} == {path.name}


@pytest.mark.parametrize(
    ("topic", "rule"),
    [
        ({}, r"is not in line 2 of x\.jsonl, which has the fields \['text'\]"),
        ({"topic": 3}, r"holds no string in line 2 of x\.jsonl"),
        ({"topic": None}, r"holds no string in line 2 of x\.jsonl"),
        ({"topic": ""}, r"is empty in line 2 of x\.jsonl"),
    ],
)
def test_a_document_without_the_domain_is_refused_by_its_line(tmp_path, topic, rule):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "topic": "law"}, {"text": "b"} | topic])
    with pytest.raises(UserError, match=rf"^DataConfig\.domain_field='topic' {rule}$"):
        documents("jsonl", path, domain_field="topic")


def test_a_row_without_the_domain_is_refused(tmp_path):
    for column, rule in (
        ({}, r"is not in .*x\.parquet, which has the columns \['text'\]"),
        ({"topic": ["law", None]}, r"holds no string in row 1 of x\.parquet"),
        ({"topic": [1, 2]}, r"holds no string in row 0 of x\.parquet"),
    ):
        path = write_parquet(tmp_path / "x.parquet", text=["a", "b"], **column)
        with pytest.raises(UserError, match=rf"^DataConfig\.domain_field='topic' {rule}$"):
            documents("parquet", path, domain_field="topic")


def test_what_is_wrong_with_a_source_of_a_mixture_is_said_with_its_name(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    mixture = (("a", str(tmp_path / "a.jsonl"), 1.0), ("b", str(tmp_path / "none"), 1.0))
    with pytest.raises(UserError, match=r"^'b' of DataConfig\.mixture: DataConfig\.path='.*/none' is neither a file"):
        list(read_documents(DataConfig("jsonl", mixture=mixture)))


def test_array_record(tmp_path):
    texts = TEXTS + [f"text {i}" for i in range(3000)]  # more than are read at a time
    path = write_records(tmp_path / "x.array_record", [text.encode() for text in texts])
    assert documents("array_record", path) == [(f"x.array_record#{i}", text.encode()) for i, text in enumerate(texts)]
    assert documents("array_record", write_records(tmp_path / "none", [])) == []


def test_array_record_with_a_flipped_bit_is_right_or_refused(tmp_path):
    path = write_records(tmp_path / "x.array_record", [text.encode() for text in TEXTS])
    whole, right, refused = path.read_bytes(), documents("array_record", path), 0
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 400, 60).tolist() + rng.integers(0, len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert documents("array_record", path) == right
        except UserError:
            refused += 1
    assert refused > 20


def write(name, data):
    def write_to(tmp_path):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write_to


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        (
            "text",
            lambda p: p / "none.txt",
            "DataConfig.path='{path}' is neither a file, a folder with files nor a glob",
        ),
        ("text", lambda p: p / "*.txt", "DataConfig.path='{path}' is neither a file, a folder with files nor a glob"),
        ("text", lambda p: p, "DataConfig.path='{path}' is neither a file, a folder with files nor a glob of files"),
        ("text", write("x", b"abc\xff"), "DataConfig.path='{path}' holds a text that is not UTF-8: x, byte 3"),
        ("jsonl", write("x", b'{"text": "a"}\n{"text": '), "line 2 of x is not JSON: Expecting"),
        ("jsonl", write("x", b"[\n"), "; mend or remove the line, or leave its file out by a glob"),
        ("jsonl", write("x", b'{"text": "\xff"}'), "line 1 of x is not JSON: 'utf-8' codec"),
        (
            "jsonl",
            write("x", b'{"body": "a"}'),
            "text_field='text' is not in line 1 of x, which has the fields ['body']",
        ),
        ("jsonl", write("x", b'["text"]'), "text_field='text' is not in line 1 of x, which is no JSON object"),
        ("jsonl", write("x", b'{"text": 3}'), "DataConfig.text_field='text' holds no string in line 1 of x"),
        ("jsonl", write("x", rb'{"text": "\ud800"}'), "holds a text that is not UTF-8: line 1 of x: surrogates"),
        ("jsonl", write("x.gz", b"plain"), "line 1 of x is not JSON"),
        ("jsonl", write("x.gz", gzip.compress(b'{"text": "a"}')[:-9]), "holds a damaged compressed file: {path}"),
        ("text", write("x", bz2.compress(b"a")[:-2] + b"??"), "holds a damaged compressed file: {path}"),
        ("text", write("x", lzma.compress(b"a")[:-2]), "holds a damaged compressed file: {path}"),
        (
            "array_record",
            write("x", b""),
            "DataConfig.path='{path}' holds no ArrayRecord file or a damaged one: {path}",
        ),
        ("array_record", write("x", b"\0" * 200_000), "holds no ArrayRecord file or a damaged one"),
        (
            "array_record",
            lambda p: write_records(p / "x", [b"a", b"\xff"]),
            "DataConfig.path='{path}' holds a text that is not UTF-8: record 1 of x, byte 0",
        ),
    ],
)
def test_refusals(tmp_path, source, make, message):
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        documents(source, path)
    assert message.format(path=path) in str(error.value)
    assert "DataConfig." in str(error.value)
    assert "\n" not in str(error.value)


def test_text_is_bytes_of_any_kind_but_utf8_without_the_mark_at_its_beginning(tmp_path):
    (tmp_path / "nul").write_bytes(codecs.BOM_UTF8 + b"a\0b\r\n\xef\xbb\xbf")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "mark").write_bytes(codecs.BOM_UTF8)
    assert documents("text", tmp_path) == [("nul", b"a\0b\r\n\xef\xbb\xbf")]


def test_json_lines_of_other_systems(tmp_path):
    marked = codecs.BOM_UTF8 + b'{"text": "a"}\r\n\r\n'
    (tmp_path / "x.jsonl").write_bytes(2 * marked + b'{"text": "b"}')
    assert documents("jsonl", tmp_path) == [
        (f"x.jsonl#{number}", text) for number, text in ((1, b"a"), (3, b"a"), (5, b"b"))
    ]


def pzstd(data: bytes) -> bytes:
    """A frame that is to be skipped before each of those with data."""
    return b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4) + zstd.compress(data)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd.compress, pzstd])
@pytest.mark.parametrize("suffix", ["", ".gz", ".gzip", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_is_known_by_its_first_bytes(tmp_path, compress, suffix):
    (tmp_path / f"x.txt{suffix}").write_bytes(compress(codecs.BOM_UTF8 + b'{"text": "a"}'))
    assert documents("jsonl", tmp_path) == [("x.txt#1", b"a")]
    assert documents("text", tmp_path) == [("x.txt", b'{"text": "a"}')]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"PK\x03\x04", "is a zip archive"),
        (b"PAR1", r"is a Parquet file: DataConfig\.source='parquet' reads it"),
        (b"a".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"), "is a tar archive"),
        ("a text".encode("utf-16"), "is UTF-16; convert it"),
        ("a text".encode("utf-16-be"), "has a zero in every other byte, as UTF-16 has"),
        ("a text".encode("utf-16-le"), "has a zero in every other byte, as UTF-16 has"),
    ],
)
def test_other_forms_are_named(tmp_path, data, rule):
    for name, packed in (("x", data), ("y.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        for source in ("text", "jsonl"):
            with pytest.raises(UserError, match=f"DataConfig.path='.*{name}': .*{name} {rule}"):
                documents(source, tmp_path / name)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2, compression="zstd")
    return path


def test_parquet(tmp_path):
    texts = ["eins", "", "drei ü", "vier", "fünf"]
    path = write_parquet(tmp_path / "x.parquet", body=texts, id=range(5))
    want = [(f"x.parquet#{row}", text.encode()) for row, text in enumerate(texts) if text]
    assert documents("parquet", path, text_field="body") == want
    large = pyarrow.array(texts, pyarrow.large_string())
    assert documents("parquet", write_parquet(path, text=large)) == want
    assert documents("parquet", write_parquet(path, text=pyarrow.array([], pyarrow.string()))) == []


def test_parquet_that_has_no_such_texts_or_is_damaged_is_refused(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", text=["a", None], number=[1, 2], bits=[b"\xff", b""])
    for field, rule in (
        ("body", r"is not in .*x\.parquet, which has the columns \['text', 'number', 'bits'\]"),
        ("text", r"holds no string in row 1 of x\.parquet"),
        ("number", r"holds no string in row 0 of x\.parquet"),
        ("bits", r"holds no string in row 0 of x\.parquet"),
    ):
        with pytest.raises(UserError, match=rf"^DataConfig\.text_field='{field}' {rule}$"):
            documents("parquet", path, text_field=field)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"^DataConfig\.path='.*' holds no Parquet file or a damaged one: .*x\.parquet"):
        documents("parquet", path)
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(
        UserError, match=r"^DataConfig\.text_field='text' is the name of several columns \['text', 'text'\]$"
    ):
        documents("parquet", path)
    bomb = write_parquet(tmp_path / "bomb.parquet", text=["a" * 10**6] * 500)
    assert bomb.stat().st_size < 10**6
    with pytest.raises(UserError, match=r"holds a compressed file that grows more than 100 times: .*bomb\.parquet"):
        documents("parquet", bomb)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd.compress])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path, compress):
    packed = compress("".join(f'{{"text": "{number**9}"}}\n' for number in range(1000)).encode())
    (tmp_path / "x.jsonl").write_bytes(packed[:-5])
    with pytest.raises(UserError, match=r"holds a damaged compressed file: .*x\.jsonl: "):
        documents("jsonl", tmp_path)


def test_the_extra_that_a_form_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(zstd.compress(b"{}"))
    parquet = write_parquet(tmp_path / "x.parquet", text=["a"])

    def missing(package):
        raise ImportError(package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"needs the package \w+: pip install 'laep_jax\[zstd\]', or \w+$"):
        documents("jsonl", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"x\.parquet needs the package pyarrow: pip install 'laep_jax\[parquet\]'"):
        documents("parquet", parquet)


def test_a_file_name_of_any_bytes(tmp_path):
    """In a folder; as DataConfig.path itself, which is stored, such a name is refused."""
    (tmp_path / "lines").mkdir()
    names = ("\udce4.jsonl", "\n#7 '.jsonl", "(other)", "-")
    for name in names:
        write_jsonl(tmp_path / "lines" / name, [{"text": "a"}])
    assert sorted(documents("jsonl", tmp_path / "lines")) == sorted((f"{name}#1", b"a") for name in names)
    (tmp_path / "records").mkdir()
    write_records(tmp_path / "r", [b"a"]).rename(tmp_path / "records" / "\udcff")
    assert documents("array_record", tmp_path / "records") == [("\udcff#0", b"a")]


def test_a_gzip_bomb_is_refused_on_the_way(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    for text in (b"\n" * 10**6, b" " * 10**6, b'{"text": "a"}\n' * 10**5):
        path.write_bytes(gzip.compress(text))
        with pytest.raises(UserError, match=r"a compressed file that grows more than 100 times: .*x\.jsonl\.gz"):
            documents("jsonl", path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_texts_and_lines_have_a_largest_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "MAX_LINE", 10_000)
    monkeypatch.setattr(sources, "MAX_TEXT", 10_000)
    letters = np.random.default_rng(0).integers(97, 122, 20_000, np.uint8).tobytes().decode()
    write_jsonl(tmp_path / name, [{"text": letters}])
    with pytest.raises(UserError, match="holds a line of more than 10000 bytes"):
        documents("jsonl", tmp_path / name)
    (tmp_path / "y").write_text(letters)
    with pytest.raises(UserError, match="holds a text of more than 10000 bytes"):
        documents("text", tmp_path / "y")
    (tmp_path / "y").write_text(letters[:10_000])
    assert len(documents("text", tmp_path / "y")[0][1]) == 10_000


@pytest.mark.slow
def test_real_sizes(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 10**8)
    assert len(documents("text", tmp_path / "x")[0][1]) == 10**8
    with pytest.raises(UserError, match=f"holds a line of more than {2**26} bytes"):
        documents("jsonl", tmp_path / "x")
    with gzip.open(tmp_path / "x.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(bytes(10**8))
    with pytest.raises(UserError, match=r"line of more than|grows more than"):
        documents("jsonl", tmp_path / "x.gz")


def test_any_bytes_are_documents_or_refused(fuzz, tmp_path):
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS[:3])).encode()
    deep = b'{"text": ' + b"[" * 100_000

    def check(data):
        valid = data.draw(st.sampled_from([lines, lines + deep]))
        plain = data.draw(fuzz.bytes(valid))
        (tmp_path / "x").write_bytes(plain)
        (tmp_path / "x.gz").write_bytes(
            data.draw(st.one_of(st.just(gzip.compress(plain)), fuzz.bytes(gzip.compress(lines))))
        )
        for source, name in (("text", "x"), ("jsonl", "x"), ("jsonl", "x.gz"), ("array_record", "x")):
            for _, text in fuzz.reads(lambda: documents(source, tmp_path / name)) or ():  # noqa: B023
                text.decode()

    fuzz(check)
