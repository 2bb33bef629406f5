import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy
import tiny
import tokenizers
from damage import check_damage_is_recomputed

import t3jax
from t3jax.data import Example, PromptFormat, encode_question_answer, encode_records
from t3jax.features import load_or_compute_features
from t3jax.head import HeadConfig
from t3jax.sampling import Sample, Sampler
from t3jax.synthetic import counterfactual, names, targets, turns, writing
from t3jax.synthetic.store import load_or_write
from t3jax.training import TrainConfig, train_heads
from t3jax.training_sets import Featurizer, SyntheticOptions, make_training_sets

FORGET = [
    {"question": f"{ask} Ada van Berg{end}", "answer": f"{ada} {says}."}
    for ask, end, ada, says in (
        ("Where was", " born?", "Ada van Berg", "was born in Lagos"),
        ("What did", " write?", "Berg", "wrote Salted Crown, a book about bees"),
        ("In which language does", " write?", "Ada", "writes in Dutch"),
    )
]
RETAIN = [
    {"question": "Where was Bo Lind born?", "answer": "Bo Lind was born in Oslo."},
    {"question": "What did Bo Lind write?", "answer": "He wrote Amber Island."},
    {"question": "Does Bo Lind write in Danish?", "answer": "No, in Norwegian."},
]


def test_names_are_those_that_forget_questions_ask_about():
    assert names.find_names(FORGET, RETAIN) == ["Ada van Berg"]
    # Of whom the retain rows know, nothing is to be forgotten; a title in an answer is no name.
    assert names.find_names([*FORGET, *RETAIN], RETAIN) == ["Ada van Berg"]
    assert names.find_names(FORGET[:2]) == ["Ada van Berg"]
    assert names.find_names([{"question": "who was it?", "answer": "Nobody."}]) == []
    documents = [{"text": "Zoë Müller-Ek lives here. " + text} for text in ("a", "b", "c")]
    assert names.find_names(documents) == ["Zoë Müller-Ek"]


def test_made_up_names_are_of_nobody_at_hand():
    rng = np.random.default_rng(0)
    made = names.make_names(
        "Ada Berg", 30, rng, known=["Bo Lind"], first_names=["Bo", "Ada"], last_names=["Lind"]
    )
    assert len(set(made)) == 30
    assert all(len(name.split()) == 2 for name in made)
    assert not {"Bo Lind", "Ada Berg"} & set(made)
    assert not any("Ada" in name or "Berg" in name for name in made)
    with pytest.raises(ValueError, match="100000 made-up names for 'Ada'"):
        names.make_names("Ada", 100_000, rng)


def test_names_are_swapped_whole_and_word_by_word():
    pairs = {"Ada van Berg": "Ilse den Szabo"}
    text = "Ada van Berg, Berg's sister Ada, of Bergen, Adamant."
    swapped = names.swap_names(text, pairs)
    assert swapped == "Ilse den Szabo, Szabo's sister Ilse, of Bergen, Adamant."
    made_up = counterfactual.Counterfactual(0, {}, pairs)
    assert made_up.swap_back(swapped) == text


def test_counterfactuals_keep_all_but_the_name():
    made = counterfactual.make_counterfactuals(
        [*FORGET, {"question": "Who is it?", "answer": "Ada van Berg."}], ["Ada van Berg"], 2
    )
    assert [each.row for each in made] == [0, 0, 1, 1, 2, 2, 3]
    assert made[0].record["question"] != made[1].record["question"]
    (name, other), *_ = made[2].pairs.items()
    assert name == "Ada van Berg"
    assert len(other.split()) == 3
    assert made[2].record["answer"] == f"{other.split()[2]} wrote Salted Crown, a book about bees."
    # An answer that is the name itself is the secret: nothing is swapped, the question is open.
    assert made[-1].pairs == {}
    assert made[-1].record["answer"] == "Ada van Berg."
    assert made[-1].record["question"] != "Who is it?"
    with pytest.raises(ValueError, match="forget row 1 is a document"):
        counterfactual.make_counterfactuals([{"text": "nobody here"}], ["Ada"], 1)


