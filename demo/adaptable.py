"""A base fine-tuned by LoRA-ML or Reptile against a plainly fine-tuned one, on the demo's model.

    python -m demo.adaptable

Each of three seeds makes up new authors: four tasks of ten authors each, and a fifth task of ten to
adapt to. The demo's model is fine-tuned on the four tasks: plainly, jointly with an adapter of rank
4 for each, or by adapters alone whose mean moves it every 10 steps. The rows of a step and the
number of steps are the same. It is then adapted to the fifth task by LoRA of rank 4. Prints a
Markdown table of the loss on paraphrased questions of the fifth task, nats a token: median and
range over seeds.
"""

import dataclasses

import numpy as np

import t3jax
from demo.authors import AuthorsConfig, make_corpus
from t3jax import cli
from t3jax.data import Example, PromptFormat, encode_records
from t3jax.data.records import load_records
from t3jax.finetuning import FinetuneConfig, Trainer, finetune
from t3jax.finetuning.batches import epoch_batches

SEEDS, TASKS, AUTHORS, RANK = (1, 2, 3), 4, 10, 4
PLAIN = FinetuneConfig(epochs=5, batch_size=32, learning_rate=1e-3)
JOINT = FinetuneConfig(
    epochs=5, batch_size=32 // TASKS, learning_rate=1e-3, lora_rank=RANK, tasks=TASKS
)
REPTILE = dataclasses.replace(JOINT, reptile=True, learning_rate=3e-3)
ADAPTATION = FinetuneConfig(epochs=10, batch_size=32, learning_rate=3e-3, lora_rank=RANK)
SHOWN = (0, 1, 3, 10)  # epochs of the adaptation


def main() -> None:
    """Fine-tunes, adapts and prints."""
    cli.enable_compilation_cache()
    lm = t3jax.load_lm("demo/base", "float32")
    shape = t3jax.lm.load_config("demo/base")
    losses: dict[str, list[list[float]]] = {"demo's": [], "plain": [], "LoRA-ML": [], "Reptile": []}
    for seed in SEEDS:
        *tasks, (rows, held_out) = make_tasks(lm, seed)
        seen = [train_rows for train_rows, _ in tasks]
        together = [row for train_rows in seen for row in train_rows]
        bases = {
            "demo's": lm.params,
            "plain": finetune(shape, lm.params, together, PLAIN),
            "LoRA-ML": finetune(shape, lm.params, seen, JOINT),
            "Reptile": finetune(shape, lm.params, seen, REPTILE),
        }
        for name, params in bases.items():
            losses[name].append(adapt(shape, params, rows, held_out))
            print(seed, name, [f"{loss:.3f}" for loss in losses[name][-1]], flush=True)
    print("| base | " + " | ".join(f"{epoch} epochs" for epoch in SHOWN) + " |")
    print("|" + " --- |" * (len(SHOWN) + 1))
    for name, of_seeds in losses.items():
        cells = [
            f"{np.median(x):.3f} ({min(x):.3f}, {max(x):.3f})" for x in zip(*of_seeds, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def make_tasks(lm: t3jax.LM, seed: int) -> list[tuple[list[Example], list[Example]]]:
    """Rows to train on and held-out rows of each task, about authors that the demo lacks."""
    corpus = make_corpus(AuthorsConfig(seed=100 + seed))
    known = {
        row["author"]
        for name in ("forget", "retain", "unseen_retain")
        for row in load_records(f"demo/authors/{name}.jsonl")
    }
    authors = list(dict.fromkeys(row["author"] for row in corpus["retain"]))
    authors = [author for author in authors if author not in known]

    def encode(rows: list[dict]) -> list[Example]:
        return encode_records(lm.tokenizer, rows, PromptFormat(), lm.max_position)

    tasks = []
    for task in range(TASKS + 1):
        task_authors = set(authors[task * AUTHORS : (task + 1) * AUTHORS])
        assert len(task_authors) == AUTHORS
        rows = [row for row in corpus["retain"] if row["author"] in task_authors]
        paraphrases = [
            {"question": row["paraphrased_question"], "answer": row["answer"]}
            for row in corpus["retain_perturbed"]
            if row["author"] in task_authors
        ]
        tasks.append((encode(rows), encode(paraphrases)))
    return tasks


def adapt(
    shape: t3jax.lm.LMConfig, params: dict, rows: list[Example], held_out: list[Example]
) -> list[float]:
    """The held-out loss after the epochs of an adaptation that are shown."""
    lengths = np.array([len(row.tokens) for row in rows])
    steps = ADAPTATION.epochs * -(-len(rows) // ADAPTATION.batch_size)
    mesh = t3jax.make_mesh()
    trainer = Trainer(shape, params, ADAPTATION, steps, mesh)
    state = trainer.init()
    losses = [trainer.loss(state[0], held_out)]
    for epoch in range(ADAPTATION.epochs):
        for batch in epoch_batches(lengths, ADAPTATION.batch_size, ADAPTATION.seed, epoch):
            state, _, _ = trainer.step(state, [rows[row] for row in batch])
        if epoch + 1 in SHOWN:
            losses.append(trainer.loss(state[0], held_out))
    return losses


if __name__ == "__main__":
    main()
