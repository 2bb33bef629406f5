"""The stages of the scripts, as functions of their config: models, features, heads, evaluation.

`finetune.py`, `train_classifier.py`, `evaluate.py`, the demo, `t3jax.sweep` and `t3jax.study`
are these in turn. Everything here calls the library's functions with what the config says; there
is no mathematics.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from t3jax import checked, data, files, hosts
from t3jax.data.records import Record
from t3jax.digests import model_digest, params_digest, rows_digest
from t3jax.evaluation import log_files, logs, questions, tofu, unlearning
from t3jax.evaluation.calibration import Calibration, calibrate
from t3jax.evaluation.logs import Log
from t3jax.evaluation.settings import Setting, settings_grid
from t3jax.evaluation.store import Store
from t3jax.finetuning import FinetuneConfig, finetune
from t3jax.head import HeadConfig, class_prior_shift
from t3jax.head_io import Head, load_head
from t3jax.lm import LM, default_dtype, load_config, load_lm, save_hf
from t3jax.lm.adapter import save_adapter
from t3jax.lm.decoder import Lora
from t3jax.refinements import Refinements
from t3jax.sections import narrow
from t3jax.settings import Settings, replace
from t3jax.training import check_start
from t3jax.training_sets import SyntheticOptions, TrainingSets, make_training_sets


@dataclasses.dataclass(frozen=True, eq=False)
class Examined:
    """What is evaluated, and on what.

    Attributes:
        store: Scores and answers of the model with its heads.
        retain_store: Those of the retain model, if it was named.
        sets: The question sets by key of `questions.SETS`.
    """

    store: Store
    retain_store: Store | None
    sets: dict[str, questions.QuestionSet]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        examined: What was evaluated.
        settings: Under which settings, the base model first.
        logs: By setting's name, the TOFU metrics.
        unlearning: By setting's name, the numbers beyond them.
        retain_log: The retain model's TOFU metrics, if there is one.
        retain_unlearning: Its numbers beyond them, if it was named.
        second_retain_log: TOFU metrics of another retain model, the noise floor.
        second_retain_unlearning: Its numbers beyond them, if they lie beside its log.
    """

    examined: Examined
    settings: list[Setting]
    logs: dict[str, Log]
    unlearning: dict[str, Log]
    retain_log: Log | None
    retain_unlearning: Log | None
    second_retain_log: Log | None = None
    second_retain_unlearning: Log | None = None


def encode(config: Settings, lm: LM, source: str) -> list[data.Example]:
    """The rows of a source as tokens."""
    return encode_rows(config, lm, data.load_dataset(source, config.tofu_dir))


def encode_rows(config: Settings, lm: LM, rows: Sequence[Record]) -> list[data.Example]:
    """Rows as tokens."""
    return data.encode_records(
        lm.tokenizer, rows, config.prompt_format, config.max_length or lm.max_position
    )


def finetune_config(config: Settings) -> FinetuneConfig:
    """How a config says that a language model is fine-tuned."""
    return narrow(
        FinetuneConfig,
        config.finetune,
        dtype=config.dtype or default_dtype(),
        minnorm=config.minnorm if config.minnorm.share else None,
        tasks=len(config.finetune.data) if config.finetune.meta else None,
        reptile=config.finetune.meta == "reptile",
    )


