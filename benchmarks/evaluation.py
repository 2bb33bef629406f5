"""A TOFU evaluation by t3jax and by transformers on PyTorch, scoring and generation apart.

    python -m benchmarks evaluation --model=FOLDER --tofu=FOLDER
    python -m benchmarks evaluation --model=FOLDER --tofu=FOLDER --whole

The questions are those of forget05: 200 forget, 400 retain, 100 real authors and 117 world facts,
with all their answers. The comparison takes every n-th row (`--every`), in blocks that both sides
process in turn. PyTorch is run fast: one forward pass for each text, texts of like length together,
logits of answer positions only, `generate` with its cache. Both decode the same prompts greedily,
with the same number of rows at once. `--whole` times all rows with t3jax alone: one scoring pass
for the base model and two settings of a head, and the base model's answers.
"""

import argparse
import functools
from collections.abc import Sequence

import numpy as np

import t3jax
from benchmarks.peer import Peer
from benchmarks.side_by_side import (
    Measured,
    alternate,
    make_parser,
    random_head,
    ratio,
    seconds,
    write,
)
from t3jax.data import Example, PromptFormat, evenly_spread, load_dataset
from t3jax.evaluation import BASE, QuestionSet, Setting, encode_set, score_texts

SETS = {
    "forget": "tofu:forget05_perturbed",
    "retain": "tofu:retain_perturbed",
    "ra": "tofu:real_authors_perturbed",
    "wf": "tofu:world_facts_perturbed",
}


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/evaluation.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--tofu", help="folder with TOFU's files; without it, the hub")
    parser.add_argument("--every", type=int, default=20, help="take every n-th row")
    parser.add_argument("--blocks", type=int, default=3, help="repeats, each on rows of its own")
    parser.add_argument("--rows", type=int, default=16, help="answers decoded together")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--whole", action="store_true", help="time all rows with t3jax alone")
    arguments = parser.parse_args()

    lm = t3jax.load_lm(arguments.model, "float32")
    records = {name: load_dataset(source, arguments.tofu) for name, source in SETS.items()}
    encode = functools.partial(
        encode_set, tokenizer=lm.tokenizer, prompt_format=PromptFormat(), max_length=lm.max_position
    )
    if arguments.whole:
        figures, details = measure_whole(
            lm, [encode(name, rows) for name, rows in records.items()], arguments
        )
        write("evaluation_whole", figures, details)
        return
    blocks = []
    for block in range(arguments.blocks):
        chosen = {
            name: evenly_spread(rows[block:], len(rows) // arguments.every)
            for name, rows in records.items()
        }
        blocks.append([encode(name, rows) for name, rows in chosen.items()])
    figures, details = compare(lm, blocks, arguments)
    write("evaluation", figures, details)


def texts(sets: Sequence[QuestionSet]) -> list[Example]:
    """All texts to score."""
    return [example for question_set in sets for example in question_set.texts]


def prompts(sets: Sequence[QuestionSet]) -> list[list[int]]:
    """All prompts to answer."""
    return [prompt.tolist() for question_set in sets for prompt in question_set.prompts]


def measure_whole(
    lm: t3jax.LM, sets: Sequence[QuestionSet], arguments: argparse.Namespace
) -> Measured:
    """The whole evaluation by t3jax: seconds, compilation included."""
    head = random_head(lm)
    settings = [BASE, Setting("head", 2.5, 1.0, (0,)), Setting("T1", 1.0, 1.0, (0,))]
    sampler = t3jax.Sampler(lm, head, batch_size=arguments.rows)
    answers: list[t3jax.Sample] = []

    def answer() -> None:
        answers.extend(
            sampler.generate(
                prompts(sets),
                base_temperature=1.0,
                guidance_scale=0.0,
                max_new_tokens=arguments.max_new_tokens,
                progress="answers",
            )
        )

    figures = {
        "scoring_seconds": seconds(
            lambda: score_texts(lm, texts(sets), settings, [head], progress="scores")
        ),
        "generation_seconds": seconds(answer),
    }
    return figures, {
        "texts": len(texts(sets)),
        "tokens": int(sum(len(example.tokens) for example in texts(sets))),
        "answer_tokens": int(sum(example.num_answer_tokens for example in texts(sets))),
        "prompts": len(prompts(sets)),
        "generated_tokens": sum(len(sample.tokens) for sample in answers),
        "rows": arguments.rows,
    }


def compare(
    lm: t3jax.LM, blocks: Sequence[Sequence[QuestionSet]], arguments: argparse.Namespace
) -> Measured:
    """Both sides on each block in turn, after a first round that is not counted."""
    peer = Peer("LanguageModel", arguments.model)
    sampler = t3jax.Sampler(lm, batch_size=arguments.rows)
    ours: dict[int, list[float]] = {}
    theirs: dict[int, list[float]] = {}
    same_text: list[bool] = []

    def score(block: int) -> None:
        ours[block] = score_texts(lm, texts(blocks[block]), [BASE])[0].avg_loss.tolist()

    def peer_score(block: int) -> None:
        examples = texts(blocks[block])
        starts = [example.answer_start for example in examples]
        tokens = [example.tokens for example in examples]
        theirs[block] = peer("losses", tokens, starts, arguments.rows)

    generated: dict[int, list[list[int]]] = {}

    def answer(block: int) -> None:
        samples = sampler.generate(prompts(blocks[block]), max_new_tokens=arguments.max_new_tokens)
        generated[block] = [sample.tokens for sample in samples]

    def peer_answer(block: int) -> None:
        asked = prompts(blocks[block])
        answers = peer("answers", asked, arguments.rows, arguments.max_new_tokens)
        same_text.extend(a == b for a, b in zip(answers, generated[block], strict=True))

    compiling = {"scoring": seconds(lambda: score(0)), "generation": seconds(lambda: answer(0))}
    peer_score(0)
    works = {"score": score, "peer_score": peer_score, "answer": answer, "peer_answer": peer_answer}
    times = alternate(works, len(blocks))
    worst = max(float(np.abs(np.subtract(ours[block], theirs[block])).max()) for block in ours)
    both = {
        "ours": np.add(times["score"], times["answer"]),
        "peer": np.add(times["peer_score"], times["peer_answer"]),
    }
    figures = {
        "scoring_speedup": ratio(times["peer_score"], times["score"]),
        "generation_speedup": ratio(times["peer_answer"], times["answer"]),
        "evaluation_speedup": ratio(both["peer"], both["ours"]),
        "largest_difference_of_losses": worst,
        "share_of_answers_equal": float(np.mean(same_text)),
    }
    return figures, {
        "seconds": times,
        "first_round_seconds_with_compilation": compiling,
        "peer_peak_memory_gib": peer.peak_memory_gib,
        "texts_of_a_block": [len(texts(block)) for block in blocks],
        "prompts_of_a_block": [len(prompts(block)) for block in blocks],
        "rows": arguments.rows,
    }
