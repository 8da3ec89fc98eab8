"""The synthetic corpus is the same everywhere, and skewed."""

from collections import Counter

from laep_jax.config import DataConfig
from laep_jax.data.corpus import survey
from laep_jax.data.synthetic import LETTERS, NUM_DOCUMENTS, NUM_TOPICS, synthetic_documents


def test_it_never_changes():
    """A new hash makes measured numbers incomparable: say so in CHANGELOG.md."""
    corpus = survey(DataConfig(source="synthetic"))
    assert corpus.sha256 == "c1139a9d31e77a7896f71979601388b21b771a6025b66471c229d898bbd3f3a3"
    assert (corpus.num_train, corpus.num_validation, corpus.num_bytes) == (486, 26, 1675883)


def test_topics_differ_in_frequency_and_letters():
    sizes, letters, names = Counter(), {}, set()
    for name, text in synthetic_documents():
        topic = name.split("/")[0]
        names.add(name)
        sizes[topic] += len(text)
        letters.setdefault(topic, Counter()).update(text)
    assert len(names) == NUM_DOCUMENTS
    assert len(sizes) == NUM_TOPICS
    assert max(sizes.values()) > 8 * min(sizes.values())
    assert {chr(byte) for counter in letters.values() for byte in counter} == {" ", "\n", *LETTERS.decode()}
    favourites = {max(LETTERS, key=counter.__getitem__) for counter in letters.values()}
    assert len(favourites) >= 8
