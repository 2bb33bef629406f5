"""What is checked before weights are loaded: numbers and names of a config, paths, head and model.

A script that is going to fail says so in its first seconds, in one line that names the field. What
only the library can know (whether a run's data changed, say) it says itself, later.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from jax.sharding import Mesh

from t3jax import data, files, hosts
from t3jax.abstract import abstract_lm
from t3jax.evaluation.logs import read_log
from t3jax.evaluation.selection import RULES
from t3jax.head import ACTIVATIONS
from t3jax.head_io import Head, check_head_fits, common_default
from t3jax.lm import LM, load_config
from t3jax.lm.model import DTYPES, default_dtype, model_path, read_dtype
from t3jax.pooling import FEATURES


class Numbers(NamedTuple):
    """Which numbers a field may have.

    Attributes:
        low: The smallest.
        high: The largest.
        whole: Whether they are whole.
        above: Whether `low` itself is too small.
        below: Whether `high` itself is too large.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        # NaN passes no comparison.
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        start, end = "(" if self.above else "[", ")" if self.below else "]"
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} in {start}{self.low:.10g}, {self.high:.10g}{end}"


class Words(NamedTuple):
    """Which words a field may have: one of them, or some joined by a character."""

    known: tuple[str, ...]
    joined: str = ""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        parts = value.split(self.joined[0]) if self.joined else [value]
        if len(self.joined) > 1:
            parts = [word for part in parts for word in part.split(self.joined[1])]
        return all(part in self.known for part in parts)

    def __str__(self) -> str:
        joined = f", or some joined by {' and '.join(map(repr, self.joined))}" * bool(self.joined)
        return f"one of {', '.join(self.known)}{joined}"


def _whole(low: int, high: int = 2**31 - 1) -> Numbers:
    return Numbers(low, high, whole=True)


# A seed beyond 32 bits would draw as a smaller one does: JAX keeps the lower bits alone.
_SEED = _whole(0, 2**32 - 1)
_SHARE = Numbers(0, 1)
_TOP_P = Numbers(0, 1, above=True)
_TEMPERATURE = Numbers(0, 1000)  # of sampling: 0 is greedy
_T = Numbers(0.001, 1000)
_S = Numbers(0, 1000)
_RATE = Numbers(0, 1000, above=True)
_RANK = _whole(1, 2**16)
_REFINED = ("plain", "gated", "protected", "product")
_TRUNCATED = Words(("guided", "base", "tilted"))

