"""Trains the classifier: text -> tokens -> frozen features -> head.

python train_classifier.py --config=configs/smollm2.py
python train_classifier.py --config=configs/smollm2.py --config.classifier.rank=50 ...
python train_classifier.py --config=configs/paper.py ...        # the published recipe

T and s that the config leaves open are chosen without a retain-only model. A stopped run resumes
when it is called again; features that were computed once are read from their store.
"""

import dataclasses
import pathlib
import re
import shlex
import sys
from typing import Any

from jax.sharding import Mesh

import t3jax
from t3jax import files, pipeline, preflight
from t3jax.head_card import write_card
from t3jax.settings import Settings
from t3jax.training import make_members


def main(config: Settings) -> None:
    """Trains the heads of a config."""
    needed = ["model", "forget", "retain", "workdir"]
    if config.synthetic.own_samples or config.synthetic.openings:  # they are a retain set
        needed.remove("retain")
    config.require(*needed)
    mesh = t3jax.make_mesh(config.mesh)
    make_members([config.train], config.seeds)
    pipeline.start_head(config, pipeline.head_config(config, preflight.shape_of(config, mesh)))
    preflight.check_sources(config, "forget", "retain")
    files.check_writable(pathlib.Path(config.feature_store))
    with preflight.outputs(config.workdir):
        _train(config, mesh)


def _train(config: Settings, mesh: Mesh) -> None:
    lm = t3jax.load_lm(config["model"], config.dtype, mesh)
    original, sets = config, pipeline.training_sets(config, lm)
    config = pipeline.settle_loss(config, sets)
    for kind, count in sets.written.items():
        print(f"written by the base model: {count} {kind}")
    if sets.names:
        print(f"names of the request: {', '.join(sets.names)}")
    elif sets.counterfactuals:
        print(
            "the forget questions hold no name: in their counterfactuals an open question takes "
            "their place; if there are names, give --config.synthetic.names=\"('NAME',)\""
        )
    training: dict[str, Any] = {"mesh": mesh, "progress": "training"}
    heads = pipeline.fit_heads(config, lm, sets, workdir=config.workdir, **training)
    if (distilled := pipeline.replace_classifier(original, heads[0].record)) is not None:
        config, sets = distilled, pipeline.training_sets(distilled, lm)
        heads = pipeline.fit_heads(config, lm, sets, workdir=config.workdir, **training)
    digests = pipeline.digests(config, lm)
    members = make_members([config.train], config.seeds)
    folders = [pathlib.Path(original["workdir"]) / member.name for member in members]
    for folder, head in zip(folders, heads, strict=True):
        head = dataclasses.replace(head, record=head.record | {"digests": digests})
        t3jax.save_head(folder, head)
        write_card(folder, head, request=config.request)
        print(f"{folder}: {head.config.num_params} weights, {head.record['seconds']:.1f} s")
    words = [word for word in sys.argv[1:] if not re.match("--(config[.])?head=", word)]
    words.append(f"--config.head={folders[0]}")
    started = sys.argv[0].startswith("t3jax ")
    print(f"sample: {'t3jax sample' if started else 'python sample.py'} {shlex.join(words)}")
