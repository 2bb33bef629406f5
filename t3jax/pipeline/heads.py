"""Heads by the config: their training sets, their training, their T and s."""

import dataclasses
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from t3jax import data
from t3jax.digests import params_digest
from t3jax.evaluation.calibration import GRID, SCALES, Calibration, calibrate
from t3jax.head import HeadConfig, class_prior_shift
from t3jax.head_io import Head, load_head
from t3jax.lm import LM
from t3jax.pipeline.models import encode_rows, source_digest
from t3jax.refinements import Refinements
from t3jax.sampling import Sampler
from t3jax.sections import narrow
from t3jax.settings import Settings, replace
from t3jax.synthetic.turns import put_behind_turns
from t3jax.training import check_start, train_heads
from t3jax.training_sets import Featurizer, SyntheticOptions, TrainingSets, make_training_sets
from t3jax.verification.attacks import Encoding
from t3jax.verification.reciting import DRAWN, prepare_asking
from t3jax.verification.verdict import LOSS, MARGIN, wilson

_MOST_ASKED = 100


def digests(config: Settings, lm: LM) -> dict[str, str]:
    """Digests of the forget rows, the retain rows and the model's weights, for a head's card."""
    sources = {name: config[name] for name in ("forget", "retain") if config[name] is not None}
    rows = {name: source_digest(config, source) for name, source in sources.items()}
    return rows | {"model": params_digest(lm.params)}


def synthetic_options(config: Settings) -> SyntheticOptions:
    """The options of the texts that the base model writes for the training of a head."""
    return dataclasses.replace(
        config.synthetic, max_new_tokens=config.sampling.max_new_tokens, batch_size=config.rows
    )


def training_sets(config: Settings, lm: LM) -> TrainingSets:
    """Makes the sets that a head is trained on, or reads them from the feature store."""
    return make_training_sets(
        Featurizer(
            lm,
            config.prompt_format,
            pathlib.Path(config.feature_store),
            config.classifier.features,
            config.classifier.feature_dtype,
            config.max_length,
            progress=True,
        ),
        data.load_dataset(config["forget"], config.tofu_dir),
        data.load_dataset(config["retain"], config.tofu_dir) if config.retain is not None else [],
        config.train,
        synthetic_options(config),
    )


def settle_loss(config: Settings, sets: TrainingSets) -> Settings:
    """Replaces the loss "auto" by that of the training sets."""
    if config.train.loss == "auto":
        why = "" if sets.loss == "distillation" else ": made-up names hide too few of the rows"
        print(f"loss: {sets.loss}{why}")
    return replace(config, train=config.train.settle_loss(sets.loss))


def head_config(config: Settings, lm: LM) -> HeadConfig:
    """The shape of a head for a model."""
    return narrow(
        HeadConfig, config.classifier, hidden_size=lm.hidden_size, vocab_size=lm.vocab_size
    )


