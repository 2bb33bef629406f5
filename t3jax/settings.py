"""Settings of the commands: a tree of frozen dataclasses, and the one place where a config is read.

The fields of `Settings` are those that a user types most; its sections are mostly the library's own
options. A dataclass has the defaults of its fields, the annotations have the ranges, and the
docstring has the comments.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from t3jax.data.chat import PromptFormat
from t3jax.evaluation.unlearning import UnlearningOptions
from t3jax.json_files import parse_json
from t3jax.lm.model import DTYPES
from t3jax.minnorm import MinNormConfig
from t3jax.ranges import (
    BASE_TEMPERATURE,
    GUIDANCE_SCALE,
    REFINEMENTS,
    SEED,
    Numbers,
    Ranged,
    Words,
    whole,
)
from t3jax.sampling.sampler import SamplingOptions
from t3jax.sections import (
    ClassifierOptions,
    EvalOptions,
    ExperimentOptions,
    FinetuneSection,
    ServeSection,
    SweepOptions,
    VerifySection,
)
from t3jax.training.recipe import TrainConfig
from t3jax.training_sets import SyntheticOptions

T = TypeVar("T")


def _section(options: type, prefix: str = "", without: tuple[str, ...] = ()) -> Any:
    """A section of `Settings`: a dataclass's fields, named without `prefix`, but not `without`."""
    return dataclasses.field(
        default_factory=options, metadata={"prefix": prefix, "without": without}
    )


