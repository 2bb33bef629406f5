"""A server under lm-evaluation-harness, against this library's own scorer.

    python -m benchmarks harness --lm_eval=VENV/bin/lm_eval

The command is in an environment with `pip install 'lm_eval[api]' transformers`. The harness asks
the server of the demo's head, through `local-completions`, a multiple-choice task made of the
demo's questions: the right answer among the wrong ones. The log-likelihoods of all choices are
compared, and the questions answered right.
"""

import json
import os
import pathlib
import subprocess
import tempfile

import httpx
import numpy as np
from transformers import PreTrainedTokenizerBase

import t3jax
from benchmarks.serving import AUTHORS, serve
from benchmarks.side_by_side import announce, make_parser, write
from t3jax.data import Example
from t3jax.evaluation.scoring import score_texts
from t3jax.evaluation.settings import settings_grid

_TASK = {
    "task": "demo_authors",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def main() -> None:
    """Reads the command line, compares, writes `out/benchmarks/harness.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--lm_eval", required=True, help="the command `lm_eval`")
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--head", default="out/demo/head")
    parser.add_argument(
        "--rows", type=int, default=60, help="of the forget and the retain set each"
    )
    arguments = parser.parse_args()
    lm, head = t3jax.load_lm(arguments.model), t3jax.load_head(arguments.head)
    docs = make_docs(lm.tokenizer, arguments.rows)
    announce("the harness asks the server")
    with serve(arguments.model, arguments.head) as (url, _), tempfile.TemporaryDirectory() as name:
        theirs, right = run_harness(arguments.lm_eval, arguments.model, url, docs, name)
    examples = [
        _encode(lm.tokenizer, doc["prompt"], choice) for doc in docs for choice in doc["choices"]
    ]
    (scores,) = score_texts(lm, examples, settings_grid([head], controls=False)[1:], [head])
    ours = np.add.reduceat(scores.logprobs.astype(np.float64), scores.starts[:-1])
    ours = ours.reshape(theirs.shape)
    labels = np.array([doc["label"] for doc in docs])
    figures = {
        "log_likelihoods": theirs.size,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "median_difference": float(np.median(np.abs(ours - theirs))),
        "accuracy_of_the_harness": float(np.mean(right)),
        "accuracy_of_the_scorer": float(np.mean(ours.argmax(axis=1) == labels)),
        "answered_alike": float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
    }
    write("harness", figures, {"arguments": vars(arguments)})


def make_docs(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[dict]:
    """Makes the task's rows: a prompt, its choices and the right one's index."""
    docs = []
    for name in ("forget", "retain"):
        lines = (AUTHORS / f"{name}_perturbed.jsonl").read_text().splitlines()[:rows]
        for i, row in enumerate(map(json.loads, lines)):
            label = i % (len(row["perturbed_answer"]) + 1)
            choices = list(row["perturbed_answer"])
            choices.insert(label, row["answer"])
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}],
                tokenize=False,
                add_generation_prompt=True,
            )
            docs.append({"prompt": prompt, "choices": choices, "label": label})
    return docs


def run_harness(
    lm_eval: str, model: str, url: str, docs: list[dict], folder: str
) -> tuple[np.ndarray, list[float]]:
    """Runs the harness; returns log-likelihoods `[docs, choices]` and each doc's accuracy."""
    here = pathlib.Path(folder)
    (here / "rows.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = _TASK | {"dataset_kwargs": {"data_files": {"test": str(here / "rows.jsonl")}}}
    (here / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    served = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    tokenizer = str(pathlib.Path(model).resolve())
    options = {
        "model": served,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": tokenizer,
        "tokenized_requests": "True",
        "num_concurrent": "8",
    }
    command = [lm_eval, "--model", "local-completions", "--tasks", "demo_authors"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in options.items())]
    command += ["--include_path", folder, "--output_path", f"{folder}/out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hub"}
    subprocess.run(command, check=True, env=os.environ | offline)
    (log,) = here.glob("out/**/samples_*.jsonl")
    samples = sorted(map(json.loads, log.read_text().splitlines()), key=lambda row: row["doc_id"])
    likelihoods = [[float(choice[0][0]) for choice in row["resps"]] for row in samples]
    return np.array(likelihoods), [row["acc"] for row in samples]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> Example:
    """The tokens that the harness sends; it scores the prompt's last space with the choice."""
    start = len(tokenizer.encode(prompt.rstrip(), add_special_tokens=False))
    tokens = tokenizer.encode(prompt + choice, add_special_tokens=False)
    return Example(np.array(tokens, np.int32), start)
