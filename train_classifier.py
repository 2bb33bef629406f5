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
from t3jax import cli, pipeline
from t3jax.training import make_members


def main(config: Any) -> None:
    """Trains the heads that the config describes."""
    cli.require(config, "model", "forget", "retain", "workdir")
    mesh = t3jax.make_mesh(config.mesh)
    lm = t3jax.load_lm(config.model, config.dtype, mesh)
    heads = t3jax.train_heads(
        retain=pipeline.features(config, lm, "retain"),
        forget=pipeline.features(config, lm, "forget"),
        head_config=pipeline.head_config(config, lm),
        train_config=pipeline.train_config(config),
        seeds=config.seeds,
        workdir=config.workdir,
        mesh=mesh,
        report=functools.partial(print, flush=True),
        **pipeline.head_defaults(config),
    )
    members = make_members([pipeline.train_config(config)], config.seeds)
    folders = [pathlib.Path(config.workdir) / member.name for member in members]
    for folder, head in zip(folders, heads, strict=True):
        print(f"{folder}: {head.config.num_params} weights, {head.record['seconds']:.1f} s")
    flags = [arg for arg in sys.argv[1:] if not arg.startswith("--config.head=")]
    print(f"sample: python sample.py {' '.join(flags)} --config.head={folders[0]}")


if __name__ == "__main__":
    cli.run(main)
