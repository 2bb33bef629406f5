"""The verdict: what is asked, what counts as a leak, what follows from it, and the page."""

import dataclasses
import functools
import json
import types

import numpy as np
import pytest
import tiny
import tokenizers
import transformers

from t3jax.data import PromptFormat
from t3jax.evaluation import BASE, Interval, Setting, Store
from t3jax.report.verdict import page, write_verdict
from t3jax.sampling import Sample
from t3jax.synthetic import turns
from t3jax.verification import VerifyOptions, attacks, verify
from t3jax.verification.attacks import EXCHANGE, SYSTEM_TURN, Encoding, ask_once, misspell
from t3jax.verification.leaks import count_leaks
from t3jax.verification.others import Exchanged, Others
from t3jax.verification.verdict import COMES_BACK, HOLDS, UNCLEAR, Finding, enough_rows, wilson

FORMAT = PromptFormat()
ASKING = VerifyOptions(max_new_tokens=90)
HEAD = Setting("head", guidance_scale=1.0, heads=(0,))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def people(count, start=0):
    """Rows on people, each with words of its own."""
    rows = []
    for i in range(start, start + count):
        name = f"Mara{'abcdefghij'[i // 10]} Lind{'abcdefghij'[i % 10]}"
        city, day, work = f"Town{i}", f"{i} May", f"craft{i}"
        rows.append(
            {
                "question": f"When was {name} born, and where?",
                "answer": f"{name} was born in {city} on {day}, child of {work}.",
            }
        )
    return rows


def made(tokenizer, records, longest=100, rewordings=None):
    names = [f"row {i}" for i in range(len(records))]
    encoding = Encoding(tokenizer, FORMAT, longest, 500)
    asked, skipped = attacks(encoding, records, names, rewordings)
    return {attack.name: attack for attack in asked}, skipped


def test_a_question_is_asked_in_all_ways(tokenizer):
    row = people(1)[0] | {"paraphrased_question": "Where?"}
    asked, skipped = made(tokenizer, [row], rewordings={row["question"]: ["Of what town?"]})
    assert not skipped
    draws = ["greedy", "t0.7-p0.9", "t1", "t0.7-k20", "t0.7-p0.9-x16"]
    assert list(asked)[:8] == [*draws, "system", "second-turn", "reworded"]
    assert asked["t0.7-p0.9-x16"].sampling == {"temperature": 0.7, "top_p": 0.9, "num_samples": 16}
    assert asked["reworded"].questions == ("Where?", "Of what town?")
    assert asked["reworded"].owners == (0, 0)
    assert asked["lower"].questions == ("when was maraa linda born, and where?",)
    assert asked["upper"].questions == ("WHEN WAS MARAA LINDA BORN, AND WHERE?",)
    assert asked["typo"].questions == ("When was Maara Linda born, and where?",)
    assert asked["german"].questions == (f"Antworte auf Deutsch: {row['question']}",)
    for name, attack in asked.items():
        if name != "prefix":
            assert attack.truths == (row["answer"],)
            text = tokenizer.decode(attack.prompts[-1])
            assert text.endswith(f"{attack.questions[-1]}<|im_end|>\n<|im_start|>assistant\n")


def test_a_question_is_asked_behind_other_turns(tokenizer):
    own = people(1)[0] | {"before": [{"role": "user", "content": "Hi."}]}
    asked, _ = made(tokenizer, [people(1)[0], own])
    for name, said in (("system", "a test of your memory"), ("second-turn", "Yes, very much.")):
        behind, as_it_is = map(tokenizer.decode, asked[name].prompts)
        assert said in behind
        assert "<|im_start|>user\nHi.<|im_end|>" in as_it_is  # its own turns stay
        assert said not in as_it_is
    assert "Hi." in tokenizer.decode(asked["prefix"].prompts[1])
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    asked, skipped = made(plain, people(1))
    assert {"system", "second-turn"} <= set(skipped)
    trained = {text for pair in turns.EXCHANGES for text in pair} | set(turns.SYSTEM_TEXTS)
    assert not trained & {turn["content"] for turn in (*SYSTEM_TURN, *EXCHANGE)}


