"""People's names in rows of text: found, made up, swapped.

A name is a run of capitalised words. No names are found in scripts without capitals: the option
`names` gives them. Nothing here knows about tokens or models.
"""

import collections
import itertools
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from t3jax.data.records import Record

_JOINED = r"(?:al|bin|da|de|del|della|der|di|dos|el|ibn|la|le|ter|van|von)"
_CAPITALISED = r"[^\W\d_a-zà-öø-ÿ][\w'\u2019]*(?:-\w+)*"
_RUN = re.compile(rf"{_CAPITALISED}(?:[ ](?:{_JOINED}[ ])*{_CAPITALISED})*")
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_MOST_WORDS = 4
_MOST_MISSES = 1000  # known or repeated candidates in a row after which the stock is used up
_LEAST_ROWS = 3
_MOST_ALIKE = 5  # answers of the same wording for each row


def _words(text: str) -> list[str]:
    return text.split()


# Words that begin a question or a sentence, and are no part of the name after them.
_NO_NAMES = frozenset(
    _words("""
    A An And Are As At Based Because Before Both But By Can Could Dear Describe Despite Did Do
    Does Dr During Each Explain For From Give Had Has Have He Her His How However I If In Is It
    Its Let List Many Mr Mrs Ms Name No Not Of On Once One Or Our Out Over Please Prof She Since
    So Some Tell That The Their Then There These They This Those Though To Today Under Was We
    Were What When Where Which While Who Whom Whose Why Will With Would Yes You Your
""")
)
_FIRST_NAMES = _words("""
    Alba Anders Aurelio Beatriz Bogdan Celeste Corin Dagny Demir Eira Elio Fenna Florian Galina
    Gideon Halima Henrik Ilse Isandro Jovan Kalinda Karel Leander Liv Maren Mateus Nerea Noemi
    Odette Orfeo Pilar Quentin Ragna Renzo Sabine Silvan Thandi Tobias Ulrike Valentin Wanda
    Yara
""")
_LAST_NAMES = _words("""
    Abernathy Albrecht Barros Brandvold Castellane Corrigan Dahlberg Delacroix Eklund Espinoza
    Falkner Ferreira Galloway Grunewald Halvorsen Hartmann Ingram Jankowski Kessler Kowalczyk
    Lindgren Lombardi Maddox Marchetti Navarro Nyberg Okafor Ostrander Pemberton Petrov Quigley
    Ramires Rosenthal Sandoval Szabo Thorne Tremblay Underhill Valcourt Wexford Yilmaz Zielinski
""")


def find_names(forget: Sequence[Record], retain: Sequence[Record] = ()) -> list[str]:
    """Finds the names in the questions or documents of a request, the most frequent first.

    A name is in at least three forget rows, in at least a quarter as many as the most frequent
    name, and in no retain row. Names that occur in answers alone may be the secret itself, and are
    not searched for.
    """
    counts = collections.Counter(
        run for record in forget for run in set(_find_runs(asked_text(record))) if len(run) > 2
    )
    known = {run for record in retain for run in _find_runs(asked_text(record))}
    counts = collections.Counter({run: n for run, n in counts.items() if run not in known})
    if not counts:
        return []
    least = max(min(_LEAST_ROWS, len(forget)), counts.most_common(1)[0][1] / 4)
    frequent = [run for run, count in counts.most_common() if count >= least]
    names: list[str] = []
    for run in frequent:
        if not any(holds_name(run, name) or holds_name(name, run) for name in names):
            names.append(run)
    # A single word counts as a name only if there are no longer ones: it is often a topic.
    return [name for name in names if " " in name] or names


def make_names(
    name: str,
    count: int,
    rng: np.random.Generator,
    *,
    known: Collection[str] = (),
    first_names: Sequence[str] = (),
    last_names: Sequence[str] = (),
) -> list[str]:
    """Makes up the names of different people who do not occur in the data.

    A made-up name has as many words as the name it replaces. The first is drawn from `first_names`,
    the others from `last_names`, both with a stock of this module added. No name is one of `known`.
    """
    words = name.split()
    taken = {word.casefold() for word in words}
    firsts = [w for w in dict.fromkeys([*first_names, *_FIRST_NAMES]) if w.casefold() not in taken]
    lasts = [w for w in dict.fromkeys([*last_names, *_LAST_NAMES]) if w.casefold() not in taken]
    known = {text.casefold() for text in known}
    names: dict[str, None] = {}
    misses = 0
    while len(names) < count and misses < _MOST_MISSES:
        rest = rng.permutation(len(lasts))[: len(words) - 1]
        candidate = " ".join([firsts[rng.integers(len(firsts))], *(lasts[i] for i in rest)])
        misses += 1
        if candidate.casefold() not in known and candidate not in names:
            names[candidate] = None
            misses = 0
    if len(names) == count:
        return list(names)
    raise ValueError(
        f"{count} made-up names for {name!r} were asked for, {len(names)} could be made"
    )


