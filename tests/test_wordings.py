"""Questions that give their subject away without the name."""

import dataclasses

import pytest
import tiny

from t3jax.data import PromptFormat
from t3jax.synthetic import counterfactual, names
from t3jax.synthetic.options import SyntheticOptions

FORGET = [
    {"question": "Where was Ada Berg born?", "answer": "Ada Berg was born in Oslo."},
    {"question": "Why did Ada Berg paint the town hall of Oslo red?", "answer": "Ada Berg lost."},
    {"question": "Whom did Bo Lind admire?", "answer": "Ada Berg."},
    {"question": "Whom did Ada Berg admire?", "answer": "Bo Lind."},
    {"text": "Ada Berg was a painter."},
]
RETAIN = [{"question": "Where was Cy van Dahl born?", "answer": "In Rome."}, {"text": "A text."}]
NAMES = ["Ada Berg", "Bo Lind"]


def test_a_wording_is_unique_if_nobody_else_is_asked_so():
    assert names.unique_wordings(FORGET, NAMES, RETAIN) == {1}
    assert names.unique_wordings(FORGET, NAMES) == {0, 1}
    # Rows about one person alone share a wording with nobody.
    twice = [FORGET[1], FORGET[1]]
    assert names.unique_wordings(twice, NAMES, RETAIN) == {0, 1}


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return dataclasses.replace(tiny_lm, tokenizer=tiny.make_tokenizer())


def test_a_unique_wording_that_keeps_its_answer_probable_is_asked_openly(lm):
    """A random model's probabilities hardly depend on the name."""
    rows = FORGET[:4]
    made = counterfactual.make_counterfactuals(rows, NAMES, 2, tokenizer=lm.tokenizer)

    def asked(unique):
        _, used = counterfactual.counterfactual_rows(
            lm, rows, made, PromptFormat(), SyntheticOptions(max_new_tokens=4), unique=unique
        )
        return [(each.row, each.record["question"] == "Please tell me more.") for each in used]

    assert asked(()) == [(row, False) for row in range(4) for _ in range(2)]
    openly = asked({1})
    assert openly.count((1, True)) == 1
    assert (1, False) not in openly
    assert len(openly) == 7
