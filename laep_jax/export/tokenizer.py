"""The tokenizer of an exported model: what its run had, as the files that `AutoTokenizer` loads."""

import json
from pathlib import Path
from typing import Any

from laep_jax.checkpoint.saved import Saved
from laep_jax.data.tokenizer import END_OF_TEXT, MAX_BYTES
from laep_jax.files import read_bytes

BYTES_END = END_OF_TEXT[0]


def tokenizer_files(saved: Saved, path: str | None) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json by name. path: as for `Saved.tokenizer`."""
    config, eod = saved.config, saved.tokenizer(path).eod
    file = path or config.data.tokenizer
    content = _bytes_tokenizer() if file == "bytes" else _plain(Path(file))
    added = {token["id"]: token["content"] for token in json.loads(content).get("added_tokens", [])}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.data.sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    if eod in added:
        settings["eos_token"] = added[eod]
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json({"eos_token_id": eod}),
    }


def _plain(path: Path) -> bytes:
    """Without what adds, cuts or fills up tokens, as training had it."""
    content = json.loads(read_bytes(path, "the tokenizer", MAX_BYTES))
    return _json(content | {"post_processor": None, "truncation": None, "padding": None})


def _bytes_tokenizer() -> bytes:
    """Bytes as a BPE without merges: its alphabet has a printable character for each byte."""
    vocab = {character: byte for byte, character in enumerate(_alphabet())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": len(vocab), "content": BYTES_END, "special": True, "single_word": False, "lstrip": False}
    return _json(
        {
            "version": "1.0",
            "added_tokens": [end | {"rstrip": False, "normalized": False}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )


def _alphabet() -> list[str]:
    """Byte-level BPE's: bytes that print in Latin-1 are themselves, the others follow from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
