"""The verdict on a head: does what was forgotten come back, and is the rest as before?

    python verify.py --config=configs/demo.py

Needs the model, the head, the forget rows and the retain rows, and no retain-only model. The
forget rows are asked in many ways; `verdict.md`, which shows the leaks, and `verdict.json` are
written to the config's `verify.dir`. A stopped run resumes when it is called again.

Exit status: 0 the forget rows are forgotten and a share of at least `verify.retained` of the retain
rows is as before; 1 they are not, or that is not shown; 2 there is no verdict, because the input is
wrong or the program failed; 130 and 143 the run was stopped.
"""

import pathlib
import sys
import traceback
from typing import Any

from jax.sharding import Mesh

import t3jax
from t3jax import cli, data, pipeline, preflight
from t3jax.data.records import Record
from t3jax.evaluation import Store, settings_grid
from t3jax.head_card import write_card
from t3jax.report.verdict import write_verdict
from t3jax.sections import narrow
from t3jax.settings import Settings
from t3jax.verification import VerifyOptions, verify


class _Judged(SystemExit):
    """Ends the script with the verdict's status; no error raises it."""


def main(config: Settings) -> None:
    """Judges the model and the head of a config."""
    config.require("model", "head", "forget", "retain")
    forget = data.load_dataset(config["forget"], config.tofu_dir)
    retain = data.load_dataset(config["retain"], config.tofu_dir)
    options = narrow(
        VerifyOptions,
        config.verify,
        threshold=config.leaks.leak_threshold,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.sampling.seed,
    )
    mesh = t3jax.make_mesh(config.mesh)
    shape = preflight.shape_of(config, mesh)
    folders, heads, groups = pipeline.load_heads(config, [config["head"]], mesh)
    preflight.check_heads(config, folders, heads, groups, shape)
    preflight.check_answer_length(config, shape)
    folder = pathlib.Path(config["verify.dir"] or pathlib.Path(folders[0]) / "verify")
    with preflight.outputs(folder):
        _judge(config, mesh, folder, (folders, heads, groups), (forget, retain), options)


def _judge(
    config: Settings,
    mesh: Mesh,
    folder: pathlib.Path,
    loaded: tuple[list[str], list[t3jax.Head], list[tuple[int, ...]]],
    rows: tuple[list[Record], list[Record]],
    options: VerifyOptions,
) -> None:
    folders, heads, groups = loaded
    lm = t3jax.load_lm(config["model"], config.dtype, mesh)
    setting = settings_grid(
        heads,
        [] if config.base_temperature is None else [config.base_temperature],
        [] if config.guidance_scale is None else [config.guidance_scale],
        controls=False,
        refinements=[pipeline.refinements(config.refinements, lm)],
        groups=groups,
    )[-1]
    verdict = verify(
        Store(lm, heads, folder / "store", rows=config.rows, progress=True),
        setting,
        *rows,
        config.prompt_format,
        options,
    )
    described: dict[str, Any] = {
        "model": config.model,
        "head": config.head,
        "T": f"{setting.base_temperature:g}",
        "s": f"{setting.guidance_scale:g}",
        "refinements": setting.refinements.name,
        "forget rows": config.forget,
        "retain rows": config.retain,
        "longest answer": f"{config.sampling.max_new_tokens} tokens",
    }
    page = write_verdict(folder, verdict, described)
    if len(folders) == 1:  # heads that are judged together have no card of their own
        write_card(folders[0], heads[0], request=config.request, verdict=verdict.line)
    print(verdict.line)
    print(f"page: {page}")
    raise _Judged(0 if verdict.forgotten and verdict.retained >= config.verify.retained else 1)


def run() -> None:
    """Runs the command; any end without a verdict has status 2."""
    try:
        cli.run(main)
    except _Judged:
        raise
    except SystemExit as error:
        if error.code in cli.STOPPED:
            raise
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(2)
