"""Runs README's commands and Python lines as they stand there, after `make demo`."""

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    """Stops at the first that fails."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (python .*)$", readme.replace("\\\n", " "), re.MULTILINE)
    # Beside the other commands, which wait for one core much of the time.
    server = concurrent.futures.ThreadPoolExecutor().submit(
        serve, *re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    )
    for command in commands:
        print(f"$ {command}", flush=True)
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "verify.py":
            words.append("--config.verify.rows=3")  # all of them take minutes
        done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
        # A verdict on few rows is "not shown", status 1; no verdict at all is status 2.
        if done.returncode > (1 if words[0] == "verify.py" else 0):
            sys.exit(f"{command} ended with status {done.returncode}")
    # What the second block of Python takes from a model of the reader's own.
    names = {
        "logits": jnp.zeros((1, 1536)),
        "hidden": jax.random.normal(jax.random.key(0), (1, 5, 128)),
        "mask": jnp.ones((1, 5), bool),
    }
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for block in blocks:
        print(block, flush=True)
        exec(block, names)
    served = server.result()
    accra = ["Accra" in answer for answer in served]
    if accra != [True, False, True]:
        sys.exit(f"README's server did not forget and remember: {served}")
    if len(commands) != 6 or len(blocks) != 2 or names["guided"].shape != (1, 1536):
        sys.exit("README has other commands than this script knows; mend it")


def serve(block: str) -> list[str]:
    """Runs the lines that start a server and change what it forgets; gives its answers."""
    environment = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    }
    print(block, flush=True)
    done = subprocess.run(
        ["bash", "-e", "-c", f"trap 'kill $(jobs -p) 2>&-' EXIT\n{block}\nwait"],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    print(done.stdout, flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"id":')]
    return [line["choices"][0]["message"]["content"] for line in lines]


if __name__ == "__main__":
    main()
