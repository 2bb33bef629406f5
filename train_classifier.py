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

import t3jax
from t3jax import cli, data
from t3jax.training import head_folders

_GUIDANCE = ("base_temperature", "guidance_scale")  # kept in the head


def main(config: Any) -> None:
    """Trains the heads that the config describes."""
    cli.require(config, "model", "forget", "retain", "workdir")
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
        report=functools.partial(print, flush=True),
        **{name: config[name] for name in _GUIDANCE if config[name] is not None},
    )
    folders = [pathlib.Path(config.workdir) / name for name in head_folders(config.seeds)]
    for folder, head in zip(folders, heads, strict=True):
        print(f"{folder}: {head_config.num_params} weights, {head.record['seconds']:.1f} s")
    flags = [arg for arg in sys.argv[1:] if not arg.startswith("--config.head=")]
    print(f"sample: python sample.py {' '.join(flags)} --config.head={folders[0]}")


def _features(config: Any, lm: t3jax.LM, name: str) -> t3jax.Features:
    records = data.load_dataset(config[name], config.tofu_dir)
    examples = data.encode_records(
        lm.tokenizer, records, cli.prompt_format(config), config.max_length or lm.max_position
    )
    return t3jax.load_or_compute_features(
        lm, examples, config.feature_store, dtype=config.feature_dtype, progress=name
    )


if __name__ == "__main__":
    cli.run(main)
