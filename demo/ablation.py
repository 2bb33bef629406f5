"""The effect of each step from the published recipe to the default one, on a demo world.

    python -m demo.ablation                    # the world that ships here
    python -m demo.ablation --world=FOLDER     # another, made by demo/make_demo.py --seed=1

T and s of each head are chosen by the made-up-name level, but the published recipe has its own.
Prints a Markdown table and writes it to `out/ablation/NAME.md`.
"""

import argparse
import functools
import pathlib

import t3jax
from configs import demo as demo_config
from configs import demo_paper
from demo.run_demo import compare, train
from t3jax import cli, files, pipeline
from t3jax.settings import Settings, from_config, replace

COLUMNS = (
    ("p", "forget_quality", ".2g"),
    ("D", "distance", ".2f"),
    ("recall", "forget_recall", ".2f"),
    ("reworded", "paraphrase_recall", ".2f"),
    ("retain", "retain_recall", ".2f"),
    ("unseen retain", "unseen_retain_recall", ".2f"),
    ("leaks greedy", "greedy", ".2f"),
    ("leaks .7/.9", "t0.7-p0.9", ".2f"),
    ("leaks 1", "t1", ".2f"),
    ("perplexity", "perplexity", ".3g"),
)


def list_steps(config: Settings, paper: Settings) -> dict[str, Settings]:
    """The settings of all steps, by the name of the change."""
    change = functools.partial(replace, config)
    linear = {
        "classifier.rank": 50,
        "classifier.activation": "identity",
        "classifier.bias": False,
        "synthetic.overcorrection": 1.0,
        "synthetic.earlier_turns": 0.0,
    }
    gelu = {"classifier.rank": 100, "synthetic.earlier_turns": 0.0}
    classifier = {
        **linear,
        **{
            f"train.{name}": getattr(paper.train, name)
            for name in ("loss", "epochs", "warmup_ratio", "learning_rate")
        },
        "train.weight_decay": paper.train.weight_decay,
        "train.zero_output": False,
    }
    counted = {"synthetic.made_up_names": config.synthetic.made_up_names}
    written = {"synthetic.own_samples": config.synthetic.own_samples}
    plain = {**classifier, "synthetic.own_samples": 0, "synthetic.made_up_names": 0}
    at_1 = {"base_temperature": 1.0, "guidance_scale": 1.0}
    return {
        "published recipe, T = 2.5": paper,
        "mean and last state": change(**plain, **at_1),
        "+ own samples": change(**{**plain, **written}, **at_1),
        "+ counterfactual rows": change(**classifier, **counted),
        "distilled": change(**linear),
        "+ GELU, rank 100": change(**gelu, **{"synthetic.overcorrection": 1.0}),
        "+ overcorrection of 1.25": change(**gelu, **{"synthetic.overcorrection": 1.25}),
        "+ earlier turns, rank 400 (default)": config,
        "default, T = 1.5 gated": change(
            refinements="gated", **{"train.distilled_temperature": 1.5}
        ),
        "default without own samples": change(**{"synthetic.own_samples": 0}),
        "default without retain rows": change(retain=None),
        # A name that is in no question, as in a request without names.
        "default, questions without names": change(**{"synthetic.names": ("Nobody at All",)}),
    }


def main() -> None:
    """Trains, asks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="demo", help="folder with authors/, base/, retain_only/")
    parser.add_argument(
        "--default_only", action="store_true", help="no step between the published and the default"
    )
    args = parser.parse_args()
    world: str = args.world
    cli.enable_compilation_cache()
    out = pathlib.Path("out/ablation") / pathlib.Path(world).name
    of_world = {
        "model": f"{world}/base",
        "forget": f"{world}/authors/forget.jsonl",
        "retain": f"{world}/authors/retain.jsonl",
        "eval.forget": f"{world}/authors/forget_perturbed.jsonl",
        "eval.retain": f"{world}/authors/retain_perturbed.jsonl",
        "eval.retain_model": f"{world}/retain_only",
        "feature_store": str(out / "features"),
        "eval.dir": str(out / "evaluation"),
        "leaks.leak_samples": 0,
        "leaks.kl_rows": 0,
    }
    config = replace(from_config(Settings, demo_config.get_config()), **of_world)
    lm = t3jax.load_lm(config.model)
    header = " | ".join(["step", "T", "s", *(name for name, _, _ in COLUMNS)])
    lines = [f"| {header} |", "|" + " --- |" * (len(COLUMNS) + 3)]
    print("\n".join(lines), flush=True)
    paper = replace(from_config(Settings, demo_paper.get_config()), **of_world)
    for name, step in list_steps(config, paper).items():
        if args.default_only and step not in (paper, config):
            continue
        folder = out / files.slug(name)
        head = train(replace(step, workdir=str(folder), head=str(folder / "head")), lm)
        refined = replace(config, refinements=step.refinements, **{"eval.controls": False})
        evaluation = pipeline.evaluate(
            refined,
            pipeline.examine(refined, lm, [head]),
            pipeline.settings(refined, lm, [head], controls=False),
        )
        numbers = compare(refined, {name: evaluation.settings[-1]}, evaluation).summary
        numbers = numbers | numbers["leak_rate"]
        shown = [name] if len(lines) > 2 else ["base", name, "retain_only"]
        for model in shown:
            cells = [f"{numbers[field][model]:{form}}" for _, field, form in COLUMNS]
            knobs = ["", ""]
            if model == name:
                knobs = [f"{head.base_temperature:g}", f"{head.guidance_scale:g}"]
            lines.append(f"| {' | '.join([model, *knobs, *cells])} |")
            print(lines[-1], flush=True)
    with files.replacing(out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
