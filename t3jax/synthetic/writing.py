"""Texts that the base model writes: chats of its own, and paraphrases of questions.

Its own samples represent all that the model knows and must keep. Retain rows cover only a part of
it, and a request may come without any.
"""

import pathlib
import re
import warnings
from collections.abc import Sequence

from t3jax.data.chat import PromptFormat, encode_prompt, tokenize
from t3jax.data.records import Record
from t3jax.lm.model import LM
from t3jax.sampling.sampler import Sampler
from t3jax.synthetic.names import holds_name
from t3jax.synthetic.options import SyntheticOptions
from t3jax.synthetic.store import load_or_write

_TOP_P = 0.95  # the tail of the base model's own samples is noise
_MOST_ROUNDS = 8
_ANSWERS = 8  # to an opening
_REWORD = (
    "Write the following question in other words. Keep all names and ask for the same thing. "
    "Answer with the question alone.\n\n{question}"
)


def write_own_samples(
    lm: LM,
    options: SyntheticOptions,
    prompt_format: PromptFormat,
    *,
    names: Sequence[str] = (),
    progress: str | None = None,
) -> list[Record]:
    """Lets the base model write questions and answer them.

    It writes a user's turn from its start, then the answer. Chats that contain a name of the
    request, answers that do not end, and repeated rows are left out, so fewer rows are returned
    than `options.own_samples`.

    References:
        Questions from an empty user's turn: Magpie, arXiv 2406.08464.
    """
    sampler = Sampler(lm, batch_size=options.batch_size)
    limit = _longest(lm, options)
    label = progress and f"{progress}: questions"
    questions = _write_questions(
        sampler, options.own_samples, limit, prompt_format, options.seed, label
    )
    questions = [q for q in questions if not _holds_any(q, names)]
    if not questions:
        raise ValueError(
            f"{lm.name} wrote no question that ends and names nobody of the request; set "
            "own_samples = 0 and give your own questions as openings"
        )
    return _write_answers(
        sampler,
        questions,
        prompt_format,
        names,
        max_new_tokens=limit,
        seed=options.seed + 1,
        progress=progress and f"{progress}: answers",
    )


def answer_openings(
    lm: LM,
    options: SyntheticOptions,
    prompt_format: PromptFormat,
    *,
    names: Sequence[str] = (),
    progress: str | None = None,
) -> list[Record]:
    """Lets the base model answer each opening `_ANSWERS` times, at temperature 1.

    Answers that contain a name of the request or do not end, and repeated rows are left out. An
    opening with such a name is an error.
    """
    for opening in options.openings:
        if not opening.strip():
            raise ValueError("openings: one of the questions is empty")
        if _holds_any(opening, names):
            raise ValueError(
                f"the opening {opening!r} holds a name of the request; openings are about what is "
                "to stay"
            )
    return _write_answers(
        Sampler(lm, batch_size=options.batch_size),
        [opening for opening in options.openings for _ in range(_ANSWERS)],
        prompt_format,
        names,
        max_new_tokens=_longest(lm, options),
        seed=options.seed + 3,  # odd: the questions of own samples are drawn with even seeds
        progress=progress,
    )


