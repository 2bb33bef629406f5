"""A head's card: the `README.md` of a head folder, on the request, the training and the verdict.

The Hugging Face hub reads the front matter. Its fields `request`, `date` and `verdict` are JSON
strings, which are YAML too; `python -m t3jax.heads` reads them without a YAML library.
"""

import dataclasses
import datetime
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t3jax import files, hosts
from t3jax.head_io import Head

DEFAULT_LIMITS = (
    "Facts that were not listed stay known: another fact about the same person is still recited.",
    "The base model still knows everything: whoever has its weights has the data.",
    "Top-p or min-p decided on the base distribution brings the answers back.",
)
_NOT_RECORDED = "not recorded"


def write_card(
    folder: str | pathlib.Path,
    head: Head,
    *,
    request: str = "",
    verdict: str = "",
    limits: Sequence[str] = DEFAULT_LIMITS,
    date: datetime.date | None = None,
) -> None:
    """Writes a head's card atomically, in the place of an earlier one.

    The head's own files are not changed. `save_head` replaces the folder and the card with it.

    Args:
        folder: The head's folder, written by `save_head` or `save_reference_head`.
        head: The head. The card shows `training`, `sequences`, `tokens`, `features` and `digests`
            of its `record`, and "not recorded" for the missing ones. `digests` has those of the
            rows as `forget` and `retain`, and of the base model's weights as `model`.
        request: Name of the forget request. Markdown in this and the next two is escaped.
        verdict: A line on the verification; "" becomes "not verified".
        limits: Limits of the head, a sentence each.
        date: Date of the head, in UTC; None means today.

    Raises:
        FileNotFoundError: If the folder holds no head.
        OSError: If the disk is full or the folder cannot be written; the earlier card stays.
    """
    if not hosts.is_lead():
        return
    folder = pathlib.Path(folder)
    if not any((folder / name).is_file() for name in ("head.json", "config.json")):
        raise FileNotFoundError(f"{folder}: no head is there; save the head first, then its card")
    day = (date or datetime.datetime.now(datetime.UTC).date()).isoformat()
    verdict = verdict or "not verified"
    parts = [
        _front_matter(head, request, day, verdict),
        f"# A head that forgets: {_escape(request) or 'a request without a name'}",
        "A head of Temper-Then-Tilt ([arXiv 2602.10217](https://arxiv.org/abs/2602.10217)), to be "
        "served with the model below. It is meant to keep the model from reciting what the request "
        "lists; the verdict says whether it does. The model's weights are not part of it and did "
        "not change.",
        _table(("", ""), _summary(head, request, day, verdict)),
        "## Data",
        _table(
            ("", "texts", "answer tokens", "digest of the rows", "digest of features"), _data(head)
        ),
        "## Recipe",
        _table(("setting", "value"), _recipe(head)),
        "## Limits",
        "\n".join(map(_item, limits)),
        "## Serve",
        _serve(folder, head),
        "## Revoke",
        "Stop serving the head: delete this folder. Nothing in the model changed, so it answers as "
        "it did before the request.",
    ]
    with files.replacing(folder / "README.md") as temporary:
        # A name from a command line may hold bytes that are not text.
        temporary.write_bytes(("\n\n".join(parts) + "\n").encode("utf-8", "replace"))


def _front_matter(head: Head, request: str, day: str, verdict: str) -> str:
    model = [f"base_model: {_quote(head.model)}"] if head.model else []
    lines = [
        "library_name: t3jax",
        *model,
        "tags:",
        "- unlearning",
        "- temper-then-tilt",
        f"request: {_quote(request)}",
        f"date: {_quote(day)}",
        f"verdict: {_quote(verdict)}",
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(head: Head, request: str, day: str, verdict: str) -> Iterable[tuple[object, ...]]:
    yield "request", request or "without a name"
    yield "date (UTC)", day
    yield "verdict", verdict
    yield "model", head.model or _NOT_RECORDED
    yield "digest of the model's weights", _of(head.record, "digests").get("model")
    yield "base temperature T", head.base_temperature
    yield "guidance scale s", head.guidance_scale
    yield "class-prior shift", head.prior_shift


def _data(head: Head) -> Iterable[tuple[object, ...]]:
    for name in ("forget", "retain"):
        columns = ("sequences", "tokens", "digests", "features")
        yield name, *(_of(head.record, column).get(name) for column in columns)


def _recipe(head: Head) -> Iterable[tuple[object, ...]]:
    config = {"features": "mean", **dataclasses.asdict(head.config)}
    training = _of(head.record, "training") or {"training": None}
    for name, value in {**config, **training}.items():
        yield name.replace("_", " "), value


def _serve(folder: pathlib.Path, head: Head) -> str:
    model = head.model or "FOLDER_OR_HUB_ID_OF_THE_MODEL"
    load = f"t3jax.load_lm({model!r}), t3jax.load_head({folder.as_posix()!r})"
    return (
        "```python\n"
        "import t3jax\n"
        f"sampler = t3jax.Sampler({load})\n"
        'texts = sampler(["Who wrote ...?"])\n'
        "```"
    )


def _of(record: Mapping[str, object], name: str) -> Mapping[str, Any]:
    """A part of the record; empty if it is absent."""
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [[*map(_escape, map(_show, row))] for row in rows]
    return "\n".join(
        f"| {' | '.join(line)} |" for line in [list(header), ["---"] * len(header), *lines]
    )


def _show(value: object) -> str:
    match value:
        case None:
            return _NOT_RECORDED
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(map(_show, value))
    return str(value)


def _escape(text: str) -> str:
    """Text escaped for one line of Markdown, without control and direction characters."""
    visible = re.sub("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text)
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(visible.split()))


def _item(text: str) -> str:
    """Escaped text as an item; a number, plus or minus at its start would begin a nested list."""
    return "- " + re.sub(r"^(\d{1,9}(?=[.)])|(?=[-+]))", r"\1\\", _escape(text))


def _quote(text: str) -> str:
    r"""Text as a JSON string that is YAML too, with \uXXXX for characters that YAML forbids."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(
        c if c.isprintable() or c > "\uffff" else f"\\u{ord(c):04x}"
        for c in json.dumps(text, ensure_ascii=False)
    )
