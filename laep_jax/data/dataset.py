"""Batches by number: a pure function of corpus, seed and step, whatever the number of processes.

Rows are ordered at random access (`mixing`), so the position in the data is the step and nothing else. Axes: B this
process's rows of the batch, S sequence, R runs of validation documents of one domain, N sources.
"""

import collections
import dataclasses
import hashlib
import math
import platform
from collections.abc import Iterator, Sequence

import numpy as np

from laep_jax.config import DataConfig
from laep_jax.data.cache import Tokens, open_tokens
from laep_jax.data.corpus import some_names
from laep_jax.data.domains import OTHER, domain_name
from laep_jax.data.listing import corpus_field, list_files, of_mixture
from laep_jax.data.mixing import Rows, shares, train_order, validation_order
from laep_jax.data.packing import pack, to_document_end
from laep_jax.data.saved import skipped_splits
from laep_jax.data.tokenizer import Tokenizer, load_tokenizer
from laep_jax.errors import printable, require

VALIDATION_SEED = 0  # every run measures the same rows, drawn from all documents, in the same order
MIN_TARGETS = 100  # of a domain: losses of tokens differ by about 2 nats, the mean of fewer is off by 0.2 and more


@dataclasses.dataclass(frozen=True)
class Source:
    """One corpus. name: "" where it is the only one. share: its rows, in proportion to those of the others."""

    name: str
    share: int
    config: DataConfig
    tokens: Tokens
    notes: list[str]

    @property
    def label(self) -> str:
        """In records, where something is listed by source."""
        return self.name or self.config.source

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """(domain, targets, bytes of text) of each run of validation documents."""
        lengths_R = np.diff(self.tokens.run_ends, prepend=-1).tolist()
        for length, (name, number, size) in zip(lengths_R, self.tokens.corpus.validation_runs, strict=True):
            yield domain_name(self.name) if self.name else name, length - number, size

    def unheld_domains(self) -> Sequence[str]:
        """Domains that have no validation text, or may have none."""
        return [domain_name(self.name)] if self.name else self.tokens.corpus.unheld_domains