def finetune_once(config: Settings, mesh: Mesh) -> pathlib.Path:
    """Fine-tunes the model of a config, or resumes that, and writes it as a Hugging Face folder.

    What was made before of the same model (weights, config and tokenizer, wherever they lie), the
    same data and by the same recipe is left as it is, once its files match their checksums.

    Args:
        config: The settings.
        mesh: Where to train.

    Returns:
        The folder, `model` in the config's `finetune.workdir`.

    Raises:
        ValueError: As `finetune`, or as loading the model or the data; or a file of the folder is
            not as it was written.
    """
    recipe = finetune_config(config)
    workdir = pathlib.Path(config["finetune.workdir"])
    made_by: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "format": dataclasses.asdict(config.prompt_format),
        **{
            f"finetune_{name}": [[each, _digest(config, each)] for each in sources]
            for name, sources in (
                ("data", config.finetune.data),
                ("validation", config.finetune.validation),
            )
        },
    }
    # What is trained is float32; weights that LoRA leaves alone need not be.
    lm = load_lm(config["model"], recipe.dtype if recipe.freezes_weights else "float32", mesh)
    made_by["model"] = model_digest(lm)
    record = workdir / "model" / "finetuning.json"
    made_by = json.loads(json.dumps(made_by))  # as it is read back
    if hosts.of_lead(hosts.is_lead() and _was_made_by(record, made_by)):
        return record.parent
    lm_config = load_config(config["model"])

    def write_adapter(lora: Lora) -> None:
        try:
            with files.replacing_folder(workdir / "adapter") as folder:
                save_adapter(
                    folder, lm_config, lora, recipe.lora_rank, recipe.lora_alpha, config["model"]
                )
        except ValueError as error:  # the merged model is written all the same
            print(f"no adapter is written: {error}")

    tasks = [encode(config, lm, source) for source in config.finetune.data]
    params = finetune(
        lm_config,
        lm.params,
        tasks if recipe.tasks else list(itertools.chain(*tasks)),
        recipe,
        validation=[
            row for source in config.finetune.validation for row in encode(config, lm, source)
        ],
        workdir=workdir,
        mesh=mesh,
        progress="fine-tuning",
        on_lora=write_adapter,
    )
    dtype = params["embed"]["weight"].dtype
    params = hosts.fetch_to_lead(params)
    if hosts.is_lead():
        with files.replacing_folder(workdir / "model") as folder:
            save_hf(folder, lm_config, params, list(lm.eos_ids), dtype)
            lm.tokenizer.save_pretrained(folder)
            sums = {
                str(path.relative_to(folder)): checked.file_checksum(path)
                for path in folder.rglob("*")
                if path.is_file()
            }
            checked.write_json(folder / record.name, {"made_by": made_by, "files": sums})
    hosts.wait_for(record)
    return record.parent


def _was_made_by(record: pathlib.Path, made_by: dict[str, Any]) -> bool:
    """Whether a fine-tuned folder was made of the same by the same, and is as it was written."""
    made = checked.read_stored(record, checked.read_json)
    if made is None or made["made_by"] != made_by:
        return False
    for name, checksum in made["files"].items():
        path = record.parent / name
        if not path.is_file() or checked.file_checksum(path) != checksum:
            raise ValueError(
                f"{path} is not the file that fine-tuning wrote (damaged, changed or missing); "
                f"remove {record.parent} to have it written anew from the run's last checkpoint"
            )
    return True


def _digest(config: Settings, source: str) -> str:
    return rows_digest(data.load_dataset(source, config.tofu_dir))


def digests(config: Settings, lm: LM) -> dict[str, str]:
    """Digests of the forget rows, the retain rows and the model's weights, for a head's card."""
    sources = {name: config[name] for name in ("forget", "retain") if config[name] is not None}
    rows = {name: _digest(config, source) for name, source in sources.items()}
    return rows | {"model": params_digest(lm.params)}


def synthetic_options(config: Settings) -> SyntheticOptions:
    """What a config lets the base model write for the training of its head."""
    return dataclasses.replace(
        config.synthetic, max_new_tokens=config.sampling.max_new_tokens, batch_size=config.rows
    )


def training_sets(config: Settings, lm: LM) -> TrainingSets:
    """The sets that a head of a config is trained on, computed or read from the feature store."""
    return make_training_sets(
        lm,
        data.load_dataset(config["forget"], config.tofu_dir),
        data.load_dataset(config["retain"], config.tofu_dir) if config.retain is not None else [],
        config.train,
        synthetic_options(config),
        prompt_format=config.prompt_format,
        features=config.classifier.features,
        feature_dtype=config.classifier.feature_dtype,
        feature_store=config.feature_store,
        max_length=config.max_length,
        progress=True,
    )


def settle_loss(config: Settings, sets: TrainingSets) -> Settings:
    """The settings with the loss that the sets are made for in the place of "auto"."""
    if config.train.loss == "auto":
        why = "" if sets.loss == "distillation" else ": made-up names hide too few of the rows"
        print(f"loss: {sets.loss}{why}")
    return replace(config, **{"train.loss": sets.loss})


def head_config(config: Settings, lm: LM) -> HeadConfig:
    """The head that a config describes, for a model."""
    return narrow(
        HeadConfig, config.classifier, hidden_size=lm.hidden_size, vocab_size=lm.vocab_size
    )


def start_head(config: Settings, shape: HeadConfig) -> Head | None:
    """The head in a config's `classifier.init`, at which training starts.

    Args:
        config: The settings.
        shape: The shape of the heads that are trained.

    Returns:
        The head; None where the field is unset.

    Raises:
        FileNotFoundError: If there is no head.
        ValueError: If it is damaged, or of another shape or kind than the config's.
    """
    if config.classifier.init is None:
        return None
    head = load_head(config.classifier.init)
    try:
        check_start(head.config, shape)
    except ValueError as error:
        raise ValueError(f"config.classifier.init = {config.classifier.init!r}: {error}") from error
    return head


