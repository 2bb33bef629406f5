"""A model of the shape of Llama 3.1 8B, in bfloat16, on one GPU, beside PyTorch on the same GPU.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks accelerator
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks accelerator --parts=head

Without the variable JAX takes three quarters of the memory, which leaves too little for PyTorch.
Weights, prompts and features are random: their values do not change the times. `steps`: decoding 1,
16 and 64 rows, and the cost of guidance and sampling for a step, in paired rounds. `calls`: whole
calls beside `generate` with the faster of its dynamic cache and its static one under
`torch.compile`. `features`: texts of 96, 1,024 and 2,048 tokens; the peer computes hidden states
and stores nothing. `head`: 3,800 and 200 sequences of 200,000 answer tokens, features of width
4,096, one run and 16 at once.
Each part writes `out/benchmarks/accelerator_PART.json`. Smaller sizes are for trying the command.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import t3jax
from benchmarks.ceilings import (
    Ceilings,
    forward_operations,
    measure_accelerator_ceilings,
    weight_bytes,
)
from benchmarks.decode import measure_guidance, measure_sampling, random_prompts
from benchmarks.features import compute_features, random_texts, report
from benchmarks.head import answer_lengths, compare, random_features
from benchmarks.peer import Peer
from benchmarks.side_by_side import (
    Measured,
    alternate,
    announce,
    fastest,
    make_parser,
    random_head,
    ratio,
    seconds,
    write,
)
from t3jax.batching import map_batches
from t3jax.data import Example
from t3jax.features import feature_pass
from t3jax.head import HeadConfig
from t3jax.lm import LMConfig, RopeConfig, from_params, init_params
from t3jax.training import TrainConfig

BATCHES = (1, 16, 64)
LENGTHS = (96, 1024, 2048)  # the first is about TOFU's mean, question and answer
ANSWER_TOKENS = 200_000
SEQUENCES = {"retain": 3800, "forget": 200}


def main() -> None:
    """Reads the command line, measures, writes a file for each part."""
    parts = {
        "steps": measure_steps,
        "calls": measure_calls,
        "features": measure_features,
        "head": measure_head,
    }
    parser = make_parser(__doc__)
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--device", default="cuda", help="of PyTorch")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="the MLP is 3.5 times wider")
    parser.add_argument("--vocab_size", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=65_536, help="of the texts of each length")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=30, help="pairs for the cost of guidance")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps of such a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--caches", default="dynamic,compiled", help="of generate, to try")
    arguments = parser.parse_args()

    ceilings = measure_accelerator_ceilings(arguments.device)
    for part in arguments.parts.split(","):
        figures, details = parts[part](arguments, ceilings)
        details |= {"arguments": vars(arguments), "ceilings": dataclasses.asdict(ceilings)}
        write(f"accelerator_{part}", figures, details)


def measure_steps(arguments: argparse.Namespace, ceilings: Ceilings) -> Measured:
    """Steps of decoding, without prefill."""
    config, lm = make_model(arguments)
    head = random_head(lm)
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {}
    weights = weight_bytes(config, lm.params)
    for rows in BATCHES:
        guiding, times = measure_guidance(lm, head, rows, arguments)
        drawing, draw_times = measure_sampling(lm, head, rows, arguments)
        figures |= guiding | drawing
        figures[f"bandwidth_share_batch{rows}"] = weights / ceilings.bandwidth / times["plain"]
        details[f"step_seconds_batch{rows}"] = times | draw_times
    return figures, details


def measure_calls(arguments: argparse.Namespace, ceilings: Ceilings) -> Measured:
    """Whole calls of both sides in turn."""
    config, lm = make_model(arguments)
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {}
    with Peer("LanguageModel", None, "bfloat16", arguments.device, llama(config)) as peer:
        for rows in BATCHES:
            announce(f"{rows} rows: whole calls")
            prompts = random_prompts(lm, rows, arguments.prompt)
            sampler, new = t3jax.Sampler(lm, batch_size=rows), arguments.new_tokens
            ours = functools.partial(sampler.generate, list(prompts), max_new_tokens=new)
            first = seconds(ours)
            theirs = {
                cache: functools.partial(peer, "generate", prompts, new, cache)
                for cache in arguments.caches.split(",")
            }
            cache, tried = fastest(theirs)
            works = {"ours": lambda _, f=ours: f(), "peer": lambda _, f=theirs[cache]: f()}
            times = alternate(works, arguments.repeats)
            figures[f"speedup_batch{rows}"] = ratio(times["peer"], times["ours"])
            details[f"whole_calls_batch{rows}"] = {
                "seconds": times,
                "first_call_seconds_with_compilation": first,
                "peer_chose": cache,
                "peer_tried_seconds": tried,
            }
    return figures, details


def measure_features(arguments: argparse.Namespace, ceilings: Ceilings) -> Measured:
    """Forward passes with causal means; the peer's forward passes."""
    config, lm = make_model(arguments)
    sets = {f"_{n}": random_texts(lm, max(1, arguments.tokens // n), n) for n in LENGTHS}
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {}
    with Peer("LanguageModel", None, "bfloat16", arguments.device, llama(config)) as peer:
        for name, texts in sets.items():
            announce(f"features{name}")
            times, details[f"texts{name}"] = compare_features(lm, texts, peer, arguments.repeats)
            needed = sum(forward_operations(config, lm.params, len(x.tokens)) for x in texts)
            ideal = [needed / ceilings.arithmetic] * arguments.repeats
            figures |= {
                f"ceiling_share{name}": ratio(ideal, times["ours"]),
                f"ceiling_share_forward{name}": ratio(ideal, times["ours_forward"]),
                f"peer_ceiling_share{name}": ratio(ideal, times["peer"]),
                f"speedup{name}": ratio(times["peer"], times["ours"]),
            }
    return figures, details


def compare_features(
    lm: t3jax.LM, texts: Sequence[Example], peer: Peer, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Both sides in turn: their seconds, and details for the file."""
    tokens = [text.tokens for text in texts]
    longest = max(map(len, tokens))
    sizes = sorted({max(1, total // longest) for total in (4096, 16384)})
    ways = {rows: functools.partial(peer, "forward", tokens, rows) for rows in sizes}
    rows, tried = fastest(ways)

    def ours_forward(_: int = 0) -> None:
        map_batches(
            lm,
            texts,
            lambda _, *batch: feature_pass(lm.apply, lm.params, *batch),
            lambda _, result: jax.block_until_ready(result),
            tokens_per_batch=None,
            progress=None,
        )

    ours = functools.partial(compute_features, lm, texts)
    first = seconds(ours)
    ours_forward()
    works: dict[str, Callable[[int], Any]] = {
        "ours": ours,
        "ours_forward": ours_forward,
        "peer": lambda _: peer("forward", tokens, rows),
    }
    times = alternate(works, repeats)
    return times, report(tokens, times, first, rows, tried)


def measure_head(arguments: argparse.Namespace, ceilings: Ceilings) -> Measured:
    """One run and 16 at once, and PyTorch's, on features that are stored on the device."""
    config = HeadConfig(arguments.width, arguments.vocab_size, rank=20)
    mean = answer_lengths(sum(SEQUENCES.values()), np.random.default_rng(0)).mean()
    stretched = ANSWER_TOKENS / sum(SEQUENCES.values()) / mean
    announce("random features")
    retain, forget = (
        random_features(count, seed, config, stretched)
        for seed, count in enumerate(SEQUENCES.values())
    )
    recipe = TrainConfig(epochs=arguments.epochs)
    announce("training")
    figures, details = compare(retain, forget, config, recipe, arguments.repeats, arguments.device)
    read = details["tokens_of_all_steps"] * config.hidden_size * 4
    ideal = [read / ceilings.bandwidth] * arguments.repeats
    for name in ("ours", "sweep16"):
        figures[f"bandwidth_share_{name}"] = ratio(ideal, details["seconds"][name])
    figures["answer_tokens"] = retain.num_tokens + forget.num_tokens
    return figures, details


def make_model(arguments: argparse.Namespace) -> tuple[LMConfig, t3jax.LM]:
    """Llama 3.1 8B's shape, unless the command line says otherwise, with random weights."""
    config = LMConfig(
        model_type="llama",
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.width,
        intermediate_size=7 * arguments.width // 2,
        num_layers=arguments.layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=arguments.width // 32,
        max_position=131_072,
        norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        tied=False,
    )
    params = init_params(config, jax.random.key(0), "bfloat16")
    return config, from_params(config, params, None, (), "random")


def llama(config: LMConfig) -> dict[str, float | bool]:
    """The shape as options of transformers' `LlamaConfig`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
