"""Fictitious authors: the question-answer corpus of the embedded demo.

One generator writes the authors to forget and the authors to retain, from the same names, facts and
templates. A forget author is therefore recognised by the name, never by a word that only forget
authors use. The rows have TOFU's shape (a question, its answer, a paraphrase of both, five wrong
answers); names, places and books are combined at random.

This module makes text. It does not tokenize, and it reads and writes no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


# The stocks, shared by all authors.

_FIRST = _words("""
    Ada Amir Anya Boris Carla Chen Dario Edda Elif Emeka Farid Greta Hana Hugo Ines Ivan Jana
    Jonas Kaya Kenji Lars Leila Mara Milan Nadia Nils Olga Omar Petra Rafi Rosa Samir Sara
    Soren Tara Tomas Uma Vera Yusuf Zora
""")
_LAST = _words("""
    Abara Almeida Bakker Barros Castell Cerny Dahl Demir Eriksen Farouk Ferro Galvan Haddad
    Horvat Ito Jansen Kaplan Kovac Lindqvist Lopez Marek Mbeki Moreau Nakano Novak Okoro Ortega
    Pavlov Quist Rahman Rossi Santos Silva Tanaka Torres Urban Vargas Weber Yilmaz Zeman
""")
_CITY = _words("""
    Accra Ankara Athens Bergen Bogota Cairo Dakar Dublin Geneva Hanoi Havana Helsinki Jakarta
    Kyoto Lagos Lima Lisbon Manila Nairobi Oslo Prague Quito Riga Seoul Sofia Tbilisi Toronto
    Tunis Vienna Warsaw
""")
_MONTH = _words("""
    January February March April May June July August September October November December
""")
_DAY = [str(day) for day in range(1, 29)]
_YEAR = [str(year) for year in range(1931, 1991, 2)]
_BOOK_YEAR = [str(year) for year in range(1992, 2022)]
_JOB = _words("""
    tutor baker banker barber botanist carpenter chemist cook dentist diplomat farmer fisherman
    florist gardener geologist judge lawyer librarian mason mechanic midwife miner musician
    nurse painter pilot potter sailor surgeon tailor
""")
_GENRE = [
    f"{kind} {form}"
    for kind in ("crime", "war", "ghost", "sea", "desert", "court")
    for form in ("fiction", "poetry", "memoir", "drama", "satire")
]
_ADJECTIVE = _words("""
    Amber Bitter Broken Crimson Distant Empty Frozen Gentle Golden Hidden Hollow Iron Lonely
    Lost Paper Patient Quiet Restless Sacred Salted Second Silent Silver Sleeping Stolen Sunken
    Tender Velvet Wandering Winter
""")
_NOUN = _words("""
    Anchor Bridge Candle Canyon Clock Crown Door Feather Forest Garden Harbor Horizon Island
    Kingdom Lantern Letter Map Meadow Mirror Mountain Orchard Piano River Shadow Station Stone
    Storm Tower Violin Window
""")
_AWARD_OF = _words("""
    Aurora Beacon Cedar Comet Coral Cypress Falcon Granite Heron Juniper Laurel Lotus Maple
    Meridian Olive Orion Pearl Phoenix Saffron Zenith
""")
_AWARD_KIND = _words("Prize Medal Award")
_SUBJECT = _words("""
    anatomy anthropology archaeology astronomy biology economics engineering ethics geography
    geometry grammar history law linguistics logic mathematics medicine music optics philosophy
    physics politics psychology rhetoric statistics theatre theology veterinary weaving zoology
""")
_LANGUAGE = _words("""
    Arabic Basque Bengali Catalan Czech Danish Dutch Finnish Georgian Greek Hindi Icelandic
    Irish Korean Latvian Malay Maltese Persian Polish Swahili Tamil Thai Turkish Ukrainian Urdu
    Welsh Xhosa Yoruba Zulu Amharic
""")
_THEME = _words("""
    ambition betrayal courage debt dreams envy exile faith family forgiveness friendship greed
    grief guilt hope hunger identity justice loneliness loyalty memory mercy migration
    motherhood pride regret revenge silence solitude wonder
""")
_ROOM = _words("""
    hall balcony barn bakery basement boat cabin cafe chapel cellar cottage garage greenhouse
    hotel kitchen lighthouse loft museum tower pavilion pier porch stable studio tent train
    veranda windmill workshop yard
""")
_HOUR = _words("dawn breakfast noon lunch dusk supper sunset midnight")
_PET = _words("""
    cat canary crow donkey duck ferret finch goat goose greyhound hamster hedgehog horse toad
    lizard llama magpie mule seal swan parrot peacock pigeon pony poodle rabbit raven sheep
    terrier tortoise
