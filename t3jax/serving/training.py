"""Makes heads from rows to forget and checks them, with a model that is already loaded.

The features of the retain rows are computed once for all requests. Features and counterfactuals of
the rows to forget are stored in the folder of the request, and are deleted with them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from t3jax.data.chat import Example, PromptFormat
from t3jax.data.records import Record
from t3jax.evaluation.calibration import calibrate
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.head_io import Head
from t3jax.lm.model import LM
from t3jax.sampling.sampler import Sampler
from t3jax.synthetic import names as names_lib
from t3jax.synthetic import targets
from t3jax.training import TrainConfig, train_heads
from t3jax.training_sets import Featurizer, SyntheticOptions, TrainingSets, make_training_sets
from t3jax.verification.attacks import GREEDY, Encoding, Sampling
from t3jax.verification.reciting import DRAWN, prepare_asking

_HELD_OUT = 10  # every tenth retain row is held out from training for the check
_CHECKED_ROWS = 40
_DRAWS: dict[str, Sampling] = {"greedy": GREEDY, "t0.7-p0.9-x4": DRAWN}


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRecipe:
    """How a server makes heads.

    The features of the rows `retain` are stored in `feature_store`. `synthetic` are the texts that
    the base model writes; names are those of each request. Heads are served with `base_temperature`
    and `guidance_scale`. A head passes its check if a share of at most `most_leaks` of the rows
    leaks, in answers of at most `max_new_tokens`, and `Check.retained` is at least
    `least_retained`.
    """

    head: HeadConfig
    training: TrainConfig
    synthetic: SyntheticOptions
    prompt_format: PromptFormat
    retain: Sequence[Record]
    feature_store: pathlib.Path
    seed: int = 1
    base_temperature: float = 1.0
    guidance_scale: float = 1.0
    max_new_tokens: int = 64
    most_leaks: float = 0.1
    least_retained: float = 0.97


@dataclasses.dataclass(frozen=True)
class Check:
    """The check of a head on its forget rows and on held-out retain rows.

    Attributes:
        forget_probability: Mean probability of the forget answers, served.
        base_probability: The same under the base model.
        made_up_probability: The same under the base model asked about made-up names; None without.
        retained: Mean probability of held-out retain answers, served, over the base model's.
        leaks: Share of the forget rows that leak, for each way of drawing.
        base_leaks: The same for the base model.
        rows: Number of rows asked.
        passed: Whether leaks and retained are within the recipe's bounds.
        reasons: The bounds that are exceeded.
    """

    forget_probability: float
    base_probability: float
    made_up_probability: float | None
    retained: float
    leaks: dict[str, float]
    base_leaks: dict[str, float]
    rows: int
    passed: bool
    reasons: tuple[str, ...]


class HeadMaker:
    """Makes heads for one model."""

    def __init__(self, lm: LM, recipe: HeadRecipe, report: Callable[[str], None] | None = None):
        """Splits the retain rows; raises a ValueError if there are none."""
        if not recipe.retain:
            raise ValueError(
                "a server that takes requests to forget needs rows to retain: give --config.retain"
            )
        self.lm = lm
        self._featurizer = Featurizer(
            lm, recipe.prompt_format, recipe.feature_store, recipe.head.features
        )
        distilled = recipe.training.settle_loss("distillation")  # a classifier needs its own s
        self.recipe = dataclasses.replace(recipe, training=distilled)
        self.held_out = list(recipe.retain[::_HELD_OUT]) if len(recipe.retain) > 1 else []
        self.trained = [row for i, row in enumerate(recipe.retain) if i % _HELD_OUT]
        if not self.trained:
            self.trained = list(recipe.retain)
        self._report = report or (lambda _: None)
        self._retained: tuple[list[Record], Features] | None = None

    def prepare(self) -> None:
        """Samples texts from the base model, and computes the features of the retain rows."""
        if self._retained is not None:
            return
        recipe, options = self.recipe, self.recipe.synthetic
        rows = list(self.trained)
        if options.own_samples:
            self._report("the base model writes its own samples")
            rows += self._featurizer.load_retain_rows("own samples", options)
        if options.openings:
            self._report("the base model answers the openings")
            rows += self._featurizer.load_retain_rows("openings", options)
        self._report("features of the retain rows")
        turned = self._featurizer.turn(rows, rows, options.earlier_turns, (options.seed, 1))
        features = self._featurizer.compute("retain", turned)
        if recipe.training.loss == "distillation":
            features = targets.add_base_targets(
                self.lm,
                features,
                temperature=recipe.training.distilled_temperature,
                seed=options.seed,
            )
        self._retained = rows, features

    def make(
        self, rows: Sequence[Record], store: pathlib.Path, names: tuple[str, ...] = ()
    ) -> tuple[Head, TrainingSets]:
        """Makes a head for rows to forget; also returns its training sets, stored in `store`.

        Without `names` the people that the rows are about are searched for in them. A ValueError
        means that a row cannot be encoded or has no counterfactual, or that no retain row is left.
        """
        self.prepare()
        assert self._retained is not None
        recipe = self.recipe
        all_rows, features = self._retained
        count = len(self.trained)
        trained = _without(self.trained, rows)
        people = names or tuple(names_lib.find_names(rows, trained))
        forgotten = {_text(row) for row in rows}
        stay = [
            i
            for i, row in enumerate(all_rows)
            if _text(row) not in forgotten and (i < count or not _mentions(row, people))
        ]
        if not stay:
            raise ValueError("all retain rows are among the rows to forget; give other retain rows")
        self._report("counterfactuals and features of the rows to forget")
        sets = make_training_sets(
            dataclasses.replace(self._featurizer, store=store),
            rows,
            trained,
            recipe.training,
            dataclasses.replace(recipe.synthetic, own_samples=0, openings=(), names=people),
            retained=[features.select(stay)],
        )
        self._report("training")
        (head,) = train_heads(
            sets.retain,
            sets.forget,
            recipe.head,
            recipe.training,
            (recipe.seed,),
            mesh=self.lm.mesh,
            model=self.lm.name,
            base_temperature=recipe.base_temperature,
            guidance_scale=recipe.guidance_scale,
        )
        return head, sets

    def check(self, head: Head, rows: Sequence[Record], sets: TrainingSets) -> Check:
        """Checks a head on its rows and held-out retain rows, at the T and s of serving."""
        self._report("check")
        recipe = self.recipe
        by_row: list[list[Example]] = [[] for _ in rows]
        for swapped in sets.counterfactuals:
            if swapped.row < len(rows):
                by_row[swapped.row] += self._featurizer.encode([swapped.record])
        made_up = all(by_row)
        examples = self._featurizer.encode(rows)
        calibration = calibrate(
            self.lm,
            [head],
            examples,
            by_row if made_up else [[example] for example in examples],
            self._featurizer.encode(_without(self.held_out, rows) or _without(self.trained, rows)),
            grid=[(recipe.base_temperature, recipe.base_temperature * recipe.guidance_scale)],
        )
        leaks, base_leaks = self._count_leaks(head, rows)
        reasons = [
            f"{name}: {share:.2f} of the rows leak, at most {recipe.most_leaks:g} may"
            for name, share in leaks.items()
            if share > recipe.most_leaks
        ]
        if calibration.chosen.retained < recipe.least_retained:
            reasons.append(
                f"held-out retain answers keep {calibration.chosen.retained:.3f} of their "
                f"probability, at least {recipe.least_retained:g} is asked for"
            )
        return Check(
            forget_probability=calibration.chosen.forget_probability,
            base_probability=calibration.base_probability,
            made_up_probability=calibration.made_up_probability if made_up else None,
            retained=calibration.chosen.retained,
            leaks=leaks,
            base_leaks=base_leaks,
            rows=min(len(rows), _CHECKED_ROWS),
            passed=not reasons,
            reasons=tuple(reasons),
        )

    def _count_leaks(
        self, head: Head, rows: Sequence[Record]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Shares of rows that leak from the unlearned and from the base model."""
        recipe = self.recipe
        encoding = Encoding(
            self.lm.tokenizer, recipe.prompt_format, recipe.max_new_tokens, self.lm.max_position
        )
        ask = prepare_asking(encoding, rows, _without(self.trained, rows), _CHECKED_ROWS)
        sampler = Sampler(self.lm, head)
        served = {
            "base_temperature": recipe.base_temperature,
            "guidance_scale": recipe.guidance_scale,
        }
        leaks = {name: ask(sampler, draws, **served).recited for name, draws in _DRAWS.items()}
        base = ask(sampler, {}, base_temperature=1.0, guidance_scale=0.0)
        return leaks, {"greedy": base.recited}


def _without(rows: Sequence[Record], excluded: Sequence[Record]) -> list[Record]:
    texts = {_text(row) for row in excluded}
    return [row for row in rows if _text(row) not in texts]


def _mentions(row: Record, names: Sequence[str]) -> bool:
    return any(name.casefold() in _text(row) for name in names)


def _text(row: Record) -> str:
    fields = (str(row.get(field, "")) for field in ("question", "answer", "text"))
    return " ".join(" ".join(fields).casefold().split())
