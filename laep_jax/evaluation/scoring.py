"""The loss of a checkpoint on any text, on the devices of this machine, whatever mesh the run had.

Every token of a document but its first is a target, and so is its end. Bits per byte count those targets over all bytes
of the text, so that models with different tokenizers compare.
Axes: B rows, S sequence, M domains.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from laep_jax.checkpoint.saved import Saved
from laep_jax.config import Config, MeshConfig
from laep_jax.data.corpus import is_validation
from laep_jax.data.mixing import Rows
from laep_jax.data.packing import pack
from laep_jax.data.sources import Document, read_documents
from laep_jax.data.tokenizer import Tokenizer
from laep_jax.errors import require
from laep_jax.laep.plan import Plan
from laep_jax.sharding import Mesh, make_mesh, put_batch
from laep_jax.state.tree import abstract_state, initial_layout
from laep_jax.training.evaluate import bits_per_byte, masked_bias
from laep_jax.training.step import make_eval_step

DOCUMENTS_CHUNK = 256  # tokenized together


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a domain, or of all text. nats: the sum over the targets."""

    nats: float
    targets: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.bytes)


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents as streams of tokens, one for each corpus, in their order.

    ends: for each stream where the last token of each document is. domain_R: of the documents of all streams.
    """

    streams: list[np.ndarray]
    ends: list[np.ndarray]
    domain_R: np.ndarray
    domains: tuple[str, ...]
    bytes_M: np.ndarray


def here(config: Config) -> Config:
    """The config of a model for the devices of this machine."""
    devices = jax.device_count()
    model = dataclasses.replace(config.model, dispatch="all_gather", receive_buffer=None, grouped_matmul="auto")
    rows = devices * max(1, config.data.batch_size // devices)
    data = dataclasses.replace(config.data, batch_size=rows)
    train = dataclasses.replace(config.train, grad_accumulation=1)
    return dataclasses.replace(config, model=model, mesh=MeshConfig(), data=data, train=train).resolve(devices)


def load_model(saved: Saved, config: Config, mesh: Mesh) -> dict:
    """A checkpoint's "params" and "router_bias" on a mesh; without moments."""
    abstract = abstract_state(config, mesh)
    return saved.restore({"params": abstract.params, "router_bias": abstract.router_bias})


def read_text(corpora: Sequence[Iterable[Document]], tokenizer: Tokenizer, max_tokens: int) -> Text:
    """The text of corpora, of each as many documents as are needed for its part of `max_tokens`.

    `UserError` where there is none.
    """
    read = [_read_stream(documents, tokenizer, max_tokens / len(corpora)) for documents in corpora]
    names, sizes = ([value for each in read for value in each[i]] for i in (2, 3))
    require(bool(names), "the text", names, "has no documents")
    domains, domain_R = np.unique(names, return_inverse=True)
    bytes_M = np.bincount(domain_R, sizes).astype(np.int64)
    streams, ends = [each[0] for each in read], [each[1] for each in read]
    return Text(streams, ends, domain_R.astype(np.int32), tuple(map(str, domains)), bytes_M)


def _read_stream(
    documents: Iterable[Document], tokenizer: Tokenizer, max_tokens: float
) -> tuple[np.ndarray, np.ndarray, list[str], list[int]]:
    """(tokens, where each document ends, its domain, its bytes)."""
    parts, names, sizes, total = [np.empty(0, np.uint32)], list[str](), list[int](), 0
    remaining = iter(documents)
    while total < max_tokens and (chunk := list(itertools.islice(remaining, DOCUMENTS_CHUNK))):
        for document, tokens in zip(chunk, tokenizer.encode([each.text for each in chunk]), strict=True):
            if total >= max_tokens:
                break
            parts.append(np.append(tokens, tokenizer.eod).astype(np.uint32))
            total += len(parts[-1])
            names.append(document.domain)
            sizes.append(len(document.text))
    return np.concatenate(parts), np.cumsum([len(part) for part in parts[1:]], dtype=np.int64) - 1, names, sizes


def validation_corpora(config: Config) -> list[Iterable[Document]]:
    """The documents that a run keeps for validation, of each source of a mixture: a row holds text of one source."""
    data, fraction = config.data, config.data.validation_fraction
    sources = [dataclasses.replace(data, mixture=(source,)) for source in data.mixture] if data.mixture else [data]
    return [
        (document for document in read_documents(source) if is_validation(document.name, fraction))
        for source in sources
    ]


def score(saved: Saved, text: Text, tokenizer: Tokenizer, plan: Plan | None = None) -> dict[str, Score]:
    """The score of each domain. plan: its pruned experts are masked, as the pruned model would be."""
    config = here(saved.config)
    mesh, layout = make_mesh(config.mesh), initial_layout(config)
    model = load_model(saved, config, mesh)
    bias = masked_bias(model["router_bias"], plan) if plan else model["router_bias"]
    eval_step = make_eval_step(config, mesh, len(text.domains))
    nats_M, targets_M = np.zeros(len(text.domains)), np.zeros(len(text.domains), np.int64)
    text_rows, rows = Rows(text.streams, config.data.sequence_length), config.data.batch_size
    count = sum(text_rows.counts_N)
    for first in range(0, count, rows):
        rows_B = np.minimum(np.arange(first, first + rows), count)  # rows past the last are padding
        batch = pack(text_rows.tokens(rows_B), tokenizer.eod)
        domains_BS = text.domain_R[text_rows.runs(rows_B, text.ends)]
        loss_M, number_M, _ = eval_step(
            layout, model["params"], bias, put_batch(batch | {"domains_BS": domains_BS}, mesh)
        )
        nats_M += np.asarray(loss_M, np.float64)
        targets_M += np.asarray(number_M)
    return {
        name: Score(float(nats), int(targets), int(number))
        for name, nats, targets, number in zip(text.domains, nats_M, targets_M, text.bytes_M, strict=True)
        if targets
    }


def total(scores: dict[str, Score]) -> Score:
    """Of all domains together."""
    sums = (sum(getattr(each, field.name) for each in scores.values()) for field in dataclasses.fields(Score))
    return Score(*sums)