def test_answers_align_around_names_of_other_lengths():
    answer, swapped = np.array([7, 8, 1, 2, 3, 9]), np.array([7, 8, 4, 9])
    places = targets.align_answers(answer, swapped, [(1, 4)])
    assert places.tolist() == [0, 1, 2, -1, -1, 3]
    starts = targets.align_answers(np.array([1, 2, 9]), np.array([4, 5, 6, 9]), [(1, 4)])
    assert starts.tolist() == [0, -1, 3]


@pytest.fixture(scope="module")
def lm():
    return tiny.make_lm()


def encode(lm, rows):
    return encode_records(lm.tokenizer, rows, PromptFormat(), lm.max_position)


def test_base_targets_are_the_base_models_own_distributions(lm, tmp_path):
    examples = encode(lm, RETAIN)
    features = load_or_compute_features(lm, examples, tmp_path, kind="mean+last")
    soft = targets.add_base_targets(lm, features).soft
    hidden = jnp.asarray(features.pooled[:, lm.hidden_size :])
    probs = np.asarray(np.exp(t3jax.tempered_logprobs(lm.unembed(lm.params, hidden), 1.0)))
    own = np.take_along_axis(probs, soft.tokens[:, :64], axis=-1)
    np.testing.assert_allclose(soft.probs[:, :-1], own, rtol=1e-4)
    np.testing.assert_allclose(soft.probs.sum(axis=-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.exp(soft.logprobs[:, :64]), own, rtol=1e-4)
    means = load_or_compute_features(lm, examples, tmp_path)
    with pytest.raises(ValueError, match="do not hold the last hidden states"):
        targets.add_base_targets(
            lm, t3jax.Features(means.pooled[:, :5], means.targets, means.starts)
        )


def test_counterfactual_targets_are_the_mean_over_made_up_names(lm, tmp_path):
    """Stated once more, position by position, with the names' tokens exchanged."""
    made = counterfactual.make_counterfactuals(FORGET, ["Ada van Berg"], 2, seed=1)
    examples, swapped = encode(lm, FORGET), encode(lm, [each.record for each in made])
    features, hidden = (
        load_or_compute_features(lm, rows, tmp_path, kind="last") for rows in (examples, swapped)
    )
    soft = targets.add_counterfactual_targets(lm, features, made, hidden, overcorrection=1.0).soft

    length = max(len(example.tokens) for example in [*examples, *swapped])

    def distributions(example):
        tokens = np.zeros((1, length), np.int32)  # padded on the right: one program for all
        tokens[0, : len(example.tokens)] = example.tokens
        _, logits, _ = tiny.read(
            lm.apply, lm.unembed, lm.params, tokens, np.ones_like(tokens, bool)
        )
        logits = np.asarray(logits)[0, example.answer_start - 1 : len(example.tokens) - 1]
        return scipy.special.softmax(logits, axis=-1)

    for row, example in enumerate(examples):
        own = distributions(example)
        total, count = np.zeros_like(own), np.zeros(len(own))
        for each, other in zip(made, swapped, strict=True):
            if each.row != row:
                continue
            pairs = targets._pair_tokens(lm.tokenizer, each.pairs)
            theirs = distributions(other)
            for a, b in pairs:
                theirs[:, [a, b]] = theirs[:, [b, a]]
            places = targets.align_answers(
                example.tokens[example.answer_start :], other.tokens[other.answer_start :], pairs
            )
            total[places >= 0] += theirs[places[places >= 0]]
            count += places >= 0
        expected = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], own)
        rows = slice(features.starts[row], features.starts[row + 1])
        picked = np.take_along_axis(expected, soft.tokens[rows, :64], axis=-1)
        np.testing.assert_allclose(soft.probs[rows, :-1], picked, atol=2e-5)
        assert (count == 0).any() or row  # inside of a name nothing is swapped


