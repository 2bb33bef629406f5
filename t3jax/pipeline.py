"""The stages of the scripts, as functions of their config: models, features, heads, evaluation.

`finetune.py`, `train_classifier.py`, `sweep.py`, `evaluate.py` and the demo are these in turn.
Everything here calls the library's functions with what the config says; there is no mathematics.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from t3jax import cli, data, files, hosts
from t3jax.evaluation import logs, recompute, selection, tofu, unlearning
from t3jax.evaluation.logs import Log
from t3jax.evaluation.metrics import ForgetQuality
from t3jax.evaluation.scoring import Setting, settings_grid
from t3jax.evaluation.store import Store
from t3jax.features import Features, load_or_compute_features
from t3jax.finetuning import FinetuneConfig, finetune
from t3jax.head import HeadConfig, class_prior_shift
from t3jax.head_io import Head
from t3jax.lm import LM, default_dtype, load_lm, model_folder, read_config, save_hf
from t3jax.training import TrainConfig, make_members, train_heads


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation of a model and its heads found.

    Attributes:
        settings: What was evaluated, the base model first.
        logs: By setting's name, the TOFU metrics.
        unlearning: By setting's name, the numbers beyond them.
        retain_log: The retain model's TOFU metrics, if there is one.
        retain_unlearning: Its numbers beyond them, if it was named.
        sets: The question sets by key of `tofu.SETS`.
        store: The scores and answers behind the numbers.
        retain_store: Those of the retain model, if it was named.
    """

    settings: list[Setting]
    logs: dict[str, Log]
    unlearning: dict[str, Log]
    retain_log: Log | None
    retain_unlearning: Log | None
    sets: dict[str, tofu.QuestionSet]
    store: Store
    retain_store: Store | None


def encode(config: Any, lm: LM, source: str) -> list[data.Example]:
    """The rows of a source as tokens."""
    return data.encode_records(
        lm.tokenizer,
        data.load_dataset(source, config.tofu_dir),
        cli.prompt_format(config),
        config.max_length or lm.max_position,
    )


def finetune_config(config: Any) -> FinetuneConfig:
    """How a config says that a language model is fine-tuned."""
    return FinetuneConfig(
        epochs=config.finetune_epochs,
        batch_size=config.finetune_batch_size,
        microbatches=config.finetune_microbatches,
        learning_rate=config.finetune_learning_rate,
        warmup_steps=config.finetune_warmup_steps,
        weight_decay=config.finetune_weight_decay,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_layers=tuple(config.lora_layers),
        dtype=config.dtype or default_dtype(),
        remat=config.finetune_remat,
        seed=config.finetune_seed,
        checkpoint_every=config.finetune_checkpoint_every,
    )


def finetuned(config: Any, mesh: Mesh) -> pathlib.Path:
    """Fine-tunes the model of a config, or resumes that, and writes it as a Hugging Face folder.

    Args:
        config: The settings.
        mesh: Where to train.

    Returns:
        The folder, `model` in the config's `finetune_workdir`.

    Raises:
        ValueError: As `finetune`, or as loading the model or the data.
    """
    recipe = finetune_config(config)
    # What is trained is float32; weights that LoRA leaves alone need not be.
    lm = load_lm(config.model, recipe.dtype if recipe.lora_rank else "float32", mesh)
    lm_config = read_config(model_folder(config.model))
    workdir = pathlib.Path(config.finetune_workdir)
    params = finetune(
        lm_config,
        lm.params,
        [row for source in config.finetune_data for row in encode(config, lm, source)],
        recipe,
        validation=[
            row for source in config.finetune_validation for row in encode(config, lm, source)
        ],
        workdir=workdir,
        mesh=mesh,
        progress="fine-tuning",
    )
    dtype = params["embed"]["weight"].dtype
    params = hosts.fetch_to_lead(params)
    if hosts.is_lead():
        with files.replacing_folder(workdir / "model") as folder:
            save_hf(folder, lm_config, params, list(lm.eos_ids), dtype)
            lm.tokenizer.save_pretrained(folder)
    hosts.wait_for(workdir / "model")
    return workdir / "model"


def features(config: Any, lm: LM, name: str) -> Features:
    """Features of the `forget` or the `retain` set of a config, computed or read from the store."""
    return load_or_compute_features(
        lm,
        encode(config, lm, config[name]),
        config.feature_store,
        dtype=config.feature_dtype,
        progress=name,
    )


def head_config(config: Any, lm: LM) -> HeadConfig:
    """The head that a config describes, for a model."""
    return HeadConfig(
        hidden_size=lm.hidden_size,
        vocab_size=lm.vocab_size,
        rank=config.rank,
        activation=config.activation,
        num_hidden_layers=config.num_hidden_layers,
        bias=config.bias,
    )


def train_config(config: Any) -> TrainConfig:
    """How a config says that heads are trained."""
    return TrainConfig(
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        zero_output=config.zero_output,
        holdout_fraction=config.holdout_fraction,
    )


def head_defaults(config: Any) -> dict[str, Any]:
    """What a trained head keeps of a config: the model, and T, s and class prior where set."""
    knobs = {name: config[name] for name in ("base_temperature", "guidance_scale")}
    if config.forget_fraction is not None:
        knobs["prior_shift"] = class_prior_shift(config.forget_fraction)
    return {"model": config.model} | {name: x for name, x in knobs.items() if x is not None}


