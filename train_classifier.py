"""Trains the classifier: text -> tokens -> frozen features -> head.

python train_classifier.py --config=configs/smollm2.py
python train_classifier.py --config=configs/smollm2.py --config.rank=50 --config.workdir=out/rank50

Called again after it was stopped, the script resumes; features that were computed once are read
from their store.
"""

import functools
import pathlib
import sys
from typing import Any

from absl import app, logging
from ml_collections import config_flags

import t3jax
from t3jax import data
from t3jax.cli import enable_compilation_cache, prompt_format
from t3jax.training import head_folders

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Path of a configs/*.py file.")


def main(argv: list[str]) -> int:
    """Trains the heads that the config describes and returns the exit status."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are --config.NAME=VALUE")
    config = _CONFIG.value
    if config is None:
        raise app.UsageError("no config; give --config=configs/smollm2.py or another")
    if missing := [n for n in ("model", "forget", "retain", "workdir") if config[n] is None]:
        raise app.UsageError(f"not in the config: {missing}; give --config.{missing[0]}=... or so")
    enable_compilation_cache()
    try:
        _train(config)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"train_classifier.py: {error}", file=sys.stderr)
        return 2
    return 0


def _train(config: Any) -> None:
    mesh = t3jax.make_mesh(config.mesh)
    lm = t3jax.load_lm(config.model, config.dtype, mesh)
    forget = _features(config, lm, "forget")
    retain = _features(config, lm, "retain")
    head_config = t3jax.HeadConfig(
        hidden_size=lm.hidden_size,
        vocab_size=lm.vocab_size,
        rank=config.rank,
        activation=config.activation,
        num_hidden_layers=config.num_hidden_layers,
        bias=config.bias,
    )
    train_config = t3jax.TrainConfig(
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        zero_output=config.zero_output,
        holdout_fraction=config.holdout_fraction,
    )
    heads = t3jax.train_heads(
        retain,
        forget,
        head_config,
        train_config,
        config.seeds,
        workdir=config.workdir,
        mesh=mesh,
        model=config.model,
        base_temperature=config.base_temperature,
        guidance_scale=config.guidance_scale,
        report=functools.partial(print, flush=True),
    )
    folders = [pathlib.Path(config.workdir) / name for name in head_folders(config.seeds)]
    for folder, head in zip(folders, heads, strict=True):
        print(f"{folder}: {head_config.num_params} weights, {head.record['seconds']:.1f} s")
    flags = [arg for arg in sys.argv[1:] if not arg.startswith("--config.head=")]
    print(f"sample: python sample.py {' '.join(flags)} --config.head={folders[0]}")


def _features(config: Any, lm: t3jax.LM, name: str) -> t3jax.Features:
    records = data.load_dataset(config[name], config.tofu_dir)
    examples = data.encode_records(
        lm.tokenizer, records, prompt_format(config), config.max_length or lm.max_position
    )
    return t3jax.load_or_compute_features(
        lm, examples, config.feature_store, dtype=config.feature_dtype, progress=name
    )


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # from ml_collections, with the nearest key that there is
        sys.exit(
            "train_classifier.py: unknown config key: " + str(error.args[0]).replace("\n", "; ")
        )


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
