"""Quick checks while T and s are chosen: are forget rows still recited, and do answers end?"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from t3jax.data.records import Record, evenly_spread
from t3jax.sampling import Sampler, SamplingOptions
from t3jax.verification.asking import VerifyOptions, share_ended
from t3jax.verification.attacks import SAMPLINGS, Encoding, Sampling, ask_once
from t3jax.verification.leaks import find_leaks, group_answers
from t3jax.verification.others import Others

RECALL = VerifyOptions.threshold
DRAWN: Sampling = types.MappingProxyType({**SAMPLINGS["t0.7-p0.9"][1], "num_samples": 4})


class Answered(NamedTuple):
    """Shares of the answers to forget rows.

    Attributes:
        recited: Share of the rows that leak, see `find_leaks`.
        ended: Share of the answers that end before the longest answer.
        rows: Number of rows.
    """

    recited: float
    ended: float
    rows: int


def prepare_asking(
    encoding: Encoding, forget: Sequence[Record], retain: Sequence[Record], most_rows: int
) -> Callable[..., Answered]:
    """Prepares to ask at most `most_rows` forget rows, evenly spread.

    The retain rows' answers measure chance. Returns a function of a sampler, fields of
    `SamplingOptions` (greedy without any), and T and s.
    """
    asked = evenly_spread(list(forget), most_rows)
    attack = ask_once(encoding, asked, [f"row {i + 1}" for i in range(len(asked))])
    overlap = Others(asked, retain, RECALL)
    wording = overlap.wording(attack)

    def ask(
        sampler: Sampler,
        draws: Mapping[str, Any],
        *,
        base_temperature: float,
        guidance_scale: float,
    ) -> Answered:
        options = SamplingOptions(max_new_tokens=encoding.max_new_tokens, **draws)
        samples = sampler.generate(
            attack.prompts,
            options,
            base_temperature=base_temperature,
            guidance_scale=guidance_scale,
        )
        tries = group_answers(attack, samples)
        pools = overlap.recall(attack, tries)
        leaks = find_leaks(attack, tries, wording, pools, RECALL).leaks
        return Answered(float(leaks.mean()), share_ended(samples, sampler.lm.eos_ids), len(leaks))

    return ask