class Dataset:
    """One process's view of a corpus, or of a mixture of several.

    fingerprint: SHA-256 that changes with any token, the tokenizer, and the names and shares of a mixture; a slash;
    the tokenizer's identity. description: one line. num_validation_batches: at most `eval_batches`, and no more than
    cover every validation token once. domains: what the targets in those batches belong to, sorted, small ones pooled.
    bytes_per_target: bytes of text behind these targets, over their number (see `_pool`). notes: lines on what is
    mixed, pooled or missing.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        *,
        eval_batches: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self.sources, self.eod, self.batch_size = sources, tokenizer.eod, config.batch_size
        self._decode = tokenizer.decode
        self.process_index, self.process_count = process_index, process_count
        self.local_rows = config.batch_size // process_count
        self.fingerprint = _fingerprint(sources, tokenizer)
        self.description = _describe(config, sources)
        shares_N = [source.share for source in sources]
        self.train_rows = Rows([source.tokens.train for source in sources], config.sequence_length)
        self.validation_rows = Rows([source.tokens.validation for source in sources], config.sequence_length)
        self.train_order = train_order(self.train_rows.numbers(), shares_N, seed).batch(self.local_rows)
        batches = math.ceil(sum(self.validation_rows.counts_N) / config.batch_size)
        self.num_validation_batches = min(eval_batches, batches)
        measured = self.num_validation_batches * config.batch_size
        self.validation_order = validation_order(self.validation_rows.numbers(), shares_N, VALIDATION_SEED, measured)
        targets_R = self._count_targets()
        rule = f"leaves nothing to predict in the validation text of {self.num_validation_batches} batches"
        require(bool(targets_R.any()), "DataConfig.validation_fraction", config.validation_fraction, rule)
        self.domains, self.run_domains, self.bytes_per_target, notes = _pool(sources, targets_R)
        self.notes = [note for source in sources for note in source.notes] + notes

    def _count_targets(self) -> np.ndarray:
        """Targets of each run of validation documents in the batches of all processes, int64 [R]."""
        targets_R = np.zeros(sum(len(source.tokens.run_ends) for source in self.sources), np.int64)
        for first in range(0, len(self.validation_order), self.batch_size):
            batch, runs_BS = self._validation(self.validation_order[first : first + self.batch_size])
            targets_R += np.bincount(runs_BS[batch["targets_BS"] >= 0], minlength=len(targets_R))
        return targets_R

    def _validation(self, rows_B: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(these rows of validation text, for each target the index of its run of documents, [B, S])."""
        ends = [source.tokens.run_ends for source in self.sources]
        return pack(self.validation_rows.tokens(rows_B), self.eod), self.validation_rows.runs(rows_B, ends)

    def prompt(self, num_tokens: int) -> np.ndarray:
        """The beginning, of at most so many tokens, of the first validation document that has any; int32."""
        streams = (source.tokens.validation for source in self.sources)
        found = ((stream, place) for stream in streams for place, token in enumerate(stream) if token != self.eod)
        stream, start = next(found)
        return to_document_end(stream[start : start + num_tokens].astype(np.int32), self.eod)

    def text(self, tokens: np.ndarray) -> str:
        """What the tokens say, up to the end of their document."""
        return self._decode(to_document_end(tokens, self.eod).tolist())

    def train_batch(self, step: int) -> dict[str, np.ndarray]:
        """tokens_BS, targets_BS, segments_BS, positions_BS (see `packing.pack`) of a step, from 0 on."""
        rows_B = np.asarray(self.train_order[step * self.process_count + self.process_index])
        return pack(self.train_rows.tokens(rows_B), self.eod)

    def batch_rows(self, step: int) -> dict[str, np.ndarray]:
        """By source, the numbers in its training stream of the rows that all processes together take in a step.

        In the order of the batch, of which each source has its fraction.
        """
        first = step * self.process_count
        rows = np.concatenate([np.asarray(self.train_order[first + index]) for index in range(self.process_count)])
        own = self.train_rows.own(rows)
        return {source.label: local for source, (_, local) in zip(self.sources, own, strict=True)}

    def epochs(self, steps: int) -> dict[str, float]:
        """Of each source that so many steps read: its fraction of their rows, over the rows that it has."""
        read, total = steps * self.batch_size, sum(source.share for source in self.sources)
        counts = zip(self.sources, self.train_rows.counts_N, strict=True)
        return {source.label: read * source.share / total / count for source, count in counts}

    def validation_batch(self, index: int) -> dict[str, np.ndarray]:
        """The same of a validation batch, and domains_BS, for each target the index of its domain.

        Rows past the last one are padding.
        """
        assert 0 <= index < self.num_validation_batches
        first = (index * self.process_count + self.process_index) * self.local_rows
        rows_B = np.full(self.local_rows, sum(self.validation_rows.counts_N))  # past the last
        own = self.validation_order[first : first + self.local_rows]
        rows_B[: len(own)] = own
        batch, runs_BS = self._validation(rows_B)
        return batch | {"domains_BS": self.run_domains[runs_BS]}