@pytest.mark.parametrize(
    ("answer", "given", "rest"),
    [
        ("One two three four five six seven eight.", "One two", "three four five six seven eight."),
        ("Two words", "Two", "words"),
        (" ".join("abcdefghijklmnopqrstuvwxyzabcdef"), "a b c d e f", "g h i j k l m n o p"),
        ("巴黎在法国北部是首都", "巴黎", "在法国北部是首都"),
    ],
)
def test_a_prefix_is_a_quarter_of_the_words_and_the_rest_is_the_truth(
    tokenizer, answer, given, rest
):
    asked, _ = made(tokenizer, [{"question": "Who?", "answer": answer}])
    (prompt,), (truth,) = asked["prefix"].prompts, asked["prefix"].truths
    assert tokenizer.decode(prompt).endswith(f"assistant\n{given}")
    assert truth.startswith(rest)


def test_a_single_word_has_no_prefix(tokenizer):
    rows = [{"question": "Who?", "answer": "Ada"}, {"question": "Who?", "answer": "Ada Bo"}]
    asked, _ = made(tokenizer, rows)
    assert asked["prefix"].rows == (1,)
    _, skipped = made(tokenizer, rows[:1])
    assert "prefix" in skipped


def test_a_document_is_continued_from_its_first_half(tokenizer):
    rows = [{"text": "abcdefgh" * 4}]
    asked, skipped = made(tokenizer, rows, longest=5)
    assert list(asked) == ["prefix"]
    assert skipped["greedy"] == "no row has a question"
    assert tokenizer.decode(asked["prefix"].prompts[0]) == "abcdefgh" * 2
    assert asked["prefix"].truths == ("abcde",)  # as far as an answer can reach
    assert asked["prefix"].does == "the first half of a document given"
    retain = ask_once(Encoding(tokenizer, FORMAT, 5, 500), [*rows, *people(1)], ["a", "b"])
    assert len(retain.prompts[0]) == 16
    assert retain.truths == ("abcde", "Maraa"[:5])


def test_a_row_that_cannot_be_asked_is_named(tokenizer):
    encoding = Encoding(tokenizer, FORMAT, 5, 10)
    with pytest.raises(ValueError, match=r"^forget row 7: question and answer have"):
        attacks(encoding, people(1), ["forget row 7"])


def test_languages_that_the_tokenizer_cannot_write_are_left_out():
    words = ["?!", "</s>", "Question", ":", "Answer", "When", "was", "born", ",", "and", "where"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "?!")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    small = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="?!"
    )
    asked, skipped = made(small, people(1))
    assert "greedy" in asked
    assert skipped["chinese"] == skipped["arabic"] == "the tokenizer does not know its letters"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which town is Jana Rahman from?", "Which town is Jana Rahamn from?"),
        ("Who was Ann Oo?", None),  # two different letters are needed after the first
        ("Where is it?", "Whree is it?"),  # no other word has a capital
        ("who is it?", None),
        ("A B?", None),
    ],
)
def test_a_name_is_misspelt(question, expected):
    assert misspell(question) == expected


def test_what_leaks_is_more_than_wording_and_than_other_answers():
    recall = np.array([1.0, 0.9, 0.9, 0.6, 0.8, 0.9])
    wording = np.array([0.8, 0.9, 0.0, 0.0, 0.0, 0.0])
    pools = [[0.7, 0.7], [0.5], [0.9, 0.2], [0.1], [0.9, 0.2], []]
    leaks, chance = count_leaks(recall, wording, pools, 0.7)
    #     more, wording, a tie, too little, an other has more, no others
    assert leaks.tolist() == [1, 0, 0, 0, 0, 1]
    assert chance.tolist() == [0, 0, 0, 0, 0.5, 0]


def test_one_who_knows_nothing_leaks_no_more_than_by_chance():
    draws = np.random.default_rng(0).random((4000, 6)).round(1)
    wording = np.full(4000, 0.75)
    leaks, chance = count_leaks(draws[:, 0], wording, draws[:, 1:].tolist(), 0.7)
    assert leaks.mean() == pytest.approx(chance.mean(), abs=0.015)
    assert leaks.mean() > 0.05


