"""Mutated inputs: what is accepted must be right, and what is refused must be said in one error.

    python -m tests.fuzz --cases 5000 --seed 1 [--kind head --kind rows] [--scripts 30] [--keep DIR]

Each case copies a small, whole input (a head, a model, rows, prompts, logs, a config's fields),
damages one thing of it and reads it as the scripts do. A case is

    same      read, with the result of the undamaged input
    other     read, with another result, all of it finite, where that may be (a default instead of a
              field that was left out, another letter in a text)
    refused   ended in one ValueError or OSError that names the file, the field or the value
    WRONG     anything else: NaN, a result that the damage should have prevented, another
              exception, an unclear message, more than 10 s or 500 MB

The same seed and number give the same cases. The scripts are also run in processes of their own.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import importlib
import io
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

if __package__:  # `python -m tests.fuzz`: pytest puts this folder on the path by itself
    sys.path.insert(0, os.path.dirname(__file__))

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tiny
from absl import flags
from ml_collections import config_flags

import t3jax
from t3jax.data import PromptFormat, encode_records, load_prompts, load_records
from t3jax.evaluation import recompute
from t3jax.head_io import load_head, save_head, save_reference_head
from t3jax.lm import save_hf
from t3jax.settings import Settings, from_config, names_of

SECONDS = 10.0
MEGABYTES = 500
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
MODEL = dataclasses.replace(tiny.CONFIG, num_layers=1)

SAME, OTHER, REFUSED, WRONG = "same", "other", "refused", "WRONG"


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was done to an input.

    Attributes:
        what: In words, with the file and the field.
        names: Texts of which a refusal must hold one.
        absurd: Whether another result is wrong: a value that nothing can be computed from.
        must_refuse: Whether the undamaged result is wrong too: the file cannot be read at all.
    """

    what: str
    names: tuple[str, ...]
    absurd: bool = False
    must_refuse: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One damaged input and what came of it."""

    kind: str
    number: int
    damage: Damage
    outcome: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.number}: {self.damage.what}\n    {self.outcome}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: Writes the undamaged input into a folder.
        read: Reads a folder as the scripts do; the result is compared with the undamaged one's.
        json_files: Files of JSON, by name.
        line_files: Files of JSON-lines.
        binary_files: Files of weights.
        optional: Files that need not be there.
        checked: Files whose bytes have a checksum: another result is wrong.
        lenient: Files that a library reads, which may pass over what our reader refuses.
        signed: Fields that may be negative.
        compares: Whether the result says itself that a number is another than before.
    """

    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Any]
    json_files: tuple[str, ...] = ()
    line_files: tuple[str, ...] = ()
    binary_files: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    lenient: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()
    compares: bool = False


class _Hang(BaseException):
    """A case took too long."""


class _Loads(BaseException):
    """A script got as far as to load weights: it has taken its settings."""


# --- JSON with what Python would not write: the placeholder of a value is replaced in the text. ---

_RAW = "\ue000raw{}\ue000"
_WAYS = (
    *("drop", "null", "retype", "retype", "huge", "negative", "nan", "infinity", "overflow"),
    *("digits", "deep", "surrogate", "duplicate", "unknown", "unicode", "empty", "long", "reorder"),
)


def _pick(rng: random.Random, value: Any) -> tuple[Any, Any, str]:
    """A place in a JSON value, fields of the outer objects more often than deep ones."""
    places: list[tuple[Any, Any, str]] = []

    def walk(node: Any, path: str, depth: int) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(items)[:40]:
            name = f"{path}.{key}" if path else str(key)
            places.append((node, key, name))
            if isinstance(child, dict | list) and child and depth < 6:
                walk(child, name, depth + 1)

    walk(value, "", 0)
    return rng.choice(places)


def _is_read_alike(old: Any, new: Any) -> bool:
    """Whether a value of another type is another value: one token id of a list, 3 for 3.0."""
    elements = {type(element) for element in old} if isinstance(old, list) else set()
    return type(new) in elements or (type(old), type(new)) == (float, int)


