"""The shared part of the commands: flags, errors, config and compilation cache."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, FieldReference, config_flags
from ml_collections.config_dict import placeholder

from t3jax import files, hosts
from t3jax.settings import Settings, config_fields, expected, from_config, names_of, nearest

# Statuses of a script that was stopped: by Ctrl-C, by a closed pipe, by SIGTERM.
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))
_CONFIGS = pathlib.Path(__file__).parent / "configs"
_OVERRIDE = re.compile(r"--?config\.(?P<field>[\w.]+)=(?P<value>.*)", re.DOTALL)


def run(command: Callable[[Settings], None]) -> None:
    """Runs a command on its `--config=configs/NAME.py`; an error of its input is one line.

    Without `--config` the default recipe is taken. `--FIELD=VALUE` is short for
    `--config.FIELD=VALUE`. The flag `--distributed` joins several processes to one program, see
    `hosts.initialize`; only process 0 then prints. Ctrl-C ends with status 130 and SIGTERM with
    143; training defers SIGTERM until its state is saved.
    """
    distributed = flags.DEFINE_enum(
        "distributed", "auto", hosts.MODES, "Whether to join the processes of a cluster."
    )
    name = pathlib.Path(sys.argv[0]).name
    words = [sys.argv[0], *map(_complete, sys.argv[1:])]
    # `--config.FIELD=None` is read here: the flags would take it for a text, or refuse it.
    overrides = {m["field"]: m["value"] for word in words if (m := _OVERRIDE.fullmatch(word))}
    unset = [field for field, value in overrides.items() if value == "None"]
    args = [word for word in words if not re.fullmatch(r"--?config\.[\w.]+=None", word)]
    if not any(re.match(r"--?config(=|$)", word) for word in args):
        args.insert(1, f"--config={_CONFIGS / 'default.py'}")
    flag = config_flags.DEFINE_config_file(
        "config", help_string="Path of a configs/*.py file.", sys_argv=args
    )
    settings: list[Settings] = []

    def parse(_: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(args)
            if len(rest) > 1:
                raise ValueError(f"unexpected {rest[1:]}; options are --config.NAME=VALUE")
            _unset(flag.value, unset)
            settings.append(from_config(Settings, flag.value))
            return rest
        except Exception as error:  # a config file is Python, and may raise anything
            sys.exit(f"{name}: {_describe_config_error(error, words)}")

    def main(_: list[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax logs its steps, and errors that it raises
        _accept_any_text()
        hosts.raise_at_signals()
        enable_compilation_cache()
        try:
            hosts.initialize(distributed.value)
            with contextlib.redirect_stdout(sys.stdout if hosts.is_lead() else None):
                try:
                    command(settings[0])
                finally:
                    _flush()
        except hosts.Preempted as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(hosts.PREEMPTED_STATUS)  # all processes end, and wait for one another
        except KeyboardInterrupt as error:
            hosts.stop_raising()
            number = signal.SIGTERM if isinstance(error, hosts.Terminated) else signal.SIGINT
            _fail(f"{name}: stopped ({number.name})", 128 + number)
        except BrokenPipeError:  # the reader of the output has closed it
            _fail("", 128 + signal.SIGPIPE)
        except Exception as error:
            if (message := _one_line(error)) is not None:
                _fail(f"{name}: {message}")
            if not jax.distributed.is_initialized():
                raise
            _fail(
                f"{traceback.format_exc()}{name}: process {jax.process_index()} of "
                f"{jax.process_count()} ends; if it lost another one, the cause is that one's error"
            )

    app.run(main, flags_parser=parse)


def optional_fields(config: ConfigDict) -> set[str]:
    """Names of the fields of a config that may be None: its placeholders."""
    names = set()
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, FieldReference):
            names.add(name)
        elif isinstance(value, ConfigDict):
            names |= {f"{name}.{field}" for field in optional_fields(value)}
    return names


def _unset(config: ConfigDict, names: Sequence[str]) -> None:
    optional = optional_fields(config)
    for name in names:
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section.get(part, {})
        if field not in section:
            raise ValueError(f"unknown config key {name!r}{nearest(name)}")
        if name not in optional:
            raise ValueError(f"config.{name}=None: this field cannot be unset")
        section[field] = None


def _complete(word: str) -> str:
    """Completes a flag of a field to `--config.FIELD`, and the name of a config to its path."""
    if (match := re.match(r"--?(\w+)[\w.]*(=|$)", word)) and match[1] in names_of():
        return "--config." + word.lstrip("-")
    if match := re.fullmatch(r"--?config=(?:configs/)?(\w+)(?:\.py)?(:.*)?", word):
        shipped = _CONFIGS / f"{match[1]}.py"
        path = pathlib.Path(word.partition("=")[2].partition(":")[0])
        if shipped.is_file() and not path.is_file():
            return f"--config={shipped}{match[2] or ''}"
    return word


def _describe_config_error(error: Exception, words: Sequence[str]) -> str:
    """An error of the config or the command line, with the nearest name for an unknown one."""
    match error:
        case flags.UnrecognizedFlagError():
            field = error.flagname.removeprefix("config.")
            return f"{error}{nearest(field, [*names_of(), *flags.FLAGS])}"
        case flags.IllegalFlagValueError():
            return _expected(error)
        case AttributeError():  # from ml_collections: an unknown field
            named = [field for word in words for field in re.findall(r"^--?config\.([\w.]+)", word)]
            named += re.findall(r"^['\"]+(?:Key ['\"])?(\w+)", str(error))
            if unknown := [field for field in named if field not in names_of()]:
                return f"unknown config key {unknown[0]!r}{nearest(unknown[0])}"
        case flags.Error() | ValueError():
            return str(error)
    return f"the config cannot be read: {type(error).__name__}: {error}"


def to_config(options: Any, metadata: Mapping[str, object] | None = None) -> ConfigDict:
    """Makes a config of the defaults of a dataclass of options, with sections for dataclasses.

    A `placeholder` in it is None until it is set. `metadata` belongs to the field of which the
    dataclass is the section, see `config_fields`.
    """
    config, hints = ConfigDict(), typing.get_type_hints(options)
    for name, field in config_fields(options, metadata):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            config[name] = to_config(hint, field.metadata)
        elif field.default is None:
            kind = typing.get_args(hint)[0]
            config[name] = placeholder(typing.get_origin(kind) or kind)
        else:
            config[name] = "{}" if field.default is dataclasses.MISSING else field.default
    return config


def _expected(error: flags.IllegalFlagValueError) -> str:
    """The error of a flag's value, with the expected type."""
    message = " ".join(str(error).split())
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
    if match is None:
        return message
    name, value = match.groups()
    return f"config.{name} = {value!r}: expected {expected(name) or f'another value; {message}'}"


