"""Files of a corpus: each once, whatever leads to it, in one order; what is passed over or stands twice is named."""

import os

import pytest
from hypothesis import strategies as st

from laep_jax.config import DataConfig
from laep_jax.data.listing import list_files
from laep_jax.data.sources import read_documents
from laep_jax.errors import UserError


def documents(source, path):
    return [document[:2] for document in read_documents(DataConfig(source, str(path)))]


def names(path):
    """Names of the files, and of those that are passed over."""
    listing = list_files(DataConfig("text", str(path)))
    return [file.name for file in listing.files], list(listing.aliases)


def write(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_text_from_a_file_a_folder_and_a_glob(tmp_path):
    files = {"b.txt": "b\r\n", "a/z.txt": "z", "a/deep/y.md": "ü", "a-b.txt": "c", "empty.txt": "", ".hidden": "no"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    expected = [("a-b.txt", b"c"), ("a/deep/y.md", "ü".encode()), ("a/z.txt", b"z"), ("b.txt", b"b\r\n")]
    assert documents("text", tmp_path) == expected
    assert documents("text", tmp_path / "b.txt") == expected[3:]
    assert documents("text", f"{tmp_path}/**/*.txt") == [expected[0], *expected[2:]]
    assert documents("text", tmp_path / "a" / "*" / "y.md") == [("deep/y.md", "ü".encode())]


def test_a_link_to_nowhere_is_refused_not_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"DataConfig.path='.*': .*b\.txt cannot be read: No such file"):
        documents("text", tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused_not_passed_over(folder, monkeypatch):
    def scandir(path, scandir=os.scandir):
        if str(path).endswith("odd"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"DataConfig.path='.*' cannot be read: .*odd: Permission denied"):
        documents("text", folder)


def test_devices_and_fifos_are_refused_without_waiting(tmp_path):
    for name, make in (("fifo", os.mkfifo), ("zero", lambda path: path.symlink_to("/dev/zero"))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "x.jsonl")
        for source in ("text", "jsonl", "array_record"):
            for path in (tmp_path / name, f"{tmp_path}/{name}/*.jsonl"):
                with pytest.raises(UserError, match=r"x.jsonl is not a regular file"):
                    documents(source, path)


def test_links_to_folders_are_followed(tmp_path):
    write(tmp_path, "there/a/x.txt", "there/b/y.txt", "here/c/z.txt")
    for name in ("a", "b"):
        (tmp_path / "here" / f"link-{name}").symlink_to(tmp_path / "there" / name)
    found = ["c/z.txt", "link-a/x.txt", "link-b/y.txt"]
    here = tmp_path / "here"
    assert names(here) == names(f"{here}/**/*.txt") == names(f"{here}/*/*.txt") == names(f"{here}/**") == (found, [])
    assert names(f"{here}/link-*/**/*.txt") == (found[1:], [])


def test_loops_of_links_end_and_are_named(tmp_path):
    write(tmp_path, "a/x.txt")
    loops = [f"a/loop{i}" for i in range(3)]  # ways into the folder again: 3**40 paths to whoever follows them
    for name in loops:
        (tmp_path / name).symlink_to(tmp_path / "a")
    assert names(tmp_path) == names(f"{tmp_path}/**/*.txt") == (["a/x.txt"], loops)


def test_a_file_that_two_names_lead_to_is_read_once(tmp_path):
    write(tmp_path, "a/x.txt", "v2/y.txt", "z.txt")
    (tmp_path / "a" / "an alias.txt").symlink_to(tmp_path / "a" / "x.txt")
    (tmp_path / "latest").symlink_to("v2")
    os.link(tmp_path / "z.txt", tmp_path / "zz.txt")
    assert names(tmp_path) == (["a/x.txt", "v2/y.txt", "z.txt"], ["a/an alias.txt", "latest", "zz.txt"])


def test_json_lines_are_not_read_as_text(tmp_path):
    write(tmp_path, "b/x.jsonl", "y.jsonl.gz")
    with pytest.raises(UserError, match=r"holds JSON lines only, which source='jsonl' reads, not 'text'$"):
        names(tmp_path)
    write(tmp_path, "z.txt")
    assert names(tmp_path)[0] == ["b/x.jsonl", "y.jsonl", "z.txt"]


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_file_beside_its_compressed_form_is_refused(tmp_path, source):
    write(tmp_path, "a.txt", "b/x.jsonl", "b/x.jsonl.gz")
    with pytest.raises(UserError, match=r"holds b/x.jsonl twice: .*b/x.jsonl and .*b/x.jsonl.gz; remove one"):
        documents(source, tmp_path)


def test_globs_find_hidden_files_only_when_asked(tmp_path):
    for name in ("a.txt", ".b.txt", ".c/d.txt", "e/.f/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [name for name, _ in documents("text", f"{tmp_path}/**/*.txt")] == ["a.txt"]
    assert [name for name, _ in documents("text", f"{tmp_path}/.*.txt")] == [".b.txt"]


def test_any_path_is_read_or_refused(fuzz, tmp_path):
    (tmp_path / "a").write_text("a")
    parts = st.sampled_from(["*", "**", "**a", "[", "[a]", "..", "a", "\0", "?", "{", "\ud800", "x" * 300])

    def check(data):
        path = "/".join([str(tmp_path), *data.draw(st.lists(parts, min_size=1, max_size=3))])
        fuzz.reads(lambda: documents("text", path))

    fuzz(check)
