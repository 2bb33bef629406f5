"""A random mixture of experts in t3jax and in transformers on PyTorch: reading and greedy decoding.

    python -m benchmarks experts

The shape is a small `qwen3_moe`, of `--width`, `--layers`, `--experts` and so on. Whole calls are
compared, in float32: prompts of 32 tokens and a fixed number of new ones for batches of 1 and 16
rows, and one new token after 4 prompts of 512. The peer is `generate` with the fastest of its ways
to multiply by experts, and of its thread counts, for each.
"""

import argparse
import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

import t3jax
from benchmarks.decode import random_prompts
from benchmarks.peer import Peer
from benchmarks.side_by_side import Measured, alternate, announce, make_parser, ratio, tune, write
from t3jax.lm import from_params, init_params, lm_config, save_hf

WAYS = ("eager", "grouped_mm")
FOR_FEW = "batched_mm"  # copies the experts of every token, also of the prompt
CALLS = {"batch1": (1, 32, 33), "batch16": (16, 32, 33), "reading": (4, 512, 1)}


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/experts.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of the residual stream")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--chosen", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="width of an expert")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    lm = random_model(arguments)
    assert lm.config is not None
    with tempfile.TemporaryDirectory() as name:
        save_hf(pathlib.Path(name), lm.config, lm.params, [0])
        figures: dict[str, Any] = {}
        details: dict[str, Any] = {}
        with Peer("LanguageModel", name) as peer:
            for call, (rows, length, new) in CALLS.items():
                announce(f"{call}: {rows} rows, {length} tokens, {new} new")
                prompts = random_prompts(lm, rows, length)
                measured, details[call] = compare(lm, peer, prompts, new, arguments.repeats)
                figures |= {f"{name}_{call}": value for name, value in measured.items()}
    weights = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    write("experts", figures, {"arguments": vars(arguments), "weights": weights, **details})


def random_model(arguments: argparse.Namespace) -> t3jax.LM:
    """A model of the shape of the command line, without an end of text."""
    config = lm_config(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 16384,
            "hidden_size": arguments.width,
            "intermediate_size": arguments.size,
            "moe_intermediate_size": arguments.size,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": arguments.width // 64,
            "num_key_value_heads": arguments.width // 128,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "num_experts": arguments.experts,
            "num_experts_per_tok": arguments.chosen,
            "norm_topk_prob": True,
        }
    )
    return from_params(config, init_params(config, jax.random.key(0)), None, (), "random")


def compare(lm: t3jax.LM, peer: Peer, prompts: np.ndarray, new: int, repeats: int) -> Measured:
    """Whole calls, both sides in turn."""
    sampler = t3jax.Sampler(lm, batch_size=len(prompts))
    tokens: dict[str, np.ndarray] = {}

    def ours(_: int) -> None:
        samples = sampler.generate(list(prompts), max_new_tokens=new)
        tokens["ours"] = np.array([sample.tokens for sample in samples])

    ours(0)
    generate = functools.partial(peer, "generate_with_experts")
    ways = (*WAYS, FOR_FEW) if prompts.size <= 64 else WAYS
    way, tried = tune(peer, {way: functools.partial(generate, way, prompts, new) for way in ways})

    def theirs(_: int) -> None:
        tokens["peer"] = generate(way, prompts, new)

    times = alternate({"ours": ours, "peer": theirs}, repeats)
    figures = {
        "speedup": ratio(times["peer"], times["ours"]),
        "share_of_tokens_equal": float(np.mean(tokens["ours"] == tokens["peer"])),
    }
    return figures, {"seconds": times, "peer_chose": way, "peer_tried_seconds": tried}
