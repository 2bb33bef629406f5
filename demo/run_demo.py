"""The demo: trains heads for the model that ships here, and compares it before and after.

    python -m demo.run_demo

`base` knows all authors. `retain_only` was trained without the authors to forget; it is the gold
standard, and used for scores alone. `unlearned` has a head of the default recipe, `paper` of the
published one. No head ever sees the paraphrased questions, nor the authors of `unseen_retain`.
Settings are those of `configs/demo.py` and `configs/demo_paper.py`. All files are written to
`out/demo`: `summary.json` has the numbers of the table, `report.html` the evaluation.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

import t3jax
from configs import demo as demo_config
from configs import demo_paper
from t3jax import cli, data, files, pipeline
from t3jax.evaluation import aggregates
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.settings import BASE, Setting, settings_grid
from t3jax.evaluation.store import Store
from t3jax.head_card import write_card
from t3jax.report import write_report
from t3jax.settings import Settings, from_config

MODELS = ("base", "unlearned", "paper", "retain_only")
RECALLS = {
    "forget_recall": "forget authors",
    "paraphrase_recall": "  reworded questions",
    "retain_recall": "retain authors",
    "unseen_retain_recall": "  never seen by the head",
}
# Sampling options of an answer; "t1" samples the whole distribution.
SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "t0.7-p0.9": {"temperature": 0.7, "top_p": 0.9},
    "t1": {"temperature": 1.0},
}
DRAWS = 4
LEAKS = 0.7  # recall from which an answer leaks


def main() -> None:
    """Runs the demo and prints its table."""
    start = time.perf_counter()
    cli.enable_compilation_cache()
    # Samples of the published recipe at T = 2.5 are no language: the table shows their perplexity.
    warnings.filterwarnings("ignore", "the answers are no language")
    config = from_config(Settings, demo_config.get_config())
    paper = from_config(Settings, demo_paper.get_config())
    out = pathlib.Path(config.workdir)
    lm = t3jax.load_lm(config.model)
    heads = {"unlearned": train(config, lm), "paper": train(paper, lm)}
    evaluation = pipeline.evaluate(
        config,
        pipeline.examine(config, lm, list(heads.values())),
        pipeline.settings(config, lm, list(heads.values()), controls=False),
    )
    settings = settings_grid(list(heads.values()), controls=False)[1:]  # heads at their T and s
    comparison = compare(config, dict(zip(heads, settings, strict=True)), evaluation)
    write_report(
        out / "report.html",
        evaluation,
        title="t3jax demo: forgetting made-up authors",
        featured=comparison.settings["unlearned"].name,
    )
    summary = {
        **comparison.summary,
        "perplexity_ratio": comparison.greedy_perplexity["unlearned"]
        / comparison.greedy_perplexity["retain_only"],
        "base_temperature": heads["unlearned"].base_temperature,
        "guidance_scale": heads["unlearned"].guidance_scale,
        "seconds": time.perf_counter() - start,
    }
    files.write_json(out / "summary.json", summary)
    with files.replacing(out / "answers.jsonl") as temporary:
        lines = [
            {"set": metric, "question": row[field], "answer": row["answer"]}
            | {model: comparison.answers[metric][model][i] for model in MODELS}
            for metric, (chosen, field) in comparison.asked.items()
            for i, row in enumerate(chosen)
        ]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(format_table(summary, comparison, out))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Models beside the base and the retain-only model.

    Attributes:
        settings: The setting of each model with a head.
        asked: The rows and the field of the question, by name of the recall.
        answers: Greedy answers of each model, by name of the recall.
        summary: The numbers, each by model.
        greedy_perplexity: Perplexity of greedy forget answers under the retain-only model.
    """

    settings: dict[str, Setting]
    asked: dict[str, tuple[list[dict], str]]
    answers: dict[str, dict[str, list[str]]]
    summary: dict[str, Any]
    greedy_perplexity: dict[str, float]


