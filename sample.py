"""Answers prompts with a frozen model, tempered and tilted by a head; the base model beside it.

python sample.py --config=configs/demo.py --config.prompt="Who is ...?"
python sample.py --config=configs/demo.py --config.prompts=FILE.jsonl --config.output=OUT.jsonl
python sample.py --config=configs/demo.py            # type prompts, text comes as it is drawn
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax

import t3jax
from t3jax import cli, files, hosts
from t3jax.data import load_prompts


def main(config: Any) -> None:
    """Loads model and head, then answers the prompts of a flag, of a file, or typed."""
    cli.require(config, "model")
    if config.output and not (config.prompt or config.prompts):
        raise ValueError("output needs prompts: give --config.prompt=... or --config.prompts=FILE")
    rows = []
    if not (config.prompt or config.prompts) and jax.process_count() > 1:
        raise ValueError(
            "only one process can be typed to; give --config.prompt=... or --config.prompts=FILE"
        )
    if config.prompts:
        rows = load_prompts(pathlib.Path(config.prompts))
    elif config.prompt:
        rows = [{"question": config.prompt}]

    mesh = t3jax.make_mesh(config.mesh)
    lm = t3jax.load_lm(config.model, config.dtype, mesh)
    _, heads, _ = cli.load_heads(config, [config.head] if config.head else [], mesh)
    sampler = t3jax.Sampler(
        lm,
        heads,
        base_temperature=config.base_temperature,
        guidance_scale=config.guidance_scale,
        refinements=cli.refinements(config.refinements, lm),
        prompt_format=cli.prompt_format(config),
        batch_size=config.rows,
    )
    _tell(
        f"{config.model} on {jax.device_count()} {jax.default_backend()} device(s), head "
        f"{config.head or '(none)'}, T = {sampler.base_temperature:g}, "
        f"s = {sampler.guidance_scale:g}, {sampler.refinements.name}"
    )
    options = {
        name: config[name]
        for name in (
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "truncate_on",
            "repetition_penalty",
            "seed",
            "stop",
            "stop_ids",
        )
    }
    # The base model is the same program at T = 1, s = 0, drawn with the same random numbers.
    variants = {"base": {"base_temperature": 1.0, "guidance_scale": 0.0}}
    if heads:
        variants["unlearned"] = {}
    if rows:
        options |= {"num_samples": config.num_samples, "logprobs": config.logprobs}
        _answer(sampler, rows, variants, options, config.output)
    else:
        _converse(sampler, variants, options)


def _answer(
    sampler: t3jax.Sampler, rows: list[dict], variants: dict, options: dict, output: str
) -> None:
    """Answers all rows; prints them, or writes one JSON line for each answer."""
    prompts = [row["question"] if "question" in row else row["prompt"] for row in rows]
    lines = [dict(row) for row in rows for _ in range(options["num_samples"])]
    if output:
        pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    for variant, guidance in variants.items():
        start = time.perf_counter()
        samples = sampler.generate(prompts, progress=variant, **guidance, **options)
        seconds = time.perf_counter() - start
        tokens = sum(len(sample.tokens) for sample in samples)
        _tell(
            f"{variant}: {len(samples)} answers, {tokens} tokens in {seconds:.1f} s "
            f"({tokens / seconds:.0f} a second, compilation included)"
        )
        for i, (line, sample) in enumerate(zip(lines, samples, strict=True)):
            line["sample"] = i % options["num_samples"]
            line[variant] = sample.text
            line[f"{variant}_tokens"] = sample.tokens
            if options["logprobs"]:
                line[f"{variant}_base_logprobs"] = sample.base_logprobs
                line[f"{variant}_guided_logprobs"] = sample.guided_logprobs
    if output:
        if hosts.is_lead():
            with files.replacing(pathlib.Path(output)) as temporary:
                temporary.write_text(
                    "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
                )
        _tell(f"wrote {len(lines)} lines to {output}")
        return
    for i, line in enumerate(lines):
        print(f"\n> {prompts[i // options['num_samples']]}")
        for variant in variants:
            print(f"{variant:>10} | {line[variant]}")


def _tell(message: str) -> None:
    """Says how the work goes on, once for all processes, and apart from the answers."""
    if hosts.is_lead():
        print(message, file=sys.stderr)


def _converse(sampler: t3jax.Sampler, variants: dict, options: dict) -> None:
    """Answers what is typed, line by line, each answer shown as it is drawn."""
    typing = sys.stdin.isatty()
    while True:
        if typing:
            print("\n> ", end="", flush=True)
        prompt = sys.stdin.readline()
        if not prompt:
            return
        if not prompt.strip():
            continue
        for variant, guidance in variants.items():
            print(f"{variant:>10} | ", end="", flush=True)
            for piece in sampler.stream(prompt.strip(), **guidance, **options):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    cli.run(main)
