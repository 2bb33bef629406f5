"""Answers prompts with a frozen model, tempered and tilted by a head; the base model beside it.

python sample.py --config=configs/demo.py --config.prompt="Who is ...?"
python sample.py --config=configs/demo.py --config.prompts=FILE.jsonl --config.output=OUT.jsonl
python sample.py --config=configs/demo.py            # type prompts, text comes as it is drawn
"""

import dataclasses
import json
import pathlib
import sys
import time
import warnings

import jax

import t3jax
from t3jax import files, hosts, pipeline, preflight
from t3jax.data import load_prompts
from t3jax.head_io import common_default
from t3jax.sampling import SamplingOptions
from t3jax.settings import Settings

DRAWING = ("temperature", "top_k", "top_p", "min_p", "truncate_on", "repetition_penalty")


def main(config: Settings) -> None:
    """Loads model and head, then answers prompts from a flag, a file or standard input."""
    config.require("model")
    if config.head is None and not config.base_only:
        raise ValueError(
            "no head: the answers would be the base model's, with nothing unlearned; give "
            "--config.head=FOLDER, or say --config.base_only=True"
        )
    if config.output and not (config.prompt or config.prompts):
        raise ValueError("output needs prompts: give --config.prompt=... or --config.prompts=FILE")
    rows = []
    if not (config.prompt or config.prompts) and jax.process_count() > 1:
        raise ValueError(
            "only one process can be typed to; give --config.prompt=... or --config.prompts=FILE"
        )
    if config.prompts:
        rows = load_prompts(pathlib.Path(config["prompts"]))
    elif config.prompt:
        rows = [{"question": config.prompt}]

    options = config.sampling
    mesh = t3jax.make_mesh(config.mesh)
    shape = preflight.shape_of(config, mesh)
    served = [] if config.base_only else [config["head"]]
    folders, heads, groups = pipeline.load_heads(config, served, mesh)
    preflight.check_heads(config, folders, heads, groups, shape)
    preflight.check_answer_length(config, shape)
    _check_refusal(config, heads)
    if config.output:
        output = pathlib.Path(config["output"])
        if output.is_dir():
            raise ValueError(f"config.output = {config.output!r}: expected a file, not a folder")
        files.check_writable(output.parent)

    lm = t3jax.load_lm(config["model"], config.dtype, mesh)
    sampler = t3jax.Sampler(
        lm,
        heads,
        base_temperature=config.base_temperature,
        guidance_scale=config.guidance_scale,
        refinements=pipeline.refinements(config.refinements, lm),
        prompt_format=config.prompt_format,
        batch_size=config.rows,
    )
    _report(
        f"{config.model} on {jax.device_count()} {jax.default_backend()} device(s), head "
        f"{config.head if heads else '(none)'}, T = {sampler.base_temperature:g}, "
        f"s = {sampler.guidance_scale:g}, {sampler.refinements.name}"
    )
    # Together with T and s, these decide how much of the forgotten text leaks.
    settings = (f"{name} = {getattr(options, name)}" for name in DRAWING)
    _report(f"drawn with {', '.join(settings)}")
    warnings.showwarning = lambda message, *_, **__: _report(f"sample.py: {message}")
    # The base model is the same program at T = 1, s = 0, drawn with the same random numbers.
    variants = {"base": {"base_temperature": 1.0, "guidance_scale": 0.0}}
    if heads:
        variants["unlearned"] = {}
    if rows:
        _answer(sampler, rows, variants, options, config.output)
    else:
        _converse(sampler, variants, dataclasses.replace(options, num_samples=1, logprobs=False))


def _check_refusal(config: Settings, heads: list[t3jax.Head]) -> None:
    if not heads and config.refinements != "plain":
        raise ValueError(f"config.refinements = {config.refinements!r}: they need a head")
    temperature = config.base_temperature or common_default(heads, "base_temperature", 1.0)
    if config.sampling.refusal is not None and heads and temperature != 1:
        raise ValueError(
            f"config.sampling.refusal needs T = 1, which is {temperature:g} here; give "
            "--config.base_temperature=1, or another head"
        )


def _answer(
    sampler: t3jax.Sampler,
    rows: list[dict],
    variants: dict,
    options: SamplingOptions,
    output: str | None,
) -> None:
    """Answers all rows; prints them, or writes one JSON line for each answer."""
    prompts = [row["question"] if "question" in row else row["prompt"] for row in rows]
    lines = [dict(row) for row in rows for _ in range(options.num_samples)]
    if output:
        pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    for variant, guidance in variants.items():
        start = time.perf_counter()
        samples = sampler.generate(prompts, options, progress=variant, **guidance)
        seconds = time.perf_counter() - start
        tokens = sum(len(sample.tokens) for sample in samples)
        _report(
            f"{variant}: {len(samples)} answers, {tokens} tokens in {seconds:.1f} s "
            f"({tokens / seconds:.0f} a second, compilation included)"
        )
        for i, (line, sample) in enumerate(zip(lines, samples, strict=True)):
            line["sample"] = i % options.num_samples
            line[variant] = sample.text
            line[f"{variant}_tokens"] = sample.tokens
            if variant == "unlearned":
                line["unlearned_base_perplexity"] = sample.base_perplexity
            if options.logprobs:
                line[f"{variant}_base_logprobs"] = sample.base_logprobs
                line[f"{variant}_guided_logprobs"] = sample.guided_logprobs
    if output:
        if hosts.is_lead():
            files.write_text(
                pathlib.Path(output),
                "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines),
            )
        _report(f"wrote {len(lines)} lines to {output}")
        return
    for i, line in enumerate(lines):
        print(f"\n> {prompts[i // options.num_samples]}")
        for variant in variants:
            print(f"{variant:>10} | {line[variant]}")


def _report(message: str) -> None:
    """Prints progress to standard error, from process 0 alone."""
    if hosts.is_lead():
        print(message, file=sys.stderr)


def _converse(sampler: t3jax.Sampler, variants: dict, options: SamplingOptions) -> None:
    """Answers typed lines; prints each answer as it is drawn."""
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
            for piece in sampler.stream(prompt.strip(), options, **guidance):
                print(piece, end="", flush=True)
            print()
