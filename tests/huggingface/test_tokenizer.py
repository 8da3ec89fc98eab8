"""The tokenizer of an exported model in Transformers."""

import pytest
import tokenizers
import transformers

from laep_jax.export.tokenizer import _bytes_tokenizer
from tests.huggingface.test_export import Run, export, load


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("uniform"), "uniform")


def test_the_tokenizer_of_bytes(run, tmp_path):
    out = export(run, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "".join(map(chr, range(1, 300))) + " wörld 漢字 <|endoftext|"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [256]
    assert tokenizer.eos_token_id == load(out).generation_config.eos_token_id == 256


def test_a_tokenizer_adds_and_cuts_nothing_that_training_did_not(run, tmp_path):
    """As those of published models do: a token at the beginning and at the end, a length."""
    own = tmp_path / "own.json"
    tokenizer = tokenizers.Tokenizer.from_str(_bytes_tokenizer().decode())
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 257), ("<|endoftext|>", 256)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(own))
    assert tokenizer.encode("abcdefgh").ids == [257, 97, 98, 99, 256, 0, 0, 0, 0]
    out = export(run, tmp_path / "out", f"--tokenizer={own}")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("abcdefgh")["input_ids"] == list(b"abcdefgh")
    assert loaded.eos_token == "<|endoftext|>"