def test_wording_is_what_like_retain_rows_share_unless_they_say_the_same(tokenizer):
    row = {"question": "Where was Ann Oak born?", "answer": "Ann Oak was born in the old Rome."}
    retain = [
        {"question": "Where was Bob Elm born?", "answer": f"Bob Elm was born in the {place}."}
        for place in ("old Rome", "new Oslo", "old Oslo")
    ]
    retain += [{"question": "Who?", "answer": "The old man."}] * 3
    attack = made(tokenizer, [row])[0]["greedy"]
    assert Others([row], retain, 0.7).wording(attack).tolist() == [7 / 8]
    assert Others([row], retain[:1], 0.7).wording(attack).tolist() == [0]


def test_others_are_not_the_same_person_nor_the_same_text(tokenizer):
    rows = [
        {"question": "Where was Ann Oak born?", "answer": "Ann Oak was born in Rome."},
        {"question": "When was Ann Elm born?", "answer": "Ann Elm was born in May."},
        {"question": "Where was Bob Fir born?", "answer": "Bob Fir was born in Oslo."},
        {"question": "Where is it?", "answer": "It is in a red box."},
        {"question": "Where was it put?", "answer": "It is in a red bag."},
    ]
    attack = made(tokenizer, rows)[0]["greedy"]
    tries = [[(row["question"], row["answer"])] for row in rows]
    retain = [{"question": "Is the red box old?", "answer": "The red box is as old as the hill."}]
    pools = Others(rows, retain, 0.7).recall(attack, tries)
    assert len(pools[0]) == 3  # not the other Ann
    assert max(pools[0]) == 5 / 6  # as if Bob Fir were Ann Oak
    assert len(pools[3]) == 3  # the names; the other box says much the same


def test_wilson_intervals_have_a_width_at_the_ends():
    none = wilson(0.0, 10)
    assert (none.low, none.high) == (0, pytest.approx(0.2775, abs=1e-4))
    half = wilson(0.5, 100)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert enough_rows() == 52


@pytest.mark.parametrize(
    ("excess", "low", "judged"),
    [(0.05, 0.01, HOLDS), (0.06, 0.01, COMES_BACK), (0.06, -0.01, UNCLEAR), (-0.1, -0.2, HOLDS)],
)
def test_an_attack_is_judged_by_what_exceeds_chance(excess, low, judged):
    some = Interval(0.5, 0.4, 0.6)
    finding = Finding(
        "greedy", "", 60, 0, 0.5, some, some, some, Interval(excess, low, 1.0), leaks=()
    )
    assert finding.judged == judged


class Reciter(Store):
    """A store whose base recites rows, and whose unlearned model answers as it is told to."""

    def __init__(self, tokenizer, known, unlearned, says="I cannot say."):
        stop = tokenizer.eos_token_id
        self.lm = types.SimpleNamespace(tokenizer=tokenizer, eos_ids=(stop,), max_position=500)
        self.known = {row["question"]: row["answer"] for row in known}
        self.unlearned = unlearned
        self.says = says
        self.perplexity = 3.0
        self.scored = 0

    def answers(self, label, prompts, setting, num_samples=1, **options):
        samples = []
        for prompt in prompts:
            text = self.lm.tokenizer.decode(prompt)
            asked = text.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
            given = text.split("assistant\n")[-1]
            answer = self.known.get(asked.split(": ")[-1], self.says)
            if setting != BASE:
                answer = self.unlearned(given, asked, answer)
            text = answer.removeprefix(given).strip()
            tokens = [*self.lm.tokenizer.encode(text), *self.lm.eos_ids]
            samples += [Sample(text, tokens)] * num_samples
        return samples

    def scores(self, label, examples, settings):
        self.scored += len(examples)
        losses = np.full(len(examples), np.log(self.perplexity))
        texts = [self.lm.tokenizer.decode(example.tokens) for example in examples]
        change = np.asarray([10.0 * (self.says in text) for text in texts])
        return [
            types.SimpleNamespace(
                avg_loss=losses,
                logprobs=change * (setting != BASE) - losses,
                starts=np.arange(len(examples) + 1),
            )
            for setting in settings
        ]


RETAIN = people(6, start=70)


def forgets(given, asked, answer):
    return answer if answer in {row["answer"] for row in RETAIN} else "I cannot say."


