"""Greedy decoding by t3jax and by transformers on PyTorch, and the cost of guidance and truncation.

    python -m benchmarks decode --model=FOLDER
    python -m benchmarks decode --model=FOLDER --growth

Whole calls are compared: prompts of one length, then a fixed number of tokens, no stop. The peer is
`generate` with the fastest of its caches and thread counts, in float32 (the main figure) and in
bfloat16; and, for guided decoding, a plain loop with a key-value cache and a running mean. The cost
of guidance and truncation is measured on the decoding steps alone, without prefill, in paired
rounds, after questions of general knowledge: the support of a sample depends on the text. A batch
whose finished rows take the next prompt is compared with batches that wait for their longest row,
on answers of uneven length. Int8 weights decode beside float32 ones, and `loss_int8` beside `loss`
shows their effect: nats per answer token of `configs/general_knowledge.jsonl`.
`--growth` writes other figures, to `decode_growth.json`: batches of 1 to 64 rows and prompts of 32
to 2,048 tokens (the peer's cache is static), and random models of other vocabularies, twice the
layers or twice the widths, with the cost of guidance on each.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import t3jax
from benchmarks.ceilings import measure_ceilings, weight_bytes
from benchmarks.peer import Peer
from benchmarks.side_by_side import (
    Measured,
    alternate,
    announce,
    make_parser,
    overhead,
    random_head,
    ratio,
    seconds,
    tune,
    write,
)
from t3jax.data import PromptFormat, encode_records, load_dataset
from t3jax.data.chat import encode_prompt
from t3jax.evaluation import Setting, score_texts
from t3jax.lm import from_params, init_params, load_config
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling import Controls, batch
from t3jax.sampling.loop import Program, State, Weights, decode_chunk, prefill

BATCHES = (1, 16)
VOCABULARIES = (32_768, 131_072, 262_144)
KNOWLEDGE = "configs/general_knowledge.jsonl"
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "draw": {},  # sampling without truncation
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/decode.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=5, help="of whole calls")
    parser.add_argument("--rounds", type=int, default=30, help="pairs for the cost of guidance")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps of such a round")
    parser.add_argument("--uneven", type=int, default=256, help="prompts of uneven answers")
    parser.add_argument("--caches", default="dynamic,static,compiled", help="of generate, to try")
    parser.add_argument("--growth", action="store_true")
    arguments = parser.parse_args()

    details: dict[str, Any]
    if arguments.growth:
        details = {
            "arguments": vars(arguments),
            "growth": measure_growth(arguments),
            "growth_of_the_model": measure_model_growth(arguments),
        }
        write("decode_growth", {}, details)
        return
    ceilings = measure_ceilings()
    lm, int8 = (load_without_end(arguments.model, dtype) for dtype in ("float32", "int8"))
    head = random_head(lm)
    figures: dict[str, Any] = {}
    details = {"ceilings": dataclasses.asdict(ceilings)}
    for rows in BATCHES:
        announce(f"{rows} rows: whole calls")
        measured, details[f"batch{rows}"] = compare(lm, int8, head, rows, arguments)
        figures |= {f"{name}_batch{rows}": value for name, value in measured.items()}
    for rows in BATCHES:
        costs, details[f"step_seconds_batch{rows}"] = measure_guidance(lm, head, rows, arguments)
        figures |= costs
    figures |= measure_sampling(lm, head, rows, arguments)[0]
    needed = weight_bytes(load_config(arguments.model), lm.params) / ceilings.bandwidth
    figures["bandwidth_share_batch1"] = needed / details["step_seconds_batch1"]["plain"]
    announce("answers of uneven length")
    measured, details["refilling"] = compare_refilling(arguments)
    figures |= measured | {"loss": loss(lm), "loss_int8": loss(int8)}
    write("decode", figures, {"arguments": vars(arguments), **details})


def compare(
    lm: t3jax.LM, int8: t3jax.LM, head: t3jax.Head, rows: int, arguments: argparse.Namespace
) -> Measured:
    """Whole calls, both sides in turn."""
    prompts, new = random_prompts(lm, rows, arguments.prompt), arguments.new_tokens
    params = head.params["hidden"][0]["weight"], head.params["output"]
    method = tuple(map(np.asarray, params)), head.base_temperature, head.guidance_scale
    samplers = {
        "ours": t3jax.Sampler(lm, batch_size=rows),
        "ours_guided": t3jax.Sampler(lm, head, batch_size=rows),
        "ours_int8": t3jax.Sampler(int8, batch_size=rows),
    }
    tokens: dict[str, np.ndarray] = {}

    def ours(name: str, _: int = 0) -> None:
        samples = samplers[name].generate(list(prompts), max_new_tokens=new)
        tokens[name] = np.array([sample.tokens for sample in samples])

    first = {name: seconds(functools.partial(ours, name)) for name in samplers}
    with (
        Peer("LanguageModel", arguments.model) as full,
        Peer("LanguageModel", arguments.model, "bfloat16") as half,
    ):
        cache, tried = choose(full, prompts, arguments)
        half_cache, half_tried = choose(half, prompts, arguments)

        def theirs(_: int) -> None:
            tokens["peer"] = full("generate", prompts, new, cache)

        def theirs_guided(_: int) -> None:
            tokens["peer_guided"] = full("guided", prompts, new, *method)

        works: dict[str, Callable[[int], Any]] = {
            **{name: functools.partial(ours, name) for name in samplers},
            "peer": theirs,
            "peer_bfloat16": lambda _: half("generate", prompts, new, half_cache),
            "peer_guided": theirs_guided,
        }
        full("guided", prompts, new, *method)
        times = alternate(works, arguments.repeats)
        peaks = {"float32": full.peak_memory_gib, "bfloat16": half.peak_memory_gib}
    figures = {
        "speedup": ratio(times["peer"], times["ours"]),
        "speedup_over_bfloat16": ratio(times["peer_bfloat16"], times["ours"]),
        "speedup_int8": ratio(times["peer"], times["ours_int8"]),
        "speedup_int8_over_bfloat16": ratio(times["peer_bfloat16"], times["ours_int8"]),
        "speedup_guided": ratio(times["peer_guided"], times["ours_guided"]),
        "share_of_tokens_equal": float(np.mean(tokens["ours"] == tokens["peer"])),
        "share_of_guided_tokens_equal": float(
            np.mean(tokens["ours_guided"] == tokens["peer_guided"])
        ),
    }
    return figures, {
        "seconds": times,
        "first_call_seconds_with_compilation": first,
        "peer_chose": {"float32": cache, "bfloat16": half_cache},
        "peer_tried_seconds": {"float32": tried, "bfloat16": half_tried},
        "peer_peak_memory_gib": peaks,
    }


def choose(
    peer: Peer, prompts: np.ndarray, arguments: argparse.Namespace
) -> tuple[str, dict[str, float]]:
    """The fastest cache of `generate`; also sets the peer's fastest thread count."""
    return tune(
        peer,
        {
            cache: functools.partial(peer, "generate", prompts, arguments.new_tokens, cache)
            for cache in arguments.caches.split(",")
        },
    )


