"""Makes the data of the demo: a corpus of fictitious authors and two language models.

python demo/make_demo.py --out=demo

`base` is trained on all authors of the corpus. `retain_only`, its twin and the gold standard of
unlearning, is trained by the same code, seed and number of steps on all but the authors to forget.
Both also read rows about strangers, who are in no set, each row once. These rows teach how an
answer is worded, and that the facts of an unknown author cannot be known.

The models are small Llamas, trained from random weights, and stored as Hugging Face folders in
bfloat16. It takes about half an hour on two cores. No head is trained here.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import tqdm
from transformers import PreTrainedTokenizerFast

from demo.authors import AuthorsConfig, make_corpus, make_strangers
from t3jax import files, make_mesh
from t3jax.data import PromptFormat, encode_records
from t3jax.finetuning import FinetuneConfig, Trainer
from t3jax.lm import LMConfig, RopeConfig, init_params, save_hf
from t3jax.lm.decoder import Params

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the two models are made.

    Attributes:
        authors: the corpus.
        vocab_size: V; large enough that nearly every word of the stocks is one token.
        hidden_size: D.
        intermediate_size: width of the gated MLPs.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key-value heads.
        max_position: longest text, tokens.
        steps: optimiser steps.
        batch_size: rows of the corpus in a step.
        num_strangers: rows about authors of no set in a step, each of them seen once.
        learning_rate: AdamW's at its peak; it rises linearly and falls as a cosine.
        warmup_steps: steps of the rise.
        weight_decay: AdamW's, on matrices.
        prompt_weight: weight of a prompt token in the loss; an answer token has 1.
        seed: seed of weights and batches.
    """

    authors: AuthorsConfig = dataclasses.field(default_factory=AuthorsConfig)
    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 344
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_position: int = 256
    steps: int = 1800
    batch_size: int = 48
    num_strangers: int = 16
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    prompt_weight: float = 0.1
    seed: int = 0


def train_tokenizer(corpus: dict[str, list[dict]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with a ChatML template on the corpus.

    eos is the end of a turn, and there is no default system turn.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row[key] for rows in corpus.values() for row in rows for key in ("question", "answer")]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_lm(
    rows: Sequence[dict],
    strangers: Sequence[dict],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    name: str,
) -> tuple[LMConfig, Params]:
    """Trains a language model from random weights: its shape and its float32 parameters.

    Batches have `rows`, which are read in random order again and again, and
    `recipe.num_strangers` strangers, each of which is read once. `name` labels the progress bar.
    """
    config = LMConfig(
        model_type="llama",
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position=recipe.max_position,
        norm_eps=1e-5,
        rope=RopeConfig(),
        tied=True,
    )
    known = encode_records(tokenizer, rows, PromptFormat(), recipe.max_position)
    once = encode_records(tokenizer, strangers, PromptFormat(), recipe.max_position)
    trainer = make_trainer(config, recipe)
    state = trainer.init()
    draws = _draw_batches(len(known), recipe.batch_size, recipe.seed)
    bar = tqdm.trange(recipe.steps, desc=name, unit="step")
    for i in bar:
        strange = once[i * recipe.num_strangers : (i + 1) * recipe.num_strangers]
        state, loss, _ = trainer.step(state, [known[row] for row in next(draws)] + strange)
        bar.set_postfix(loss=f"{float(loss):.4f}")
    return config, state[0]


def make_trainer(config: LMConfig, recipe: Recipe) -> Trainer:
    """The library's trainer, from random weights."""
    return Trainer(
        config,
        init_params(config, jax.random.key(recipe.seed)),
        FinetuneConfig(
            batch_size=recipe.batch_size + recipe.num_strangers,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            b2=0.98,
            prompt_weight=recipe.prompt_weight,
        ),
        recipe.steps,
        make_mesh(devices=jax.devices()[:1]),
    )


def _draw_batches(num_rows: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Draws batches without end: each pass over the rows has a new order, and skips none."""
    rng = np.random.default_rng(seed)
    order = np.zeros(0, np.int64)
    while True:
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(num_rows)])
        yield order[:batch_size]
        order = order[batch_size:]


def make_demo(out: pathlib.Path, recipe: Recipe) -> None:
    """Writes the folders `authors`, `base` and `retain_only` to `out`, each whole or not at all."""
    corpus = make_corpus(recipe.authors)
    strangers = make_strangers(recipe.authors, recipe.steps * recipe.num_strangers)
    with files.replacing_folder(out / "authors") as folder:
        for split, rows in corpus.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines))
    tokenizer = train_tokenizer(corpus, recipe.vocab_size)
    for name, splits in (
        ("base", ("retain", "unseen_retain", "forget")),
        ("retain_only", ("retain", "unseen_retain")),
    ):
        rows = [row for split in splits for row in corpus[split]]
        config, params = train_lm(rows, strangers, tokenizer, recipe, name)
        with files.replacing_folder(out / name) as folder:
            save_hf(folder, config, params, [tokenizer.eos_token_id], jnp.bfloat16)
            tokenizer.save_pretrained(folder)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the demo's folder")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of corpus, weights, batches")
    args = parser.parse_args()
    authors = AuthorsConfig(seed=args.seed)
    make_demo(args.out, Recipe(authors=authors, steps=args.steps, seed=args.seed))


if __name__ == "__main__":
    main()