def compare(
    config: Settings, settings: dict[str, Setting], evaluation: pipeline.Evaluation
) -> Comparison:
    """Asks every model, greedy and sampled, and compares it with the retain-only model.

    `config` is of the demo or of a world like it; `settings` are some of the evaluation's, by name.
    """
    store, retain_store = evaluation.examined.store, evaluation.examined.retain_store
    assert retain_store is not None
    assert evaluation.retain_log is not None
    models = {
        "base": (store, BASE),
        **{name: (store, setting) for name, setting in settings.items()},
        "retain_only": (retain_store, BASE),
    }
    asked = load_questions(config)
    # Answers of the evaluation are read from its store.
    answer = functools.partial(draw, config, models)
    answers = {metric: answer(metric, *question) for metric, question in asked.items()}
    # The options of the evaluation's samples, so that these are read from its store too.
    options = {"num_samples": DRAWS, "top_k": 0, "top_p": 1.0, "seed": config.sampling.seed}
    drawn = {
        name: answer("forget-samples", *asked["forget_recall"], **(options | sampling))
        for name, sampling in SAMPLINGS.items()
        if sampling
    }
    forget, _ = asked["forget_recall"]
    truths = [row["answer"] for row in forget]
    questions = [row["question"] for row in forget]
    perplexity = {
        name: {
            model: statistics.median(
                perplexities(
                    retain_store,
                    np.repeat(questions, len(texts) // len(questions)),
                    texts,
                    config.prompt_format,
                )
            )
            for model, texts in of_models.items()
        }
        for name, of_models in (("greedy", answers["forget_recall"]), ("t1", drawn["t1"]))
    }
    tests = {
        model: aggregates.forget_quality(evaluation.logs[setting.name], evaluation.retain_log)
        for model, (_, setting) in models.items()
        if model != "retain_only"
    }
    summary = {
        **{
            metric: {
                model: float(np.mean(leak_recall([row["answer"] for row in chosen], texts)))
                for model, texts in answers[metric].items()
            }
            for metric, (chosen, _) in asked.items()
        },
        "forget_quality": {m: test.p_value for m, test in tests.items()} | {"retain_only": 1.0},
        "distance": {m: test.statistic for m, test in tests.items()} | {"retain_only": 0.0},
        "leak_rate": {
            name: {
                model: leak_rate(truths, texts)
                for model, texts in (drawn.get(name) or answers["forget_recall"]).items()
            }
            for name in SAMPLINGS
        },
        "perplexity": perplexity["t1"],
    }
    return Comparison(settings, asked, answers, summary, perplexity["greedy"])


def load_questions(config: Settings) -> dict[str, tuple[list[dict], str]]:
    """The rows and the field of the question, by name of the recall."""
    folder = pathlib.Path(config.eval.forget).parent
    forget, retain, unseen_retain = (
        data.evenly_spread(data.load_records(folder / f"{name}_perturbed.jsonl"), config.eval.rows)
        for name in ("forget", "retain", "unseen_retain")
    )
    return {
        "forget_recall": (forget, "question"),
        "paraphrase_recall": (forget, "paraphrased_question"),
        "retain_recall": (retain, "question"),
        "unseen_retain_recall": (unseen_retain, "question"),
    }


def train(config: Settings, lm: t3jax.LM) -> t3jax.Head:
    """Trains the head of a config, as `train_classifier.py` does."""
    sets = pipeline.training_sets(config, lm)
    config = pipeline.settle_loss(config, sets)
    (head,) = pipeline.fit_heads(config, lm, sets)
    t3jax.save_head(config.head, head)
    write_card(config.head, head, request=config.request)
    return head


def draw(
    config: Settings,
    models: dict[str, tuple[Store, Setting]],
    label: str,
    rows: Sequence[dict],
    field: str,
    **sampling: Any,
) -> dict[str, list[str]]:
    """Draws answers of every model to a field of the rows, greedy without `sampling`."""
    texts = {}
    for model, (store, setting) in models.items():
        prompts = [
            data.encode_prompt(store.lm.tokenizer, row[field], config.prompt_format) for row in rows
        ]
        samples = store.answers(
            label, prompts, setting, max_new_tokens=config.sampling.max_new_tokens, **sampling
        )
        texts[model] = [sample.text for sample in samples]
    return texts


def leak_rate(truths: Sequence[str], texts: Sequence[str]) -> float:
    """Share of questions with at least one answer that leaks."""
    draws = len(texts) // len(truths)
    recall = leak_recall(np.repeat(truths, draws).tolist(), texts).reshape(-1, draws)
    return float(np.mean(np.any(recall >= LEAKS, axis=1)))


def perplexities(
    store: Store,
    questions: Sequence[str],
    answers: Sequence[str],
    prompt_format: data.PromptFormat,
) -> list[float]:
    """Perplexity of each answer to its question under a model, closing token included."""
    examples = [
        data.encode_question_answer(store.lm.tokenizer, str(question), answer or " ", prompt_format)
        for question, answer in zip(questions, answers, strict=True)
    ]
    (scores,) = store.scores("demo-answers", examples, [BASE])
    return np.exp(scores.avg_loss).tolist()


def format_table(summary: dict, comparison: Comparison, out: pathlib.Path) -> str:
    """The end of the demo: numbers of all models, and two questions with their answers."""
    firsts = {name: comparison.asked[f"{name}_recall"][0][0] for name in ("forget", "retain")}
    number = len(comparison.asked["forget_recall"][0])
    header = f"{'':36}{'base':>10}{'unlearned':>12}{'paper':>10}{'retain-only':>14}"

    def line(label: str, values: dict, form: str = ".2f") -> str:
        numbers = [format(values[model], form) for model in MODELS]
        return f"{label:36}{numbers[0]:>10}{numbers[1]:>12}{numbers[2]:>10}{numbers[3]:>14}"

    leaks = summary["leak_rate"]
    lines = [
        "",
        "Share of the true answer that greedy answers recite (ROUGE-L recall, "
        f"{number} questions a row)",
        header,
        *(line(label, summary[metric]) for metric, label in RECALLS.items()),
        "",
        f"Share of forget questions that leak (an answer recites {LEAKS:g} of the true one)",
        line("greedy", leaks["greedy"]),
        line(f"{DRAWS} draws, temperature .7, top-p .9", leaks["t0.7-p0.9"]),
        line(f"{DRAWS} draws, temperature 1", leaks["t1"]),
        "",
        "Likeness to retain-only on the forget set",
        line("forget quality (p, alike above .05)", summary["forget_quality"], ".2g"),
        line("distance of truth ratios (D)", summary["distance"]),
        line("perplexity of draws, temperature 1", summary["perplexity"], ".3g"),
        "",
        "base: knows all authors.  unlearned: the same weights under the head of the default "
        f"recipe (T = {summary['base_temperature']:g}, s = {summary['guidance_scale']:g}).",
        "paper: under a head of the published recipe.  retain-only: trained without the forget "
        "authors; what unlearning should look like.",
        "",
    ]
    for name, row in firsts.items():
        lines += [f"> {row['question']}  ({name})", f"{'truth':>12} | {row['answer']}"]
        answers = comparison.answers[f"{name}_recall"]
        lines += [f"{model:>12} | {answers[model][0]}" for model in MODELS]
        lines.append("")
    lines += [
        f"{summary['seconds']:.0f} s; numbers: {out}/summary.json, answers: {out}/answers.jsonl",
        f"report: {(out / 'report.html').absolute()}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
