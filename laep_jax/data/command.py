"""`python -m laep_jax train-tokenizer`: a byte-level BPE vocabulary from the training documents of a corpus.

python -m laep_jax train-tokenizer --vocab-size 4096 --out tok.json

It prints the settings that train with it. Needs the package `tokenizers`.
"""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

from laep_jax.commands import program
from laep_jax.config import DataConfig
from laep_jax.data.corpus import is_validation, survey
from laep_jax.data.optional import import_extra
from laep_jax.data.sources import read_documents
from laep_jax.data.tokenizer import END_OF_TEXT
from laep_jax.errors import UserError, require

MIN_VOCAB_SIZE = 257  # every byte and the end of a document


def main(argv: list[str]) -> int:
    """Trains a tokenizer and writes it as `tokenizer.json`. `UserError` on a bad corpus or setting."""
    args = _parser().parse_args(argv)
    require(args.vocab_size >= MIN_VOCAB_SIZE, "--vocab-size", args.vocab_size, f"must be at least {MIN_VOCAB_SIZE}")
    config = DataConfig(args.source, args.path, args.text_field, validation_fraction=args.validation_fraction)
    corpus = survey(config)
    tokenizer = train_tokenizer(config, args.vocab_size)
    try:
        args.out.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={str(args.out)!r} cannot be written: {error.strerror}") from error
    size = tokenizer.get_vocab_size()
    print(f"{args.out}: {size} tokens from {corpus.num_train} training documents; to train with it:")
    print(f"--gin.DataConfig.tokenizer={shlex.quote(str(args.out))} --gin.ModelConfig.vocab_size={size}")
    return 0


def train_tokenizer(config: DataConfig, vocab_size: int):
    """A `tokenizers.Tokenizer` of at most `vocab_size` tokens, fewer where the corpus has no more pairs to merge."""
    tokenizers = import_extra("tokenizers", "tok", "a tokenizer.json")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(config), trainer)
    return tokenizer


def _training_texts(config: DataConfig) -> Iterator[str]:
    for document in read_documents(config):
        if not is_validation(document.name, config.validation_fraction):
            yield document.text.decode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("train-tokenizer"),
        description="Trains a byte-level BPE tokenizer on the training documents of a corpus.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="where to write tokenizer.json")
    add("--vocab-size", type=int, default=4096, metavar="N", help="largest number of tokens (%(default)s)")
    add("--source", default=DataConfig.source, help="as DataConfig.source (%(default)s)")
    add("--path", default=DataConfig.path, help="as DataConfig.path (%(default)s)")
    add(
        "--text-field",
        default=DataConfig.text_field,
        metavar="NAME",
        help="the field or column that holds the text (%(default)s)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=DataConfig.validation_fraction,
        metavar="X",
        help="fraction of the documents that is left out (%(default)s)",
    )
    return parser