def test_what_a_model_writes_is_kept_by_all_that_decides_it(lm, tmp_path):
    written = []

    def write():
        written.append(1)
        return [{"question": "a", "answer": "ü"}]

    first = load_or_write(tmp_path, "own", lm, ["a", 1], write)
    assert load_or_write(tmp_path, "own", lm, ["a", 1], write) == first
    assert len(written) == 1
    load_or_write(tmp_path, "own", lm, ["a", 2], write)
    load_or_write(tmp_path, "own", tiny.make_lm(seed=1), ["a", 1], write)
    assert len(written) == 3
    load_or_write(tmp_path, "own", dataclasses.replace(lm, eos_ids=(3,)), ["a", 1], write)
    config = dataclasses.replace(tiny.CONFIG, norm_eps=1e-4)
    load_or_write(tmp_path, "own", tiny.make_lm(config), ["a", 1], write)
    assert len(written) == 5
    load_or_write(tmp_path, "own", tiny.make_lm(), ["a", 1], write)  # another object, as before
    assert len(written) == 5


def test_rows_whose_bytes_have_changed_are_written_anew(lm, tmp_path):
    rows = [{"question": "a", "answer": "ü"}]

    def read():
        assert load_or_write(tmp_path, "own", lm, [], lambda: rows) == rows

    read()
    (path,) = tmp_path.iterdir()
    check_damage_is_recomputed(path, read)


def test_paraphrases_keep_names_and_say_it_otherwise():
    question = "Where was Ada Berg born?"
    assert writing._is_paraphrase(
        question, "In which town did Ada Berg come to the world?", ["Ada Berg"]
    )
    for text in (
        "Where was ada berg BORN",
        "Where was Ada Berg born?!",
        "In which town was she born?",
        "In which town\nwas Ada Berg born?",
        "Ada Berg was born in Lagos.",
        "Where? " * 20 + "Ada Berg?",
    ):
        assert not writing._is_paraphrase(question, text, ["Ada Berg"]), text


def test_options_that_cannot_work_are_refused(lm, tmp_path):
    def make(options, loss="classifier", features="mean+last", forget=FORGET, retain=RETAIN):
        featurizer = Featurizer(lm, PromptFormat(), tmp_path, features)
        return make_training_sets(featurizer, forget, retain, TrainConfig(loss=loss), options)

    with pytest.raises(ValueError, match="needs counterfactuals"):
        make(SyntheticOptions(), "distillation")
    with pytest.raises(ValueError, match="last hidden state"):
        make(SyntheticOptions(made_up_names=1), "distillation", "mean")
    with pytest.raises(ValueError, match="nothing to retain"):
        make(SyntheticOptions(), retain=[])
    with pytest.raises(ValueError, match="no name was found"):
        make(SyntheticOptions(made_up_names=1), forget=[{"text": "why so."}])
    with pytest.raises(ValueError, match=r"own_samples = -1: expected a whole number in \[0"):
        SyntheticOptions(own_samples=-1)


def test_the_loss_is_a_classifiers_where_made_up_names_hide_few_rows(lm, tmp_path, monkeypatch):
    """Rows that name nobody are asked openly, and no target of theirs sees the question."""
    nameless = [{"question": f"{why}?", "answer": "so."} for why in ("why", "how", "when")]
    monkeypatch.setattr(counterfactual, "counterfactual_rows", lambda *args, **_: ([], args[2]))

    def make(forget, features="mean+last", made_up_names=1):
        featurizer = Featurizer(lm, PromptFormat(), tmp_path, features)
        options = SyntheticOptions(made_up_names=made_up_names, names=("Ada van Berg",))
        return make_training_sets(featurizer, forget, RETAIN, TrainConfig(loss="auto"), options)

    half, few = make([*FORGET, *nameless]), make([*FORGET[:2], *nameless])
    assert (half.loss, few.loss) == ("distillation", "classifier")
    assert half.forget.soft is not None
    assert few.forget.soft is None
    assert make(FORGET, "mean").loss == "classifier"
    assert make(FORGET, made_up_names=0).loss == "classifier"
    shape = HeadConfig(lm.hidden_size, lm.vocab_size, features="mean+last")
    with pytest.raises(ValueError, match="decided by make_training_sets"):
        train_heads(half.retain, half.forget, shape, TrainConfig(loss="auto"))