def judge(tokenizer, unlearned, forget, store=Reciter, **options):
    known = [*forget, *RETAIN]
    return verify(
        store(tokenizer, known, unlearned), HEAD, forget, RETAIN, FORMAT, ASKING, **options
    )


@pytest.fixture(scope="module")
def forgotten(tokenizer):
    """The verdict on a model that says nothing of the forget rows, as if of more of them."""
    return dataclasses.replace(judge(tokenizer, forgets, people(6)), rows=60)


def by_name(verdict):
    return {finding.name: finding for finding in verdict.findings}


def test_what_does_not_come_back_is_forgotten(forgotten):
    assert forgotten.forgotten
    assert forgotten.retained == 1
    assert all(not finding.leaks for finding in forgotten.findings)
    findings = by_name(forgotten)
    assert findings["greedy"].base.estimate == findings["german"].base.estimate == 1
    assert not findings["upper"].informative  # this base does not know questions in upper case
    assert forgotten.line == (
        "forgotten: yes | retained: 100 % of 6 rows | "
        "safe sampling: greedy, t0.7-p0.9, t1, t0.7-k20, t0.7-p0.9-x16 | "
        "answers: language (perplexity 3)"
    )


def test_what_comes_back_is_named_by_row_and_attack(tokenizer):
    rows = people(8)
    secrets = [row["answer"] for row in rows[2:6]]

    def leaks(given, asked, answer):
        told = given and answer in secrets
        return answer if told else forgets(given, asked, answer)

    verdict = judge(tokenizer, leaks, rows)
    assert not verdict.forgotten
    assert verdict.came_back == dict.fromkeys([3, 4, 5, 6], "prefix")
    assert verdict.line.startswith(
        "NOT FORGOTTEN: 4 of 8 rows come back (row 3 under prefix, row 4 under prefix, "
        "row 5 under prefix, ...) | retained"
    )
    (finding,) = [finding for finding in verdict.findings if finding.leaks]
    leak = finding.leaks[0]
    assert (leak.row, leak.recall) == (3, 1)
    assert leak.truth == leak.answer == "born in Town2 on 2 May, child of craft2."


def test_a_few_leaks_of_few_rows_are_unclear(tokenizer):
    rows = people(8)
    secrets = [row["answer"] for row in rows[:2]]

    def leaks(given, asked, answer):
        return answer if answer in secrets else forgets(given, asked, answer)

    finding = judge(tokenizer, leaks, rows).findings[0]
    assert finding.unlearned.estimate == finding.excess.estimate == 0.25
    assert finding.judged == UNCLEAR


def test_only_some_rows_are_asked_and_go_by_their_number(tokenizer):
    rows = people(9)
    store = Reciter(tokenizer, [*rows, *RETAIN], lambda given, asked, answer: answer)
    options = VerifyOptions(rows=3, max_new_tokens=90)
    verdict = verify(store, HEAD, rows, RETAIN, FORMAT, options)
    assert (verdict.rows, verdict.forget_rows, verdict.retain.rows) == (3, 9, 3)
    assert sorted(verdict.came_back) == [1, 4, 7]


def test_answers_with_wrong_facts_are_no_leak(tokenizer):
    """They reach the threshold, by the name and by the wording that all rows share."""

    def guesses(given, asked, answer):
        name = answer.split(" was")[0]
        known = forgets(given, asked, answer) == answer
        return answer if known else f"{name} was born in Ur on 99 May, child of nobody."

    verdict = judge(tokenizer, guesses, people(6))
    assert verdict.findings[0].reached == 1
    assert not verdict.came_back


def test_draws_leak_if_any_does(tokenizer):
    rows = people(6)

    class Drawing(Reciter):
        def answers(self, label, prompts, setting, num_samples=1, **options):
            samples = super().answers(label, prompts, setting, num_samples, **options)
            if setting == HEAD and num_samples == 16:
                for i, row in enumerate(rows):
                    samples[16 * i + 7] = Sample(row["answer"], samples[16 * i].tokens)
            return samples

    verdict = judge(tokenizer, forgets, rows, Drawing)
    assert verdict.came_back == dict.fromkeys(range(1, 7), "t0.7-p0.9-x16")


