"""Where text comes from: named documents of UTF-8 bytes, always in the same order.

A document's name is that of its file in the `Listing`, with "#" and its number where a file holds several. Its domain
is what `DataConfig.domain_field` says, the name of its source in a mixture, else as `domains.domain` says.
Files compressed with gzip, bzip2, xz or zstd are unpacked, whatever their names. What cannot be read stops the run, and
so does what is too long or grows out of all proportion when unpacked; only blank lines and empty texts are passed over.
"""

import bz2
import codecs
import contextlib
import gzip
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

from laep_jax.config import DataConfig
from laep_jax.data.bucket import on_disk
from laep_jax.data.domains import domain, domain_name
from laep_jax.data.listing import File, corpus_text, list_files, of_mixture
from laep_jax.data.optional import import_extra
from laep_jax.data.saved import arrow_files
from laep_jax.data.synthetic import synthetic_documents
from laep_jax.errors import UserError, require, short
from laep_jax.files import open_regular, parse_json

RECORDS_CHUNK = 1024
MAX_TEXT = 2**27  # bytes of a document
MAX_LINE = 2**26  # bytes of a JSON line
MAX_GROWTH = 100  # of a compressed file, in units of its size; text grows to 3 to 10 times
REFUSED = {
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it or use gzip, bzip2 or xz",
    b"\x1f\x9d": "compressed with compress; unpack it or use gzip, bzip2 or xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a Parquet file: DataConfig.source='parquet' reads it",
    codecs.BOM_UTF16_LE: "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}
HEAD = 512  # bytes from which a file is known


class Document(NamedTuple):
    """One text: its name in the corpus, its UTF-8 bytes, at least one, and its domain."""

    name: str
    text: bytes
    domain: str


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Every document with any text in it, of a mixture those of each source in turn, each source its own domain.

    `UserError` at the first that cannot be read.
    """
    for source, part in config.parts:
        with of_mixture(source):
            for document in _read(part):
                if document.text:
                    yield document._replace(domain=domain_name(source)) if source else document


def _read(config: DataConfig) -> Iterator[Document]:
    if config.source == "synthetic":
        for name, text in synthetic_documents():
            yield Document(name, text, domain(name, config.source))
        return
    read = READERS.get(config.source, _read_text)
    files = list_files(config).files
    for file in arrow_files(files, config) if config.source == "datasets" else files:
        try:
            yield from read(file, config)
        except OSError as error:
            raise UserError(f"{corpus_text(config)} cannot be read: {file.path}: {error.strerror or error}") from error


def _read_text(file: File, config: DataConfig) -> Iterator[Document]:
    with _opened(file, config) as (opened, most):
        text = opened.read(min(MAX_TEXT, most) + 1)
        _check_growth(len(text), most, file, config)
        if len(text) > MAX_TEXT:
            raise UserError(f"{corpus_text(config)} holds a text of more than {MAX_TEXT} bytes: {file.path}")
    yield Document(file.name, _utf8(text, file.name, config), domain(file.name, config.source))


def _read_jsonl(file: File, config: DataConfig) -> Iterator[Document]:
    """One document a line, named by its line."""
    for number, line in enumerate(_lines(file, config), 1):
        if line.strip():
            yield _json_document(line, f"{file.name}#{number}", f"line {number} of {file.name}", config)


def _lines(file: File, config: DataConfig) -> Iterator[bytes]:
    with _opened(file, config) as (opened, most):
        size = number = 0
        while line := opened.readline(MAX_LINE + 1):
            size, number = size + len(line), number + 1
            if len(line) > MAX_LINE:
                where = f"{file.path}, line {number}"
                raise UserError(f"{corpus_text(config)} holds a line of more than {MAX_LINE} bytes: {where}")
            _check_growth(size, most, file, config)
            yield line


def _open_zstd(file: BinaryIO) -> BinaryIO:
    package = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return import_extra(package, "zstd", "a file compressed with zstd").open(file)


UNPACK = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"\x28\xb5\x2f\xfd": _open_zstd}
UNPACK |= {bytes([byte]) + b"\x2a\x4d\x18": _open_zstd for byte in range(0x50, 0x60)}  # a frame to skip, as of pzstd


@contextlib.contextmanager
def _opened(file: File, config: DataConfig) -> Iterator[tuple[BinaryIO, int]]:
    """(the file, unpacked and behind its byte order mark, the most bytes that it may have)."""
    where, most = f"{corpus_text(config)}: {file.path}", 2**63
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_regular(stack.enter_context(on_disk(file.path)), where))
        try:
            if unpack := next((UNPACK[magic] for magic in UNPACK if _head(opened).startswith(magic)), None):
                most = MAX_GROWTH * file.size
                opened = stack.enter_context(cast(BinaryIO, unpack(opened)))
            _refuse_format(_head(opened), where)
            if _head(opened).startswith(codecs.BOM_UTF8):
                opened.read(len(codecs.BOM_UTF8))
            yield opened, most
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{corpus_text(config)} holds a damaged compressed file: {file.path}: {error}") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # of a package that may not be there
                raise
            raise UserError(f"{corpus_text(config)} holds a damaged compressed file: {file.path}: {error}") from error


def _head(opened: BinaryIO) -> bytes:
    return opened.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]


def _refuse_format(head: bytes, where: str) -> None:
    for magic, rule in REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{where} is {rule}")
    if head[257:262] == b"ustar":
        raise UserError(f"{where} is a tar archive; unpack it")
    if len(head) >= 4 and any(head[:64:2]) != any(head[1:64:2]):
        raise UserError(f"{where} has a zero in every other byte, as UTF-16 has; convert it to UTF-8")


def _check_growth(size: int, most: int, file: File, config: DataConfig) -> None:
    if size > most:
        rule = f"holds a compressed file that grows more than {MAX_GROWTH} times"
        raise UserError(f"{corpus_text(config)} {rule}: {file.path}")


def _json_document(line: bytes, name: str, where: str, config: DataConfig) -> Document:
    """The document in one line of JSON."""
    try:
        value = parse_json(line, f"{corpus_text(config)}: {where}")
    except UserError as error:
        raise UserError(f"{error}; mend or remove the line, or leave its file out by a glob") from error
    rule = f"is not in {where}, which is no JSON object"
    require(isinstance(value, dict), "DataConfig.text_field", config.text_field, rule)
    for setting, field in _fields(config).items():
        require(field in value, setting, field, f"is not in {where}, which has the fields {short(list(value))}")
    return _document(value, name, where, config)


def _fields(config: DataConfig) -> dict[str, str]:
    """The fields that a record must have, by their settings."""
    fields = {"DataConfig.text_field": config.text_field, "DataConfig.domain_field": config.domain_field}
    return {setting: field for setting, field in fields.items() if field}


def _document(values: Mapping[str, Any], name: str, where: str, config: DataConfig) -> Document:
    """The document that a record holds. values: by field or column."""
    for setting, field in _fields(config).items():
        require(isinstance(values[field], str), setting, field, f"holds no string in {where}")
    of_domain = domain(name, config.source)
    if config.domain_field:
        of_domain = domain_name(values[config.domain_field])
        require(bool(of_domain), "DataConfig.domain_field", config.domain_field, f"is empty in {where}")
    try:
        return Document(name, values[config.text_field].encode(), of_domain)
    except UnicodeEncodeError as error:  # JSON can write one half of a surrogate pair
        raise UserError(f"{corpus_text(config)} holds a text that is not UTF-8: {where}: {error.reason}") from error


def _read_array_record(file: File, config: DataConfig) -> Iterator[Document]:
    """One document a record, named by its index."""
    from array_record.python.array_record_module import ArrayRecordReader

    problem = f"{corpus_text(config)} holds no ArrayRecord file or a damaged one: {file.path}"
    with on_disk(file.path) as path:
        open_regular(path, f"{corpus_text(config)}: {path}").close()
        try:
            reader = ArrayRecordReader(os.fsencode(path))
            number = reader.num_records()
            for first in range(0, number, RECORDS_CHUNK):
                for index, record in enumerate(reader.read(first, min(first + RECORDS_CHUNK, number)), first):
                    name = f"{file.name}#{index}"
                    text = _utf8(record, f"record {index} of {file.name}", config)
                    yield Document(name, text, domain(name, config.source))
        except (RuntimeError, IndexError) as error:
            raise UserError(problem) from error
        if not reader.ok():  # without a footer it has no records, and says no more
            raise UserError(problem)


def _read_parquet(file: File, config: DataConfig) -> Iterator[Document]:
    """Only the columns that are needed are read, a group of rows at a time."""
    parquet = import_extra("pyarrow.parquet", "parquet", f"{corpus_text(config)}: {file.path}")
    with on_disk(file.path) as path, _arrow_errors("Parquet file", file, config):
        open_regular(path, f"{corpus_text(config)}: {path}").close()
        with parquet.ParquetFile(path) as opened:
            columns = _columns(opened.schema_arrow.names, file, config)
            yield from _rows(opened.iter_batches(RECORDS_CHUNK, columns=columns), file, config)


def _read_arrow(file: File, config: DataConfig) -> Iterator[Document]:
    arrow = import_extra("pyarrow.ipc", "parquet", f"{corpus_text(config)}: {file.path}")
    with (
        on_disk(file.path) as path,
        _arrow_errors("Arrow stream", file, config),
        open_regular(path, f"{corpus_text(config)}: {path}") as opened,
        arrow.open_stream(opened) as batches,
    ):
        _columns(batches.schema.names, file, config)
        yield from _rows(batches, file, config)


@contextlib.contextmanager
def _arrow_errors(form: str, file: File, config: DataConfig) -> Iterator[None]:
    lib = import_extra("pyarrow", "parquet", "")
    try:
        yield
    except (lib.ArrowException, UnicodeDecodeError, MemoryError) as error:  # of a length that no file has
        problem = f"{corpus_text(config)} holds no {form} or a damaged one: {file.path}: {short(error)}"
        raise UserError(f"{problem}; mend it, or leave it out by a glob") from error


def _columns(names: list[str], file: File, config: DataConfig) -> list[str]:
    """Those that hold what is read."""
    for setting, field in _fields(config).items():
        rule = "is the name of several columns" if field in names else f"is not in {file.path}, which has the columns"
        require(names.count(field) == 1, setting, field, f"{rule} {short(names)}")
    return [*_fields(config).values()]


def _rows(batches: Iterable[Any], file: File, config: DataConfig) -> Iterator[Document]:
    """One document a row of pyarrow's batches, named by its index."""
    number, fields = 0, _fields(config).values()
    for batch in batches:
        _check_growth(batch.nbytes, MAX_GROWTH * file.size, file, config)
        for field in fields:
            batch.column(field).validate(full=True)  # places out of its bounds, which a damaged file may hold
        for first in range(0, batch.num_rows, RECORDS_CHUNK):
            columns = {field: batch.column(field).slice(first, RECORDS_CHUNK).to_pylist() for field in fields}
            for values in zip(*columns.values(), strict=True):
                named = dict(zip(columns, values, strict=True))
                yield _document(named, f"{file.name}#{number}", f"row {number} of {file.name}", config)
                number += 1


def _utf8(data: bytes, where: str, config: DataConfig) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{corpus_text(config)} holds a text that is not UTF-8: {where}, byte {error.start}") from error
    return data


READERS = {
    "jsonl": _read_jsonl,
    "array_record": _read_array_record,
    "parquet": _read_parquet,
    "datasets": _read_arrow,
}