def _longest(lm: LM, options: SyntheticOptions) -> int:
    return min(options.max_new_tokens, lm.max_position // 4)


def _holds_any(text: str, names: Sequence[str]) -> bool:
    return any(holds_name(text, name) for name in names)


def _write_answers(
    sampler: Sampler,
    questions: Sequence[str],
    prompt_format: PromptFormat,
    names: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    progress: str | None,
) -> list[Record]:
    """Rows of the questions and the base model's answers, those with a name left out."""
    lm = sampler.lm
    answers = sampler.generate(
        [encode_prompt(lm.tokenizer, question, prompt_format) for question in questions],
        temperature=1.0,
        top_p=_TOP_P,
        max_new_tokens=max_new_tokens,
        seed=seed,
        progress=progress,
    )
    rows = {}
    for question, sample in zip(questions, answers, strict=True):
        text = sample.text.strip()
        ended = bool(text) and sample.tokens[-1] in lm.eos_ids
        if ended and not _holds_any(text, names):
            rows[question, text] = {"question": question, "answer": text}
    if not rows:
        raise ValueError(
            f"{lm.name} ended none of {len(questions)} answers within {max_new_tokens} tokens; "
            "raise max_new_tokens"
        )
    return list(rows.values())


def _write_questions(
    sampler: Sampler,
    count: int,
    limit: int,
    prompt_format: PromptFormat,
    seed: int,
    progress: str | None,
) -> list[str]:
    """Writes user's turns that end and are not empty, `count` at most.

    A model that was trained on answers alone may end most of its user's turns at once. It writes
    again, `_MOST_ROUNDS` times at most, until it has half of the questions.
    """
    lm = sampler.lm
    opening, stop, stop_ids = _find_user_turn(lm, prompt_format)
    questions: list[str] = []
    for round_ in range(_MOST_ROUNDS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* answers are empty")  # they are questions
            drawn = sampler.generate(
                [opening],
                num_samples=count,
                temperature=1.0,
                top_p=_TOP_P,
                max_new_tokens=limit,
                stop=stop,
                stop_ids=stop_ids,
                seed=seed + 2 * round_,  # the answers are drawn with seed + 1
                progress=progress,
            )
        ended = [
            sample.text.strip()
            for sample in drawn
            if len(sample.tokens) < limit or sample.tokens[-1] in (*lm.eos_ids, *stop_ids)
        ]
        questions += [text for text in ended if text]
        if 2 * len(questions) >= count:
            break
    return questions[:count]


def load_retain_rows(
    kind: str,
    lm: LM,
    options: SyntheticOptions,
    people: Sequence[str] = (),
    *,
    prompt_format: PromptFormat,
    store: pathlib.Path | str,
    progress: bool = False,
) -> list[Record]:
    """Reads stored rows of a kind, or lets the base model write them.

    The kinds are "own samples" (`write_own_samples`) and "openings" (`answer_openings`). No answer
    contains a name of `people`.
    """
    requested: object = options.own_samples
    write = write_own_samples
    if kind == "openings":
        requested, write = options.openings, answer_openings
    depends_on = [
        tuple(people),
        requested,
        options.max_new_tokens,
        prompt_format,
        options.seed,
    ]
    return load_or_write(
        pathlib.Path(store) / "written",
        kind.replace(" ", "-"),
        lm,
        depends_on,
        lambda: write(
            lm, options, prompt_format, names=people, progress=kind if progress else None
        ),
    )


def reword_questions(
    lm: LM,
    questions: Sequence[str],
    options: SyntheticOptions,
    prompt_format: PromptFormat,
    *,
    names: Sequence[str] = (),
    progress: str | None = None,
) -> list[list[str]]:
    """Lets an instruct model paraphrase questions: up to `options.paraphrases` for each.

    A paraphrase is used if it keeps the names of the question, is one line, ends in a question mark
    where the question does, and is neither the question itself nor more than twice as long. Twice
    the wanted number is sampled.
    """
    count = options.paraphrases
    samples = Sampler(lm, batch_size=options.batch_size).generate(
        [
            encode_prompt(lm.tokenizer, _REWORD.format(question=question), prompt_format)
            for question in questions
        ],
        num_samples=2 * count,
        temperature=0.8,
        top_p=0.9,
        max_new_tokens=64,
        seed=options.seed,
        progress=progress,
    )
    paraphrases: list[list[str]] = []
    for i, question in enumerate(questions):
        present = [name for name in names if holds_name(question, name)]
        usable: list[str] = []
        for sample in samples[2 * count * i : 2 * count * (i + 1)]:
            text = sample.text.strip().strip('"').strip()
            if _is_paraphrase(question, text, present) and text not in usable:
                usable.append(text)
        paraphrases.append(usable[:count])
    return paraphrases


def _is_paraphrase(question: str, text: str, names: Sequence[str]) -> bool:
    words = len(text.split())
    return (
        "\n" not in text
        and re.sub(r"\W", "", text).casefold() != re.sub(r"\W", "", question).casefold()
        and (text.endswith("?") or not question.rstrip().endswith("?"))
        and 3 <= words <= 2 * len(question.split()) + 4
        and all(holds_name(text, name) for name in names)
    )


def _find_user_turn(
    lm: LM, prompt_format: PromptFormat
) -> tuple[list[int], tuple[str, ...], tuple[int, ...]]:
    """Tokens before a user's turn; the string, or the tokens, that end it."""
    tokenizer = lm.tokenizer
    if tokenizer.chat_template is None:
        start = prompt_format.question_start or tokenizer.bos_token or tokenizer.eos_token
        end = prompt_format.question_end.strip("\r ") or "\n"
        return tokenize(tokenizer, start).tolist(), (end,), ()
    mark = "a question to be written"
    ids = encode_prompt(tokenizer, mark, prompt_format)
    text = tokenizer.decode(ids)
    before, after = text[: text.index(mark)], text[text.index(mark) + len(mark) :]
    opening = tokenizer(before, add_special_tokens=False)["input_ids"]
    closing = tokenizer(after, add_special_tokens=False)["input_ids"]
    if closing and closing[0] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        return opening, (), (int(closing[0]),)
    return opening, tuple(s for s in [after.strip()[:16]] if s), ()
