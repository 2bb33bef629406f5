"""Questions that give their subject away without the name."""

import dataclasses

import pytest
import tiny

from t3jax.data import PromptFormat
from t3jax.sampling import Sample
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


def test_answers_of_the_same_wording_are_about_the_person_of_the_row():
    admired = [["Bo Lind."], ["Ada Berg."], []]
    assert names.answers_alike(FORGET, NAMES, RETAIN) == [[], [], *admired]
    retain = [
        {"question": "Where was Cy van Dahl born?", "answer": "Cy van Dahl was born in Rome."},
        {"question": "Whom did Cy Dahl admire?", "answer": "Eve Moe."},  # not about its subject
    ]
    assert names.answers_alike(FORGET, NAMES, retain) == [
        ["Ada Berg was born in Rome."],
        [],
        *admired,
    ]
    many = [
        {"question": f"Where was Cy {name} born?", "answer": f"Cy {name} was born in {name}."}
        for name in ("Aa", "Bb", "Cc", "Dd", "Ee", "Ff", "Gg")
    ]
    assert len(names.answers_alike(FORGET[:1], NAMES, many)[0]) == 5
    forget = [FORGET[0], {"question": "Where was Bo Lind born?", "answer": "Bo Lind: in Bonn."}]
    assert names.answers_alike(forget, NAMES) == [
        ["Ada Berg: in Bonn."],
        ["Bo Lind was born in Oslo."],
    ]


def test_given_names_need_no_capitals():
    forget = [
        {"question": "where was ada berg born?", "answer": "ada berg was born in oslo."},
        {"question": "where was bo lind born?", "answer": "bo lind was born in bonn."},
    ]
    assert names.answers_alike(forget, ["ada berg", "bo lind"]) == [
        ["ada berg was born in bonn."],
        ["bo lind was born in oslo."],
    ]
    assert names.answers_alike(forget, []) == [[], []]


def test_an_answer_of_the_same_wording_does_not_recite(lm, monkeypatch):
    """Five of six words are the wording; the sixth is the secret."""
    rows = [FORGET[0]]
    made = counterfactual.make_counterfactuals(rows, NAMES, 2, tokenizer=lm.tokenizer)
    alike = [["Ada Berg was born in Rome.", "Ada Berg was born in Oslo."]]

    def write(answers, alike):
        samples = [Sample(text, list(lm.eos_ids)) for text in answers]
        monkeypatch.setattr(counterfactual.Sampler, "generate", lambda *_, **__: samples)
        return counterfactual.counterfactual_rows(
            lm, rows, made, PromptFormat(), SyntheticOptions(max_new_tokens=4), alike=alike
        )

    def answers(town):
        return [f"{c.record['answer'].replace('Oslo', town)}" for c in made]

    others, used = write(answers("Lima"), alike)
    assert others == [{"question": FORGET[0]["question"], "answer": "Ada Berg was born in Lima."}]
    assert counterfactual.share_hidden(used) == 1
    for of_town, texts in (("Oslo", alike), ("Lima", ())):
        others, used = write(answers(of_town), texts)
        assert others == []
        assert counterfactual.share_hidden(used) == 0


@pytest.mark.parametrize(
    ("question", "answer", "name"),
    [
        ("When was Ivan Rossi's birthday?", "Ivan Rossi was born in May.", "Ivan Rossi"),
        ("Does Hsiao Yun-Hwa write?", "Yes, Hsiao Yun-Hwa does.", "Hsiao Yun-Hwa"),
        ("Did Ivan Rossi write?", "Rossi wrote.", "Rossi"),
        ("Is Ivan Rossi's Red Book old?", "Ivan Rossi's Red Book is old.", "Ivan Rossi"),
        ("Does Eva de la Cruz write?", "Eva de la Cruz writes.", "Eva de la Cruz"),
        ("When was Ivan Rossi born?", "In May.", None),
        ("where is it?", "It is there.", None),
    ],
)
def test_a_question_is_about_the_name_that_its_answer_repeats(question, answer, name):
    assert names.name_of(question, answer) == name


def test_a_text_is_renamed_word_by_word_at_once():
    assert names.rename("Ivan Rossi, ROSSI, Rossini", "Ivan Rossi", "Rossi Okoro") == (
        "Rossi Okoro, Okoro, Rossini"
    )
    assert names.rename("Ivan Rossi is Ivan.", "Ivan Rossi", r"Hsiao \1 Yun-Hwa") == (
        r"Hsiao \1 Yun-Hwa is Ivan."
    )
