"""Evaluates unlearning on TOFU, or checks the log of an evaluation.

    python evaluate.py --config=configs/smollm2.py
    python evaluate.py --recompute LOG [--retain-log LOG]

The first evaluates a base model, and every head at every T and s of the config. It writes for each
setting `TOFU_EVAL.json` and `TOFU_SUMMARY.json`, in the reference evaluator's format, and
`UNLEARNING.json`; for all of them `report.html`. A stopped run resumes when it is called again.

The second is `t3jax check LOG`.
"""

import pathlib
import sys

from jax.sharding import Mesh

import t3jax
from t3jax import cli, pipeline, preflight
from t3jax.commands import check
from t3jax.evaluation import log_files, logs
from t3jax.report import describe_diagnoses, diagnose_heads, write_report
from t3jax.settings import Settings

_HEADLINES = ("forget_quality", "model_utility", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "privleak")


def main(config: Settings) -> None:
    """Evaluates the model and the heads of a config."""
    config.require("model", "eval.forget", "eval.dir")
    mesh = t3jax.make_mesh(config.mesh)
    names = tuple(config.eval.heads) or ((config.head,) if config.head else ())
    if not names:
        print("no head: nothing is unlearned, and the base model alone is evaluated")
    paths, heads, groups = pipeline.load_heads(config, names, mesh)
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
    evaluation = pipeline.evaluate(
        config,
        pipeline.examine(config, lm, heads, mesh),
        pipeline.settings(config, lm, heads, groups, controls=config.eval.controls),
    )
    print(_table(evaluation.logs))
    for i, path in enumerate(paths):
        print(f"head{i}: {path}")
    print(f"logs: {config.eval.dir}/SETTING/{log_files.EVAL_NAME}, {log_files.UNLEARNING_NAME}")
    diagnoses = diagnose_heads(evaluation)
    print(describe_diagnoses(diagnoses))
    report = pathlib.Path(config["eval.dir"]) / "report.html"
    write_report(report, evaluation, title=f"Unlearning with {config.model}", diagnoses=diagnoses)
    print(f"report: {report}")


def _table(evaluated: dict[str, logs.Log]) -> str:
    """The headline metrics of every setting, and the reasons for missing numbers."""
    width = max(len(name) for name in evaluated)
    lines = [" ".join([" " * width, *(f"{metric:>17}" for metric in _HEADLINES)])]
    reasons: dict[str, str] = {}
    for name, log in evaluated.items():
        summary = logs.summarize(log)
        numbers = [f"{summary[m]:17.4g}" if m in summary else f"{'-':>17}" for m in _HEADLINES]
        lines.append(" ".join([f"{name:<{width}}", *numbers]))
        reasons |= logs.missing_reasons(log)
    return "\n".join([*lines, *(f"{m} is missing: {reason}" for m, reason in reasons.items())])


def run() -> None:
    """Runs the command, or checks the log of `--recompute LOG`."""
    if any(word.startswith("--recompute") for word in sys.argv):
        if any(word.startswith("--config") for word in sys.argv):
            sys.exit("evaluate.py: --recompute reads a log alone; give it without --config")
        check.run()
    cli.run(main)
