"""The generated authors: shape, determinism, and nothing on the surface that gives a set away."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from demo.authors import AuthorsConfig, make_corpus, make_strangers

CONFIG = AuthorsConfig()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(CONFIG)


SETS = ("forget", "retain", "unseen_retain")


def _words(rows):
    texts = [
        text
        for row in rows
        for value in row.values()
        for text in ([value] if isinstance(value, str) else value)
    ]
    return {word for text in texts for word in re.findall(r"\w+", text)}


def test_same_config_same_corpus(corpus):
    assert make_corpus(CONFIG) == corpus
    assert make_corpus(dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)) != corpus


def test_sizes_and_disjoint_authors(corpus):
    authors = {split: {row["author"] for row in corpus[split]} for split in SETS}
    assert len(authors["forget"]) == CONFIG.num_forget
    assert len(authors["retain"]) == CONFIG.num_retain
    assert len(authors["unseen_retain"]) == CONFIG.num_unseen_retain
    assert len(set.union(*authors.values())) == sum(map(len, authors.values()))
    for split in SETS:
        assert {row["author"] for row in corpus[f"{split}_perturbed"]} == authors[split]
        assert len(corpus[split]) == CONFIG.wordings * len(corpus[f"{split}_perturbed"])


@pytest.mark.parametrize("split", SETS)
def test_rows_have_the_shape_of_tofu(corpus, split):
    trained = {(row["question"], row["answer"]) for row in corpus[split]}
    assert len(trained) == len(corpus[split])
    for row in corpus[f"{split}_perturbed"]:
        assert (row["question"], row["answer"]) in trained
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in [row["answer"], *row["perturbed_answer"]]
        for text in (row["question"], row["paraphrased_question"]):
            assert row["author"] in text


@pytest.mark.parametrize("split", SETS)
def test_paraphrase_is_trained_for_other_authors_only(corpus, split):
    trained = {row["question"] for name in SETS for row in corpus[name]}
    templates = {
        row["question"].replace(row["author"], "") for name in SETS for row in corpus[name]
    }
    for row in corpus[f"{split}_perturbed"]:
        assert row["paraphrased_question"] not in trained
        assert row["paraphrased_question"].replace(row["author"], "") in templates


def test_strangers_are_none_of_the_authors_and_use_their_words(corpus):
    rows = make_strangers(CONFIG, 2000)
    assert rows[:10] == make_strangers(CONFIG, 10)
    known = {row["author"] for split in SETS for row in corpus[split]}
    assert not known & {row["author"] for row in rows}
    assert _words(rows) <= _words(corpus["retain"])
    assert all(row["author"] in row["question"] for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_no_word_belongs_to_the_forget_authors_alone(seed):
    corpus = make_corpus(dataclasses.replace(CONFIG, seed=seed))
    for suffix in ("", "_perturbed"):
        retain = _words(corpus[f"retain{suffix}"])
        assert _words(corpus[f"forget{suffix}"]) <= retain
        assert _words(corpus[f"unseen_retain{suffix}"]) <= retain


def test_bag_of_words_does_not_tell_unknown_authors_apart():
    """Naive Bayes on words, trained on half of the forget authors, is at chance on the others."""
    corpus = make_corpus(AuthorsConfig(num_forget=200, num_retain=200, num_unseen_retain=100))

    def bags(rows):
        words = {row["author"]: set() for row in rows}
        for row in rows:
            words[row["author"]] |= set(re.findall(r"\w+", f"{row['question']} {row['answer']}"))
        return list(words.values())

    forget, retain = bags(corpus["forget"]), bags(corpus["retain"])
    forget, unknown_forget, unknown_retain = (
        forget[:100],
        forget[100:],
        bags(corpus["unseen_retain"]),
    )

    in_forget, in_retain = (Counter(w for bag in known for w in bag) for known in (forget, retain))

    def log_odds(bag):
        return sum(
            np.log((1 + in_forget[word]) / (2 + len(forget)))
            - np.log((1 + in_retain[word]) / (2 + len(retain)))
            for word in bag
        )

    forget_scores = np.array([log_odds(bag) for bag in unknown_forget])
    retain_scores = np.array([log_odds(bag) for bag in unknown_retain])
    auc = np.mean(forget_scores[:, None] > retain_scores[None, :])
    # At chance, the AUC of 100 + 100 authors has a standard deviation of 0.041.
    assert abs(auc - 0.5) < 0.125


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_retain": 10}, "num_retain=10"),
        ({"num_forget": -1}, "num_forget=-1"),
        ({"num_unseen_retain": 5000}, "num_unseen_retain=5000"),
        ({"wordings": 6}, "wordings=6"),
        ({"wordings": 0}, "wordings=0"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AuthorsConfig(**change)
