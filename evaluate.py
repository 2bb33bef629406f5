"""Evaluates unlearning on TOFU, or checks the log of an evaluation.

    python evaluate.py --config=configs/smollm2.py
    python evaluate.py --recompute LOG [--retain-log LOG]

The first evaluates a base model, and every head at every T and s of the config. It writes for each
setting `TOFU_EVAL.json` and `TOFU_SUMMARY.json`, in the reference evaluator's format, and
`UNLEARNING.json`; for all of them `report.html`. Called again after it was stopped, it goes on
where it was.

The second recomputes every aggregate of a `TOFU_EVAL.json` (of this project or of the reference
evaluator, or its folder) from its per-example values.

Exit status of the second: 0 all stored numbers agree, 1 one differs by more than 1e-9 relative to
the larger, 2 a log cannot be read or does not fit.
"""

import pathlib
import re
import sys

import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

from absl import app, flags
from jax.sharding import Mesh

import t3jax
from t3jax import cli, pipeline, preflight
from t3jax.evaluation import logs, recompute, unlearning
from t3jax.report import write_report
from t3jax.settings import Settings

_RECOMPUTE = flags.DEFINE_string("recompute", None, "The log (or its folder) to recompute.")
_RETAIN_LOG = flags.DEFINE_string(
    "retain_log", None, "The retain model's log (or its folder), for forget_quality and privleak."
)

_HEADLINES = ("forget_quality", "model_utility", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "privleak")


def main(config: Settings) -> None:
    """Evaluates the model and the heads of a config."""
    config.require("model", "eval.forget", "eval.dir")
    mesh = t3jax.make_mesh(config.mesh)
    names = tuple(config.eval.heads) or ((config.head,) if config.head else ())
    if not names:
        print("no head: nothing is unlearned, and the base model alone is evaluated")
    paths, heads, groups = cli.load_heads(config, names, mesh)
    shape = preflight.shape_of(config, mesh)
    preflight.check_heads(config, paths, heads, groups, shape)
    preflight.check_evaluation(config, shape)
    with preflight.outputs(config.eval.dir):
        _evaluate(config, mesh, paths, heads, groups)


def _evaluate(
    config: Settings,
    mesh: Mesh,
    paths: list[str],
    heads: list[t3jax.Head],
    groups: list[tuple[int, ...]],
) -> None:
    lm = t3jax.load_lm(config["model"], config.dtype, mesh)
    found = pipeline.evaluate(
        config,
        pipeline.examine(config, lm, heads, mesh),
        pipeline.settings(config, lm, heads, groups, controls=config.eval.controls),
    )
    print(_table(found.logs))
    for i, path in enumerate(paths):
        print(f"head{i}: {path}")
    print(f"logs: {config.eval.dir}/SETTING/{logs.EVAL_NAME}, {unlearning.UNLEARNING_NAME}")
    report = pathlib.Path(config["eval.dir"]) / "report.html"
    write_report(report, found, title=f"Unlearning with {config.model}")
    print(f"report: {report}")


def _table(evaluated: dict[str, logs.Log]) -> str:
    """The headlines of every setting, and why numbers are missing."""
    width = max(len(name) for name in evaluated)
    lines = [" ".join([" " * width, *(f"{metric:>17}" for metric in _HEADLINES)])]
    reasons: dict[str, str] = {}
    for name, log in evaluated.items():
        summary = logs.summary(log)
        numbers = [f"{summary[m]:17.4g}" if m in summary else f"{'-':>17}" for m in _HEADLINES]
        lines.append(" ".join([f"{name:<{width}}", *numbers]))
        reasons |= logs.missing_reasons(log)
    return "\n".join([*lines, *(f"{m} is missing: {reason}" for m, reason in reasons.items())])


def check(argv: list[str]) -> int:
    """Recomputes the log that the flags name and returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _RECOMPUTE.value is None:
        raise app.UsageError("name a log: --recompute LOG")
    try:
        comparison, differs = recompute.compare_files(
            pathlib.Path(_RECOMPUTE.value),
            None if _RETAIN_LOG.value is None else pathlib.Path(_RETAIN_LOG.value),
        )
    except (OSError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    print(comparison)
    return 1 if differs else 0


if __name__ == "__main__":
    if any(arg.startswith("--config") for arg in sys.argv):
        if any(arg.startswith("--recompute") for arg in sys.argv):
            sys.exit("evaluate.py: --recompute reads a log alone; give it without --config")
        cli.run(main)
    else:
        # absl knows flags with underscores only.
        app.run(check, [re.sub("^--?retain-log(?==|$)", "--retain_log", arg) for arg in sys.argv])
