"""Items of three lm_eval tasks, made of the validation documents of a run, on which it never trained.

    python -m experiments.task_data RUN

writes `runs/tasks/NAME.jsonl` for each task of `experiments/tasks/`, the same for the same corpus and settings:

* `laep_next_line`: which of four lines continues the code
* `laep_identifier`: which of four identifiers comes next; one of them is in the code above
* `laep_bits_per_byte`: the documents, up to 8 kB of each

The wrong choices are right ones of other documents, with the same indentation or length. So a model that does not use
the code above is right by chance, in a quarter of the items. No item is longer than the sequences of the training.
"""

import builtins
import collections
import io
import itertools
import json
import keyword
import random
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from laep_jax.checkpoint.saved import Saved
from laep_jax.config import Config
from laep_jax.data.sources import Document
from laep_jax.data.tokenizer import load_tokenizer
from laep_jax.errors import UserError, run_main
from laep_jax.evaluation.scoring import validation_corpora

FOLDER = Path("runs/tasks")  # where the tasks look for it, from the current directory
MAX_ITEMS = 400  # of a task
CHOICES = 4
MAX_BYTES = 8192  # of a document whose bits per byte are measured
LINE_LENGTH = range(10, 61)  # characters, without the indentation
SHORTEST_NAME = 4
COMMON_NAMES = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self"}
Item = dict[str, Any]


class Place(NamedTuple):
    """Where a document's text is continued by `answer`. kind: places of one kind have interchangeable answers."""

    document: str
    text: str
    offset: int
    answer: str
    kind: str | int


def main(argv: Sequence[str]) -> int:
    """Writes the files. `UserError` where the run has no checkpoint or too little validation text."""
    if len(argv) != 1:
        raise UserError("usage: python -m experiments.task_data RUN")
    for name, number in write_items(Saved(argv[0]).config, FOLDER).items():
        print(f"{FOLDER / name}.jsonl: {number} items")
    return 0


def write_items(config: Config, folder: Path) -> dict[str, int]:
    """Writes the items of every task for the models of a config; returns how many they are."""
    folder.mkdir(parents=True, exist_ok=True)
    items = make_items(validation_documents(config), config)
    for name, of_task in items.items():
        lines = [json.dumps(item) + "\n" for item in of_task]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(of_task) for name, of_task in items.items()}


def validation_documents(config: Config) -> Iterator[Document]:
    """Those of all sources."""
    return itertools.chain.from_iterable(validation_corpora(config))


def make_items(documents: Iterable[Document], config: Config) -> dict[str, list[Item]]:
    """The items by task. `UserError` where a task has none."""
    texts = {document.name: document.text.decode() for document in documents}
    tokenizer, length = load_tokenizer(config.data.tokenizer), config.data.sequence_length

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode([text.encode()])[0])

    line_places = [place for name, text in texts.items() for place in _lines(name, text)]
    name_places = [place for name, text in texts.items() for place in _identifiers(name, text, 2 * length)]
    found = {
        "laep_next_line": _choose(line_places, num_tokens, length, lambda place, context: True),
        "laep_identifier": _choose(name_places, num_tokens, length, _is_above),
        "laep_bits_per_byte": [{"document": name, "text": _beginning(text)} for name, text in texts.items()],
    }
    for task, items in found.items():
        if not items:
            raise UserError(f"{task}: no item in {len(texts)} validation documents; it needs several modules of Python")
    return {task: items[:MAX_ITEMS] for task, items in found.items()}


def _lines(name: str, text: str) -> Iterator[Place]:
    """Beginnings of lines of code or text; comments are left out."""
    offset = 0
    for line in text.splitlines(keepends=True):
        answer = line.strip()
        if len(answer) in LINE_LENGTH and answer.isascii() and answer[0] != "#" and re.search("[a-z]", answer):
            yield Place(name, text, offset, line.rstrip(), len(line) - len(line.lstrip()))
        offset += len(line)


def _identifiers(name: str, text: str, reach: int) -> Iterator[Place]:
    """Identifiers that were used before, at most `reach` characters above. None of a text that is not Python."""
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    last_use: dict[str, int] = {}
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, tokenize.TokenError):
        return
    for token in tokens:
        used = token.string
        if token.type != tokenize.NAME or used in COMMON_NAMES or used[0] == "_" or len(used) < SHORTEST_NAME:
            continue
        offset = line_starts[token.start[0] - 1] + token.start[1]
        if used in last_use and offset - last_use[used] < reach:
            yield Place(name, text, offset, used, len(used))
        last_use[used] = offset


def _is_above(place: Place, context: str) -> bool:
    return re.search(rf"\b{re.escape(place.answer)}\b", context) is not None


def _choose(
    places: list[Place],
    num_tokens: Callable[[str], int],
    sequence_length: int,
    is_item: Callable[[Place, str], bool],
) -> list[Item]:
    """Items at places drawn at random, in the order of the draw. is_item: of a place and its context."""
    rng, alike, items = random.Random(0), collections.defaultdict(list), []
    for place in places:
        alike[place.kind].append(place)
    for place in rng.sample(places, len(places)):
        context = _context(place, num_tokens, sequence_length - sequence_length // CHOICES)
        wrong = _wrong_answers(place, context, alike[place.kind], rng)
        longest = max((num_tokens(context + answer) for answer in (place.answer, *wrong)), default=0)
        if context.strip() and is_item(place, context) and len(wrong) == CHOICES - 1 and longest <= sequence_length:
            right = len(items) % CHOICES
            choices = [*wrong[:right], place.answer, *wrong[right:]]
            items.append({"document": place.document, "context": context, "choices": choices, "answer": right})
        if len(items) == MAX_ITEMS:
            break
    return items


def _context(place: Place, num_tokens: Callable[[str], int], max_tokens: int) -> str:
    """The lines above and what stands before the place in its own, as many as fit; empty where that is too long."""
    context, start = "", place.offset
    while start > 0:
        start = place.text.rfind("\n", 0, start - 1) + 1
        longer = place.text[start : place.offset]
        if num_tokens(longer) > max_tokens:
            break
        context = longer
    return context


def _wrong_answers(place: Place, context: str, alike: list[Place], rng: random.Random) -> list[str]:
    """Different answers at places of the same kind in other documents, which are not in the context."""
    found: list[str] = []
    for other in rng.sample(alike, len(alike)):
        new = other.document != place.document and other.answer not in (place.answer, *found)
        if new and other.answer.strip() not in context:
            found.append(other.answer)
        if len(found) == CHOICES - 1:
            break
    return found


def _beginning(text: str) -> str:
    """Whole lines of at most MAX_BYTES bytes; a first line that is longer is cut."""
    cut = text.encode()[:MAX_BYTES].decode(errors="ignore")
    return cut if cut == text or "\n" not in cut else cut[: cut.rindex("\n") + 1]


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
