"""Bytes, and what is taken from a Hugging Face tokenizer.json."""

import sys

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
    with pytest.raises(UserError, match=r'pip install "laep_jax\[tok\]"'):
        load_tokenizer(path)
    assert load_tokenizer("bytes").vocab_size == 257