def swap_names(text: str, pairs: Mapping[str, str]) -> str:
    """Swaps each name for its pair: whole names first, then each of their words alone.

    Both names of a pair have equally many words. Words of fewer than three letters and joining
    words such as "van" stay.
    """
    table = dict(pairs)
    for name, pair in pairs.items():
        for word, replacement in zip(name.split(), pair.split(), strict=True):
            if len(word) > 2 and not re.fullmatch(_JOINED, word):
                table.setdefault(word, replacement)
    if not table:
        return text
    longest_first = sorted(table, key=len, reverse=True)
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)"
    return re.sub(pattern, lambda match: table[match.group(1)], text)


def unique_wordings(
    forget: Sequence[Record], names: Sequence[str], retain: Sequence[Record] = ()
) -> set[int]:
    """Finds the forget questions whose wording, without the names, no other question has.

    A base model that has learned such a question by heart may recognise it without the name.
    """
    people: dict[str, set[tuple[str, ...]]] = {}
    for record in forget:
        if "question" in record:
            people.setdefault(_wording(record, names), set()).add(_named(record, names))
    shared = {_wording(record) for record in retain if "question" in record}
    return {
        row
        for row, record in enumerate(forget)
        if "question" in record
        and (text := _wording(record, names)) not in shared
        and len(people[text]) == 1
    }


def answers_alike(
    forget: Sequence[Record], names: Sequence[str], retain: Sequence[Record] = ()
) -> list[list[str]]:
    """Finds, for each forget row, true answers to questions of the same wording about others.

    The others' names are replaced by the row's own. At most `_MOST_ALIKE` for each row; none for a
    document. Such answers share words with the row's answer that are not secret.
    """
    wordings = [_wording(row, names) if "question" in row else None for row in forget]
    others: dict[str, list[tuple[str, str]]] = {text: [] for text in wordings if text is not None}
    for record in [*retain, *forget]:
        if "question" in record and (found := others.get(_wording(record, names))) is not None:
            found.append((_find_subject(record, names), record["answer"]))
    alike: list[list[str]] = []
    for record, text in zip(forget, wordings, strict=True):
        own = "" if text is None else _find_subject(record, names)
        apart = [
            rename(answer, person, own)
            for person, answer in (others[text] if text is not None and own else ())
            if person and not holds_name(own, person)
        ]
        alike.append(apart[:_MOST_ALIKE])
    return alike


def name_of(question: str, answer: str) -> str | None:
    """The name that a question is about: its longest run of capitalised words in the answer too."""
    words = [
        match
        # A possessive ends a name.
        for match in re.finditer(r"\w+(?:-\w+|['\u2019](?!s\b)\w+)*", question)
        if match.group()[0].isupper()
    ]
    best = ""
    for first in range(len(words)):
        for last in range(first, len(words)):
            between = question[words[last - 1].end() : words[last].start()]
            if last > first and not re.fullmatch(rf" (?:{_JOINED} )*", between):
                break
            text = question[words[first].start() : words[last].end()]
            if len(text) > len(best) and holds_name(answer, text):
                best = text
    return best or None


def rename(text: str, name: str, other: str) -> str:
    """Replaces a name in a text by another, whatever the case of its letters.

    Single words of the name are replaced too if both names have as many words.
    """
    renamed = {name.lower(): other}
    if len(words := name.lower().split()) == len(replacements := other.split()):
        renamed = dict(zip(words, replacements, strict=True)) | renamed
    pattern = "|".join(_match_whole(part) for part in sorted(renamed, key=len, reverse=True))
    return re.sub(
        pattern, lambda match: renamed.get(match.group().lower(), other), text, flags=re.IGNORECASE
    )


def _find_subject(record: Record, names: Sequence[str]) -> str:
    """The name that a question is about; "" if there is none."""
    named = _named(record, names)
    return named[0] if named else name_of(record["question"], record["answer"]) or ""


def _named(record: Record, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if holds_name(record["question"], name))


def _wording(record: Record, names: Sequence[str] = ()) -> str:
    """The question of a row with one blank for each name."""
    # `swap_names` needs as many words as the name has.
    blanks = {name: " ".join(["_"] * len(name.split())) for name in _named(record, names)}
    return _blank_names(swap_names(record["question"], blanks))


def _blank_names(text: str) -> str:
    """A text with one blank for each name."""
    blanked = _RUN.sub(" _ ", text).casefold()
    return re.sub(r"(?:_\s*)+", "_ ", " ".join(blanked.split())).strip()


def asked_text(record: Record) -> str:
    """The question of a row, or all of a document."""
    return str(record["text"] if "text" in record else record["question"])


def holds_name(text: str, name: str) -> bool:
    """Whether a text contains a name, as whole words."""
    # Most texts hold none of the names: the pattern is tried on the others.
    return name in text and re.search(_match_whole(name), text) is not None


def _match_whole(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def _find_runs(text: str) -> list[str]:
    """Runs of capitalised words, without the words that begin a sentence and are no name."""
    runs = []
    for match in _RUN.finditer(text):
        words = [_POSSESSIVE.sub("", word) for word in match.group().split()]
        words = list(itertools.dropwhile(lambda word: word in _NO_NAMES, words))
        if not words or len(words) > _MOST_WORDS:
            continue
        before = text[: match.start()].rstrip()
        # Any word is capitalised at the beginning of a sentence.
        if len(words) == 1 and (not before or before[-1] in ".?!\n:"):
            continue
        runs.append(" ".join(words))
    return runs
