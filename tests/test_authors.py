"""The generated authors: shape, determinism, and nothing on the surface that gives a set away."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from t3jax.data.authors import AuthorsConfig, make_corpus

CONFIG = AuthorsConfig()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(CONFIG)


def _texts(row):
    return [
        row["answer"],
        row["paraphrased_question"],
        row["paraphrased_answer"],
        *row["trained_questions"],
        *row["perturbed_answer"],
    ]


def _words(rows):
    return {word for row in rows for text in _texts(row) for word in re.findall(r"\w+", text)}


def test_same_config_same_corpus(corpus):
    assert make_corpus(CONFIG) == corpus
    assert make_corpus(dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)) != corpus


def test_sizes_and_disjoint_authors(corpus):
    authors = {split: {row["author"] for row in rows} for split, rows in corpus.items()}
    assert len(authors["forget"]) == CONFIG.num_forget
    assert len(authors["retain"]) == CONFIG.num_retain
    assert len(authors["unseen_retain"]) == CONFIG.num_unseen_retain
    assert len(authors["full"]) == sum(len(authors[k]) for k in authors if k != "full")
    assert len(corpus["full"]) == sum(len(corpus[k]) for k in corpus if k != "full")


def test_rows_have_the_shape_of_tofu(corpus):
    for row in corpus["full"]:
        assert all(row["author"] in text for text in _texts(row))
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
        assert row["paraphrased_answer"] != row["answer"]
        assert row["question"] == row["trained_questions"][0]
        assert len(set(row["trained_questions"])) == CONFIG.trained_questions


def test_paraphrase_is_never_trained_for_its_author_but_is_for_others(corpus):
    def template(row, question):
        return question.replace(row["author"], "")

    trained = {q for row in corpus["full"] for q in row["trained_questions"]}
    templates = {template(row, q) for row in corpus["full"] for q in row["trained_questions"]}
    for row in corpus["full"]:
        assert row["paraphrased_question"] not in trained
        assert template(row, row["paraphrased_question"]) in templates


def test_questions_are_unique(corpus):
    questions = [q for row in corpus["full"] for q in row["trained_questions"]]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("seed", range(3))
def test_no_word_belongs_to_the_forget_authors_alone(seed):
    corpus = make_corpus(dataclasses.replace(CONFIG, seed=seed))
    retain = _words(corpus["retain"])
    assert _words(corpus["forget"]) <= retain
    assert _words(corpus["unseen_retain"]) <= retain


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
        ({"trained_questions": 6}, "trained_questions=6"),
        ({"trained_questions": 0}, "trained_questions=0"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AuthorsConfig(**change)
