"""The whole story on the model that ships here: train the head, evaluate before and after, compare.

    python -m demo.run_demo

`base` knows all authors, `retain_only` was trained without those to forget: the gold standard. The
head never sees the paraphrased questions, nor the authors of `unseen_retain`. Settings are those of
`configs/demo.py`. Everything is written under `out/demo`: `summary.json` holds the numbers of the
table, `report.html` the evaluation.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import t3jax
from configs import demo as demo_config
from t3jax import data, files, pipeline
from t3jax.cli import enable_compilation_cache, prompt_format
from t3jax.evaluation.metrics import rouge_scores
from t3jax.evaluation.scoring import BASE, settings_grid
from t3jax.evaluation.store import Store
from t3jax.report import write_report

MODELS = ("base", "unlearned", "retain_only")
LABELS = {
    "forget_recall": "forget authors",
    "paraphrase_recall": "  reworded questions",
    "retain_recall": "retain authors",
    "unseen_retain_recall": "  never seen by the head",
}


def main() -> None:
    """Runs the demo and prints its table."""
    start = time.perf_counter()
    enable_compilation_cache()
    config = demo_config.get_config()
    out = pathlib.Path(config.workdir)
    lm = t3jax.load_lm(config.model)
    head = train(config, lm, out)
    evaluation = pipeline.evaluate(
        config,
        pipeline.examine(config, lm, [head]),
        pipeline.settings(config, lm, [head], controls=config.eval_controls),
    )
    assert evaluation.examined.retain_store is not None  # the config names the twin
    unlearned = settings_grid([head], controls=False)[-1]  # at the head's own T and s
    write_report(
        out / "report.html",
        evaluation,
        title="t3jax demo: forgetting made-up authors",
        featured=unlearned.name,
    )

    # What the evaluation asked already is read from its store.
    models = {
        "base": (evaluation.examined.store, BASE),
        "unlearned": (evaluation.examined.store, unlearned),
        "retain_only": (evaluation.examined.retain_store, BASE),
    }
    rows = {
        name: data.evenly_spread(
            data.load_records(f"demo/authors/{name}_perturbed.jsonl"), config.eval_rows
        )
        for name in ("forget", "retain", "unseen_retain")
    }
    asked = {
        "forget_recall": (rows["forget"], "question"),
        "paraphrase_recall": (rows["forget"], "paraphrased_question"),
        "retain_recall": (rows["retain"], "question"),
        "unseen_retain_recall": (rows["unseen_retain"], "question"),
    }
    answers: dict[str, dict[str, list[str]]] = {}
    recalls: dict[str, dict[str, float]] = {}
    for metric, (chosen, field) in asked.items():
        answers[metric], recalls[metric] = {}, {}
        prompts = [
            data.encode_prompt(lm.tokenizer, row[field], prompt_format(config)) for row in chosen
        ]
        for model, (store, setting) in models.items():
            samples = store.answers(metric, prompts, setting, max_new_tokens=config.max_new_tokens)
            texts = [sample.text for sample in samples]
            answers[metric][model] = texts
            scores = rouge_scores([row["answer"] for row in chosen], texts)
            recalls[metric][model] = float(np.mean(scores["rougeL_recall"]))

    questions = [row["question"] for row in rows["forget"]]
    perplexity = {
        model: statistics.median(
            perplexities(
                evaluation.examined.retain_store,
                questions,
                answers["forget_recall"][model],
                prompt_format(config),
            )
        )
        for model in ("unlearned", "retain_only")
    }
    summary = {
        **recalls,
        "perplexity_ratio": perplexity["unlearned"] / perplexity["retain_only"],
        "base_temperature": head.base_temperature,
        "guidance_scale": head.guidance_scale,
        "seconds": time.perf_counter() - start,
    }
    files.write_json(out / "summary.json", summary)
    with files.replacing(out / "answers.jsonl") as temporary:
        lines = [
            {"set": metric, "question": row[field], "answer": row["answer"]}
            | {model: answers[metric][model][i] for model in MODELS}
            for metric, (chosen, field) in asked.items()
            for i, row in enumerate(chosen)
        ]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(table(summary, rows, answers, out))


def train(config: Any, lm: t3jax.LM, out: pathlib.Path) -> t3jax.Head:
    """Features, then the head: what `train_classifier.py --config=configs/demo.py` does."""
    (head,) = t3jax.train_heads(
        retain=pipeline.features(config, lm, "retain"),
        forget=pipeline.features(config, lm, "forget"),
        head_config=pipeline.head_config(config, lm),
        train_config=pipeline.train_config(config),
        **pipeline.head_defaults(config),
    )
    t3jax.save_head(out / "head", head)
    return head


def perplexities(
    store: Store,
    questions: Sequence[str],
    answers: Sequence[str],
    prompt_format: data.PromptFormat,
) -> list[float]:
    """Perplexity of each answer to its question under a model, closing token included."""
    examples = [
        data.encode_question_answer(store.lm.tokenizer, question, answer or " ", prompt_format)
        for question, answer in zip(questions, answers, strict=True)
    ]
    (scores,) = store.scores("demo-answers", examples, [BASE])
    return np.exp(scores.avg_loss).tolist()


def table(summary: dict, rows: dict, answers: dict, out: pathlib.Path) -> str:
    """What a person should see at the end."""
    lines = [
        "",
        "How much of the true answers is recited "
        f"(ROUGE-L recall, {len(rows['forget'])} questions a row)",
        "",
        f"{'':28}{'base':>10}{'unlearned':>12}{'retain-only':>14}",
    ]
    for metric, label in LABELS.items():
        base, unlearned, twin = (summary[metric][model] for model in MODELS)
        lines.append(f"{label:28}{base:>10.2f}{unlearned:>12.2f}{twin:>14.2f}")
    lines += [
        "",
        "base: knows all authors.  unlearned: the same weights, tempered and tilted "
        f"(T = {summary['base_temperature']:g}, s = {summary['guidance_scale']:g}).",
        "retain-only: trained without the forget authors; what unlearning should look like.",
        f"Perplexity of unlearned answers under retain-only, over its own: "
        f"{summary['perplexity_ratio']:.2f}",
        "",
    ]
    for name, metric in (("forget", "forget_recall"), ("retain", "retain_recall")):
        row = rows[name][0]
        lines += [f"> {row['question']}  ({name})", f"{'truth':>12} | {row['answer']}"]
        lines += [f"{model:>12} | {answers[metric][model][0]}" for model in MODELS]
        lines.append("")
    lines += [
        f"{summary['seconds']:.0f} s; numbers: {out}/summary.json, answers: {out}/answers.jsonl",
        f"report: {(out / 'report.html').absolute()}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