def train_grid(config: Any, lm: LM, mesh: Mesh) -> tuple[list[pathlib.Path], list[Head]]:
    """Trains the heads of a sweep, those of one rank in one program.

    Each rank's run has a folder of its own in the config's `workdir` and resumes by itself.

    Args:
        config: The settings.
        lm: The model.
        mesh: Where to train.

    Returns:
        Folders and heads, rank by rank.

    Raises:
        ValueError: As `train_heads`.
    """
    retain, forget = features(config, lm, "retain"), features(config, lm, "forget")
    recipes = [
        dataclasses.replace(train_config(config), learning_rate=rate, weight_decay=decay)
        for rate, decay in itertools.product(
            config.sweep_learning_rates or (config.learning_rate,),
            config.sweep_weight_decays or (config.weight_decay,),
        )
    ]
    folders: list[pathlib.Path] = []
    heads: list[Head] = []
    for rank in config.sweep_ranks or (config.rank,):
        workdir = pathlib.Path(config.workdir) / f"sweep-rank{rank}"
        heads += train_heads(
            retain,
            forget,
            head_config=dataclasses.replace(head_config(config, lm), rank=rank),
            train_config=recipes,
            seeds=config.seeds,
            workdir=workdir,
            mesh=mesh,
            report=functools.partial(print, flush=True),
            **head_defaults(config),
        )
        folders += [workdir / member.name for member in make_members(recipes, config.seeds)]
    return folders, heads


def choose(
    config: Any, evaluation: Evaluation, heads: Sequence[Head]
) -> tuple[selection.CrossFit, ForgetQuality | None]:
    """Chooses a setting of an evaluation by cross-fitting, and measures the noise floor.

    Args:
        config: The settings.
        evaluation: The evaluation.
        heads: Its heads.

    Returns:
        The choice, and the test between the retain model and a second one, if that is named.

    Raises:
        ValueError: If logs are of different rows, or the rule is unknown.
    """
    if evaluation.retain_log is None:
        raise ValueError("choosing a setting needs the retain model's log")
    # Controls are there to be compared with, not to be chosen.
    asked = _settings(config, evaluation.store.lm, heads, controls=False)
    found = selection.cross_fit(
        {
            setting.name: evaluation.logs[setting.name]
            for setting in asked
            if setting.guidance_scale > 0
        },
        evaluation.retain_log,
        config.selection_rule,
        group=config.selection_group,
    )
    if config.second_retain_log is None:
        return found, None
    second = logs.read_log(pathlib.Path(config.second_retain_log))
    return found, recompute.forget_quality(second, evaluation.retain_log)


def evaluate(
    config: Any,
    lm: LM,
    heads: Sequence[Head],
    mesh: Mesh | None = None,
    groups: Sequence[tuple[int, ...]] | None = None,
) -> Evaluation:
    """Evaluates a model and heads over the question sets and settings of a config.

    Args:
        config: The settings; results go to its `eval_dir`.
        lm: The model.
        heads: The heads; settings refer to them by index.
        mesh: Where the retain model goes.
        groups: Heads that are served together, see `settings_grid`; None: each by itself.

    Returns:
        The results, which are also on disk.

    Raises:
        ValueError: If the retain log or model does not fit, or a score is not finite.
    """
    folder = pathlib.Path(config.eval_dir)
    retain_log = (
        None if config.retain_log is None else logs.read_log(pathlib.Path(config.retain_log))
    )
    settings = _settings(config, lm, heads, config.eval_controls, groups)
    sets = tofu.load_sets(
        {
            "forget": config.eval_forget,
            "retain": config.eval_retain,
            "ra": config.eval_real_authors,
            "wf": config.eval_world_facts,
            "holdout": config.eval_holdout,
        },
        lm.tokenizer,
        cli.prompt_format(config),
        config.max_length or lm.max_position,
        config.tofu_dir,
        config.eval_rows,
    )
    options = tofu.TofuOptions(config.max_new_tokens, config.reference_mask)
    kept = {"folder": folder / "store", "rows": config.rows, "progress": True}
    store = Store(lm, heads, **kept)
    beyond = unlearning.UnlearningOptions(
        leak_samples=config.leak_samples,
        leak_threshold=config.leak_threshold,
        leak_temperature=config.leak_temperature,
        leak_top_k=config.leak_top_k,
        leak_top_p=config.leak_top_p,
        kl_rows=config.kl_rows,
        kl_samples=config.kl_samples,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    retain_store, retain_unlearning = None, None
    if config.retain_model is not None:
        retain_store = Store(load_lm(config.retain_model, config.dtype, mesh), **kept)
        unlearning.check_same_vocabulary(store, retain_store)
        itself = Setting("retain_model")
        if retain_log is None:
            found = tofu.evaluate(retain_store, sets, [itself], folder, options)
            retain_log = found[itself.name]
        retain_unlearning = unlearning.measure(
            retain_store, sets, [itself], folder, beyond, judge=store
        )[itself.name]
    evaluated = tofu.evaluate(
        store, sets, settings, folder, options, retain_log=retain_log, retain_store=retain_store
    )
    measured = unlearning.measure(store, sets, settings, folder, beyond, retain_store=retain_store)
    return Evaluation(
        settings,
        evaluated,
        measured,
        retain_log,
        retain_unlearning,
        sets,
        store,
        retain_store,
    )


def _settings(
    config: Any,
    lm: LM,
    heads: Sequence[Head],
    controls: bool,
    groups: Sequence[tuple[int, ...]] | None = None,
) -> list[Setting]:
    names = (config.eval_refinements or config.refinements).split(",")
    return settings_grid(
        heads,
        config.eval_temperatures,
        config.eval_scales,
        controls,
        [cli.refinements(name, lm) for name in names],
        groups,
    )
