"""From the start of a process to its first token: sample.py, and a minimal transformers script.

    python -m benchmarks startup --model=FOLDER

Each start is a process that loads the model and answers one question. `cold` has an empty
compilation cache and `warm` the cache of the start before; in all, the model's files are in the
page cache and Python's bytecode is on the disk. sample.py serves a head, and prints its first token
when the program for the next tokens is compiled too; the peer asks `generate` for one token.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import t3jax
from benchmarks.peer import peak_memory_gib
from benchmarks.side_by_side import make_parser, random_head, ratio, write
from t3jax.head_io import save_head

QUESTION = "Who wrote the play Hamlet?"
PEER = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
folder, dtype, question = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
chat = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**prompt, do_sample=False, max_new_tokens=1, pad_token_id=0)
print("| " + tokenizer.decode(out[0, -1]), flush=True)
"""


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/startup.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    starts: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_head(pathlib.Path(folder) / "head", random_head(t3jax.load_lm(arguments.model)))
        ours = [
            "sample.py",
            "--config=configs/paper.py",
            f"--config.model={arguments.model}",
            f"--config.head={folder}/head",
            "--config.sampling.max_new_tokens=9",
        ]
        peer = functools.partial(_peer_command, arguments.model)
        for repeat in range(-1, arguments.repeats):
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache{repeat}"}
            results = {
                "cold": start(ours, cache),
                "warm": start(ours, cache),
                "peer": start(peer("float32"), {}),
                "peer_bfloat16": start(peer("bfloat16"), {}),
            }
            if repeat >= 0:  # the first start reads files that are not in the page cache yet
                for name, result in results.items():
                    starts.setdefault(name, []).append(result)
    times = {name: [seconds for seconds, _ in results] for name, results in starts.items()}
    figures = {
        **{f"{name}_seconds": _median(values) for name, values in times.items()},
        "speedup_cold": ratio(times["peer"], times["cold"]),
        "speedup_warm": ratio(times["peer"], times["warm"]),
        "speedup_warm_over_bfloat16": ratio(times["peer_bfloat16"], times["warm"]),
    }
    details = {
        "arguments": vars(arguments),
        "seconds": times,
        "peak_memory_gib_of_starts": {
            name: max(memory for _, memory in results) for name, results in starts.items()
        },
    }
    write("startup", figures, details)


def start(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Runs Python until the first text after "| "; returns seconds and peak memory in GiB."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        env=inherited | dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{QUESTION}\n".encode())
    process.stdin.close()
    shown = b""
    while b"| " not in shown or shown.endswith(b"| "):
        piece = os.read(process.stdout.fileno(), 1)
        if not piece:
            raise RuntimeError(f"{' '.join(command[:2])} ended without an answer: {shown!r}")
        shown += piece
    seconds = time.perf_counter() - begin
    memory = peak_memory_gib(process.pid)
    process.stdout.read()  # the process would block on a full pipe
    process.wait()
    return seconds, memory


def _peer_command(model: str, dtype: str) -> list[str]:
    return ["-c", PEER, model, dtype, QUESTION]


def _median(values: Sequence[float]) -> dict[str, Any]:
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}
