"""serve.py: wrong settings are said before weights are loaded; the server's defaults agree."""

import pytest
import tiny

from configs import default, demo
from t3jax.commands import serve
from t3jax.sections import narrow
from t3jax.serving.app import ServerOptions
from t3jax.serving.messages import EngineOptions


@pytest.fixture
def no_weights(monkeypatch, repository):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(serve, "_serve", lambda *_: pytest.fail("weights would be loaded"))
    monkeypatch.delenv("T3JAX_SERVER_KEY", raising=False)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "no head: nothing would be unlearned"),
        ({"serve.requests": "out/r"}, "T3JAX_SERVER_KEY"),
        ({"serve.port": 70000}, r"config\.serve\.port = 70000: expected a whole number in"),
        ({"serve.rows": 0}, r"config\.serve\.rows = 0: expected a whole number"),
        ({"serve.piece": 100}, r"config\.serve\.piece = 100: expected 32, 64"),
        ({"serve.max_length": 1}, r"serve\.max_length"),
        ({"serve.timeout": 0.0}, r"serve\.timeout"),
        ({"head": "demo"}, "demo"),
        ({"sampling.max_new_tokens": 5000}, "max_new_tokens = 5000"),
        ({"model": "demo/none"}, "demo/none"),
    ],
)
def test_wrong_settings_are_said_at_once(no_weights, fields, error):
    base_only = bool(fields) and "serve.requests" not in fields and "head" not in fields
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        serve.main(tiny.make_settings(demo, {"head": None, "base_only": base_only} | fields))


def test_the_defaults_of_config_and_options_agree():
    section = tiny.make_settings(default).serve
    for options, others in ((EngineOptions, {"rank": 200}), (ServerOptions, {})):
        assert narrow(options, section, **others) == options()


def test_several_processes_take_no_requests_to_forget(no_weights, monkeypatch):
    monkeypatch.setenv("T3JAX_SERVER_KEY", "key")
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"heads that they start with: .*drop config\.serve"):
        serve.main(tiny.make_settings(demo, {"head": None, "serve.requests": "out/r"}))
