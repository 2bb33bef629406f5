"""Chat templates, rendered in a process of their own with bounds on time and memory.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and from
Python, not from nested loops or from texts that double. Limits of the operating system bound those.
The process starts with the first text, renders all later ones, and ends with its parent. The text
equals the one that transformers renders, but for the date: where the values have a `date_string`,
`strftime_now` returns it.
"""

import atexit
import contextlib
import datetime
import functools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 2.0  # of computing, for one text
MEMORY = 1 << 29  # bytes, of the process

_LONGEST = 300  # characters of an error


class TemplateFailure(ValueError):
    """A template that fails: a syntax error, an undefined name, or `raise_exception`."""


def render_template(template: str, values: Mapping[str, object]) -> str:
    """Renders a chat template.

    Raises:
        TemplateFailure: If the template fails.
        ValueError: If the values are no JSON, or the template needs more than `SECONDS` of CPU time
            or `MEMORY` bytes.
    """
    try:
        request = json.dumps({"template": template, "values": dict(values)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it can be given plain JSON values only ({error})") from None
    return _renderer(SECONDS, MEMORY).render(request)


class _Renderer:
    """The process; it is started at the first text, and anew after a template has ended it."""

    def __init__(self, seconds: float, memory: int):
        self._limits = (str(seconds), str(memory))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def render(self, request: str) -> str:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer.endswith(b"\n"):
                status = process.wait()
                self.close()
                raise ValueError(_explain(status, *self._limits))
        reply = json.loads(answer)
        if "text" in reply:
            return str(reply["text"])
        raise (TemplateFailure if reply["by_template"] else ValueError)(reply["error"])

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P: modules beside this file must not shadow the standard library.
        # In its own session, so that Ctrl-C does not reach it.
        return subprocess.Popen(
            [sys.executable, "-P", __file__, *self._limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


@functools.cache
def _renderer(seconds: float, memory: int) -> _Renderer:
    return _Renderer(seconds, memory)


def _explain(status: int, seconds: str, memory: str) -> str:
    if status == -signal.SIGPROF:
        return f"it needs more than {seconds} s of computing for one text"
    end = f"status {status}" if status >= 0 else signal.Signals(-status).name
    return (
        f"the process that renders it ended ({end}): one text needs more than "
        f"{int(memory) >> 20} MiB, or it calls itself without an end"
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks answers for transformers; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: object, **kwargs: object):
        self, *rest = args  # so that a field may be called self
        fields = dict(*rest, **kwargs)
        for name in fields:
            _check_field(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: object) -> None:
        _check_field(name)
        super().__setitem__(name, value)


def _check_field(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _answer(request: Mapping[str, Any], seconds: float, memory: int) -> dict[str, object]:
    """The text, or the error. The kernel ends the process when the time is over."""
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        values = request["values"]
        if "date_string" in values:
            values = {"strftime_now": lambda _: values["date_string"], **values}
        text = _compile(request["template"]).render(values)
        signal.setitimer(signal.ITIMER_PROF, 0)
        text.encode()
        return {"text": text}
    except jinja2.TemplateSyntaxError as error:
        return {"by_template": True, "error": f"{error.message} (line {error.lineno})"}
    except jinja2.TemplateError as error:
        return {"by_template": True, "error": str(error)[:_LONGEST] or type(error).__name__}
    except MemoryError:
        return {
            "by_template": False,
            "error": f"it needs more than {memory >> 20} MiB for one text",
        }
    except RecursionError:
        return {"by_template": False, "error": "it calls itself without an end"}
    except Exception as error:  # a template can raise any error of Python
        return {"by_template": True, "error": f"{type(error).__name__}: {error}"[:_LONGEST]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _serve(seconds: float, memory: int) -> None:
    import resource  # not on Windows, where nothing is bounded

    with contextlib.suppress(OSError, ValueError):  # macOS does not bound address space
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        reply = _answer(json.loads(line), seconds, memory)
        try:
            written = json.dumps(reply).encode()
        except MemoryError:
            reply = {"by_template": False, "error": "its text is too long"}
            written = json.dumps(reply).encode()
        sys.stdout.buffer.write(written + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
