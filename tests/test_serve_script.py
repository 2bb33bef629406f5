"""serve.py: wrong settings are said before weights are loaded; the server's defaults agree."""

import dataclasses

import pytest

import serve
from configs import default, demo
from t3jax.serving.app import ServerOptions
from t3jax.serving.messages import EngineOptions
from t3jax.settings import from_config


@pytest.fixture
def config(monkeypatch, repository):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(serve, "_serve", lambda *_: pytest.fail("weights would be loaded"))
    monkeypatch.delenv("T3JAX_SERVER_KEY", raising=False)
    config = demo.get_config()
    config.head = None
    return config


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "no head: nothing would be unlearned"),
        ({"serve.requests": "out/r"}, "T3JAX_SERVER_KEY"),
        ({"serve.port": 70000}, r"serve\.port must be in"),
        ({"serve.rows": 0}, r"serve\.rows must be a whole number"),
        ({"serve.piece": 100}, r"serve\.piece must be 32, 64"),
        ({"serve.max_length": 1}, r"serve\.max_length"),
        ({"serve.timeout": 0.0}, r"serve\.timeout"),
        ({"head": "demo"}, "demo"),
        ({"max_new_tokens": 5000}, "max_new_tokens = 5000"),
        ({"model": "demo/none"}, "demo/none"),
    ],
)
def test_wrong_settings_are_said_at_once(config, fields, error):
    config.base_only = bool(fields) and "serve.requests" not in fields and "head" not in fields
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        serve.main(config)


def test_the_defaults_of_config_and_options_agree():
    section = default.get_config().serve
    for options, others in ((EngineOptions, {"rank": 100}), (ServerOptions, {})):
        assert from_config(options, section, **others) == options()
    known = {
        field.name for kind in (EngineOptions, ServerOptions) for field in dataclasses.fields(kind)
    }
    own = {"requests", "most_leaks", "least_retained", "warm_up"}
    assert set(section) - own <= known
