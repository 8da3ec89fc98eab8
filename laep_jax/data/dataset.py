"""Batches by number: a pure function of corpus, seed and step, whatever the number of processes.

Grain's random access orders the rows: each epoch a new permutation of all of them, one epoch after the
other, so the position in the data is the step and nothing else. Axes: B this process's rows of the
batch, S sequence, R runs of validation documents of one domain.
"""

import collections
import hashlib
import math
import platform

import grain
import numpy as np

from laep_jax.config import DataConfig
from laep_jax.data.cache import Tokens, open_tokens
from laep_jax.data.corpus import OTHER, some_names
from laep_jax.data.listing import list_files
from laep_jax.data.packing import document_indices, num_rows, pack, split_rows, to_document_end
from laep_jax.data.tokenizer import Tokenizer, load_tokenizer
from laep_jax.errors import printable, require

VALIDATION_SEED = 0  # every run measures the same rows, drawn from all documents, in the same order
MIN_TARGETS = 100  # of a domain: losses of tokens differ by about 2 nats, the mean of fewer is off by 0.2 and more


class Dataset:
    """One process's view of a corpus.

    fingerprint: SHA-256 that changes with any token or with the tokenizer. description: one line.
    num_validation_batches: at most `eval_batches`, and no more than cover every validation token once. domains: what
    the targets in those batches belong to, sorted, small ones pooled. notes: lines on what is pooled or missing.
    """

    def __init__(
        self,
        config: DataConfig,
        tokens: Tokens,
        tokenizer: Tokenizer,
        *,
        eval_batches: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self.tokens, self.eod, self.sequence_length = tokens, tokenizer.eod, config.sequence_length
        self._decode = tokenizer.decode
        self.process_index, self.process_count = process_index, process_count
        self.local_rows = config.batch_size // process_count
        identity = f"{tokens.sha256} {len(tokens.train)} {tokenizer.identity}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.description = _describe(config, tokens)
        train_rows = range(num_rows(tokens.train, self.sequence_length))
        validation_rows = range(num_rows(tokens.validation, self.sequence_length))
        self.train_order = grain.MapDataset.source(train_rows).seed(seed).shuffle().repeat().batch(self.local_rows)
        self.validation_order = grain.MapDataset.source(validation_rows).seed(VALIDATION_SEED).shuffle()
        self.num_validation_batches = min(eval_batches, math.ceil(len(validation_rows) / config.batch_size))
        targets_R = self._count_targets()
        rule = f"leaves nothing to predict in the validation text of {self.num_validation_batches} batches"
        require(bool(targets_R.any()), "DataConfig.validation_fraction", config.validation_fraction, rule)
        rule = "makes no training document longer than one token, so that there is nothing to predict"
        require(len(tokens.train) > tokens.corpus.num_train, "DataConfig.tokenizer", config.tokenizer, rule)
        self.domains, self.run_domains, self.notes = _pool(tokens, targets_R)

    def _count_targets(self) -> np.ndarray:
        """Targets of each run of validation documents in the batches of all processes, int64 [R]."""
        batch_size, last = self.local_rows * self.process_count, len(self.validation_order)
        measured = min(self.num_validation_batches * batch_size, last)
        rows = np.arange(last) if measured == last else np.array([self.validation_order[i] for i in range(measured)])
        targets_R = np.zeros(len(self.tokens.run_ends), np.int64)
        for first in range(0, measured, batch_size):
            batch, runs_BS = self._validation(rows[first : first + batch_size])
            targets_R += np.bincount(runs_BS[batch["targets_BS"] >= 0], minlength=len(targets_R))
        return targets_R

    def _validation(self, rows_B: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(these rows of validation text, for each target the index of its run of documents, [B, S])."""
        batch = pack(split_rows(self.tokens.validation, rows_B, self.sequence_length), self.eod)
        return batch, document_indices(self.tokens.run_ends, rows_B, self.sequence_length)

    def prompt(self, num_tokens: int) -> np.ndarray:
        """The beginning, of at most so many tokens, of the first validation document that has any; int32."""
        stream = self.tokens.validation
        start = next(place for place, token in enumerate(stream) if token != self.eod)
        return to_document_end(stream[start : start + num_tokens].astype(np.int32), self.eod)

    def text(self, tokens: np.ndarray) -> str:
        """What the tokens say, up to the end of their document."""
        return self._decode(to_document_end(tokens, self.eod).tolist())

    def train_batch(self, step: int) -> dict[str, np.ndarray]:
        """tokens_BS, targets_BS, segments_BS, positions_BS (see `packing.pack`) of a step, from 0 on."""
        rows_B = np.asarray(self.train_order[step * self.process_count + self.process_index])
        return pack(split_rows(self.tokens.train, rows_B, self.sequence_length), self.eod)

    def batch_rows(self, step: int) -> np.ndarray:
        """Numbers, in the training stream, of the rows that all processes together take in a step, in their order."""
        first = step * self.process_count
        return np.concatenate([np.asarray(self.train_order[first + index]) for index in range(self.process_count)])

    def validation_batch(self, index: int) -> dict[str, np.ndarray]:
        """The same of a validation batch, and domains_BS, for each target the index of its domain.

        Rows past the last one are padding.
        """
        assert 0 <= index < self.num_validation_batches
        first, last = (index * self.process_count + self.process_index) * self.local_rows, len(self.validation_order)
        rows = [self.validation_order[i] if i < last else last for i in range(first, first + self.local_rows)]
        batch, runs_BS = self._validation(np.array(rows))
        return batch | {"domains_BS": self.run_domains[runs_BS]}


def make_dataset(
    config: DataConfig, *, eval_batches: int, seed: int, vocab_size: int, process_index: int, process_count: int
) -> Dataset:
    """Opens the corpus; reads and tokenizes it where the cache does not hold it yet.

    eval_batches: of validation text, the most that are asked for. `UserError` where the corpus, the tokenizer, the
    cache or the sizes are not usable.
    """
    rule = f"is not divisible by {process_count} processes"
    require(config.batch_size % process_count == 0, "DataConfig.batch_size", config.batch_size, rule)
    tokenizer = load_tokenizer(config.tokenizer)
    rule = f"is below the tokenizer's {tokenizer.vocab_size}"
    require(vocab_size >= tokenizer.vocab_size, "ModelConfig.vocab_size", vocab_size, rule)
    listing = list_files(config)
    tokens = open_tokens(config, listing, tokenizer)
    dataset = Dataset(
        config,
        tokens,
        tokenizer,
        eval_batches=eval_batches,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )
    if listing.aliases:
        dataset.notes.append(f"read once, under another name: {some_names(listing.aliases)}")
    return dataset


def _pool(tokens: Tokens, targets_R: np.ndarray) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """(domains with targets, sorted; the index of each run's domain, int32 [R]; notes)."""
    names, targets, notes = [name for name, _ in tokens.corpus.validation_runs], collections.Counter[str](), []
    for name, number in zip(names, targets_R.tolist(), strict=True):
        targets[name] += number
    small = sorted(name for name, number in targets.items() if 0 < number < MIN_TARGETS)
    unheld = sorted({name for name, number in targets.items() if not number}.union(tokens.corpus.unheld_domains))
    if unheld:
        notes.append(f"no validation text is measured for the domains {some_names(unheld)}")
    if len(small) > 1:
        notes.append(
            f"{OTHER} pools, for fewer than {MIN_TARGETS} validation targets each, the domains {some_names(small)}"
        )
    pooled = {name: OTHER for name in small} if len(small) > 1 else {}
    domains = tuple(sorted({pooled.get(name, name) for name, number in targets.items() if number}))
    index = {name: index for index, name in enumerate(domains)}
    # A run without targets in the measured batches has no domain; any index will do.
    return domains, np.array([index.get(pooled.get(name, name), 0) for name in names], np.int32), notes


def _describe(config: DataConfig, tokens: Tokens) -> str:
    stdlib, corpus = f"Python {platform.python_version()} standard library", tokens.corpus
    name = {"stdlib": stdlib, "synthetic": "synthetic text"}.get(config.source, config.path)
    return printable(
        f"{name}: {corpus.num_train} + {corpus.num_validation} validation documents, {corpus.num_bytes / 1e6:.1f} MB, "
        f"{len(tokens.train) / 1e6:.2f} + {len(tokens.validation) / 1e6:.2f} M tokens ({config.tokenizer}), "
        f"sha256 {corpus.sha256[:12]}"
    )