def start_head(config: Settings, shape: HeadConfig) -> Head | None:
    """Loads the head in `classifier.init`, from which training starts; None if unset.

    Raises:
        FileNotFoundError: If there is no head.
        ValueError: If it is damaged, or differs in shape or kind from the heads to train.
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
    """The settings that a trained head stores: the model, and T, s and class prior if set."""
    knobs = {name: config[name] for name in ("base_temperature", "guidance_scale")}
    if config.train.loss == "distillation" and knobs["base_temperature"] is None:
        knobs["base_temperature"] = config.train.distilled_temperature
    if config.forget_fraction is not None:
        knobs["prior_shift"] = class_prior_shift(config.forget_fraction)
    return {"model": config.model} | {name: x for name, x in knobs.items() if x is not None}


def fit_heads(
    config: Settings,
    lm: LM,
    sets: TrainingSets,
    *,
    workdir: str | None = None,
    mesh: Mesh | None = None,
    progress: str | None = None,
) -> list[Head]:
    """Trains a head for each seed on the sets, and chooses T and s."""
    shape = head_config(config, lm)
    heads = train_heads(
        retain=sets.retain,
        forget=sets.forget,
        head_config=shape,
        init=start_head(config, shape),
        train_config=config.train,
        seeds=config.seeds,
        workdir=workdir,
        mesh=mesh,
        progress=progress,
        **head_defaults(config),
    )
    return choose_setting(config, lm, heads, sets)


def choose_setting(
    config: Settings, lm: LM, heads: Sequence[Head], sets: TrainingSets
) -> list[Head]:
    """Chooses T and s of heads if the config leaves both open and there are counterfactuals.

    All heads get the setting that is chosen for the first, and a record of the choice.
    """
    open_fields = config.base_temperature is None and config.guidance_scale is None
    if not open_fields or not sets.counterfactuals:
        return list(heads)
    calibration, checks = choose_among(config, lm, heads[:1], sets)
    print(calibration, flush=True)
    chosen = calibration.chosen
    record = checks | {"calibration": dataclasses.asdict(calibration)}
    return [
        dataclasses.replace(
            head,
            base_temperature=chosen.base_temperature,
            guidance_scale=chosen.guidance_scale,
            record=head.record | record,
        )
        for head in heads
    ]


def choose_among(
    config: Settings, lm: LM, heads: Sequence[Head], sets: TrainingSets, seeds: int = 1
) -> tuple[Calibration, dict[str, float]]:
    """Chooses a head, T and s by the made-up-name level, see `t3jax.evaluation.calibration`.

    Probabilities are means over rows, and a classifier may leave a few rows untouched: its s grows
    until at most 5 % of the forget rows are recited greedily, alone and behind other turns, and at
    most 5 %, give or take what 95 % of such samples vary, in any of four draws at ordinary
    sampling. The entries of the chosen head's record that `name_fault` reads are returned too.
    """
    calibration = calibrate_heads(config, lm, heads, sets, seeds)
    if sets.loss != "classifier":
        return calibration, {}
    head = heads[calibration.chosen.head]
    calibration, record = _grow_scale(config, lm, head, sets, calibration)
    print(
        f"recited: {record['recited']:.0%} of the forget rows greedily, "
        f"{record['recited_drawn']:.0%} in any of {DRAWN['num_samples']} draws"
    )
    return calibration, record


def name_fault(record: Mapping[str, Any]) -> str:
    """Names the reason not to serve a head with that record; empty if none is known.

    Only classifiers are asked while T and s are chosen.
    """
    if float(record.get("recited", 0.0)) > MARGIN:
        return "recites forget rows"
    if float(record.get("unended", 0.0)) > LOSS:
        return "makes answers that do not end"
    return ""


def replace_classifier(config: Settings, record: Mapping[str, Any]) -> Settings | None:
    """The config of the distilled heads that replace a faulty classifier, in a folder of their own.

    None if the config names the loss, or the classifier's `record` has no fault.
    """
    fault = name_fault(record)
    if config.train.loss != "auto" or not fault:
        return None
    print(f"loss: distillation, since the classifier {fault}")
    recipe = config.train.settle_loss("distillation")
    return replace(config, train=recipe, workdir=f"{config.workdir}/distillation")


def _grow_scale(
    config: Settings, lm: LM, head: Head, sets: TrainingSets, calibration: Calibration
) -> tuple[Calibration, dict[str, float]]:
    """Raises s until few forget rows are recited, or takes the s that recites the fewest.

    Returns the calibration with that choice, and the entries of the head's record: the shares of
    rows that are `recited` greedily and in draws (`recited_drawn`), and the excess of greedy
    answers without an end over the base's, `unended`.
    """
    encoding = Encoding(
        lm.tokenizer, config.prompt_format, config.sampling.max_new_tokens, lm.max_position
    )
    turned = put_behind_turns(
        lm.tokenizer,
        sets.rows,
        1.0 if config.synthetic.earlier_turns else 0.0,
        config.prompt_format,
        others=[],
        max_length=lm.max_position - config.sampling.max_new_tokens,
        seed=config.synthetic.seed,
    )
    # Without a chat template, or without turns in training, no row was changed.
    asked = [sets.rows] if turned == sets.rows else [sets.rows, turned]
    ways = [prepare_asking(encoding, rows, sets.retained, _MOST_ASKED) for rows in asked]
    sampler = Sampler(
        lm,
        head,
        refinements=refinements(config.refinements, lm),
        prompt_format=config.prompt_format,
        batch_size=config.rows,
    )
    base = [ask(sampler, {}, base_temperature=1.0, guidance_scale=0.0) for ask in ways]
    tried = []
    for setting in (calibration.chosen, *calibration.stronger):
        served = {
            "base_temperature": setting.base_temperature,
            "guidance_scale": setting.guidance_scale,
        }
        answered = [ask(sampler, {}, **served) for ask in ways]
        drawn = ways[0](sampler, DRAWN, **served)
        checks = {
            "recited": max(answer.recited for answer in answered),
            "recited_drawn": drawn.recited,
            "unended": max(b.ended - a.ended for a, b in zip(answered, base, strict=True)),
        }
        if checks["recited"] <= MARGIN and wilson(drawn.recited, drawn.rows).low <= MARGIN:
            break
        tried.append((max(checks["recited"], drawn.recited), checks, setting))
    else:
        _, checks, setting = min(tried, key=operator.itemgetter(0))
    return dataclasses.replace(calibration, chosen=setting), checks


def calibrate_heads(
    config: Settings, lm: LM, heads: Sequence[Head], sets: TrainingSets, seeds: int = 1
) -> Calibration:
    """Compares heads and settings with the made-up-name level, see `calibrate`.

    A distilled head is compared only at the T that it was trained for.
    """
    encoded = encode_rows(config, lm, [swap.record for swap in sets.counterfactuals])
    by_row: list[list[data.Example]] = [[] for _ in sets.rows]
    for swap, example in zip(sets.counterfactuals, encoded, strict=True):
        by_row[swap.row].append(example)
    grid = GRID
    if config.train.loss == "distillation":
        grid = tuple((config.train.distilled_temperature, scale) for scale in SCALES)
    return calibrate(
        lm,
        heads,
        encode_rows(config, lm, sets.rows),
        by_row,
        encode_rows(config, lm, sets.retained),
        grid=grid,
        refinements=refinements(config.refinements, lm),
        seeds=seeds,
    )


def load_heads(
    config: Settings, names: Sequence[str], mesh: Mesh
) -> tuple[list[str], list[Head], list[tuple[int, ...]]]:
    """Loads heads, and gives them the class prior of the config if set.

    Names are head folders; those in "FOLDER,FOLDER" are served together. Returns the distinct
    folders, their heads, and for each name the indices of its heads.
    """
    groups = [name.split(",") for name in names]
    folders = list(dict.fromkeys(folder for group in groups for folder in group))
    heads = [load_head(folder, mesh) for folder in folders]
    if config.forget_fraction is not None:
        shift = class_prior_shift(config.forget_fraction)
        heads = [dataclasses.replace(head, prior_shift=shift) for head in heads]
    return folders, heads, [tuple(map(folders.index, group)) for group in groups]


def refinements(name: str, lm: LM) -> Refinements:
    """Refinements by name: `plain`, or some of `gated`, `protected` and `product`, joined by "-".

    The protected tokens are the model's stop tokens.
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
