"""The whole story on the model that ships here: train the head, sample before and after, compare.

    python -m demo.run_demo

`base` knows all authors, `retain_only` was trained without those to forget: the gold standard. The
head never sees the paraphrased questions, nor the authors of `unseen_retain`. Settings are those of
`configs/demo.py`. Everything is written under `out/demo`; `summary.json` holds the numbers.
"""

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Sequence

import numpy as np

import t3jax
from configs import demo as demo_config
from t3jax import data, files, pipeline
from t3jax.cli import enable_compilation_cache, prompt_format
from t3jax.evaluation.metrics import rouge_scores
from t3jax.evaluation.scoring import BASE, score_texts

ROOT = pathlib.Path(__file__).parent
ROWS = 160  # of each set that are asked: all of the forget set
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
    twin = t3jax.load_lm(str(ROOT / "retain_only"))
    head = train(config, lm, out)
    sampler = functools.partial(
        t3jax.Sampler, prompt_format=prompt_format(config), batch_size=64, chunk=8
    )
    samplers = {
        "base": sampler(lm),
        "unlearned": sampler(lm, head),
        "retain_only": sampler(twin),
    }

    rows = {
        name: _spread(data.load_records(ROOT / "authors" / f"{name}_perturbed.jsonl"), ROWS)
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
        for model in MODELS:
            texts = samplers[model](
                [row[field] for row in chosen],
                max_new_tokens=config.max_new_tokens,
                progress=f"{LABELS[metric].strip()}, {model}",
            )
            answers[metric][model] = texts
            scores = rouge_scores([row["answer"] for row in chosen], texts)
            recalls[metric][model] = float(np.mean(scores["rougeL_recall"]))

    questions = [row["question"] for row in rows["forget"]]
    perplexity = {
        model: statistics.median(
            perplexities(twin, questions, answers["forget_recall"][model], prompt_format(config))
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


def train(config, lm: t3jax.LM, out: pathlib.Path) -> t3jax.Head:
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
    lm: t3jax.LM,
    questions: Sequence[str],
    answers: Sequence[str],
    prompt_format: data.PromptFormat,
) -> list[float]:
    """Perplexity of each answer to its question under a model, closing token included."""
    examples = [
        data.encode_question_answer(lm.tokenizer, question, answer or " ", prompt_format)
        for question, answer in zip(questions, answers, strict=True)
    ]
    (scores,) = score_texts(lm, examples, [BASE])
    return np.exp(scores.avg_loss).tolist()


def table(summary: dict, rows: dict, answers: dict, out: pathlib.Path) -> str:
    """What a person should see at the end."""
    lines = [
        "",
        f"How much of the true answers is recited (ROUGE-L recall, {ROWS} questions a row)",
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
    lines.append(
        f"{summary['seconds']:.0f} s; all numbers in {out}/summary.json, answers in answers.jsonl"
    )
    return "\n".join(lines)


def _spread(rows: list[dict], count: int) -> list[dict]:
    """`count` rows, evenly spread over the set."""
    if len(rows) < count:
        raise ValueError(f"the demo asks {count} questions of each set, got {len(rows)}")
    return [rows[i * len(rows) // count] for i in range(count)]


if __name__ == "__main__":
    main()