def head_defaults(config: Settings) -> dict[str, Any]:
    """What a trained head keeps of a config: the model, and T, s and class prior where set."""
    knobs = {name: config[name] for name in ("base_temperature", "guidance_scale")}
    if config.train.loss == "distillation" and knobs["base_temperature"] is None:
        knobs["base_temperature"] = config.train.distilled_temperature
    if config.forget_fraction is not None:
        knobs["prior_shift"] = class_prior_shift(config.forget_fraction)
    return {"model": config.model} | {name: x for name, x in knobs.items() if x is not None}


def choose_setting(
    config: Settings, lm: LM, heads: Sequence[Head], sets: TrainingSets
) -> list[Head]:
    """Gives heads T and s where the config leaves them open and there are counterfactuals.

    See `t3jax.evaluation.calibration`. All heads get the setting chosen for the first.

    Args:
        config: The settings.
        lm: The model.
        heads: Heads that differ in their seed or recipe.
        sets: What they were trained on.

    Returns:
        The heads, with what was chosen in their record.
    """
    open_fields = config.base_temperature is None and config.guidance_scale is None
    if not open_fields or not sets.counterfactuals:
        return list(heads)
    calibration = calibrate_heads(config, lm, heads[:1], sets)
    print(calibration, flush=True)
    chosen = calibration.chosen
    return [
        dataclasses.replace(
            head,
            base_temperature=chosen.base_temperature,
            guidance_scale=chosen.guidance_scale,
            record=head.record | {"calibration": dataclasses.asdict(calibration)},
        )
        for head in heads
    ]


def calibrate_heads(
    config: Settings, lm: LM, heads: Sequence[Head], sets: TrainingSets, seeds: int = 1
) -> Calibration:
    """Compares heads and settings with the made-up-name level, see `calibrate`.

    Args:
        config: The settings. A distilled head is tried at the T that it was trained for alone.
        lm: The model.
        heads: The heads.
        sets: What they were trained on, with counterfactuals.
        seeds: See `calibrate`.

    Returns:
        The choice.
    """
    swapped = encode_rows(config, lm, [each.record for each in sets.counterfactuals])
    of_row: list[list[data.Example]] = [[] for _ in sets.rows]
    for each, example in zip(sets.counterfactuals, swapped, strict=True):
        of_row[each.row].append(example)
    distils = config.train.loss == "distillation"
    return calibrate(
        lm,
        heads,
        encode_rows(config, lm, sets.rows),
        of_row,
        encode_rows(config, lm, sets.retained),
        refinements=refinements(config.refinements, lm),
        seeds=seeds,
        **({"temperatures": (config.train.distilled_temperature,)} if distils else {}),
    )


def settings(
    config: Settings,
    lm: LM,
    heads: Sequence[Head],
    groups: Sequence[tuple[int, ...]] | None = None,
    *,
    controls: bool,
) -> list[Setting]:
    """The settings that a config asks for, see `settings_grid`."""
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
    """The question sets of a config, encoded, by key of `questions.SETS`.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is bad.
    """
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
    """Loads what an evaluation needs beside the model: the question sets and the retain model.

    Args:
        config: The settings; what is computed is kept in its `eval.dir`.
        lm: The model.
        heads: The heads; settings refer to them by index.
        mesh: Where the retain model goes.

    Returns:
        What is needed.

    Raises:
        ValueError: If a file is bad, or the retain model has another tokenizer.
    """
    sets = load_sets(config, lm)
    kept: dict[str, Any] = {
        "folder": pathlib.Path(config["eval.dir"]) / "store",
        "rows": config.rows,
        "progress": True,
    }
    store = Store(lm, heads, **kept)
    retain_store = None
    if config.eval.retain_model is not None:
        retain_store = Store(load_lm(config["eval.retain_model"], config.dtype, mesh), **kept)
        unlearning.check_same_vocabulary(store, retain_store)
    return Examined(store, retain_store, sets)


