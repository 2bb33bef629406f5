"""Scripts in processes of their own, on a tiny model that they find in a folder.

The processes are forked from a server that has imported what takes seconds.
"""

import atexit
import json
import multiprocessing
import os
import pathlib
import resource
import runpy
import sys
import threading
import time

QUESTIONS = ["Who is Ada?", "Where was Bo born?", "What did Cy write?", "Why is it so?"]


def run_script(
    folder: pathlib.Path, words: list[str], largest_file: int | None, stdout: str, encoding: str
) -> None:
    """Runs a script of the repository; in a process of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    for number, name, mode in ((1, stdout, "w"), (2, "stderr", "w"), (0, "stdin", "r")):
        file = open(folder / name, mode, encoding=encoding)  # noqa: SIM115
        os.dup2(file.fileno(), number)
        opened = open(number, mode, encoding=encoding, buffering=1 if number == 2 else -1)  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[number], opened)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = words
    sys.path.insert(0, str(pathlib.Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:  # as every Python ends, and the fork of a server does not
        threading._shutdown()
        atexit._run_exitfuncs()


class Runner:
    """Starts scripts on a tiny model in `folder`."""

    def __init__(self, repository: pathlib.Path, folder: pathlib.Path):
        self.repository, self.folder = repository, folder
        self.server = multiprocessing.get_context("forkserver")
        # What a process with a limit on its files imports itself, it may cache half.
        names = ("train", "sample", "verify", "evaluate", "sweep", "finetune", "experiment")
        scripts = [f"t3jax.commands.{name}" for name in names]
        slow = ("orbax.checkpoint.v1", "tensorboardX", "transformers.models.auto")
        slow += ("scipy.stats", "sklearn.metrics")
        self.server.set_forkserver_preload(["t3jax.cli", "t3jax.report", *scripts, *slow])

    def start(
        self,
        script: str,
        *flags: str,
        stdin: str = "",
        largest_file: int | None = None,
        stdout: str = "stdout",
        encoding: str = "utf-8",
    ):
        (self.folder / "stdin").write_text(stdin, encoding="utf-8")
        (self.folder / "stderr").write_text("")
        words = [f"{self.repository}/{script}", f"--config={self.repository}/configs/paper.py"]
        words.append(f"--config.model={self.folder}/model")
        process = self.server.Process(
            target=run_script, args=(self.folder, [*words, *flags], largest_file, stdout, encoding)
        )
        process.start()
        return process

    def finish(self, process) -> tuple[int, str, list[str]]:
        """Status, output, and lines of errors."""
        process.join(300)
        output = (self.folder / "stdout").read_text() if (self.folder / "stdout").is_file() else ""
        return process.exitcode, output, (self.folder / "stderr").read_text().splitlines()

    def run(self, *words, **options) -> tuple[int, str, list[str]]:
        return self.finish(self.start(*words, **options))

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in (self.folder / "stderr").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)

    def wait_for_file(self, path: pathlib.Path) -> None:
        deadline = time.monotonic() + 120
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.01)


def make_world(folder: pathlib.Path) -> None:
    """Writes a model, a head, and the forget and retain rows of a request."""
    import tiny  # not above: what a script's process imports of this file shall be quick

    from t3jax.head_io import save_head
    from t3jax.lm import save_hf

    tokenizer = tiny.make_tokenizer()
    save_hf(folder / "model", tiny.CONFIG, tiny.make_params(), [tokenizer.eos_token_id])
    tokenizer.save_pretrained(folder / "model")
    save_head(folder / "head", tiny.make_head(tiny.make_lm()))
    rows = [{"question": question, "answer": "In a town by the sea."} for question in QUESTIONS]
    for name in ("forget", "retain"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