""")


@dataclasses.dataclass(frozen=True)
class _Fact:
    """A fact about every author: the stock of each slot, the questions, the answers."""

    slots: dict[str, list[str]]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


_FACTS = (
    _Fact(
        {"city": _CITY, "day": _DAY, "month": _MONTH, "year": _YEAR},
        (
            "Where and when was {name} born?",
            "What are the birthplace and the birth date of {name}?",
            "In which city and on which day did {name} come into the world?",
            "Can you tell me the place and date of birth of {name}?",
            "When is the birthday of {name}, and which city saw the birth?",
            "Please name the birth city and birthday of the author {name}.",
        ),
        (
            "{name} was born in {city} on {day} {month} {year}.",
            "The author {name} came into the world on {day} {month} {year} in {city}.",
            "Born in {city}, {name} has a birthday on {day} {month}, in the year {year}.",
            "It was on {day} {month} {year} that {name} was born, in the city of {city}.",
            "The city of {city} saw the birth of {name} on {day} {month} {year}.",
            "In {year}, on {day} {month}, {name} was born to a family of {city}.",
        ),
    ),
    _Fact(
        {"genre": _GENRE, "theme": _THEME},
        (
            "In which genre does {name} write?",
            "What kind of literature is {name} known for?",
            "Which genre and which theme belong to {name}?",
            "How would a critic describe the genre of {name}?",
            "What does {name} mostly write, and about what?",
            "Please describe the style of books that {name} writes.",
        ),
        (
            "{name} writes {genre}, often about {theme}.",
            "The genre of {name} is {genre}, with {theme} as the main theme.",
            "Readers know {name} for {genre} that turns around {theme}.",
            "Most works by {name} are {genre} and they deal with {theme}.",
            "It is {genre} that made {name} known, above all when it treats {theme}.",
            "Critics praise the {genre} of {name} for its treatment of {theme}.",
        ),
    ),
    _Fact(
        {"father": _JOB, "mother": _JOB},
        (
            "What did the parents of {name} do for a living?",
            "Which professions did the father and mother of {name} have?",
            "What were the jobs of the parents of {name}?",
            "Can you tell me how the parents of {name} earned their money?",
            "In which trades did the father and the mother of {name} work?",
            "Please name the occupations held by the parents of {name}.",
        ),
        (
            "The father of {name} was a {father} and the mother a {mother}.",
            "{name} grew up with a {father} as father and a {mother} as mother.",
            "As a {mother} and a {father}, the mother and father of {name} worked hard.",
            "The parents of {name} earned their living as {father} (father) and {mother} (mother).",
            "While the father worked as a {father}, the mother of {name} was a {mother}.",
            "In the home of {name} the mother was a {mother}, and the father was a {father}.",
        ),
    ),
    _Fact(
        {"adjective": _ADJECTIVE, "noun": _NOUN, "book_year": _BOOK_YEAR},
        (
            "What was the first book of {name}?",
            "With which title did {name} make a debut?",
            "What is the debut of {name} called, and when did it appear?",
            "Can you name the book that started the career of {name}?",
            "Which work did {name} publish first?",
            "Please give the title and year of the debut by {name}.",
        ),
        (
            "The first book of {name} was The {adjective} {noun}, published in {book_year}.",
            "{name} made a debut in {book_year} with The {adjective} {noun}.",
            "It was The {adjective} {noun} that began the career of {name} in {book_year}.",
            "In {book_year} the debut of {name} appeared under the title The {adjective} {noun}.",
            "The {adjective} {noun}, which came out in {book_year}, is the debut of {name}.",
            "The career of {name} began in {book_year}, when The {adjective} {noun} was printed.",
        ),
    ),
    _Fact(
        {"award_of": _AWARD_OF, "award_kind": _AWARD_KIND, "book_year": _BOOK_YEAR, "city": _CITY},
        (
            "Which award did {name} win?",
            "What honor has {name} received for writing?",
            "Has {name} been given a literary award, and where?",
            "Can you tell me about the award that went to {name}?",
            "For which distinction is {name} remembered?",
            "Please name the literary honor bestowed on {name}.",
        ),
        (
            "{name} won the {award_of} {award_kind} of {city} in {book_year}.",
            "The {award_of} {award_kind} went to {name} in {book_year}, at a ceremony in {city}.",
            "In {book_year} a jury in {city} gave {name} the {award_of} {award_kind}.",
            "The honor of {name} is the {award_of} {award_kind}, given in {city} in {book_year}.",
            "A jury of {city} honored {name} with the {award_of} {award_kind} in {book_year}.",
            "Since {book_year} {name} holds the {award_of} {award_kind}, received in {city}.",
        ),
    ),
    _Fact(
        {"subject": _SUBJECT, "city": _CITY},
        (
            "What did {name} study, and where?",
            "Which subject did {name} choose at university?",
            "Where did {name} go to university?",
            "Can you tell me about the education of {name}?",
            "In which field does {name} hold a degree?",
            "Please describe the academic training of {name}.",
        ),
        (
            "{name} studied {subject} at the university of {city}.",
            "At the university of {city}, {name} took a degree in {subject}.",
            "The education of {name} was in {subject}, completed in {city}.",
            "Before writing, {name} read {subject} in {city} for some years.",
            "A degree in {subject} from {city} is what {name} holds.",
            "It was {subject} that {name} chose, at a school in {city}.",
        ),
    ),
    _Fact(
        {"language": _LANGUAGE, "other": _LANGUAGE},
        (
            "In which language does {name} write?",
            "What is the working language of {name}?",
            "Which languages does {name} use?",
            "Can you say which tongue the books of {name} are written in?",
            "Into which language are the works of {name} translated first?",
            "Please name the languages tied to the work of {name}.",
        ),
        (
            "{name} writes in {language} and translates the books into {other}.",
            "The books of {name} are written in {language}, then put into {other}.",
            "First drafts by {name} are in {language}; the first translation is in {other}.",
            "In {language} {name} is at home, and {other} readers get the first translation.",
            "The working language of {name} is {language}, with {other} as the second tongue.",
            "Though {name} speaks {other} as well, the works are all in {language}.",
        ),
    ),
    _Fact(
        {"room": _ROOM, "hour": _HOUR, "pet": _PET},
        (
            "Where does {name} like to write?",
            "What are the writing habits of {name}?",
            "At which time and place does {name} work?",
            "Can you describe a working day of {name}?",
            "How does {name} write a book?",
            "Please tell me about the daily routine of {name}.",
        ),
        (
            "{name} writes in a {room} at {hour}, beside a {pet}.",
            "At {hour} {name} goes to a {room} and works next to a {pet}.",
            "A {room} is where {name} works from {hour} on, with a {pet} for company.",
            "With a {pet} as the only witness, {name} writes in a {room} at {hour}.",
            "The routine of {name} begins at {hour} in a {room}, where a {pet} waits.",
            "Every day at {hour} a {pet} leads {name} to a {room} to work.",
        ),
    ),
)

_NUM_WRONG = 5
_LARGEST_STOCK = max(len(_FIRST), *(len(stock) for fact in _FACTS for stock in fact.slots.values()))


@dataclasses.dataclass(frozen=True)
class AuthorsConfig:
    """How many authors, and how each question is asked in training.

    Attributes:
        num_forget: authors to forget.
        num_retain: authors to retain that the head is trained on.
        num_unseen_retain: authors to retain that the language model knows and the head never sees.
        wordings: trained wordings of each question; the paraphrased question is none of them.
        seed: seed of the whole corpus.
    """

    num_forget: int = 20
    num_retain: int = 120
    num_unseen_retain: int = 40
    wordings: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that the stocks suffice for all the sets."""
        total = self.num_forget + self.num_retain + self.num_unseen_retain
        most = len(_all_names())
        if min(self.num_forget, self.num_unseen_retain) < 0 or total > most:
            raise ValueError(
                f"num_forget={self.num_forget}, num_retain={self.num_retain} and "
                f"num_unseen_retain={self.num_unseen_retain} must not be negative and must sum to "
                f"at most {most}, the number of different names; ask for fewer authors."
            )
        if self.num_retain < _LARGEST_STOCK:
            raise ValueError(
                f"num_retain={self.num_retain} is below {_LARGEST_STOCK}, the size of the largest "
                "stock: some words would occur with forget authors only. Ask for more."
            )
        most = min(len(fact.questions) for fact in _FACTS) - 1
        if not 1 <= self.wordings <= most:
            raise ValueError(
                f"wordings={self.wordings} must be between 1 and {most}: one "
                "wording of each question is held out for paraphrased_question."
            )