# Every number of configs/default.py, and every word of a few; of a list, each of its elements.
FIELDS: Mapping[str, Numbers | Words] = {
    "dtype": Words((*DTYPES, "int8")),
    "mesh": _whole(-1, 2**20),
    "max_length": _whole(2),
    "finetune_epochs": _whole(1, 10**6),
    "finetune_batch_size": _whole(1, 2**20),
    "finetune_microbatches": _whole(1, 2**20),
    "finetune_learning_rate": _RATE,
    "finetune_warmup_steps": _whole(0),
    "finetune_weight_decay": Numbers(0, 1000),
    "finetune_seed": _SEED,
    "finetune_checkpoint_every": _whole(1),
    "minnorm_share": _SHARE,
    "minnorm_decay": _SHARE,
    "minnorm_every": _whole(1),
    "minnorm_last_epochs": _whole(0),
    "minnorm_n_pert": _whole(1, 2**12),
    "meta": Words(("joint",)),
    "lora_rank": _whole(0, 2**16),
    "lora_alpha": Numbers(0, 10**6, above=True),
    "features": Words(FEATURES),
    "feature_dtype": Words(("float32", "bfloat16")),
    "own_samples": _whole(0, 10**7),
    "made_up_names": _whole(0, 10**4),
    "earlier_turns": _SHARE,
    "paraphrases": _whole(0, 10**4),
    "rank": _RANK,
    "activation": Words(tuple(ACTIVATIONS)),
    "num_hidden_layers": _whole(1, 100),
    "base_temperature": _T,
    "guidance_scale": _S,
    "forget_fraction": Numbers(0, 1, above=True, below=True),
    "refinements": Words(_REFINED, "-"),
    "seeds": _SEED,
    "loss": Words(("distillation", "classifier")),
    "distilled_temperature": Numbers(1, 1000),
    "overcorrection": Numbers(0, 1000),
    "retain_weight": Numbers(0, 10**6, above=True),
    "epochs": _whole(1, 10**6),
    "warmup_ratio": _SHARE,
    "batch_size": _whole(1, 2**20),
    "learning_rate": _RATE,
    "weight_decay": Numbers(0, 1000),
    "holdout_fraction": Numbers(0, 1, below=True),
    "patience": _whole(0),
    "rows": _whole(1, 2**16),
    "max_new_tokens": _whole(1, 2**20),
    "temperature": _TEMPERATURE,
    "top_k": _whole(0),
    "top_p": _TOP_P,
    "min_p": _SHARE,
    "truncate_on": _TRUNCATED,
    "repetition_penalty": Numbers(0, 1000, above=True),
    "num_samples": _whole(1, 2**16),
    "seed": _SEED,
    "stop_ids": _whole(0),
    "eval_rows": _whole(1),
    "eval_temperatures": _T,
    "eval_scales": _S,
    "eval_refinements": Words(_REFINED, ",-"),
    "sweep_learning_rates": _RATE,
    "sweep_weight_decays": Numbers(0, 1000),
    "sweep_ranks": _RANK,
    "selection_rule": Words(tuple(RULES)),
    "selection_group": _whole(1),
    "vary_ranks": _RANK,
    "vary_epochs": _whole(1, 10**6),
    "vary_retain_rows": _whole(1),
    "refine_rows": _whole(1),
    "refine_top_p": _TOP_P,
    "leak_samples": _whole(0, 2**16),
    "leak_rows": _whole(1),
    "leak_temperature": _TEMPERATURE,
    "leak_top_k": _whole(0),
    "leak_top_p": _TOP_P,
    "leak_truncate_on": _TRUNCATED,
    "leak_threshold": _TOP_P,
    "kl_rows": _whole(0),
    "kl_samples": _whole(1, 2**16),
    "verify_rows": _whole(1),
    "verify_retained": _SHARE,
}
_MAY_BE_EMPTY = (
    "system",
    "date_string",
    "question_start",
    "question_end",
    "answer_start",
    "request",
)
_MAY_NOT_BE_EMPTY = ("seeds", "lora_layers", "mesh")


def check_fields(config: Any, optional: Set[str]) -> None:
    """Checks every value of a config by itself, whether or not a script uses it.

    Args:
        config: The settings.
        optional: Names of the fields that may be None.

    Raises:
        ValueError: If a number is out of its range, a word is unknown, a text is empty or no text;
            names the field, the value and what was expected.
    """
    for name, value in config.items():
        if value is None and name in optional:
            continue
        several = isinstance(value, tuple | list)
        if several and not value and name in _MAY_NOT_BE_EMPTY:
            raise ValueError(f"config.{name} = {value!r}: expected at least one")
        if several and len(set(map(repr, value))) < len(value) and name == "seeds":
            raise ValueError(f"config.{name} = {value!r}: expected different ones")
        for each in value if several else (value,):
            wrong = _wrong(name, each)
            if several and name not in FIELDS and not isinstance(each, str):
                wrong = "texts"
            if wrong is not None:
                raise ValueError(f"config.{name} = {value!r}: expected {wrong}")


def _wrong(name: str, value: Any) -> str | None:
    """What was expected in the place of a value; None if it is as expected."""
    if name in FIELDS:
        return None if value in FIELDS[name] else str(FIELDS[name])
    if not isinstance(value, str):
        numbers = isinstance(value, int | float) and not isinstance(value, bool)
        return "a finite number" if numbers and not math.isfinite(value) else None
    if value == "None":
        return f"a text; --config.{name}=None, with the equals sign, unsets a field"
    if not value and name not in _MAY_BE_EMPTY:
        return f"a text that is not empty; --config.{name}=None unsets a field that may be unset"
    if any("\ud800" <= character <= "\udfff" for character in value) or "\0" in value:
        return "a text in UTF-8, without NUL"
    return None