def _accept_any_text() -> None:
    """Escapes characters that the locale cannot print, and reads typed text as UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8")


def _flush() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        # At exit Python would flush again and print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno, error.strerror, "standard output") from error


def _one_line(error: Exception) -> str | None:
    """An error of the input or the machine in one line; None for an error of the program."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        if cause in causes:  # a library raised an earlier error again
            break
        causes.append(cause)
    if any(map(files.is_full, causes)):
        return _no_room(causes)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).splitlines()[0] if str(error) else "out of memory"
        return (
            f"{first:.300}; lower config.rows or the batch, or spread over more devices "
            "(python -m t3jax.plan says what fits)"
        )
    return str(error) if isinstance(error, OSError | ValueError | FloatingPointError) else None


def _no_room(causes: Sequence[BaseException]) -> str:
    """One line on a full disk, where the messages of libraries have pages."""
    named = [c for c in causes if isinstance(c, OSError) and c.filename is not None]
    if named:
        return (
            f"{os.fsdecode(named[0].filename)}: {named[0].strerror}; make room and start again, "
            "finished work is kept"
        )
    # The project's message holds the library's in parentheses, which is left out.
    message = re.sub(r" \(.*\)", "", str(causes[0]), flags=re.DOTALL)
    reason = next(text for c in causes for text in files.FULL_TEXTS if text in str(c))
    return f"{message.splitlines()[0]} ({reason})"


def _fail(message: str, status: int = 1) -> NoReturn:
    if message:
        print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # A normal exit would wait for the other processes, which wait for this one.
        os._exit(status)
    sys.exit(status)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, under `$XDG_CACHE_HOME/t3jax` or `~/.cache/t3jax`.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "t3jax" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
