"""A process of test_distributed.py: runs scripts, one after the other, with others as one."""

import importlib
import json
import os
import queue
import signal
import sys

import jax
from absl import flags

import t3jax
from t3jax import cli, hosts
from t3jax.checkpoint import RunFolder
from t3jax.data import load_dataset
from t3jax.data.chat import encode_prompt
from t3jax.sampling import SamplingOptions
from t3jax.serving.engine import Engine
from t3jax.serving.messages import EngineOptions, Request
from t3jax.sharding import make_mesh

_SCRIPTS = flags.DEFINE_list("scripts", [], "Names of scripts.")
_SIGNAL = flags.DEFINE_list(
    "signal", [], "NAME,UNIT,NUMBER: what process 1 sends itself in that epoch or step."
)


def send_signal(name: str, unit: str, number: str) -> None:
    finish = RunFolder.finish

    def finish_or_die(self, done, lines, state, save):
        if jax.process_index() == 1 and unit in lines[0] and done == int(number):
            os.kill(os.getpid(), getattr(signal, name))
        finish(self, done, lines, state, save)

    RunFolder.finish = finish_or_die


def serve(config) -> None:
    """Process 0 asks its engine the prompts and prints the tokens; the other one follows."""
    mesh = make_mesh((1, 1, 8))
    lm = t3jax.load_lm(config.model, mesh=mesh)
    options = EngineOptions(rows=2, chunk=4, piece=32, max_length=64, heads=1, rank=8, queue=8)
    head = t3jax.load_head(config.head, mesh=mesh)
    engine = Engine(lm, options, base_temperature=head.base_temperature)
    engine.install("head", head)
    if not hosts.is_lead():
        engine.follow()
        return
    engine.start()
    rows = load_dataset(config.prompts)
    asked = [
        Request(
            encode_prompt(lm.tokenizer, row["question"], config.prompt_format),
            SamplingOptions(max_new_tokens=8),
        )
        for row in rows
    ]
    arrived: queue.Queue = queue.Queue()
    engine.submit(asked, lambda i, event: arrived.put((i, event)))
    tokens: list[list[int]] = [[] for _ in asked]
    left = len(asked)
    while left:
        i, event = arrived.get(timeout=120)
        tokens[i] += event.tokens
        left -= event.finish is not None
        assert event.finish != "error", event.error
    engine.stop()
    print(f"served: {json.dumps(tokens)}")


def main(config) -> None:
    if _SIGNAL.value:
        send_signal(*_SIGNAL.value)
    for name in _SCRIPTS.value:
        if name == "engine":
            serve(config)
        else:
            importlib.import_module(f"t3jax.commands.{name}").main(config)


if __name__ == "__main__":
    # Gloo's threads write to the process's stdout, into one another's lines: it goes to stderr, and
    # what Python prints stays alone.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cli.run(main)
