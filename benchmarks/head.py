"""Training the head by t3jax and by PyTorch, one run and a sweep of 16.

    python -m benchmarks head
    python -m benchmarks head --model=FOLDER    # also against running the base model at every step

Features are random and have the sizes of forget05 and retain95 under SmolLM2's tokenizer: 200 and
3,800 sequences of some 36 answer tokens, of which some 8,600 are different. Both sides have them
on the device when the clock starts: our time is of all epochs of `train_heads`, or of the whole
call in `speedup_whole_call`. The peer trains on the same features and batches, which it has indexed
beforehand, with the fastest of AdamW's implementations and thread counts. In
`speedup_stored_same_rows` it trains only the rows of W2 that occur, as we do. The sweep is the
paper's grid of learning rates and weight decays with four seeds; the peer's sweep is counted as 16
of its runs.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.ceilings import measure_ceilings
from benchmarks.peer import Peer
from benchmarks.side_by_side import Measured, alternate, make_parser, ratio, seconds, tune, write
from t3jax import sharding
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.training import TrainConfig, make_members, train_heads
from t3jax.training.batches import Data, Planner

HEAD = HeadConfig(hidden_size=576, vocab_size=49152, rank=20)
SEED = 1
SWEEP_SEEDS = (1, 2, 3, 4)
OPTIMIZERS = ("for-loop", "foreach", "fused")


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/head.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="a Hugging Face folder of width 576; for speedup_rerun")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rerun_steps", type=int, default=3, help="timed of the base model's")
    arguments = parser.parse_args()

    ceilings = measure_ceilings()
    retain, forget = random_features(3800, 0), random_features(200, 1)
    recipe = TrainConfig(epochs=arguments.epochs)
    figures, details = compare(retain, forget, HEAD, recipe, arguments.repeats)
    ours = np.array(details["seconds"]["ours"])
    needed = details["steps"] * step_seconds(details, ceilings.arithmetic)
    figures["ceiling_share"] = ratio([needed] * len(ours), ours)
    figures["sweep16_ceiling_share"] = ratio(
        [16 * needed] * len(ours), details["seconds"]["sweep16"]
    )
    if arguments.model:
        step = rerun_step_seconds(arguments)
        details["rerun_step_seconds"] = step
        figures["speedup_rerun"] = ratio([step * details["steps"]] * len(ours), ours)
    details["ceilings"] = dataclasses.asdict(ceilings)
    write("head", figures, {"arguments": vars(arguments), **details})


def compare(
    retain: Features,
    forget: Features,
    head_config: HeadConfig,
    recipe: TrainConfig,
    repeats: int,
    device: str = "cpu",
) -> Measured:
    """Both sides in turn, after first runs that are not counted; PyTorch works on that device."""
    batches, forget_start = same_batches(retain, forget, head_config, recipe)
    steps = len(batches)
    pooled = np.concatenate([retain.pooled, forget.pooled])
    targets = np.concatenate([retain.targets, forget.targets])
    vocabulary, rows = np.unique(targets, return_inverse=True)
    grid = [
        dataclasses.replace(recipe, learning_rate=rate, weight_decay=decay)
        for rate, decay in itertools.product((1e-2, 1e-3), repeat=2)
    ]
    losses: dict[str, float] = {}
    epochs: dict[str, list[float]] = {"ours": [], "sweep16": []}

    def ours(_: int = 0) -> None:
        (head,) = train_heads(retain, forget, head_config, recipe, (SEED,))
        losses["ours"] = head.record["final"]["loss"]
        epochs["ours"].append(head.record["seconds"])

    def sweep(_: int = 0) -> None:
        head = train_heads(retain, forget, head_config, grid, SWEEP_SEEDS)[0]
        epochs["sweep16"].append(head.record["seconds"])

    first = {"ours": seconds(ours), "sweep16": seconds(sweep)}
    width, rank = head_config.hidden_size, head_config.rank
    with (
        Peer("HeadTrainer", width, head_config.vocab_size, rank, device=device) as full,
        Peer("HeadTrainer", width, len(vocabulary), rank, device=device) as same_rows,
    ):
        full("store", pooled, targets, forget_start, batches)
        same_rows("store", pooled, rows, forget_start, batches)
        knobs = (recipe.learning_rate, recipe.weight_decay)
        tried, chosen = {}, {}
        for name, peer in (("peer", full), ("peer_same_rows", same_rows)):
            ways = {
                how: functools.partial(peer, "train", how, min(steps, 70), *knobs)
                for how in OPTIMIZERS
            }
            chosen[name], tried[name] = tune(peer, ways)

        def theirs(_: int) -> None:
            step_losses = full("train", chosen["peer"], steps, *knobs)
            losses["peer"] = float(np.mean(step_losses[-steps // recipe.epochs :]))

        works: dict[str, Callable[[int], Any]] = {
            "ours": ours,
            "peer": theirs,
            "peer_same_rows": lambda _: same_rows("train", chosen["peer_same_rows"], steps, *knobs),
            "sweep16": sweep,
        }
        epochs |= {"ours": [], "sweep16": []}
        times = alternate(works, repeats)
        whole_calls = {f"{name}_whole_call": times[name] for name in epochs}
        times |= whole_calls | epochs
        peaks = {"all rows": full.peak_memory_gib, "same rows": same_rows.peak_memory_gib}
    return compute_figures(times), {
        "seconds": times,
        "first_run_seconds_with_compilation": first,
        "peer_chose": chosen,
        "peer_tried_seconds": tried,
        "peer_peak_memory_gib": peaks,
        "loss_of_the_last_epoch": losses,
        "steps": steps,
        "tokens_of_all_steps": sum(map(len, batches)),
        "trained_rows": len(vocabulary),
    }


def compute_figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Speedups over the peer, and the cost of the sweep; the peer's sweep counts as 16 runs."""
    ours, sweep = times["ours"], times["sweep16"]
    return {
        "speedup_stored": ratio(times["peer"], ours),
        "speedup_stored_same_rows": ratio(times["peer_same_rows"], ours),
        "speedup_whole_call": ratio(times["peer"], times["ours_whole_call"]),
        "sweep16_cost": ratio(sweep, ours),
        "sweep16_speedup": ratio(16 * np.array(times["peer"]), sweep),
        "sweep16_speedup_same_rows": ratio(16 * np.array(times["peer_same_rows"]), sweep),
    }