@dataclasses.dataclass(frozen=True)
class Settings(Ranged):
    """All settings: the fields that are typed most, and the sections.

    A relative path starts at the working folder.

    Attributes:
        model: The base model: a Hugging Face folder, hub id or GGUF file.
        head: A head folder, or several with commas between, one for each forget request.
        forget: Rows to forget: "tofu:SPLIT", or a file or folder of JSON or JSON-lines;
            "SOURCE[:400]" is some of its rows, "SOURCE+SOURCE" both.
        retain: Rows to retain, a source as `forget`.
        tofu_dir: Folder of TOFU; None: the Hugging Face hub.
        request: Name of the request, for the head's card.
        workdir: Folder of training: checkpoints, metrics and the head.
        feature_store: Folder of features that were computed once.
        prompt: A prompt to answer.
        prompts: A file of prompts; without it and `prompt` they are typed.
        output: A JSON-lines file of the answers; None: the terminal.
        base_only: Answer without a head, with the base model alone.
        base_temperature: T; None: the head's, which training chooses by the made-up-name level, or
            sets to 2.5 without made-up names.
        guidance_scale: s; None: likewise, or 1.
        forget_fraction: The forget set's share of forget and retain text in the model's training,
            an extension that shifts the scores to this class prior. None: the head's, which is half
            by default, as in the paper.
        refinements: Extensions when sampling: "plain", or some of "gated" (retain text is not
            tempered), "protected" (the tilt leaves stop tokens alone) and "product" (of several
            heads, instead of disjoint requests), joined by "-".
        seeds: Seeds of training, one head each.
        rows: Answers or texts that are computed together.
        max_length: Longest text, tokens; None: the model's context.
        mesh: Devices along (data, fsdp, model); -1 takes what remains.
        dtype: float32, bfloat16, float16, int8 (matrices alone); None: float32 on CPU, bfloat16
            elsewhere.
        sampling: How an answer is drawn.
        classifier: The head and its features.
        train: How the head is trained.
        synthetic: Texts that the base model writes for the training, beyond the paper.
        prompt_format: How a question becomes a prompt.
        eval: Evaluation.
        leaks: Metrics beyond TOFU's: leaks of drawn answers, and the Monte-Carlo KL.
        sweep: The grid of heads, and the choice among them.
        experiment: The TOFU experiment.
        verify: The verdict on a head.
        finetune: Fine-tuning of the language model.
        minnorm: Unlearning by MinNorm-OG (docs/minnorm_og.md), with `finetune.data` as retain set.
        serve: The server.
    """

    model: str | None = None
    head: str | None = None
    forget: str | None = None
    retain: str | None = None
    tofu_dir: str | None = None
    request: str = ""
    workdir: str | None = None
    feature_store: str = "out/features"
    prompt: str | None = None
    prompts: str | None = None
    output: str | None = None
    base_only: bool = False
    base_temperature: Annotated[float | None, BASE_TEMPERATURE] = None
    guidance_scale: Annotated[float | None, GUIDANCE_SCALE] = None
    forget_fraction: Annotated[float | None, Numbers(0, 1, above=True, below=True)] = None
    refinements: Annotated[str, Words(REFINEMENTS, "-")] = "plain"
    seeds: Annotated[tuple[int, ...], SEED] = (1,)
    rows: Annotated[int, whole(1, 2**16)] = 16
    max_length: Annotated[int | None, whole(2)] = None
    mesh: Annotated[tuple[int, ...], whole(-1, 2**20)] = (-1, 1, 1)
    dtype: Annotated[str | None, Words((*DTYPES, "int8"))] = None
    sampling: SamplingOptions = _section(SamplingOptions)
    classifier: ClassifierOptions = _section(ClassifierOptions)
    train: TrainConfig = _section(TrainConfig)
    synthetic: SyntheticOptions = _section(
        SyntheticOptions, without=("max_new_tokens", "batch_size", "seed")
    )
    prompt_format: PromptFormat = _section(PromptFormat)
    eval: EvalOptions = _section(EvalOptions)
    leaks: UnlearningOptions = _section(UnlearningOptions, "leak_", ("max_new_tokens", "seed"))
    sweep: SweepOptions = _section(SweepOptions)
    experiment: ExperimentOptions = _section(ExperimentOptions)
    verify: VerifySection = _section(VerifySection, without=("threshold", "max_new_tokens", "seed"))
    finetune: FinetuneSection = _section(
        FinetuneSection, without=("dtype", "minnorm", "tasks", "reptile")
    )
    minnorm: MinNormConfig = _section(MinNormConfig)
    serve: ServeSection = _section(ServeSection)

    def __post_init__(self):
        super().__post_init__()
        if len(self.mesh) != 3:
            raise ValueError(f"mesh = {self.mesh!r}: expected three numbers")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds!r}: expected one or more, all different")

    def __getitem__(self, name: str) -> Any:
        """A field by its name, such as "eval.dir"."""
        return functools.reduce(getattr, name.split("."), self)

    def require(self, *names: str) -> None:
        """Raises ValueError if one of these fields, such as "eval.dir", is not set."""
        if missing := [name for name in names if self[name] is None]:
            raise ValueError(f"not in the config: {missing}; give --config.{missing[0]}=... or so")


def replace(settings: Settings, **fields: object) -> Settings:
    """Changes fields of settings; "SECTION.FIELD" is a field of a section's dataclass."""
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        by_section.setdefault(section, {})[field] = value
    changed = by_section.pop("", {})
    for section, values in by_section.items():
        changed[section] = dataclasses.replace(getattr(settings, section), **values)
    return dataclasses.replace(settings, **changed)