def damage_json(rng: random.Random, text: str) -> tuple[bytes, str, list[str], bool, bool]:
    """Damages one field of a JSON text.

    Returns:
        The bytes, what was done, the names of the field and of those that it is in, and `absurd`
        and `must_refuse` of the damage.
    """
    value = json.loads(text)
    parent, key, path = _pick(rng, value)
    old = parent[key]
    raws: list[str] = []

    def raw(token: str) -> str:
        raws.append(token)
        return _RAW.format(len(raws) - 1)

    kind = rng.choice(_WAYS)
    absurd = must_refuse = False
    match kind:
        case "drop":
            del parent[key]
        case "null":
            parent[key] = None
        case "retype":
            choices = ["x", 3, 2.5, True, [], {}, [1], {"a": 1}, str(old)]
            new = rng.choice([c for c in choices if type(c) is not type(old)])
            kind, absurd = f"retype to {new!r}", not _is_read_alike(old, new)
            parent[key] = new
        case "huge":
            parent[key] = rng.choice([1e300, 10**18, 10**30, 2**31, 2**63])
            kind, absurd = f"{parent[key]:g}", True
        case "negative":
            parent[key] = rng.choice([-1, -(2**31), -1e-3, -1e300, -0.5])
            kind, absurd = f"{parent[key]}", True
        case "nan" | "infinity" | "overflow" | "digits" | "deep" | "surrogate":
            tokens = {
                "nan": "NaN",
                "infinity": rng.choice(["Infinity", "-Infinity"]),
                "overflow": rng.choice(["1e999", "-1e400"]),
                "digits": "7" * rng.choice([400, 5000]),
                "deep": "[" * 2000 + "]" * 2000 if rng.random() < 0.5 else '{"a":' * 100_000,
                "surrogate": r'"\ud83d x"',
            }
            parent[key] = raw(tokens[kind])
            must_refuse = True
        case "duplicate":
            if isinstance(parent, dict):
                parent[key] = raw(f"{json.dumps(old)}, {json.dumps(key)}: {json.dumps(old)}")
                must_refuse = True
            else:
                parent.insert(key, old)
        case "unknown":
            name = rng.choice(["an_unknown_field", "", "__class__", "\u202e", "a" * 500])
            if isinstance(parent, dict):
                parent[name] = rng.choice([1, "x", None, {"a": [1]}])
            else:
                parent.append("an_unknown_field")
        case "unicode":
            parent[key] = rng.choice(
                ["\u0000", "\u202egnp", "😀" * 50, "\ufeff", "e\u0301", "\x1b[2J"]
            )
        case "empty":
            parent[key] = rng.choice(["", [], {}])
        case "long":
            parent[key] = "word " * 40_000
        case "reorder":
            if isinstance(parent, dict):
                items = list(parent.items())
                rng.shuffle(items)
                parent.clear()
                parent.update(items)
    result = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for i, token in enumerate(raws):
        for placeholder in (_RAW.format(i), json.dumps(_RAW.format(i))[1:-1]):
            result = result.replace(f'"{placeholder}"', token)
    names = [name for name in path.split(".") if len(name) > 2]
    return result.encode(), f"{kind} at {path[:80]}", names, absurd, must_refuse