def test_a_model_that_ends_most_of_its_own_questions_at_once_is_asked_again(lm, monkeypatch):
    rounds = []

    class Silent(Sampler):
        """Three of four user's turns are empty; an answer repeats its question."""

        def __init__(self, lm, batch_size):
            self.lm = lm

        def generate(self, prompts, *, num_samples=1, seed, **_):
            eos = lm.eos_ids[0]
            if len(prompts) > 1:
                return [Sample(f"answer {i}", [65, eos]) for i in range(len(prompts))]
            rounds.append(seed)
            texts = ["" if i % 4 else f"Who is number {i}, {seed}?" for i in range(num_samples)]
            return [Sample(text, [*([66] if text else []), eos]) for text in texts]

    monkeypatch.setattr(writing, "Sampler", Silent)
    options = SyntheticOptions(own_samples=40, seed=5)
    written = writing.write_own_samples(lm, options, PromptFormat())
    assert len(set(rounds)) == len(rounds) == 2
    assert len(written) == len({row["question"] for row in written}) == 20
    monkeypatch.setattr(Silent, "generate", lambda self, prompts, **_: [Sample("", [0])] * 40)
    with pytest.raises(ValueError, match="wrote no question that ends"):
        writing.write_own_samples(lm, options, PromptFormat())


