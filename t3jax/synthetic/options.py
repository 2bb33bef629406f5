"""The options of the texts that the base model writes."""

import dataclasses
from typing import Annotated

from t3jax.ranges import COUNT, RATE, SEED, SHARE, Ranged, whole


@dataclasses.dataclass(frozen=True)
class SyntheticOptions(Ranged):
    """Texts that the base model writes for the training of its head.

    Attributes:
        own_samples: Chats of its own that it writes, a second retain source; 0: none.
        openings: Questions near the request, about what is to stay. It answers each several times,
            as further retain rows.
        made_up_names: Made-up people for each forget row; 0: no counterfactuals.
        names: Names of the request; empty: those that `find_names` finds.
        paraphrases: Paraphrases of each forget question that it writes; 0: none.
        earlier_turns: Share of the questions, of forget and of retain rows alike, that are trained
            behind an earlier turn of a conversation, see `turns.put_behind_turns`.
        overcorrection: How far a distilled head's targets are moved, see
            `distillation.overcorrect`.
        max_new_tokens: Longest text that it writes, tokens.
        batch_size: Texts that it writes together.
        seed: Seed of all samples.
    """

    own_samples: Annotated[int, whole(0, 10**7)] = 0
    openings: tuple[str, ...] = ()
    made_up_names: Annotated[int, whole(0, 10**4)] = 0
    names: tuple[str, ...] = ()
    paraphrases: Annotated[int, whole(0, 10**4)] = 0
    earlier_turns: Annotated[float, SHARE] = 0.0
    overcorrection: Annotated[float, RATE] = 1.15
    max_new_tokens: Annotated[int, COUNT] = 128
    batch_size: Annotated[int, COUNT] = 64
    seed: Annotated[int, SEED] = 0