def damage_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Flips bits, cuts, or overwrites a stretch."""
    changed = bytearray(data)
    match rng.choice(("flip", "flip", "cut", "overwrite", "more")):
        case "flip":
            places = [rng.randrange(len(data)) for _ in range(rng.randint(1, 3))]
            for place in places:
                changed[place] ^= 1 << rng.randrange(8)
            return bytes(changed), f"bits flipped at {places}"
        case "cut":
            size = rng.choice([0, 1, 7, len(data) // 2, len(data.rstrip()) - 1])
            return data[:size], f"cut to {size} bytes"
        case "overwrite":
            place, size = rng.randrange(len(data)), rng.randint(1, 16)
            changed[place : place + size] = rng.randbytes(size)
            return bytes(changed[: len(data)]), f"{size} random bytes at {place}"
    return data + rng.randbytes(5), "5 bytes more"


def damage_file(rng: random.Random, path: pathlib.Path) -> tuple[str, bool]:
    """Puts something else in the place of a file.

    Returns:
        What, and whether no one can read it.
    """
    data = path.read_bytes()
    path.unlink()
    match rng.choice(("missing", "folder", "pipe", "device", "dangling", "away", "utf16", "latin")):
        case "missing":
            return "missing", True
        case "folder":
            path.mkdir()
            return "a folder", True
        case "pipe":
            os.mkfifo(path)
            return "a pipe", True
        case "device":
            path.symlink_to("/dev/zero")
            return "a link to a device", True
        case "dangling":
            path.symlink_to("nowhere")
            return "a dangling link", True
        case "away":
            target = path.parent.parent / f"{path.parent.name}-away"
            target.write_bytes(data)
            path.symlink_to(target)
            return "a link out of the folder", False
        case "utf16":
            path.write_bytes(data.decode("latin-1").encode("utf-16"))
            return "in UTF-16", True
    path.write_bytes(data[:20] + b"\xff\xfe" + data[20:])
    return "two stray bytes", path.suffix != ".txt"


def damage(rng: random.Random, kind: Kind, folder: pathlib.Path) -> Damage:
    """Damages one file of an input in place."""
    files = [*kind.json_files, *kind.json_files, *kind.line_files, *kind.binary_files]
    name = rng.choice(files)
    path = folder / name
    says = (name, str(folder), *(["tokenizer"] if "tokenizer" in name else []))
    way = rng.random()
    if way < 0.12:
        what, unreadable = damage_file(rng, path)
        gone = what in ("missing", "a dangling link") and name in kind.optional
        return Damage(f"{name}: {what}", says, False, unreadable and not gone)
    if way < 0.25 or name in kind.binary_files:
        data, what = damage_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        cut = what.startswith("cut") and name not in kind.line_files
        return Damage(f"{name}: {what}", says, name in kind.checked, cut)
    if name in kind.line_files:
        lines = path.read_text("utf-8").splitlines()
        place = rng.randrange(len(lines))
        data, what, fields, absurd, refuse = damage_json(rng, lines[place])
        encoded = [line.encode() for line in lines]
        encoded[place] = data
        path.write_bytes(b"\n".join(encoded) + b"\n")
        return Damage(f"{name}:{place + 1}: {what}", (name,), absurd, refuse)
    data, what, fields, absurd, refuse = damage_json(rng, path.read_text("utf-8"))
    path.write_bytes(data)
    absurd = absurd and not kind.compares
    absurd = absurd and not (what.startswith("-") and set(fields) & set(kind.signed))
    refuse = refuse and not (name in kind.lenient and what.startswith("duplicate"))
    return Damage(f"{name}: {what}", (*says, *fields), absurd, refuse)


# --- The kinds of input. ---

_FEATURES = np.random.default_rng(0).normal(size=(3, MODEL.hidden_size)).astype(np.float32)


def _head(reference: bool) -> Kind:
    def make(folder: pathlib.Path) -> None:
        config = t3jax.HeadConfig(MODEL.hidden_size, MODEL.vocab_size, 4, "gelu", 1, True)
        params = t3jax.init_head(jax.random.key(0), config)
        head = t3jax.Head(config, params, 2.5, 1.5, "models/base", record={"seed": 3})
        if not reference:
            save_head(folder, head)
            return
        base = {"model_type": "llama", "hidden_size": 32, "vocab_size": 264}
        save_reference_head(folder, head, base)
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {}
        for i, (name, tensor) in enumerate(sorted(tensors.items())):
            places[name] = f"model-{i}.safetensors"
            safetensors.numpy.save_file({name: tensor}, folder / places[name])
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def read(folder: pathlib.Path) -> Any:
        head = load_head(folder)
        scores = t3jax.head_scores(head.params, jnp.asarray(_FEATURES), head.config.activation)
        logits = jnp.linspace(-3.0, 3.0, scores.size, dtype=scores.dtype).reshape(scores.shape)
        cooled = t3jax.tempered_logprobs(logits, head.base_temperature)
        return {
            "guided": np.asarray(
                t3jax.tilt(cooled, scores + head.prior_shift, head.guidance_scale)
            ),
            "model": head.model,
        }

    if reference:
        shards = tuple(f"model-{i}.safetensors" for i in range(3))
        return Kind(make, read, ("config.json", "model.safetensors.index.json"), (), shards)
    return Kind(
        make,
        read,
        ("head.json",),
        (),
        ("head.safetensors",),
        checked=("head.safetensors",),
        signed=("prior_shift",),
    )


def _make_model(folder: pathlib.Path) -> None:
    tokenizer = tiny.make_tokenizer()
    save_hf(folder, MODEL, tiny.make_params(MODEL), [tokenizer.eos_token_id])
    tokenizer.save_pretrained(folder)


def _read_model(folder: pathlib.Path) -> Any:
    lm = t3jax.load_lm(folder, "float32")
    prompts = [{"question": "Who is Ada?", "answer": "In the town."}]
    row = encode_records(lm.tokenizer, prompts, PromptFormat(), 256)[0]
    tokens = np.array([[1, 5, 9, 70]], np.int32)
    mask = np.ones(tokens.shape, bool)
    _, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask)
    return {
        "logits": np.asarray(logits),
        "eos": lm.eos_ids,
        "row": [np.asarray(part).tolist() for part in dataclasses.astuple(row)],
    }


_ROWS = [
    {"question": f"Who is {name}?", "answer": f"{name} is of the town, in {year}."}
    for name, year in (("Ada", 1), ("Bo", 22), ("Cäcilie", 333), ("林晓梅", 4444))
]


def _make_rows(folder: pathlib.Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in _ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "rows.json").write_text(json.dumps([{"text": row["answer"]} for row in _ROWS]))


_TOKENIZER = tiny.make_tokenizer()


def _read_rows(folder: pathlib.Path) -> Any:
    rows = [*load_records(folder / "rows.jsonl"), *load_records(folder / "rows.json")]
    examples = encode_records(_TOKENIZER, rows, PromptFormat(), 10**6)
    return [[np.asarray(part).tolist() for part in dataclasses.astuple(e)] for e in examples]


def _make_prompts(folder: pathlib.Path) -> None:
    rows = [{"question": "Who is Ada?", "id": 7}, {"prompt": "Say <b>so</b>: "}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_prompts(folder: pathlib.Path) -> Any:
    rows = load_prompts(folder / "prompts.jsonl")
    # What sample.py asks, and a line of what it writes.
    texts = [row["question"] if "question" in row else row["prompt"] for row in rows]
    json.dumps([row | {"base": "text"} for row in rows]).encode()
    return [_TOKENIZER.encode(text) for text in texts]


def _make_logs(folder: pathlib.Path) -> None:
    from test_logs import make_log

    from t3jax.evaluation import logs

    retain = make_log(1, rows=6)
    logs.write_log(folder / "retain", retain)
    logs.write_log(folder, make_log(0, rows=6, retain_log=retain))
    (folder / "retain" / logs.EVAL_NAME).rename(folder / "retain.json")


def _read_logs(folder: pathlib.Path) -> Any:
    text, _ = recompute.compare_files(folder, folder / "retain.json")
    if "nan" in text.replace("Finance", "").split() or " inf " in text:
        return math.nan
    return text


_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
KINDS: dict[str, Kind] = {
    "head": _head(reference=False),
    "reference head": _head(reference=True),
    "model": Kind(
        _make_model,
        _read_model,
        ("config.json", "config.json", "generation_config.json", *_TOKENIZER_FILES),
        (),
        ("model.safetensors",),
        ("generation_config.json", "tokenizer_config.json"),
        lenient=("tokenizer.json",),
    ),
    "rows": Kind(_make_rows, _read_rows, ("rows.json",), ("rows.jsonl",)),
    "prompts": Kind(_make_prompts, _read_prompts, (), ("prompts.jsonl",)),
    "logs": Kind(
        _make_logs,
        _read_logs,
        ("TOFU_EVAL.json", "TOFU_SUMMARY.json", "retain.json"),
        optional=("TOFU_SUMMARY.json",),
        compares=True,
    ),
}
# A share of the quick cases; loading a model takes the longest.
WEIGHTS = {
    "head": 5, "reference head": 5, "model": 4, "rows": 5, "prompts": 3, "logs": 4, "flags": 8,
}  # fmt: skip

# Fields of a config that a script writes or only shows, and texts that may be any.
FREE_TEXTS = (
    "request",
    *(
        f"prompt_format.{name}"
        for name in ("system", "date_string", "question_start", "question_end", "answer_start")
    ),
)
SCRIPTS = ("sample", "train_classifier", "evaluate", "verify", "finetune", "sweep", "experiment")


# --- Running. ---


def finite(result: Any) -> bool:
    """Whether all numbers of a result are finite."""
    match result:
        case dict():
            return all(map(finite, result.values()))
        case list() | tuple():
            return all(map(finite, result))
        case np.ndarray():
            return bool(np.isfinite(result).all())
        case float():
            return math.isfinite(result)
    return True


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same, to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def attempt(read: Callable[[], Any]) -> tuple[str, Any]:
    """Calls what reads, within time and memory.

    Returns:
        `read` and the result; `refused` and the error's text; or `WRONG` and why.
    """

    def stop(*_: Any) -> None:
        raise _Hang

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    # For code that never returns to Python: the process then ends, and says where.
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome: tuple[str, Any] = "read", read()
    except (ValueError, OSError) as error:
        outcome = REFUSED, error
    except _Hang:
        outcome = WRONG, f"more than {SECONDS:g} s"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [f for f in place if "t3jax/" in f.filename or "main" in f.name] or list(place)
        where = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}"
        outcome = WRONG, f"{type(error).__name__} at {where}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEGABYTES:
        return WRONG, f"{grown:.0f} MB more"
    return outcome


def judge(damage: Damage, outcome: str, result: Any, undamaged: Any) -> tuple[str, str]:
    """Sorts what came of a damaged input; the outcome and a detail."""
    if outcome == WRONG:
        return WRONG, result
    if outcome == REFUSED:
        message = str(result)
        shown = " ".join(message.split())[:300]
        if not any(name in message for name in damage.names):
            return (
                WRONG,
                f"the error names none of {damage.names}: {type(result).__name__}: {shown}",
            )
        if len(message) > 2000:
            return WRONG, f"an error of {len(message)} characters: {shown}"
        return REFUSED, f"{type(result).__name__}: {shown}"
    if not finite(result):
        return WRONG, "taken, with NaN or infinite results"
    same = equal(result, undamaged)
    if damage.must_refuse:
        return WRONG, f"taken, with {'the same' if same else 'another'} result"
    if damage.absurd and not same:
        return WRONG, "taken, with another result"
    return (SAME, "") if same else (OTHER, "")


class Runner:
    """Runs cases; undamaged inputs are made once."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self._folder = folder
        self._seed = seed
        self._whole: dict[str, tuple[pathlib.Path, Any]] = {}

    def run(self, name: str, number: int) -> Case:
        """Runs one case of a kind; the same number is the same case."""
        rng = random.Random(f"{self._seed} {name} {number}")
        if name == "flags":
            return self._run_flag(rng, number)
        kind = KINDS[name]
        if name not in self._whole:
            whole = self._folder / name.replace(" ", "-")
            whole.mkdir()
            kind.make(whole)
            self._whole[name] = whole, kind.read(whole)
        whole, undamaged = self._whole[name]
        folder = self._folder / f"{whole.name}-{number}"
        shutil.copytree(whole, folder)
        try:
            done = damage(rng, kind, folder)
            outcome, result = attempt(lambda: kind.read(folder))
            return Case(name, number, done, *judge(done, outcome, result, undamaged))
        finally:
            shutil.rmtree(folder)
            (folder.parent / f"{folder.name}-away").unlink(missing_ok=True)

    def world(self) -> pathlib.Path:
        """A folder with a model, a head, rows and prompts, for the scripts."""
        world = self._folder / "world"
        if not world.exists():
            world.mkdir()
            _make_model(world / "model")
            KINDS["head"].make(world / "head")
            for name in ("forget", "retain"):
                lines = [json.dumps(row) + "\n" for row in _ROWS]
                (world / f"{name}.jsonl").write_text("".join(lines))
            _make_prompts(world)
        return world

    def fields(self) -> dict[str, str]:
        """What every script needs to be told."""
        world = self.world()
        return {
            "model": f"{world}/model",
            "head": f"{world}/head",
            "prompts": f"{world}/prompts.jsonl",
            "forget": f"{world}/forget.jsonl",
            "retain": f"{world}/retain.jsonl",
            **{f"eval.{name}": f"{world}/retain.jsonl" for name in ("retain", "holdout")},
            "eval.forget": f"{world}/forget.jsonl",
            "eval.retain_model": f"{world}/model",
            "finetune.data": f"('{world}/retain.jsonl',)",
            **{
                name: f"{world}/out/{name}"
                for name in ("workdir", "finetune.workdir", "eval.dir", "verify.dir")
            },
            "experiment.dir": f"{world}/out/experiment",
            "feature_store": f"{world}/out/features",
            "sampling.max_new_tokens": "4",
        }

    def _run_flag(self, rng: random.Random, number: int) -> Case:
        script = rng.choice(SCRIPTS)
        field, odd, absurd = odd_field(rng)
        what = Damage(f"{script}.py --config.{field}={odd[:60]!r}", (field, odd), False, absurd)
        outcome, result = self.start(script, {field: odd})
        return Case("flags", number, what, *judge(what, outcome, result, None))

    def start(self, script: str, fields: dict[str, str]) -> tuple[str, Any]:
        """Starts a script with some fields, up to the loading of weights; as `attempt`."""
        module = importlib.import_module(f"t3jax.commands.{script.removesuffix('_classifier')}")

        def start() -> Any:
            config = parse_fields({**self.fields(), **fields})
            try:
                module.main(from_config(Settings, config))
            except _Loads:
                return None
            raise AssertionError("the script ended without loading a model")

        with (
            _without_weights(),
            contextlib.chdir(self.world()),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            return attempt(start)


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Loading weights ends the script: by then its settings have been taken."""

    def load(*_: Any, **__: Any) -> None:
        raise _Loads

    modules = [m for m in [*sys.modules.values()] if getattr(m, "load_lm", None) is t3jax.load_lm]
    former = t3jax.load_lm
    try:
        for module in modules:
            vars(module)["load_lm"] = load
        yield
    finally:
        for module in modules:
            vars(module)["load_lm"] = former


def odd_field(rng: random.Random) -> tuple[str, str, bool]:
    """A field of configs/default.py, an odd value for it, and whether no script may take it."""
    from configs import default

    config = default.get_config()
    field = rng.choice([n for n in names_of() if "." in n or not hasattr(config[n], "items")])
    section, _, name = field.rpartition(".")
    values = config[section] if section else config
    value = values[name] if values[name] is not None else values.get_type(name)()
    match value:
        case bool():
            return field, rng.choice(["maybe", "2", "", "None"]), True
        case int():
            return field, rng.choice(["-5", "1000000000000", "nan", "1.5", "x", "", "1e9"]), True
        case float():
            return field, rng.choice(["nan", "inf", "-inf", "-1", "1e300", "x", ""]), True
        case tuple():
            odd = rng.choice(["(1e999,)", "('',)", "('\\ud800',)", "((1,),)", "({},)"])
            return field, odd, True
    odd = rng.choice(["\x00", "a\x00b", "\udc80", "None "])
    return field, odd, odd != "None " and field not in FREE_TEXTS


def parse_fields(fields: dict[str, str]) -> Any:
    """The config of `configs/paper.py` with these fields, read as the flags are.

    Raises:
        ValueError: If a flag refuses its value.
    """
    from configs import paper

    values = flags.FlagValues()
    args = ["fuzz", *(f"--config.{name}={value}" for name, value in fields.items())]
    config = paper.get_config()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=args)
    try:
        values(args)
    except Exception as error:  # as in cli.run
        raise ValueError(str(error)) from error
    return values["config"].value


def run_scripts(runner: Runner, count: int, seed: int) -> Iterator[Case]:
    """Runs the real scripts on damaged inputs: a status, one line, no traceback, no result."""
    for number in range(count):
        rng = random.Random(f"{seed} scripts {number}")
        fields = runner.fields()
        script = rng.choice(("sample", "train_classifier", "evaluate"))
        if number % 2:
            field, odd, _ = odd_field(rng)
            fields[field] = odd.replace("\x00", "?")  # no argument of a process can hold it
            done = Damage(f"{script}.py --config.{field}={odd!r}", (field, odd))
            folder = None
        else:
            name = rng.choice(("model", "head"))
            folder = runner.world().parent / f"script-{number}"
            shutil.copytree(runner.world() / name, folder)
            of_file = damage(rng, KINDS[name], folder)
            done = dataclasses.replace(of_file, what=f"{script}.py, {name}: {of_file.what}")
            fields[name] = str(folder)
        args = [f"--config.{name}={value}" for name, value in fields.items()]
        config = REPOSITORY / "configs" / "paper.py"
        command = [sys.executable, str(REPOSITORY / f"{script}.py"), f"--config={config}", *args]
        try:
            process = subprocess.run(
                [*command, "--config.train.epochs=1", "--config.eval.controls=False"],
                cwd=runner.world(),
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=300,
                check=False,
            )
        except subprocess.TimeoutExpired:
            yield Case("scripts", number, done, WRONG, "more than 300 s")
            continue
        errors = process.stderr.decode("utf-8", "replace")
        last = errors.strip().splitlines()[-1:] or [""]
        if "Traceback" in errors or process.returncode < 0:
            yield Case("scripts", number, done, WRONG, f"{process.returncode}: {errors[-600:]}")
        elif process.returncode == 0:
            yield Case("scripts", number, done, OTHER, "ran to its end")
        elif last[0].startswith(f"{script}.py: ") or "FATAL" in errors:
            yield Case("scripts", number, done, REFUSED, last[0][:300])
        else:
            yield Case("scripts", number, done, WRONG, f"{process.returncode}: {errors[-600:]}")
        if folder is not None:
            shutil.rmtree(folder)


def plan(cases: int, kinds: list[str] | None = None) -> list[tuple[str, int]]:
    """Which kind has how many cases, and their numbers."""
    weights = {name: weight for name, weight in WEIGHTS.items() if not kinds or name in kinds}
    total = sum(weights.values())
    return [
        (name, number)
        for name, weight in weights.items()
        for number in range(round(cases * weight / total))
    ]


def table(cases: list[Case]) -> str:
    """How many cases of each kind came out how."""
    counts = collections.Counter((case.kind, case.outcome) for case in cases)
    outcomes = (SAME, OTHER, REFUSED, WRONG)
    lines = [f"{'kind':<16}" + "".join(f"{outcome:>9}" for outcome in outcomes)]
    for kind in dict.fromkeys(case.kind for case in cases):
        lines.append(f"{kind:<16}" + "".join(f"{counts[kind, o]:>9}" for o in outcomes))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the cases and prints the wrong ones and a table; the status is 1 if one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=list(WEIGHTS))
    parser.add_argument("--number", type=int, help="one case of the kind, said in full")
    parser.add_argument("--scripts", type=int, default=0, help="runs of the real scripts")
    parser.add_argument("--verbose", action="store_true", help="say every case")
    arguments = parser.parse_args(argv)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(pathlib.Path(folder), arguments.seed)
        chosen = plan(arguments.cases, arguments.kind)
        if arguments.number is not None:
            chosen = [(arguments.kind[0], arguments.number)]
        for name, number in chosen:
            case = runner.run(name, number)
            cases.append(case)
            if case.outcome == WRONG or arguments.verbose or arguments.number is not None:
                print(case, flush=True)
        for case in run_scripts(runner, arguments.scripts, arguments.seed):
            cases.append(case)
            print(case, flush=True)
    print(table(cases))
    return int(any(case.outcome == WRONG for case in cases))


if __name__ == "__main__":
    sys.exit(main())