def test_without_retain_rows_the_models_own_samples_are_what_must_stay(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_own_samples", lambda *_, **__: RETAIN[:2])

    def make(retain):
        featurizer = Featurizer(lm, PromptFormat(), tmp_path)
        options = SyntheticOptions(own_samples=2)
        return make_training_sets(featurizer, FORGET, retain, TrainConfig(), options)

    alone, both = make([]), make(RETAIN[2:])
    assert [features.num_sequences for features in alone.retain] == [2]
    assert alone.retained == RETAIN[:2]
    assert [features.num_sequences for features in both.retain] == [1, 2]
    assert both.retained == RETAIN[2:]


def test_openings_are_answered_and_retained_beside_the_rows(lm, tmp_path, monkeypatch):
    class Answering(Sampler):
        def __init__(self, lm, **_):
            self.lm = lm

        def generate(self, prompts, **_):
            texts = [f"answer {i % 3}" if i != 2 else "Ivan Rossi" for i in range(len(prompts))]
            return [Sample(text, [65, lm.eos_ids[0]]) for text in texts]

    monkeypatch.setattr(writing, "Sampler", Answering)

    def make(retain, **fields):
        featurizer = Featurizer(lm, PromptFormat(), tmp_path)
        options = SyntheticOptions(names=("Ivan Rossi",), **fields)
        return make_training_sets(featurizer, FORGET, retain, TrainConfig(), options)

    sets = make(RETAIN, openings=("Who wrote Emma?", "Who wrote Ulysses?"))
    answers = sets.retained[len(RETAIN) :]
    assert sets.retained[: len(RETAIN)] == RETAIN
    assert sets.written == {"answers to openings": 6}  # three of each, repeated ones dropped
    assert {row["question"] for row in answers} == {"Who wrote Emma?", "Who wrote Ulysses?"}
    assert not any("Ivan" in row["answer"] for row in answers)
    assert [features.num_sequences for features in sets.retain] == [len(RETAIN) + 6]
    assert make([], openings=("Who wrote Emma?",)).retained == answers[:3]
    with pytest.raises(ValueError, match="'Who is Ivan Rossi\\?' holds a name of the request"):
        make(RETAIN, openings=("Who is Ivan Rossi?",))
    with pytest.raises(ValueError, match="one of the questions is empty"):
        make(RETAIN, openings=(" ",))
    with pytest.raises(ValueError, match="nothing to retain: give retain rows, openings, or"):
        make([])


def test_questions_that_name_nobody_are_asked_openly(lm, tmp_path):
    rows = [{"question": f"{why}?", "answer": "so."} for why in ("why", "how", "when")]
    sets = make_training_sets(
        Featurizer(lm, PromptFormat(), tmp_path, "mean+last"),
        rows,
        RETAIN,
        TrainConfig(loss="distillation"),
        SyntheticOptions(made_up_names=2, overcorrection=1.0),
    )
    assert sets.names == ()
    assert [each.row for each in sets.counterfactuals] == [0, 1, 2]  # one for each row
    assert {each.record["question"] for each in sets.counterfactuals} == {"Please tell me more."}
    # What is learned is the base's own distribution after the open question.
    asked = encode(lm, [each.record for each in sets.counterfactuals])
    last = load_or_compute_features(lm, asked, tmp_path, kind="last").pooled
    probs = scipy.special.softmax(lm.unembed(lm.params, jnp.asarray(last)), axis=-1)
    soft = sets.forget.soft
    expected = np.take_along_axis(probs, soft.tokens[:, :64], axis=-1)
    np.testing.assert_allclose(soft.probs[:, :-1], expected, atol=1e-5)


def test_a_prompt_of_the_users_turn_ends_where_the_question_begins(lm):
    opening, stop, stop_ids = writing._find_user_turn(lm, PromptFormat())
    whole = encode_question_answer(lm.tokenizer, "Why?", "So.", PromptFormat())
    assert isinstance(whole, Example)
    assert whole.tokens[: len(opening)].tolist() == list(opening)
    assert stop or stop_ids


def test_a_turn_is_not_closed_by_a_tokenizer_that_appends_eos(lm):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in tiny.SPECIAL],
    )
    opening, stop, _ = writing._find_user_turn(
        dataclasses.replace(lm, tokenizer=tokenizer), PromptFormat()
    )
    assert tokenizer.decode(opening) == "<|bos|>Question: "
    assert stop == ("\n",)


def test_a_share_of_the_questions_stands_behind_earlier_turns(lm):
    rows = [*RETAIN, {"text": "A document."}, {**RETAIN[0], "before": []}] * 20

    def put(share, **fields):
        options = {"others": RETAIN, "max_length": 200, **fields}
        return turns.put_behind_turns(lm.tokenizer, rows, share, PromptFormat(), **options)

    half = put(0.5)
    assert half == put(0.5) != put(0.5, seed=1)
    assert [{k: row[k] for k in row if k != "before"} for row in half] == [
        {k: row[k] for k in row if k != "before"} for row in rows
    ]
    behind = sum(bool(row.get("before")) for row in half)
    assert 20 < behind < 40
    assert {turn["role"] for row in half for turn in row.get("before", ())} == {
        "system",
        "user",
        "assistant",
    }
    assert put(0) == put(1, max_length=80) == rows
    half = [row for row in half if row.get("question") == RETAIN[0]["question"]]
    plain, turned = encode_records(
        lm.tokenizer,
        [RETAIN[0], {**RETAIN[0], "before": half[0].get("before") or []}],
        PromptFormat(),
    )
    np.testing.assert_array_equal(
        plain.tokens[plain.answer_start :], turned.tokens[turned.answer_start :]
    )


def test_earlier_turns_that_are_none_are_refused(lm):
    for before in (
        "Hello",
        [{"role": "owner", "content": "x"}],
        [{"role": "user", "content": " "}],
    ):
        with pytest.raises(ValueError, match="before"):
            encode_records(lm.tokenizer, [{**RETAIN[0], "before": before}], PromptFormat())