def check_sources(config: Any, *names: str) -> None:
    """Reads the rows that fields of a config name, so that a bad file is known early.

    Args:
        config: The settings.
        *names: Fields that hold a source of `t3jax.data.load_dataset`, or several, or None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is bad.
    """
    for name in names:
        sources = config[name] or ()
        for source in (sources,) if isinstance(sources, str) else sources:
            try:
                data.load_dataset(source, config.tofu_dir)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"config.{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"config.{name}: {error}") from error


def shape_of(config: Any, mesh: Mesh, name: str = "model") -> LM:
    """The model of a config without its weights; of a folder, `config.json` is read.

    Args:
        config: The settings.
        mesh: Where it will be.
        name: The field that names it.

    Returns:
        The model, whose arrays have no bytes and which has no tokenizer.

    Raises:
        FileNotFoundError: If there is no such model, or it has no weights.
        ValueError: If it is of an unknown family, or the dtype is.
    """
    path = model_path(config[name])
    shape = load_config(path)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path}: no *.safetensors file; expected a model folder with its weights"
        )
    _, dtype = read_dtype(config.dtype or default_dtype(), default_dtype())
    return abstract_lm(shape, dtype, mesh)


def check_heads(
    config: Any, folders: Sequence[str], heads: Sequence[Head], groups: Sequence[tuple], lm: LM
) -> None:
    """Checks that heads fit the model, and those that are served together one another.

    Args:
        config: The settings.
        folders: Where the heads are.
        heads: The heads.
        groups: Indices of those that are served together, in turn.
        lm: The model; its weights need not be there.

    Raises:
        ValueError: If they do not.
    """
    for folder, head in zip(folders, heads, strict=True):
        try:
            check_head_fits(head, lm)
        except ValueError as error:
            raise ValueError(f"{folder} on {config.model}: {error}") from error
    for group in groups:
        served = [heads[index] for index in group]
        for name in ("base_temperature", "guidance_scale"):
            if config[name] is None:
                common_default(served, name, 1.0)


def check_answer_length(config: Any, lm: LM) -> None:
    """Checks that an answer of the config's length fits the model's context.

    Raises:
        ValueError: If it does not.
    """
    if config.max_new_tokens >= lm.max_position:
        raise ValueError(
            f"config.max_new_tokens = {config.max_new_tokens}: expected less than the "
            f"{lm.max_position} tokens of the context of {config.model}"
        )


def check_evaluation(config: Any, lm: LM) -> None:
    """Checks what an evaluation reads beside model and heads: rows, logs, the retain model.

    Args:
        config: The settings.
        lm: The model; its weights need not be there.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If one is bad.
    """
    names = ("forget", "retain", "real_authors", "world_facts", "holdout")
    check_sources(config, *(f"eval_{name}" for name in names))
    for name in ("retain_log", "second_retain_log"):
        if config[name] is not None:
            read_log(pathlib.Path(config[name]))
    check_answer_length(config, lm)
    if config.retain_model is not None:
        shape_of(config, lm.mesh, "retain_model")


@contextlib.contextmanager
def outputs(*folders: str | pathlib.Path | None) -> Iterator[None]:
    """Claims the folders that a script writes to, see `files.claim`; process 0 does.

    Args:
        *folders: The folders; None is left out.

    Raises:
        OSError: If one cannot be written to, or another run is at work there.
    """
    with contextlib.ExitStack() as claimed:
        if hosts.is_lead():
            for folder in sorted({str(folder) for folder in folders if folder is not None}):
                claimed.enter_context(files.claim(pathlib.Path(folder)))
        yield
