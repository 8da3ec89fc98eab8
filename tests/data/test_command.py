"""`train-tokenizer`: a byte-level BPE of the training documents that reads any text and gives it back."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from laep_jax.data.command import main
from laep_jax.data.dataset import make_dataset
from laep_jax.data.tokenizer import load_tokenizer
from laep_jax.errors import UserError


def arguments(folder, out, *more):
    return ["--source", "text", "--path", str(folder), "--validation-fraction", "0.25", "--out", str(out), *more]


def dataset(config):
    return make_dataset(config, eval_batches=9, seed=0, vocab_size=321, process_index=0, process_count=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("bpe")
    for i in range(20):
        (root / f"{i}.txt").write_text("the expert and the router, " * (i + 1))
    out = root.parent / "tok.json"
    assert main(arguments(root, out, "--vocab-size", "300")) == 0
    return out


@given(texts=st.lists(st.text(), min_size=1, max_size=20))
@settings(max_examples=30)
def test_any_text_comes_back(trained, texts):
    tokenizer, file = load_tokenizer(str(trained)), tokenizers.Tokenizer.from_file(str(trained))
    encoded = [tokens.tolist() for tokens in tokenizer.encode([text.encode() for text in texts])]
    assert [file.decode(tokens, skip_special_tokens=False) for tokens in encoded] == texts
    assert all(tokenizer.eod < token < tokenizer.vocab_size for tokens in encoded for token in tokens)


def test_vocabulary(trained):
    tokenizer = load_tokenizer(str(trained))
    assert tokenizer.eod == 0  # its own <|endoftext|>
    assert 257 < tokenizer.vocab_size <= 300
    (tokens,) = tokenizer.encode([b"the expert and the router"])
    assert len(tokens) <= 6


def test_trains_the_dataset_it_came_from(folder, config, tmp_path, capsys):
    out = tmp_path / "tok.json"
    main(arguments(folder, out, "--vocab-size", "320"))
    said, following = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{out}: 320 tokens from ")
    assert following == f"--gin.DataConfig.tokenizer={out} --gin.ModelConfig.vocab_size=320"
    data = dataset(config(tokenizer=str(out)))
    assert f"tokens ({out})" in data.description
    tokenizer = tokenizers.Tokenizer.from_file(str(out))
    assert tokenizer.decode(data.sources[0].tokens.validation.tolist()).startswith("document ")
    tokenizer.add_tokens(["never seen"])
    tokenizer.save(str(out))
    again = dataset(config(tokenizer=str(out)))
    assert again.sources[0].tokens.sha256 == data.sources[0].tokens.sha256
    assert again.fingerprint != data.fingerprint


def test_same_corpus_same_file_and_validation_documents_have_no_say(folder, tmp_path, texts):
    outs = [tmp_path / f"{i}.json" for i in range(3)]
    main(arguments(folder, outs[0], "--vocab-size", "400"))
    main(arguments(folder, outs[1], "--vocab-size", "400"))
    for path in folder.rglob("*.txt"):
        if path.read_bytes() in texts[1]:
            path.write_text("quite another text " * 50)
    main(arguments(folder, outs[2], "--vocab-size", "400"))
    assert outs[0].read_text() == outs[1].read_text() == outs[2].read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vocab-size", "256"], "--vocab-size=256 must be at least 257"),
        (["--source", "web"], "DataConfig.source='web' must be one of"),
        (["--path", "nowhere"], "DataConfig.path='nowhere' is neither a file"),
        (["--out", "no/such/folder/tok.json"], "--out='no/such/folder/tok.json' cannot be written: No such file"),
    ],
)
def test_refusals(folder, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        main(arguments(folder, tmp_path / "tok.json", *more))
    assert message in str(error.value)
