"""The options of the texts that the base model writes."""

import dataclasses

from t3jax.ranges import COUNT, RATE, SEED, SHARE, check_ranges, whole


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """What the base model writes for the training of its head.

    Attributes:
        own_samples: Chats of its own that it writes, a second retain source; 0: none.
        openings: Questions that it answers in the place of its own; None: it asks by itself.
        made_up_names: Made-up people for each forget row; 0: no counterfactuals.
        names: Names of the request; empty: those that `find_names` finds.
        paraphrases: Paraphrases of each forget question that it writes; 0: none.
        earlier_turns: Share of the questions, of forget and of retain rows alike, that are trained
            behind an earlier turn of a conversation, see `turns.put_behind_turns`.
        overcorrection: How far a distilled head's targets are moved, see
            `distillation.overcorrect`.
        max_new_tokens: Longest text that it writes, tokens.
        batch_size: Texts that it writes together.
        seed: Seed of all draws.
    """

    own_samples: int = 0
    openings: tuple[str, ...] | None = None
    made_up_names: int = 0
    names: tuple[str, ...] = ()
    paraphrases: int = 0
    earlier_turns: float = 0.0
    overcorrection: float = 1.15
    max_new_tokens: int = 128
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        check_ranges(
            self,
            own_samples=whole(0, 10**7),
            made_up_names=whole(0, 10**4),
            paraphrases=whole(0, 10**4),
            earlier_turns=SHARE,
            overcorrection=RATE,
            max_new_tokens=COUNT,
            batch_size=COUNT,
            seed=SEED,
        )
