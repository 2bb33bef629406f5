"""Chooses the head, T and s: trains a grid of heads, scores all, and cross-fits the choice.

    python sweep.py --config=configs/smollm2.py --config.sweep_learning_rates=0.01,0.003

Heads of all `sweep_learning_rates` x `sweep_weight_decays` x `seeds` train together in one program,
one program for each of `sweep_ranks`; an empty list is the config's own value. All are scored at
`eval_temperatures` x `eval_scales`; what is chosen, and its controls, then answer questions too.

Called again after it was stopped, it goes on where it was. Writes `selection.json`, `report.html`
and the logs to `eval_dir`, and the heads to `workdir`.
"""

from typing import Any

import t3jax
from t3jax import cli
from t3jax.report import write_sweep
from t3jax.sweep import sweep, train_grid


def main(config: Any) -> None:
    """Trains, scores and chooses."""
    cli.require(config, "model", "forget", "retain", "workdir", "eval_forget", "eval_retain")
    cli.require(config, "eval_dir")
    if config.retain_model is None and config.retain_log is None:
        raise ValueError("choosing needs the retain model: give --config.retain_model=FOLDER")
    mesh = t3jax.make_mesh(config.mesh)
    lm = t3jax.load_lm(config.model, config.dtype, mesh)
    found = sweep(config, lm, train_grid(config, lm, mesh), mesh)
    print(write_sweep(config.eval_dir, found, title=f"Choosing a head for {config.model}"))


if __name__ == "__main__":
    cli.run(main)