def config_fields(options: Any, metadata: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Fields of a dataclass of options, each with its name in a config."""
    without, prefix = (metadata or {}).get("without", ()), (metadata or {}).get("prefix", "")
    for field in dataclasses.fields(options):
        if field.name not in without:
            yield field.name.removeprefix(prefix), field


def names_of() -> list[str]:
    """Names of all fields in a config, those of a section as "SECTION.FIELD"."""
    names = []
    for name, field in config_fields(Settings):
        names.append(name)
        if dataclasses.is_dataclass(field.type):
            names += [f"{name}.{inner}" for inner, _ in config_fields(field.type, field.metadata)]
    return names


def nearest(name: str, known: list[str] | None = None) -> str:
    """A hint at the known name, by default of `Settings`, nearest to an unknown one; "" without.

    A field that was once at the top level is found in its section.
    """
    known = names_of() if known is None else known
    as_section = [n for n in known if n.replace(".", "_") == name or n.replace("s.", "_") == name]
    moved = as_section or [field for field in known if field.endswith(f".{name}")]
    near = moved[:1] or difflib.get_close_matches(name, known, 1)
    return f"; did you mean --config.{near[0]}?" if near else ""


def expected(name: str) -> str:
    """The values that a field such as "train.epochs" may have, in words; "" for any text."""
    options: Any = Settings
    metadata: Mapping[str, Any] = {}
    *sections, last = name.split(".")
    for section in sections:
        field = dict(config_fields(options, metadata))[section]
        options, metadata = field.type, field.metadata
    return _expected(options, dict(config_fields(options, metadata))[last].name)


def _expected(options: Any, field: str) -> str:
    hint = typing.get_type_hints(options)[field]
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    is_tuple = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if is_tuple else hint
    # Only the check of the dataclass knows the range: a value outside gives an error with it.
    probes = {int: -(2**62), float: math.nan, str: "\0"}
    try:
        if kind in probes:
            options(**{field: (probes[kind],) if is_tuple else probes[kind]})
    except ValueError as error:
        pattern = rf"{field} (?:= .*: expected|must be) (.*?)(?:, got.*)?$"
        if match := re.match(pattern, str(error)):
            return match[1]
    words = {bool: "True or False", int: "a whole number", float: "a finite number"}
    return "texts" if is_tuple and kind is str else words.get(kind, "")


def from_config(options: type[T], config: Any) -> T:
    """Makes options of a config; no other function of the library reads a config.

    The config holds values by field; sections are mappings too. A missing field has the dataclass's
    default. A ValueError names a field that is unknown, of another type, or out of its range.
    """
    return _read(options, config, "", {})


def _read(options: Any, config: Any, path: str, metadata: Mapping[str, Any]) -> Any:
    fields = dict(config_fields(options, metadata))
    hints = typing.get_type_hints(options)
    start = f"{path}." if path else ""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name not in fields:
            raise ValueError(f"unknown config key {start + name!r}{nearest(start + name)}")
        field, hint = fields[name], hints[fields[name].name]
        if dataclasses.is_dataclass(hint):
            if not hasattr(value, "items"):
                raise ValueError(f"config.{name} = {value!r}: expected a section")
            values[field.name] = _read(hint, value, start + name, field.metadata)
            continue
        try:
            values[field.name] = _fit(hint, value, options is PromptFormat or field.default == "")
        except TypeError as error:
            expectation = _expected(options, field.name) or str(error)
            raise ValueError(f"config.{start}{name} = {value!r}: expected {expectation}") from None
    try:
        return options(**values)
    except ValueError as error:
        prefix = metadata.get("prefix", "")
        # "FIELD = VALUE: expected RANGE"; the sampler's words are "FIELD must be RANGE, got VALUE".
        message = re.sub(r"^(\w+) must be (.*), got (.*)$", r"\1 = \3: expected \2", str(error))
        message = message.removeprefix(prefix)
        where = f"config.{start}" if message.split()[0] in fields else f"config.{path}: "
        raise ValueError(where + message) from error


def _fit(hint: Any, value: Any, may_be_empty: bool) -> Any:
    """Converts a value to its type; a TypeError names the expected type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None else _fit(arguments[0], value, may_be_empty)
    if hint is bool:
        if not isinstance(value, bool):
            raise TypeError
    elif hint in (int, float):
        number = isinstance(value, int | hint) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise TypeError
        return hint(value)
    elif hint is str:
        _check_text(value, may_be_empty)
    elif typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise TypeError("several, with commas between")
        return tuple(_fit(arguments[0], element, False) for element in value)
    elif isinstance(value, str):
        return parse_json(value, "config.prompt_format.chat_template_kwargs", dict[str, Any])
    return value


def _check_text(value: object, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise TypeError("a text")
    if value == "None" or (not value and not may_be_empty):
        raise TypeError("a text that is not empty; --config.FIELD=None unsets a field")
    if any("\ud800" <= character <= "\udfff" for character in value) or "\0" in value:
        raise TypeError("a text in UTF-8, without NUL")
