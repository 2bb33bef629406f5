"""Whether forget rows are still recited, and answers end: quick checks while T and s are chosen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from t3jax.data.records import Record, evenly_spread
from t3jax.sampling import Sampler, SamplingOptions
from t3jax.verification.asking import VerifyOptions, share_ended
from t3jax.verification.attacks import Encoding, as_they_stand
from t3jax.verification.leaks import find_leaks, group_answers
from t3jax.verification.others import Others

RECALL = VerifyOptions.threshold


class Answered(NamedTuple):
    """How forget rows are answered.

    Attributes:
        recited: Share of the rows that leak, see `find_leaks`.
        ended: Share of the answers that end before the longest answer.
    """

    recited: float
    ended: float


def prepare_asking(
    encoding: Encoding, forget: Sequence[Record], retain: Sequence[Record], most_rows: int
) -> Callable[..., Answered]:
    """Prepares at most `most_rows` forget rows, evenly spread, to be asked as they stand.

    The retain rows' answers show what chance would reach. The result is a function of a sampler,
    fields of `SamplingOptions` (greedy without any), and T and s.
    """
    asked = evenly_spread(list(forget), most_rows)
    attack = as_they_stand(encoding, asked, [f"row {i + 1}" for i in range(len(asked))])
    others = Others(asked, retain, RECALL)
    wording = others.wording(attack)

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
        pools = others.recall(attack, tries)
        leaks = find_leaks(attack, tries, wording, pools, RECALL).leaks
        return Answered(float(leaks.mean()), share_ended(samples, sampler.lm.eos_ids))

    return ask
