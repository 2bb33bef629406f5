"""A verdict for people: the page `verdict.md`, and every number in `verdict.json`."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping

from t3jax import files, hosts
from t3jax.evaluation.metrics import Interval
from t3jax.report.markdown import make_table
from t3jax.sampling.warn import ABSURD_PERPLEXITY
from t3jax.verification.verdict import (
    COMES_BACK,
    HOLDS,
    LOSS,
    MARGIN,
    SHORT,
    Finding,
    Leak,
    Verdict,
    enough_rows,
    number,
    percent,
)

PAGE_NAME, DATA_NAME = "verdict.md", "verdict.json"
_SHOWN = 20  # rows of a table of answers


def write_verdict(
    folder: str | os.PathLike[str], verdict: Verdict, described: Mapping[str, str]
) -> pathlib.Path:
    """Writes `verdict.md`, whose path it returns, and `verdict.json`.

    `described` lists model, head, T and so on, by label.
    """
    folder = pathlib.Path(folder)
    if hosts.is_lead():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(
            folder / DATA_NAME,
            {
                "line": verdict.line,
                "forgotten": verdict.forgotten,
                "doubts": verdict.doubts,
                "came_back": [
                    {"row": row, "under": name} for row, name in verdict.came_back.items()
                ],
                "retained": verdict.retained,
                "safe_sampling": verdict.safe_sampling,
                "judged": {finding.name: finding.judged for finding in verdict.findings},
                "described": dict(described),
                **dataclasses.asdict(verdict),
            },
        )
        files.write_text(folder / PAGE_NAME, page(verdict, described))
    return folder / PAGE_NAME


def page(verdict: Verdict, described: Mapping[str, str]) -> str:
    """The page in Markdown."""
    sections = [
        ("", f"**{_escape(verdict.line)}**"),
        ("", "\n".join(f"- {label}: {_escape(text)}" for label, text in described.items())),
        ("Does it come back?", _write_attacks(verdict)),
        ("Rows that leak", _write_leaks(verdict)),
        ("Is the rest as before?", _write_retained(verdict)),
        ("Are the answers language?", _write_fluency(verdict)),
        ("If such answers are refused", _write_refusals(verdict)),
        ("What this does not show", _list_limits(verdict)),
    ]
    parts = ["# Verdict"]
    for heading, body in sections:
        if body:
            parts += [f"## {heading}", body] if heading else [body]
    return "\n\n".join(parts) + "\n"


def _write_attacks(verdict: Verdict) -> str:
    rows = [
        [
            finding.name,
            _escape(finding.does),
            str(finding.rows),
            _share(finding.base),
            _share(finding.unlearned),
            _share(finding.chance),
            _show_judgement(finding),
            percent(finding.reached),
        ]
        for finding in verdict.findings
    ]
    reach = f"recall ≥ {verdict.threshold:g}"
    columns = ["attack", "asked", "rows", "base", "unlearned", "chance", "judged", reach]
    how = [
        f"{verdict.rows} of {verdict.forget_rows} forget rows were asked. The shares are of rows "
        "that leak, with 95 % intervals. A row leaks if an answer holds at least "
        f"{verdict.threshold:g} of the true answer (recall), and more of it than texts about "
        "others do, the names exchanged: the true answers of the retain rows most alike, and the "
        "answers to the forget rows most alike. The last column counts all answers of such recall; "
        "much of it may be wording that other rows share.",
        "Chance is how often the answer to another row leaks in the place of the row's own. Where "
        "first words are given, it is the base's answer with the same words about someone of the "
        "retain rows. "
        f"{_explain_made_up(verdict)}An attack holds if rows leak at most {_points(MARGIN)} more "
        "often than by chance. It comes back if they leak more often, and by more than rows vary, "
        "and is unclear otherwise.",
    ]
    if verdict.rows < enough_rows():
        how.append(
            f"A verdict needs {enough_rows()} rows: if none of fewer leaks, that does not show "
            f"that under {percent(MARGIN)} would. Ask more rows, or write more questions on what "
            "must be forgotten."
        )
    if short := max(finding.short for finding in verdict.findings):
        how.append(
            f"Of the true answers, up to {short} in an attack have fewer than {SHORT} words. Such "
            "an answer is often right by chance. Another row's answer may hold all of it too, and "
            "the row then does not count as leaking. Read its answers in person."
        )
    if verdict.skipped:
        skipped = "; ".join(f"{name} ({reason})" for name, reason in verdict.skipped.items())
        how.append(f"Not asked: {_escape(skipped)}.")
    return "\n\n".join([make_table(columns, rows), *how])


def _explain_made_up(verdict: Verdict) -> str:
    if not verdict.made_up:
        return ""
    return f"For {verdict.made_up} of the rows it is the base's answer about a made-up name. "


def _show_judgement(finding: Finding) -> str:
    if finding.judged == HOLDS and not finding.informative:
        return "holds, but so does the base"
    return f"**{finding.judged}**" if finding.judged == COMES_BACK else finding.judged


def _write_leaks(verdict: Verdict) -> str:
    leaks = [(finding, leak) for finding in verdict.findings for leak in finding.leaks]
    # A row that leaks under several attacks is shown once, with the clearest leak.
    leaks.sort(key=lambda pair: (pair[0].judged != COMES_BACK, pair[1].others - pair[1].recall))
    by_row: dict[int, list[tuple[Finding, Leak]]] = {}
    for pair in leaks:
        by_row.setdefault(pair[1].row, []).append(pair)
    rows = []
    for row, pairs in list(by_row.items())[:_SHOWN]:
        leak = pairs[0][1]
        rows.append(
            [
                str(row),
                ", ".join(finding.name for finding, _ in pairs),
                f"{leak.recall:.2f} ({leak.others:.2f})",
                _escape(leak.question),
                _escape(leak.truth),
                _escape(leak.answer),
            ]
        )
    if not rows:
        return ""
    columns = ["row", "under", "recall", "asked", "true answer", "answer"]
    note = _note_cut(
        len(by_row),
        "Question and answer are of the first attack named; in brackets, the recall of the text "
        "about others that has most. Rows under an attack that comes back are first.",
    )
    return f"{make_table(columns, rows)}\n\n{note}"


def _write_retained(verdict: Verdict) -> str:
    retain = verdict.retain
    text = (
        f"{retain.rows} of {verdict.retain_rows} retain rows were asked, answered by the likeliest "
        f"tokens. {_share(retain.share)} of the answers hold as much of the true one as the base's "
        f"do, or at most {LOSS:g} less. Mean recall: base {retain.base:.3f}, unlearned "
        f"{retain.unlearned:.3f}."
    )
    if not retain.changed:
        return text
    rows = [
        [
            str(changed.row),
            f"{changed.base_recall:.2f} → {changed.unlearned_recall:.2f}",
            _escape(changed.question),
            _escape(changed.base),
            _escape(changed.unlearned),
        ]
        for changed in retain.changed[:_SHOWN]
    ]
    columns = ["row", "recall", "asked", "base", "unlearned"]
    note = _note_cut(len(retain.changed), "The largest losses come first.")
    return f"{text}\n\n{make_table(columns, rows)}\n\n{note}"


def _write_fluency(verdict: Verdict) -> str:
    rows = [
        [
            fluency.name,
            f"{number(fluency.perplexity)} ({number(fluency.base_perplexity)})",
            f"{percent(fluency.ended)} ({percent(fluency.base_ended)})",
            f"{percent(fluency.repetition)} ({percent(fluency.base_repetition)})",
            f"**no: {fluency.wrong}**" if fluency.wrong else "yes",
        ]
        for fluency in verdict.fluency
    ]
    columns = ["sampling", "perplexity", "end in time", "repeats itself", "language"]
    return (
        f"{make_table(columns, rows)}\n\nAnswers to the forget rows: their median perplexity under "
        "the base, the share that ends before the longest answer, and the share of 4-word "
        "sequences that stood in the answer before; in brackets, those of the base's answers. As a "
        f"rule of thumb, language has a perplexity of at most {ABSURD_PERPLEXITY:g}, or twice the "
        f"base's own, and ends and repeats itself as the base does, give or take {_points(LOSS)}."
    )


def _write_refusals(verdict: Verdict) -> str:
    refusals = verdict.refusals
    if refusals is None:
        return ""
    return (
        "`refusal` puts a text of yours in the place of each answer whose log-likelihood ratio, "
        f"served over base, exceeds {refusals.threshold:g} nats. Of the greedy answers that is "
        f"{_share(refusals.forget)} to forget rows and {_share(refusals.retain)} to retain rows, "
        "the false alarms. An answer to a forget row that is not refused is the alternative answer."
    )


def _list_limits(verdict: Verdict) -> str:
    return "\n".join(
        [
            "- Other ways of asking. The attacks above are tried, and no others.",
            "- The same content in other words. An answer is compared with the true one by the "
            "words that both have, in order.",
            "- What the weights hold. They are the base's; who has them can leave the head out.",
            "- Text that is neither in the forget rows nor like the retain rows.",
            "- Rows that the head was not trained on, if these are its training rows. Name "
            "held-out rows as `retain` to see those.",
            "",
            "This page and its folder hold questions and answers of the forget rows: keep them as "
            "you keep those.",
        ]
    )


def _note_cut(count: int, note: str) -> str:
    return f"{note} {_SHOWN} of {count} are shown." if count > _SHOWN else note


def _share(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    return f"{percent(interval.estimate)} ({low:.0f} to {high:.0f})"


def _points(share: float) -> str:
    return f"{100 * share:.0f} points"


def _escape(text: str) -> str:
    """Escapes text for Markdown, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(text.split()))