def step_seconds(details: dict[str, Any], arithmetic: float) -> float:
    """Seconds of a step's two products over the features, at the ceiling of arithmetic."""
    tokens = details["tokens_of_all_steps"] / details["steps"]
    return 4 * tokens * HEAD.hidden_size * HEAD.rank / arithmetic


def same_batches(
    retain: Features, forget: Features, head_config: HeadConfig, recipe: TrainConfig
) -> tuple[list[np.ndarray], int]:
    """The rows of every batch of a run of ours, and where the forget set's rows start."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    data = Data.build([retain], forget, head_config, recipe, mesh)
    planner = Planner(data, make_members([recipe], (SEED,)), mesh)
    batches = []
    for epoch in range(1, recipe.epochs + 1):
        for rows in np.asarray(planner.epoch(epoch)[0][0]):
            batches.append(rows[rows >= 0].astype(np.int64))
    return batches, retain.num_tokens


def rerun_step_seconds(arguments: argparse.Namespace) -> float:
    """Seconds of a step of 32 + 32 texts of TOFU's lengths that runs the base model."""
    rng = np.random.default_rng(0)
    lengths = answer_lengths(64, rng)
    question = 50  # tokens, the chat template's included
    texts = [rng.integers(HEAD.vocab_size, size=question + length) for length in lengths]
    retain = [True] * 32 + [False] * 32
    size = (HEAD.hidden_size, HEAD.vocab_size, HEAD.rank)
    with Peer("HeadTrainer", *size, folder=arguments.model) as peer:
        return peer("rerun", texts, [question] * 64, retain, arguments.rerun_steps)


def random_features(
    sequences: int, seed: int, head_config: HeadConfig = HEAD, stretched: float = 1.0
) -> Features:
    """Random features with the lengths of TOFU's answers, times `stretched`."""
    rng = np.random.default_rng(seed)
    lengths = (answer_lengths(sequences, rng) * stretched).round().astype(int)
    starts = np.cumsum([0, *lengths])
    frequencies = 1 / np.arange(1, head_config.vocab_size + 1) ** 1.25
    tokens = np.searchsorted(np.cumsum(frequencies), rng.random(starts[-1]) * frequencies.sum())
    pooled = rng.standard_normal((starts[-1], head_config.hidden_size), np.float32)
    return Features(pooled, tokens.astype(np.int32), starts, key=f"random {sequences} {seed}")


def answer_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random numbers of tokens, distributed like TOFU's answers."""
    return np.clip(rng.normal(36, 11.5, count).round(), 7, 95).astype(int)