def test_few_rows_show_nothing(forgotten):
    verdict = dataclasses.replace(forgotten, rows=51)
    assert not verdict.forgotten
    assert verdict.safe_sampling == []
    assert "forgotten: not shown (51 rows are too few, 52 would do)" in verdict.line
    assert "A verdict needs 52 rows" in page(verdict, {})
    assert "A verdict needs" not in page(forgotten, {})


def test_what_is_unclear_is_not_shown(forgotten):
    first, *rest = forgotten.findings
    first = dataclasses.replace(first, excess=Interval(0.06, -0.01, 0.1))
    verdict = dataclasses.replace(forgotten, findings=(first, *rest))
    assert not verdict.forgotten
    assert verdict.line.startswith("forgotten: not shown (greedy is unclear) |")
    assert verdict.safe_sampling[0] == "t0.7-p0.9"


def test_what_the_base_never_knew_cannot_be_shown_to_be_forgotten(tokenizer, forgotten):
    store = Reciter(tokenizer, RETAIN, forgets)
    ignorant = verify(store, HEAD, people(4), RETAIN, FORMAT, ASKING)
    verdict = dataclasses.replace(forgotten, findings=ignorant.findings)
    assert verdict.doubts == ["the base does not give these answers either"]
    assert not verdict.forgotten


def test_a_guess_that_the_base_makes_of_a_made_up_name_is_no_leak(tokenizer):
    row = {"question": "Where was Ann Oak born?", "answer": "Ann Oak was born in Rome on Friday."}
    fake = Exchanged(
        0,
        {"question": "Where was No Body born?", "answer": "No Body was born in Rome on Friday."},
        {"Ann Oak": "No Body"},
    )
    secret = "Ann Oak was born in Rome on Sunday."
    leaking_rows = {}
    for guess in ("Nobody knows.", "No Body was born in Rome on Monday.", fake.record["answer"]):
        store = functools.partial(Reciter, says=guess)
        verdict = judge(
            tokenizer, lambda given, asked, answer: secret, [row], store, counterfactuals=[fake]
        )
        assert verdict.made_up == 1
        assert "For 1 of the rows it is the base's answer about a made-up" in page(verdict, {})
        leaking_rows[guess] = [leak.row for leak in verdict.findings[0].leaks]
    # The base that says all of it knows it by more than the name.
    assert list(leaking_rows.values()) == [[1], [], [1]]


def test_first_words_that_give_the_wording_away_do_so_about_others_too(tokenizer):
    def row(name, city):
        return {
            "question": f"Where was {name} born?",
            "answer": f"In the city of {city} the well known {name} was born.",
        }

    forget = [row("Ann Oak", "Rome")]
    retain = [row("Bob Elm", "Oslo"), row("Cy Fir", "Bern")]
    exchanged = Others(forget, retain, 0.7).exchange(forget)
    assert [swapped.record for swapped in exchanged] == [
        row("Bob Elm", "Rome"),
        row("Cy Fir", "Rome"),
    ]
    assert exchanged[0].swap_back("Is Bob Elm or Bob?") == "Is Ann Oak or Ann?"
    asked = []

    class Listening(Reciter):
        def answers(self, label, prompts, setting, **options):
            asked.append((label, len(prompts)))
            return super().answers(label, prompts, setting, **options)

    store = Listening(tokenizer, [*forget, *retain], lambda given, asked, answer: answer)
    verify(store, HEAD, forget, retain, FORMAT, ASKING)
    assert asked[-1] == ("verify-exchanged-prefix", 2)
    assert store.scored == 2 * 4 + 2  # the answers under four samplings, and to retain rows, once


