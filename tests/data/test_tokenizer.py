"""Bytes, and what is taken from a Hugging Face tokenizer.json."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.config import ModelConfig
from laep_jax.data.tokenizer import load_tokenizer
from laep_jax.errors import UserError


def write_words(path, words, special=(), added=()):
    """A tokenizer.json with one id a word, in their order, and then the special and other added tokens."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    tokenizer.save(str(path))
    return str(path)


@given(st.lists(st.text()))
def test_bytes_are_the_text(texts):
    tokenizer = load_tokenizer("bytes")
    encoded = tokenizer.encode([text.encode() for text in texts])
    assert [bytes(tokens.tolist()).decode() for tokens in encoded] == texts
    assert tokenizer.eod == 256
    assert tokenizer.vocab_size == 257 <= ModelConfig().vocab_size


@pytest.mark.parametrize(
    ("special", "added", "eod", "vocab_size"),
    [
        ([], [], 3, 4),  # none: one id more
        (["<pad>", "</s>"], [], 4, 5),
        (["</s>", "<|endoftext|>"], [], 4, 5),
        ([], ["</s>"], 4, 5),  # an ordinary token of that name ends nothing
        (["<pad>"], [], 4, 5),
    ],
)
def test_end_of_document(tmp_path, special, added, eod, vocab_size):
    tokenizer = load_tokenizer(write_words(tmp_path / "tok.json", ["unk", "a", "b"], special, added))
    assert (tokenizer.eod, tokenizer.vocab_size) == (eod, vocab_size)


def test_texts_are_whole_and_cannot_end_their_document(tmp_path):
    path = write_words(tmp_path / "tok.json", ["unk", "a", "b"], ["<|endoftext|>"])
    tokenizer = load_tokenizer(path)
    encoded = [tokens.tolist() for tokens in tokenizer.encode([b"a b a b", b"b", b"", b"a <|endoftext|> b"])]
    assert encoded[:3] == [[1, 2, 1, 2], [2], []]
    assert encoded[3][0] == 1
    assert encoded[3][-1] == 2
    assert tokenizer.eod not in encoded[3]


def test_identity_is_that_of_the_file(tmp_path):
    paths = [write_words(tmp_path / f"{i}.json", ["unk", *words]) for i, words in enumerate(["ab", "ab", "ba"])]
    same, again, other = (load_tokenizer(path).identity for path in paths)
    assert same == again != other != load_tokenizer("bytes").identity


def test_ids_are_kept_in_two_bytes_where_they_fit(tmp_path):
    assert load_tokenizer("bytes").dtype == np.uint16
    for number, dtype in ((2**16 - 1, np.uint16), (2**16, np.uint32)):  # and one for the end of a document
        path = write_words(tmp_path / "tok.json", ["unk", *map(str, range(number - 1))])
        assert load_tokenizer(path).dtype == dtype


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "\x00"])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tok.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"DataConfig.tokenizer='.*tok.json' is no Hugging Face tokenizer.json: .+"):
        load_tokenizer(str(path))


def test_a_missing_file_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"DataConfig.tokenizer='byte' is neither \"bytes\" nor a file"):
        load_tokenizer("byte")
    path = write_words(tmp_path / "tok.json", ["unk"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'laep_jax\[tok\]', or tokenizers$"):
        load_tokenizer(path)
    assert load_tokenizer("bytes").vocab_size == 257


def test_any_json_is_a_tokenizer_or_refused(fuzz, tmp_path):
    path = Path(write_words(tmp_path / "tok.json", ["unk", "a", "b"], ["</s>"]))
    valid = json.loads(path.read_text())

    def read():
        tokenizer = load_tokenizer(str(path))
        return tokenizer, tokenizer.encode([b"a b c", b"", "\0é".encode()])

    def check(data):
        text = json.dumps(fuzz.json(data.draw, valid)).encode()
        path.write_bytes(data.draw(fuzz.bytes(text)) if data.draw(st.booleans()) else text)
        if found := fuzz.reads(read):
            tokenizer, encoded = found
            assert all((tokens < tokenizer.vocab_size).all() for tokens in encoded)
            assert tokenizer.eod < tokenizer.vocab_size

    fuzz(check)


def edited(path, **model):
    fields = json.loads(path.read_text())
    fields["model"] |= model
    path.write_text(json.dumps(fields))


def test_what_tokenizers_raises_or_panics_of_is_told(tmp_path):
    path = Path(write_words(tmp_path / "tok.json", ["unk", "a", "b"]))
    edited(path, unk_token="gone")
    with pytest.raises(UserError, match="does not encode the corpus: WordLevel error: Missing"):
        load_tokenizer(str(path)).encode([b"never seen"])
    splitting = tokenizers.Tokenizer(tokenizers.models.WordLevel({"unk": 0}, unk_token="unk"))
    splitting.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a|aa)+$"), "isolated")
    splitting.save(str(path))
    with pytest.raises(UserError, match=r"does not encode the corpus: .*retry-limit"):  # a panic, no Exception
        load_tokenizer(str(path)).encode([b"a" * 40 + b"b"])


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path):
    path = tmp_path / "tok.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)).save(str(path))
    with pytest.raises(UserError, match=r"dropout of .*=0.5 gives other tokens each time"):
        load_tokenizer(str(path))


def test_a_tokenizer_has_a_largest_size(tmp_path):
    with (tmp_path / "tok.json").open("wb") as file:
        file.truncate(2**27 + 1)
    with pytest.raises(UserError, match=f"size of DataConfig.tokenizer=.*={2**27 + 1} is above"):
        load_tokenizer(str(tmp_path / "tok.json"))