def make_dataset(
    config: DataConfig, *, eval_batches: int, seed: int, vocab_size: int, process_index: int, process_count: int
) -> Dataset:
    """Opens the corpus, or each of a mixture; reads and tokenizes it where the cache does not hold it yet.

    eval_batches: of validation text, the most that are asked for. `UserError` where a corpus, the tokenizer, the
    cache or the sizes are not usable.
    """
    rule = f"is not divisible by {process_count} processes"
    require(config.batch_size % process_count == 0, "DataConfig.batch_size", config.batch_size, rule)
    tokenizer = load_tokenizer(config.tokenizer)
    rule = f"is below the tokenizer's {tokenizer.vocab_size}"
    require(vocab_size >= tokenizer.vocab_size, "ModelConfig.vocab_size", vocab_size, rule)
    sources = _open_sources(config, tokenizer)
    number = sum(source.tokens.corpus.num_train for source in sources)  # all that there are, where the rest is none
    field, value = corpus_field(config)
    one = ", since a text file is one" if config.source == "text" and not config.mixture else ""
    rule = f"leaves no validation document: {field}={value!r} holds {number}{one}"
    held = any(source.tokens.corpus.num_validation for source in sources)
    require(held, "DataConfig.validation_fraction", config.validation_fraction, rule)
    return Dataset(
        config,
        sources,
        tokenizer,
        eval_batches=eval_batches,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def _open_sources(config: DataConfig, tokenizer: Tokenizer) -> list[Source]:
    shares_N = shares([weight for _, _, weight in config.mixture] if config.mixture else [1.0])
    listings, sources = [], []
    for name, part in config.parts:  # all, before the first is tokenized
        with of_mixture(name):
            listings.append(list_files(part))
    for (name, part), share, listing in zip(config.parts, shares_N, listings, strict=True):
        with of_mixture(name):
            tokens = open_tokens(part, listing, tokenizer)
            rule = "makes no training document longer than one token, so that there is nothing to predict"
            require(len(tokens.train) > tokens.corpus.num_train, "DataConfig.tokenizer", config.tokenizer, rule)
        fraction = f"{share / sum(shares_N):.1%} of the training tokens"
        notes = [f"{printable(name)}, {fraction}: {_contents(part, tokens)}"] if name else []
        if listing.aliases:
            notes.append(f"read once, under another name: {some_names(listing.aliases)}")
        if part.source == "datasets" and (skipped := skipped_splits(listing.files)):
            notes.append(f"not read, as splits beside train: {some_names(skipped)}")
        sources.append(Source(name, share, part, tokens, notes))
    return sources


def _fingerprint(sources: Sequence[Source], tokenizer: Tokenizer) -> str:
    parts = [f"{source.tokens.sha256} {len(source.tokens.train)}" for source in sources]
    if sources[0].name:
        parts = [f"{part} {source.share} {source.name!r}" for part, source in zip(parts, sources, strict=True)]
    sha256 = hashlib.sha256(f"{' '.join(parts)} {tokenizer.identity}".encode()).hexdigest()
    return f"{sha256}/{tokenizer.identity}"


def _pool(sources: Sequence[Source], targets_R: np.ndarray) -> tuple[tuple[str, ...], np.ndarray, float, list[str]]:
    """(domains with targets, sorted; the index of each run's domain, int32 [R]; bytes per target; notes).

    targets_R: in the measured batches. The bytes of a domain's measured targets are taken in proportion to those of all
    its validation text: exact where all of it is measured, else the bytes per target of the whole.
    """
    runs = [run for source in sources for run in source.runs()]
    names = [name for name, _, _ in runs]
    whole, size = _sums(names, [number for _, number, _ in runs]), _sums(names, [size for _, _, size in runs])
    targets, notes = _sums(names, targets_R.tolist()), []
    small = sorted(name for name, number in targets.items() if 0 < number < MIN_TARGETS)
    held = {name for name, number in targets.items() if number}
    unheld = sorted(set(names).union(*(source.unheld_domains() for source in sources)) - held)
    if unheld:
        notes.append(f"no validation text is measured for the domains {some_names(unheld)}")
    if len(small) > 1:
        notes.append(
            f"{OTHER} pools, for fewer than {MIN_TARGETS} validation targets each, the domains {some_names(small)}"
        )
    pooled = {name: OTHER for name in small} if len(small) > 1 else {}
    bytes_measured = sum(targets[name] * size[name] / whole[name] for name in held)
    domains = tuple(sorted({pooled.get(name, name) for name in held}))
    index = {name: index for index, name in enumerate(domains)}
    # A run without targets in the measured batches has no domain; any index will do.
    runs_R = np.array([index.get(pooled.get(name, name), 0) for name in names], np.int32)
    return domains, runs_R, bytes_measured / sum(targets.values()), notes


def _sums(names: Sequence[str], numbers: Sequence[int]) -> collections.Counter[str]:
    sums = collections.Counter[str]()
    for name, number in zip(names, numbers, strict=True):
        sums[name] += number
    return sums


def _describe(config: DataConfig, sources: Sequence[Source]) -> str:
    if config.mixture is None:
        return _contents(config, sources[0].tokens)
    train, validation = (
        sum(len(getattr(source.tokens, side)) for source in sources) for side in ("train", "validation")
    )
    names = some_names(source.name for source in sources)
    return f"a mixture of {names}: {train / 1e6:.2f} + {validation / 1e6:.2f} M tokens ({printable(config.tokenizer)})"


def _contents(config: DataConfig, tokens: Tokens) -> str:
    stdlib, corpus = f"Python {platform.python_version()} standard library", tokens.corpus
    name = {"stdlib": stdlib, "synthetic": "synthetic text"}.get(config.source, config.path)
    return printable(
        f"{name}: {corpus.num_train} + {corpus.num_validation} validation documents, {corpus.num_bytes / 1e6:.1f} MB, "
        f"{len(tokens.train) / 1e6:.2f} + {len(tokens.validation) / 1e6:.2f} M tokens ({config.tokenizer}), "
        f"sha256 {corpus.sha256[:12]}"
    )
