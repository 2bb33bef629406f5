"""Evaluation by the config: question sets, stores, and the metrics of every setting."""

import dataclasses
import pathlib
from collections.abc import Sequence

from jax.sharding import Mesh

from t3jax.evaluation import log_files, logs, questions, tofu, unlearning
from t3jax.evaluation.logs import Log
from t3jax.evaluation.settings import Setting, settings_grid
from t3jax.evaluation.store import Store
from t3jax.head_io import Head
from t3jax.lm import LM, load_lm
from t3jax.pipeline.heads import refinements
from t3jax.settings import Settings

_RETAIN_MODEL = Setting("retain_model")


@dataclasses.dataclass(frozen=True, eq=False)
class Examined:
    """The models and the question sets of an evaluation.

    Attributes:
        store: Scores and answers of the model with its heads.
        retain_store: Scores and answers of the retain model, if it was named.
        sets: The question sets by key of `questions.SETS`.
    """

    store: Store
    retain_store: Store | None
    sets: dict[str, questions.QuestionSet]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        examined: The models and the question sets.
        settings: The settings, the base model first.
        logs: TOFU metrics by setting's name.
        unlearning: Metrics beyond TOFU's by setting's name.
        retain_log: TOFU metrics of the retain model, if there is one.
        retain_unlearning: Its metrics beyond TOFU's, if it was named.
        second_retain_log: TOFU metrics of another retain model, the noise floor.
        second_retain_unlearning: Its metrics beyond TOFU's, if the file is beside its log.
    """

    examined: Examined
    settings: list[Setting]
    logs: dict[str, Log]
    unlearning: dict[str, Log]
    retain_log: Log | None
    retain_unlearning: Log | None
    second_retain_log: Log | None = None
    second_retain_unlearning: Log | None = None


def settings(
    config: Settings,
    lm: LM,
    heads: Sequence[Head],
    groups: Sequence[tuple[int, ...]] | None = None,
    *,
    controls: bool,
) -> list[Setting]:
    """The settings of the method that `config.eval` lists, see `settings_grid`."""
    names = (config.eval.refinements or config.refinements).split(",")
    return settings_grid(
        heads,
        config.eval.base_temperatures,
        config.eval.guidance_scales,
        controls,
        [refinements(name, lm) for name in names],
        groups,
    )


def load_sets(config: Settings, lm: LM) -> dict[str, questions.QuestionSet]:
    """Loads and encodes the question sets, by key of `questions.SETS`; errors as there."""
    return questions.load_sets(
        {
            "forget": config.eval.forget,
            "retain": config.eval.retain,
            "ra": config.eval.real_authors,
            "wf": config.eval.world_facts,
            "holdout": config.eval.holdout,
        },
        lm.tokenizer,
        config.prompt_format,
        config.max_length or lm.max_position,
        config.tofu_dir,
        config.eval.rows,
    )


def examine(config: Settings, lm: LM, heads: Sequence[Head], mesh: Mesh | None = None) -> Examined:
    """Loads the question sets and the retain model, and opens the stores in `eval.dir`."""
    sets = load_sets(config, lm)
    folder = pathlib.Path(config["eval.dir"]) / "store"
    store = Store(lm, heads, folder, rows=config.rows, progress=True)
    retain_store = None
    if config.eval.retain_model is not None:
        retain_model = load_lm(config["eval.retain_model"], config.dtype, mesh)
        retain_store = Store(retain_model, (), folder, rows=config.rows, progress=True)
        unlearning.check_same_vocabulary(store, retain_store)
    return Examined(store, retain_store, sets)


def score(
    config: Settings, examined: Examined, settings: Sequence[Setting], *, answers: bool = True
) -> tuple[dict[str, Log], Log | None]:
    """Computes the TOFU metrics under some settings; writes logs to `eval.dir`.

    Without `answers` nothing is generated: ROUGE is missing, a setting takes seconds, and logs are
    in `scored` in `eval.dir`. Returns the logs by setting's name, and the retain model's log, if
    there is one.
    """
    folder = pathlib.Path(config["eval.dir"]) / ("" if answers else "scored")
    options = tofu.TofuOptions(config.sampling.max_new_tokens, config.eval.reference_mask, answers)
    retain_log = None
    if config.eval.retain_log is not None:
        retain_log = log_files.read_log(pathlib.Path(config["eval.retain_log"]))
    elif examined.retain_store is not None:
        retain_log = tofu.evaluate(
            examined.retain_store, examined.sets, [_RETAIN_MODEL], folder, options
        )[_RETAIN_MODEL.name]
    evaluated = tofu.evaluate(
        examined.store,
        examined.sets,
        settings,
        folder,
        options,
        retain_log=retain_log,
        retain_store=examined.retain_store,
    )
    return evaluated, retain_log


def evaluate(config: Settings, examined: Examined, settings: Sequence[Setting]) -> Evaluation:
    """Computes the TOFU metrics and those beyond under settings, the base model first.

    The results are written to `eval.dir` too.
    """
    second = _read_second_retain_logs(config.eval.second_retain_log)
    evaluated, retain_log = score(config, examined, settings)
    if second[0] is not None and retain_log is not None:
        logs.check_retain_log(second[0], retain_log)
    measured, retain_unlearning = measure(config, examined, settings)
    return Evaluation(
        examined, list(settings), evaluated, measured, retain_log, retain_unlearning, *second
    )


def _read_second_retain_logs(name: str | None) -> tuple[Log | None, Log | None]:
    """Reads the second retain model's log, and its metrics beyond TOFU's."""
    if name is None:
        return None, None
    path = pathlib.Path(name)
    beside = (path if path.is_dir() else path.parent) / log_files.UNLEARNING_NAME
    return log_files.read_log(path), log_files.read_log(beside) if beside.is_file() else None


def measure(
    config: Settings, examined: Examined, settings: Sequence[Setting]
) -> tuple[dict[str, Log], Log | None]:
    """Computes the metrics beyond TOFU's, see `evaluation.unlearning`; writes logs to `eval.dir`.

    Returns the logs by setting's name, and the retain model's log, if it was named.
    """
    store, retain_store, sets = examined.store, examined.retain_store, examined.sets
    options = dataclasses.replace(
        config.leaks,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.sampling.seed,
    )
    folder = pathlib.Path(config["eval.dir"])
    retain_unlearning = None
    if retain_store is not None:
        retain_unlearning = unlearning.measure(
            retain_store, sets, [_RETAIN_MODEL], folder, options, judge=store
        )[_RETAIN_MODEL.name]
    measured = unlearning.measure(store, sets, settings, folder, options, retain_store=retain_store)
    return measured, retain_unlearning
