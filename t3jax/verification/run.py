"""Asks base and unlearned model under all attacks, and judges the answers."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from t3jax.data.chat import PromptFormat
from t3jax.data.records import Record, evenly_spread
from t3jax.evaluation import metrics
from t3jax.evaluation.settings import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.sampling import Sample
from t3jax.synthetic import Counterfactual
from t3jax.verification.asking import Asking, VerifyOptions
from t3jax.verification.attacks import PREFIX, Attack, ask_once, words_of
from t3jax.verification.leaks import best_answers, find_leaks, group_answers
from t3jax.verification.others import Exchanged, Others
from t3jax.verification.verdict import (
    LOSS,
    SHORT,
    Changed,
    Finding,
    Leak,
    Retained,
    Verdict,
    wilson,
)


def verify(
    store: Store,
    setting: Setting,
    forget: Sequence[Record],
    retain: Sequence[Record],
    prompt_format: PromptFormat,
    options: VerifyOptions,
    *,
    rewordings: Mapping[str, Sequence[str]] | None = None,
    counterfactuals: Sequence[Counterfactual] = (),
) -> Verdict:
    """Asks the rows under all attacks and judges the answers."""
    asking = Asking(store, setting, options, prompt_format, rewordings or {})
    numbers = evenly_spread(range(len(forget)), options.rows)
    records = [forget[number] for number in numbers]
    attacks, skipped = asking.attacks(records, numbers)
    if not attacks:
        raise ValueError(f"no forget row can be asked: {skipped}")
    retain_numbers = evenly_spread(range(len(retain)), options.rows)
    names = [f"retain row {number + 1}" for number in retain_numbers]
    before = ask_once(asking.encoding, [retain[number] for number in retain_numbers], names)
    base, unlearned = (asking.answer([*attacks, before], model) for model in (BASE, setting))
    overlap = Others(records, retain, options.threshold)
    made_up = [swap for swap in counterfactuals if swap.row in numbers and swap.pairs]
    guesses = _guess(asking, made_up, overlap.exchange(records), numbers)
    findings = tuple(
        _judge(
            attack, base[attack.name], unlearned[attack.name], overlap, guesses, numbers, options
        )
        for attack in attacks
    )
    fluency, refusals = asking.judge_answers(attacks, before, base, unlearned)
    return Verdict(
        findings=findings,
        skipped=skipped,
        fluency=fluency,
        retain=_compare(before, base[before.name], unlearned[before.name], retain_numbers),
        refusals=refusals,
        rows=len(records),
        forget_rows=len(forget),
        retain_rows=len(retain),
        made_up=len({swap.row for swap in made_up}),
        threshold=options.threshold,
    )


def _guess(
    asking: Asking,
    made_up: Sequence[Counterfactual],
    exchanged: Sequence[Exchanged],
    numbers: Sequence[int],
) -> dict[tuple[str, int], list[float]]:
    """Recall of true answers in the base's about other names, by attack and number of the row."""
    guesses = asking.guess(made_up, "made-up")
    # Answers to other rows lack the wording that the first words give away.
    swapped = [dataclasses.replace(swap, row=numbers[swap.row]) for swap in exchanged]
    for key, recall in asking.guess(swapped, "exchanged", PREFIX).items():
        guesses.setdefault(key, []).extend(recall)
    return guesses


def _judge(
    attack: Attack,
    base: Sequence[Sample],
    unlearned: Sequence[Sample],
    overlap: Others,
    guesses: Mapping[tuple[str, int], Sequence[float]],
    numbers: Sequence[int],
    options: VerifyOptions,
) -> Finding:
    """Judges the answers to an attack."""
    answers = group_answers(attack, unlearned)
    pools, wording = overlap.recall(attack, answers), overlap.wording(attack)
    for i, row in enumerate(attack.rows):
        if guessed := guesses.get((attack.name, numbers[row])):
            # Guesses of the row itself measure chance better than answers to other rows. They
            # share its wording too, so these answers then measure the wording.
            wording[i] = max(pools[i], default=0.0)
            pools[i] = list(guessed)
    threshold, rows = options.threshold, len(attack.rows)
    of_base = find_leaks(attack, group_answers(attack, base), wording, pools, threshold)
    recall, best, leaks, chance = find_leaks(attack, answers, wording, pools, threshold)
    most = [max([shared, *pool]) for shared, pool in zip(wording.tolist(), pools, strict=True)]
    order = sorted(np.flatnonzero(leaks).tolist(), key=lambda i: (most[i] - recall[i], i))
    return Finding(
        name=attack.name,
        does=attack.does,
        rows=rows,
        short=sum(len(words_of(truth)) < SHORT for truth in attack.truths),
        reached=float((recall >= threshold).mean()),
        base=wilson(float(of_base.leaks.mean()), rows),
        unlearned=wilson(float(leaks.mean()), rows),
        chance=wilson(float(chance.mean()), rows),
        excess=metrics.bootstrap_difference(leaks, chance, level=0.9),
        leaks=tuple(
            Leak(
                numbers[attack.rows[i]] + 1,
                best[i][0],
                attack.truths[i],
                best[i][1].strip(),
                float(recall[i]),
                most[i],
            )
            for i in order
        ),
    )


def _compare(
    asked: Attack, base: Sequence[Sample], unlearned: Sequence[Sample], numbers: Sequence[int]
) -> Retained:
    """Compares the answers to retain rows."""
    before, base_best = best_answers(asked, group_answers(asked, base))
    after, unlearned_best = best_answers(asked, group_answers(asked, unlearned))
    lower = after < before - LOSS
    return Retained(
        rows=len(numbers),
        share=wilson(float(np.mean(~lower)), len(numbers)),
        base=float(before.mean()),
        unlearned=float(after.mean()),
        changed=tuple(
            Changed(
                numbers[i] + 1,
                base_best[i][0],
                base_best[i][1].strip(),
                unlearned_best[i][1].strip(),
                float(before[i]),
                float(after[i]),
            )
            for i in sorted(np.flatnonzero(lower).tolist(), key=lambda i: after[i] - before[i])
        ),
    )