def measure_guidance(
    lm: t3jax.LM, head: t3jax.Head, rows: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, float]]:
    """The cost of guidance, plain and gated, for a step; and the seconds of a step of each."""
    announce(f"{rows} rows: the cost of guidance")
    stretch = functools.partial(Stretch, lm, rows, arguments)
    gated = stretch(head, Refinements(gated=True))
    variants = {"plain": stretch(), "guidance": stretch(head), "gated": gated}
    costs, steps = measure_steps(variants, "plain", arguments.rounds)
    return {f"{name}_overhead_batch{rows}": value for name, value in costs.items()}, steps


def measure_sampling(
    lm: t3jax.LM, head: t3jax.Head, rows: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, float]]:
    """The cost of sampling for a guided step; and the seconds of a step of each."""
    announce(f"{rows} rows: the cost of sampling")
    stretch = functools.partial(Stretch, lm, rows, arguments, head)
    variants = {"greedy": stretch()}
    variants |= {name: stretch(temperature=1.0, **x) for name, x in TRUNCATIONS.items()}
    costs, steps = measure_steps(variants, "greedy", -(-arguments.rounds // 3))
    return {f"{name}_cost_batch{rows}": value for name, value in costs.items()}, steps


def measure_steps(
    variants: Mapping[str, "Stretch"], base: str, rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The cost of each variant over the base, as a fraction, and the seconds of a step of each."""
    for stretch in variants.values():
        stretch.prepare()
        stretch.run()
    times = alternate(
        {name: stretch.run for name, stretch in variants.items()},
        rounds,
        {name: stretch.prepare for name, stretch in variants.items()},
    )
    costs = {name: overhead(times[name], times[base]) for name in variants if name != base}
    steps = {name: float(np.median(times[name])) / variants[name].steps for name in variants}
    return costs, steps


class Stretch:
    """A number of decoding steps; the prompts are read before, so that only the steps are timed."""

    def __init__(
        self,
        lm: t3jax.LM,
        rows: int,
        arguments: argparse.Namespace,
        head: t3jax.Head | None = None,
        refinements: Refinements = PLAIN,
        **knobs: Any,
    ):
        self.steps = arguments.steps
        if head is not None:
            knobs |= {"base_temperature": head.base_temperature, "guidance_scale": 1.0}
        self._controls = jax.device_put(Controls.filled(rows, **knobs))
        heads = [] if head is None else [head]
        self._program = Program(
            lm.apply,
            lm.unembed,
            lm.init_cache,
            tuple(head.config for head in heads),
            "base",
            False,
            lm.mesh,
            refinements,
        )
        shifts = tuple(jnp.float32(head.prior_shift) for head in heads)
        self._weights = Weights(lm.params, tuple(head.params for head in heads), shifts)
        self._stopped = jnp.zeros(rows, bool)
        self._stop_ids = jnp.zeros(0, jnp.int32)
        prompts = jnp.asarray(
            random_prompts(lm, rows, arguments.prompt)
            if lm.tokenizer is None
            else questions(lm, rows, arguments.prompt)
        )
        self._read, _ = prefill(
            self._program,
            self._weights,
            prompts,
            jnp.ones(prompts.shape, bool),
            jax.random.split(jax.random.key(0), rows),
            self._controls,
            prompts.shape[1] + 1 + self.steps,
            self._stop_ids,
        )
        self._state: State

    def prepare(self) -> None:
        """Restores the state after the prompts."""
        self._state = jax.block_until_ready(jax.tree.map(jnp.copy, self._read))

    def run(self, _: int = 0) -> None:
        """Decodes; the state is donated."""
        jax.block_until_ready(
            decode_chunk(
                self._program,
                self._weights,
                self._state,
                self._stopped,
                self._controls,
                self._stop_ids,
                self.steps,
            )
        )


def compare_refilling(arguments: argparse.Namespace) -> Measured:
    """Many prompts, 16 rows: all in one call, and 16 at a time, which wait for their longest.

    One token in 40 ends an answer, so that lengths have a geometric distribution.
    """
    rows, longest = 16, 96
    lm = t3jax.load_lm(arguments.model, "float32")
    lm = dataclasses.replace(lm, eos_ids=tuple(range(0, lm.vocab_size, 40)))
    sampler = t3jax.Sampler(lm, batch_size=rows)
    prompts = list(random_prompts(lm, arguments.uneven, arguments.prompt))
    steps = {"refilled": 0, "waiting": 0}
    lengths: dict[str, list[int]] = {}

    def count_steps(name: str) -> Callable[..., Any]:
        def decode(program: Program, weights: Weights, state: State, *rest: Any) -> Any:
            steps[name] += len(state.done) * rest[-1]
            return decode_chunk(program, weights, state, *rest)

        return decode

    def answer(name: str, at_once: int) -> None:
        steps[name], lengths[name] = 0, []
        with mock.patch.object(batch, "decode_chunk", count_steps(name)):
            for start in range(0, len(prompts), at_once):
                asked = prompts[start : start + at_once]
                samples = sampler.generate(asked, temperature=1.0, max_new_tokens=longest)
                lengths[name] += [len(sample.tokens) for sample in samples]

    works = {
        "refilled": lambda _=0: answer("refilled", len(prompts)),
        "waiting": lambda _=0: answer("waiting", rows),
    }
    for work in works.values():
        work()
    times = alternate(works, 3)
    used = {name: sum(counts) - len(counts) for name, counts in lengths.items()}
    figures = {
        "refill_speedup": ratio(times["waiting"], times["refilled"]),
        "wasted_share": 1 - used["refilled"] / steps["refilled"],
        "wasted_share_waiting": 1 - used["waiting"] / steps["waiting"],
    }
    mean = float(np.mean(lengths["refilled"]))
    return figures, {"seconds": times, "steps": steps, "mean_tokens": mean}


def measure_growth(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """New tokens a second, prefill included, as batches and prompts grow."""
    lm = load_without_end(arguments.model, "float32")
    lines = []
    shapes = [(1, 32), (4, 32), (16, 32), (64, 32), (1, 128), (1, 512), (1, 2048)]
    with Peer("LanguageModel", arguments.model) as peer:
        for rows, length in shapes:
            announce(f"{rows} rows of {length} tokens")
            prompts = random_prompts(lm, rows, length)
            sampler = t3jax.Sampler(lm, batch_size=rows)
            ours = functools.partial(
                sampler.generate, list(prompts), max_new_tokens=arguments.new_tokens
            )
            compiling = seconds(ours)
            theirs = functools.partial(peer, "generate", prompts, arguments.new_tokens, "static")
            tune(peer, {"static": theirs})
            works = {"ours": lambda _, f=ours: f(), "peer": lambda _, f=theirs: f()}
            times = alternate(works, 3)
            speeds = {
                f"{name}_tokens_per_second": rows * arguments.new_tokens / float(np.median(x))
                for name, x in times.items()
            }
            shape = {"rows": rows, "prompt": length, "first_call_seconds": compiling}
            lines.append(shape | speeds | {"speedup": ratio(times["peer"], times["ours"])})
    return lines


def measure_model_growth(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A step of decoding, and the cost of guidance, as the model grows."""
    config = load_config(arguments.model)
    widths = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    shapes = [
        *({"vocab_size": size} for size in VOCABULARIES),
        {"num_layers": 2 * config.num_layers},
        {name: 2 * getattr(config, name) for name in widths},
    ]
    lines = []
    for shape in shapes:
        announce(str(shape))
        grown: Any = dataclasses.replace(config, **shape)
        lm = from_params(grown, init_params(grown, jax.random.key(0)), None, (), "random")
        for rows in BATCHES:
            variants = {
                "plain": Stretch(lm, rows, arguments),
                "guidance": Stretch(lm, rows, arguments, random_head(lm)),
            }
            costs, steps = measure_steps(variants, "plain", -(-arguments.rounds // 3))
            lines.append({**shape, "rows": rows, "step_seconds": steps["plain"], **costs})
    return lines


def loss(lm: t3jax.LM) -> float:
    """Mean loss of answers of general knowledge, nats a token."""
    texts = encode_records(lm.tokenizer, load_dataset(KNOWLEDGE), PromptFormat(), lm.max_position)
    (scores,) = score_texts(lm, texts, [Setting("base")])
    return -float(scores.logprobs.mean(dtype=np.float64))


def load_without_end(model: str, dtype: str) -> t3jax.LM:
    """The model without an end of text: all rows run to the end."""
    return dataclasses.replace(t3jax.load_lm(model, dtype), eos_ids=())


def questions(lm: t3jax.LM, rows: int, length: int) -> np.ndarray:
    """The last tokens `[B, P]` of prompts that ask questions of general knowledge."""
    texts = [row["question"] for row in load_dataset(KNOWLEDGE)]
    prompts = [encode_prompt(lm.tokenizer, text, PromptFormat()) for text in texts]
    long_enough = [prompt[-length:] for prompt in prompts if len(prompt) >= length]
    return np.stack([long_enough[i % len(long_enough)] for i in range(rows)]).astype(np.int32)


def random_prompts(lm: t3jax.LM, rows: int, length: int) -> np.ndarray:
    """Token ids `[B, P]`."""
    rng = np.random.default_rng(0)
    return rng.integers(lm.vocab_size, size=(rows, length), dtype=np.int32)
