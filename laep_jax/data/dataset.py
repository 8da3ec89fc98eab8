"""Batches by number: a pure function of corpus, seed and step, whatever the number of processes.

Grain's random access orders the rows: each epoch a new permutation of all of them, one epoch after the
other, so the position in the data is the step and nothing else. Letters: B this process's rows of the
batch, S sequence.
"""

import hashlib
import math
import platform
from collections.abc import Sequence

import grain
import numpy as np

from laep_jax.config import DataConfig
from laep_jax.data.cache import Tokens, open_tokens
from laep_jax.data.corpus import Corpus, survey
from laep_jax.data.packing import cut_rows, document_indices, num_rows, pack
from laep_jax.data.tokenizer import Tokenizer, load_tokenizer
from laep_jax.errors import require

HELDOUT_SEED = 0  # every run measures the same rows, drawn from all documents, in the same order


class Dataset:
    """One process's view of a corpus.

    fingerprint: SHA-256 that changes with any token or with the tokenizer. description: one line.
    num_heldout_batches: batches that cover every held-out token once. domains: what the held-out documents belong to,
    sorted.
    """

    def __init__(
        self,
        config: DataConfig,
        tokens: Tokens,
        tokenizer: Tokenizer,
        heldout_domains: Sequence[str],
        *,
        seed: int,
        process_index: int,
        process_count: int,
        description: str,
    ):
        self.tokens, self.eod, self.sequence_length = tokens, tokenizer.eod, config.sequence_length
        self.process_index, self.process_count = process_index, process_count
        self.local_rows = config.batch_size // process_count
        identity = f"{tokens.sha256} {len(tokens.train)} {tokenizer.identity}"
        self.fingerprint, self.description = hashlib.sha256(identity.encode()).hexdigest(), description
        train_rows = range(num_rows(tokens.train, self.sequence_length))
        heldout_rows = range(num_rows(tokens.heldout, self.sequence_length))
        self.num_heldout_batches = math.ceil(len(heldout_rows) / config.batch_size)
        self.domains = tuple(sorted(set(heldout_domains)))
        number = {name: index for index, name in enumerate(self.domains)}
        self.document_domains = np.array([number[name] for name in heldout_domains], np.int32)
        self.document_ends = np.flatnonzero(tokens.heldout == self.eod)
        rule = f"writes the end of a document, token {self.eod}, also inside one that is held out"
        require(len(self.document_ends) == len(heldout_domains), "DataConfig.tokenizer", config.tokenizer, rule)
        self.train_order = grain.MapDataset.source(train_rows).seed(seed).shuffle().repeat().batch(self.local_rows)
        self.heldout_order = grain.MapDataset.source(heldout_rows).seed(HELDOUT_SEED).shuffle()

    def train_batch(self, step: int) -> dict[str, np.ndarray]:
        """tokens_BS, targets_BS, segments_BS, positions_BS (see `packing.pack`) of a step, from 0 on."""
        rows_B = np.asarray(self.train_order[step * self.process_count + self.process_index])
        return pack(cut_rows(self.tokens.train, rows_B, self.sequence_length), self.eod)

    def batch_rows(self, step: int) -> np.ndarray:
        """Numbers, in the training stream, of the rows that all processes together take in a step, in their order."""
        first = step * self.process_count
        return np.concatenate([np.asarray(self.train_order[first + index]) for index in range(self.process_count)])

    def heldout_batch(self, index: int) -> dict[str, np.ndarray]:
        """The same of a held-out batch, and domains_BS, for each target the index of its domain.

        Rows past the last one are padding.
        """
        assert 0 <= index < self.num_heldout_batches
        first = (index * self.process_count + self.process_index) * self.local_rows
        last = len(self.heldout_order)
        rows = [self.heldout_order[i] if i < last else last for i in range(first, first + self.local_rows)]
        batch = pack(cut_rows(self.tokens.heldout, np.array(rows), self.sequence_length), self.eod)
        documents_BS = document_indices(self.document_ends, np.array(rows), self.sequence_length)
        return batch | {"domains_BS": self.document_domains[documents_BS]}


def make_dataset(config: DataConfig, *, seed: int, vocab_size: int, process_index: int, process_count: int) -> Dataset:
    """Reads and checks the corpus, tokenizes it where the cache does not hold it yet.

    `UserError` where the corpus, the tokenizer, the cache or the sizes are not usable.
    """
    rule = f"is not divisible by {process_count} processes"
    require(config.batch_size % process_count == 0, "DataConfig.batch_size", config.batch_size, rule)
    tokenizer = load_tokenizer(config.tokenizer)
    rule = f"is below the tokenizer's {tokenizer.vocab_size}"
    require(vocab_size >= tokenizer.vocab_size, "ModelConfig.vocab_size", vocab_size, rule)
    corpus = survey(config)
    tokens = open_tokens(config, corpus, tokenizer)
    return Dataset(
        config,
        tokens,
        tokenizer,
        corpus.heldout_domains,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        description=_describe(config, corpus, tokens, tokenizer),
    )


def _describe(config: DataConfig, corpus: Corpus, tokens: Tokens, tokenizer: Tokenizer) -> str:
    stdlib = f"Python {platform.python_version()} standard library"
    name = {"stdlib": stdlib, "synthetic": "synthetic text"}.get(config.source, config.path)
    return (
        f"{name}: {corpus.num_train} + {corpus.num_heldout} held-out documents, {corpus.num_bytes / 1e6:.1f} MB, "
        f"{len(tokens.train) / 1e6:.2f} + {len(tokens.heldout) / 1e6:.2f} M tokens ({config.tokenizer}), "
        f"sha256 {corpus.sha256[:12]}"
    )