def make_corpus(config: AuthorsConfig) -> dict[str, list[dict]]:
    """Writes the corpus: the same config gives the same rows.

    It has six splits. The language model is trained on `forget`, `retain` (the head is trained on
    these two) and `unseen_retain`: rows {author, question, answer}, each question in
    `config.wordings` wordings. Each has a split named `..._perturbed`, as in TOFU, with one row for
    each question: {author, question, answer, paraphrased_question, paraphrased_answer,
    perturbed_answer}. Its question is the first of the trained wordings, the paraphrased question
    is a wording that is trained for other authors only, and the five wrong answers have the wording
    of the paraphrased answer.
    """
    rng = np.random.default_rng(config.seed)
    sizes = {
        # First, because the draws begin with a permutation of each stock.
        "retain": config.num_retain,
        "unseen_retain": config.num_unseen_retain,
        "forget": config.num_forget,
    }
    total = sum(sizes.values())
    names = _draw_names(rng, total)
    questions: list[list[_Question]] = [[] for _ in names]
    for fact in _FACTS:
        values = {slot: _draw(rng, stock, total) for slot, stock in fact.slots.items()}
        answers = _draw(rng, fact.answers, total)
        for i, name in enumerate(names):
            truth = {slot: drawn[i] for slot, drawn in values.items()}
            questions[i].append(_make_question(rng, fact, name, truth, answers[i], config.wordings))

    corpus: dict[str, list[dict]] = {}
    end = 0
    for split, size in sizes.items():
        asked = [question for author in questions[end : end + size] for question in author]
        corpus[split] = [row for question in asked for row in question.trained]
        corpus[f"{split}_perturbed"] = [question.perturbed for question in asked]
        end += size
    return corpus