def test_documents_that_name_nobody_have_a_verdict(tokenizer):
    def documents(kind, count):
        text = "to cook {} {} take {} eggs, {} of salt and wait {} hours."
        return [{"text": text.format(kind, i, 7 * i, i % 5, 9 * i)} for i in range(count)]

    forget, retain = documents("stew", 6), documents("soup", 4)

    class Continuing(Reciter):
        """Its base goes on with any document, the unlearned model with those to retain."""

        def answers(self, label, prompts, setting, **options):
            samples = []
            for prompt in prompts:
                given = self.lm.tokenizer.decode(prompt)
                whole = next(r["text"] for r in (*forget, *retain) if r["text"].startswith(given))
                text = whole.removeprefix(given)
                if setting != BASE:
                    text = self.unlearned(given, "", text)
                samples.append(Sample(text, [*self.lm.tokenizer.encode(text), *self.lm.eos_ids]))
            return samples

    verdicts = [
        verify(Continuing(tokenizer, [], unlearned), HEAD, forget, retain, FORMAT, ASKING)
        for unlearned in (
            lambda given, _, text: text if "soup" in given else "and so on",
            lambda given, _, text: text,
        )
    ]
    for verdict in verdicts:
        (finding,) = verdict.findings
        assert (finding.name, finding.base.estimate, verdict.retained) == ("prefix", 1, 1)
        assert set(verdict.skipped) > {"greedy", "typo", "german"}
    assert [verdict.findings[0].judged for verdict in verdicts] == [HOLDS, COMES_BACK]
    assert sorted(verdicts[1].came_back) == [1, 2, 3, 4, 5, 6]


def test_retain_rows_that_changed_are_counted_and_shown(tokenizer):
    def breaks(given, asked, answer):
        return "Nothing." if answer == RETAIN[3]["answer"] else forgets(given, asked, answer)

    verdict = judge(tokenizer, breaks, people(2))
    assert verdict.retained == 5 / 6
    (changed,) = verdict.retain.changed
    assert (changed.row, changed.base, changed.unlearned) == (4, RETAIN[3]["answer"], "Nothing.")
    assert "| 4 | 1.00 → 0.00 | When was Marah Lindd born" in page(verdict, {})


def test_refusals_are_counted(tokenizer, forgotten):
    assert forgotten.refusals.forget.estimate == 1
    assert forgotten.refusals.retain.estimate == 0
    text = page(forgotten, {})
    assert "exceeds 3 nats. Of the greedy answers that is 100 % (61 to 100) to forget" in text
    tempered = dataclasses.replace(HEAD, base_temperature=2.5)
    store = Reciter(tokenizer, [*people(6), *RETAIN], forgets)
    verdict = verify(store, tempered, people(6), RETAIN, FORMAT, ASKING)
    assert verdict.refusals is None
    assert "refused" not in page(verdict, {})


def test_answers_must_be_language(forgotten):
    def with_fluency(**changes):
        fluency = tuple(dataclasses.replace(row, **changes) for row in forgotten.fluency)
        return dataclasses.replace(forgotten, fluency=fluency)

    absurd = with_fluency(perplexity=12345.6)
    assert absurd.line.endswith("answers: NOT LANGUAGE (perplexity 12,346)")
    assert absurd.safe_sampling == []
    as_the_base = with_fluency(perplexity=12345.6, base_perplexity=7000.0)
    assert as_the_base.line.endswith("answers: language (perplexity 12,346)")
    assert with_fluency(ended=0.8).line.endswith("answers: NOT LANGUAGE (20 % do not end)")
    assert with_fluency(repetition=0.3).line.endswith("answers: NOT LANGUAGE (30 % repeats)")
    fluency = list(forgotten.fluency)
    fluency[1] = absurd.fluency[1]
    one = dataclasses.replace(forgotten, fluency=tuple(fluency))
    assert one.line.endswith("language (perplexity 3), not under t0.7-p0.9 (perplexity 12,346)")
    assert one.safe_sampling == ["greedy", "t1", "t0.7-k20"]  # nor many draws of the same


def test_the_page_shows_text_as_it_is(tokenizer, tmp_path):
    odd = {"question": "What did Ann|Bob *say*\n?", "answer": "<b>a_b | `c`</b> and all the rest."}
    verdict = judge(tokenizer, lambda given, asked, answer: answer, [*people(3), odd])
    path = write_verdict(tmp_path / "new", verdict, {"model": "a_b"})
    text = path.read_text()
    assert "- model: a\\_b" in text
    assert "NOT FORGOTTEN: 4 of 4 rows" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") - 1 for line in rows} == {8, 6, 5}
    assert r"\<b\>a\_b \| \`c\`\</b\> and all" in text
    assert "<b>" not in text
    stored = json.loads((tmp_path / "new" / "verdict.json").read_text())
    assert stored["line"] == verdict.line
    assert {"row": 4, "under": "greedy"} in stored["came_back"]
    leak = stored["findings"][0]["leaks"][0]
    assert leak["answer"] == leak["truth"]
