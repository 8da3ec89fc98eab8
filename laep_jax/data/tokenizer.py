"""Text to token ids: plain bytes, or any Hugging Face `tokenizer.json` (package `tokenizers`)."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from laep_jax.data.optional import import_extra
from laep_jax.errors import UserError, require
from laep_jax.files import read_bytes

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # first one found ends documents
MAX_BYTES = 2**27  # of a tokenizer.json; the largest known have 40 MB


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The interface of a tokenizer to the data pipeline.

    identity: names this very vocabulary. vocab_size: one above the largest id, the end-of-document
    id `eod` included. encode: UTF-8 texts to ids, one array each, without `eod`. decode: ids to a text; what is not
    UTF-8 becomes U+FFFD, and ids that no text has are left out.
    """

    identity: str
    vocab_size: int
    eod: int
    encode: Callable[[Sequence[bytes]], list[np.ndarray]]
    decode: Callable[[Sequence[int]], str]

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


def load_tokenizer(tokenizer: str) -> Tokenizer:
    """The tokenizer of `DataConfig.tokenizer`: "bytes" or a path. `UserError` where there is none."""
    return BYTES if tokenizer == "bytes" else _load_json(tokenizer)


def _encode_bytes(texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(text, np.uint8) for text in texts]


def _decode_bytes(ids: Sequence[int]) -> str:
    return bytes(id for id in ids if id < 256).decode(errors="replace")


BYTES = Tokenizer("bytes", vocab_size=257, eod=256, encode=_encode_bytes, decode=_decode_bytes)


@contextlib.contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """What the package `tokenizers` raises as a `UserError`; a panic in it is no `Exception`."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{problem}: {error}") from error


def _load_json(path: str) -> Tokenizer:
    name = f"DataConfig.tokenizer={path!r}"
    require(Path(path).is_file(), "DataConfig.tokenizer", path, 'is neither "bytes" nor a file')
    tokenizers = import_extra("tokenizers", "tok", "a tokenizer.json")
    data = read_bytes(Path(path), name, MAX_BYTES)
    with _refusing(f"{name} is no Hugging Face tokenizer.json"):
        model = tokenizers.Tokenizer.from_buffer(data)
        first_free = max(model.get_vocab(with_added_tokens=True).values()) + 1
        model.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not its end
        model.no_padding()
        model.no_truncation()
        special = {token.content: id for id, token in model.get_added_tokens_decoder().items() if token.special}
    dropout = getattr(model.model, "dropout", None)
    require(not dropout, f"dropout of {name}", dropout, "gives other tokens each time")
    eod = next((special[token] for token in END_OF_TEXT if token in special), first_free)

    def encode(texts: Sequence[bytes]) -> list[np.ndarray]:
        with _refusing(f"{name} does not encode the corpus"):
            encodings = model.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(ids: Sequence[int]) -> str:
        return model.decode([id for id in ids if id < first_free])

    return Tokenizer(hashlib.sha256(data).hexdigest(), max(first_free, eod + 1), eod, encode, decode)