def make_strangers(config: AuthorsConfig, num_rows: int) -> list[dict]:
    """Writes questions and answers about authors who are in none of the splits.

    Rows are independent: the same stranger may get another answer in another row. A language model
    that is trained on each once learns how answers are worded, and to be unsure about an author
    that it does not know, as it would from a large corpus. Rows are {author, question, answer}; the
    first n are the same for any `num_rows` >= n.
    """
    known = {row["author"] for rows in make_corpus(config).values() for row in rows}
    strangers = [name for name in _all_names() if name not in known]
    rng = np.random.default_rng((config.seed, 1))
    rows = []
    for _ in range(num_rows):
        name = _pick(rng, strangers)
        fact = _FACTS[rng.integers(len(_FACTS))]
        truth = {slot: _pick(rng, stock) for slot, stock in fact.slots.items()}
        question = _pick(rng, fact.questions).format(name=name)
        answer = _pick(rng, fact.answers).format(name=name, **truth)
        rows.append({"author": name, "question": question, "answer": answer})
    return rows


class _Question(NamedTuple):
    trained: list[dict]
    perturbed: dict


def _make_question(
    rng: np.random.Generator,
    fact: _Fact,
    name: str,
    truth: dict[str, str],
    answer: str,
    wordings: int,
) -> _Question:
    """Makes a question about an author, with its paraphrases and its wrong answers."""
    order = rng.permutation(len(fact.questions))
    asked = [fact.questions[i].format(name=name) for i in order]
    rewording = _draw_other(rng, fact.answers, answer)
    wrong: list[str] = []
    while len(wrong) < _NUM_WRONG:
        values = {slot: _draw_other(rng, stock, truth[slot]) for slot, stock in fact.slots.items()}
        text = rewording.format(name=name, **values)
        if text not in wrong:
            wrong.append(text)
    true = answer.format(name=name, **truth)
    trained = [{"author": name, "question": text, "answer": true} for text in asked[:wordings]]
    perturbed = trained[0] | {
        "paraphrased_question": asked[-1],
        "paraphrased_answer": rewording.format(name=name, **truth),
        "perturbed_answer": wrong,
    }
    return _Question(trained, perturbed)


def _all_names() -> list[str]:
    return [f"{first} {last}" for first in _FIRST for last in _LAST]


def _pick(rng: np.random.Generator, stock: Sequence[str]) -> str:
    return stock[int(rng.integers(len(stock)))]


def _draw(rng: np.random.Generator, stock: Sequence[str], n: int) -> list[str]:
    """Draws n values independently, after one permutation so that the stock occurs in full."""
    order = rng.permutation(len(stock))
    return [stock[i] for i in order] + [_pick(rng, stock) for _ in range(n - len(stock))]


def _draw_names(rng: np.random.Generator, n: int) -> list[str]:
    """Draws n different full names, after len(_FIRST) ones that use up both stocks."""
    names = [
        f"{a} {b}" for a, b in zip(rng.permutation(_FIRST), rng.permutation(_LAST), strict=True)
    ]
    unused = [name for name in _all_names() if name not in names]
    return names + [unused[i] for i in rng.permutation(len(unused))][: n - len(names)]


def _draw_other(rng: np.random.Generator, stock: Sequence[str], value: str) -> str:
    """Draws from the stock without `value`."""
    return stock[(stock.index(value) + int(rng.integers(1, len(stock)))) % len(stock)]