def score(
    config: Settings, examined: Examined, settings: Sequence[Setting], *, answers: bool = True
) -> tuple[dict[str, Log], Log | None]:
    """The TOFU metrics of a model under some settings.

    Args:
        config: The settings; logs go to its `eval.dir`.
        examined: What to evaluate.
        settings: Under which settings.
        answers: Whether to generate answers; without them, ROUGE is missing and a setting costs
            seconds. Logs then go to `scored` in the `eval.dir`.

    Returns:
        Logs by setting's name, and the retain model's, if there is one.

    Raises:
        ValueError: If the retain log is of other rows, or a score is not finite.
    """
    folder = pathlib.Path(config["eval.dir"]) / ("" if answers else "scored")
    options = tofu.TofuOptions(config.sampling.max_new_tokens, config.eval.reference_mask, answers)
    retain_log = None
    if config.eval.retain_log is not None:
        retain_log = log_files.read_log(pathlib.Path(config["eval.retain_log"]))
    elif examined.retain_store is not None:
        itself = Setting("retain_model")
        found = tofu.evaluate(examined.retain_store, examined.sets, [itself], folder, options)
        retain_log = found[itself.name]
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
    """Evaluates a model under some settings: the TOFU metrics, and the numbers beyond them.

    Args:
        config: The settings; results go to its `eval.dir`.
        examined: What to evaluate.
        settings: Under which settings, the base model first.

    Returns:
        The results, which are also on disk.

    Raises:
        ValueError: As `score`.
    """
    second = _second_retain_logs(config.eval.second_retain_log)
    evaluated, retain_log = score(config, examined, settings)
    if second[0] is not None and retain_log is not None:
        logs.check_retain_log(second[0], retain_log)
    measured, retain_unlearning = measure(config, examined, settings)
    return Evaluation(
        examined, list(settings), evaluated, measured, retain_log, retain_unlearning, *second
    )


def _second_retain_logs(name: str | None) -> tuple[Log | None, Log | None]:
    """The log of the second retain model, and what was measured beyond it."""
    if name is None:
        return None, None
    path = pathlib.Path(name)
    beside = (path if path.is_dir() else path.parent) / log_files.UNLEARNING_NAME
    return log_files.read_log(path), log_files.read_log(beside) if beside.is_file() else None


def measure(
    config: Settings, examined: Examined, settings: Sequence[Setting]
) -> tuple[dict[str, Log], Log | None]:
    """The numbers beyond the TOFU metrics, see `t3jax.evaluation.unlearning`.

    Args:
        config: The settings; logs go to its `eval.dir`.
        examined: What to evaluate.
        settings: Under which settings.

    Returns:
        Logs by setting's name, and the retain model's, if it was named.

    Raises:
        ValueError: If a score is not finite.
    """
    store, retain_store, sets = examined.store, examined.retain_store, examined.sets
    beyond = dataclasses.replace(
        config.leaks,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.sampling.seed,
    )
    folder = pathlib.Path(config["eval.dir"])
    retain_unlearning = None
    if retain_store is not None:
        itself = Setting("retain_model")
        retain_unlearning = unlearning.measure(
            retain_store, sets, [itself], folder, beyond, judge=store
        )[itself.name]
    measured = unlearning.measure(store, sets, settings, folder, beyond, retain_store=retain_store)
    return measured, retain_unlearning


def load_heads(
    config: Settings, names: Sequence[str], mesh: Mesh
) -> tuple[list[str], list[Head], list[tuple[int, ...]]]:
    """Loads the heads that a config names, with its class prior where it has one.

    Args:
        config: The settings.
        names: Head folders; "FOLDER,FOLDER" are several that are served together.
        mesh: Where to.

    Returns:
        The folders, each once; their heads; and for each name the indices of its heads.
    """
    groups = [name.split(",") for name in names]
    folders = list(dict.fromkeys(folder for group in groups for folder in group))
    heads = [load_head(folder, mesh) for folder in folders]
    if config.forget_fraction is not None:
        shift = class_prior_shift(config.forget_fraction)
        heads = [dataclasses.replace(head, prior_shift=shift) for head in heads]
    return folders, heads, [tuple(map(folders.index, group)) for group in groups]


def refinements(name: str, lm: LM) -> Refinements:
    """Refinements by name; what is protected are the model's stop tokens.

    Args:
        name: `plain`, or some of `gated`, `protected` and `product`, joined by "-".
        lm: The model.

    Returns:
        The refinements, of this `name`.

    Raises:
        ValueError: If a part of the name is unknown.
    """
    parts = set(name.split("-")) - {"plain"}
    if unknown := sorted(parts - {"gated", "protected", "product"}):
        raise ValueError(
            f"refinements {name!r}: unknown {unknown}; expected plain, or some of gated, protected "
            "and product, joined by '-'"
        )
    return Refinements(
        gated="gated" in parts,
        protected=lm.eos_ids if "protected" in parts else (),
        combine="product" if "product" in parts else "disjoint",
    )
