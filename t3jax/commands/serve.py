"""Serves a frozen model, tempered and tilted by heads, to clients of the OpenAI API.

    python serve.py --config=configs/demo.py
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "..."}]}'

With `--config.serve.requests=FOLDER` and T3JAX_SERVER_KEY in the environment it takes requests to
forget while it answers: each becomes a head that is on for everybody until it is revoked. Ctrl-C
and SIGTERM end it after the running answers. See docs/serving.md.
"""

import os
import pathlib
import sys
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

import t3jax
from t3jax import data, files, hosts, pipeline, preflight
from t3jax.head_io import common_default
from t3jax.lm.model import LM
from t3jax.sections import narrow
from t3jax.serving.messages import EngineOptions, ServerOptions
from t3jax.settings import Settings

if TYPE_CHECKING:  # the server is an extra
    from t3jax.serving.access import Keys
    from t3jax.serving.training import HeadMaker


def main(config: Settings) -> None:
    """Loads model and heads, and answers until it is stopped."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}: pip install 't3jax[serve]'") from error
    from t3jax.serving.app import Keys

    config.require("model")
    if jax.process_count() > 1 and config.serve.requests:
        raise ValueError(
            "several processes serve the heads that they start with: the training of a new head "
            "and the engine would run their programs in another order in each process; drop "
            "config.serve.requests"
        )
    options = narrow(ServerOptions, config.serve)
    keys = Keys(*(os.environ.get(f"T3JAX_{name}_KEY") or None for name in ("API", "SERVER")))
    if config.serve.requests and keys.server is None:
        raise ValueError(
            "config.serve.requests needs a server key, which allows to add and revoke requests: "
            "set T3JAX_SERVER_KEY in the environment"
        )
    mesh = t3jax.make_mesh((1, 1, -1) if tuple(config.mesh) == (-1, 1, 1) else config.mesh)
    shape = preflight.shape_of(config, mesh)
    preflight.check_answer_length(config, shape)
    served = [] if config.head is None or config.base_only else [config.head]
    folders, heads, groups = pipeline.load_heads(config, served, mesh)
    preflight.check_heads(config, folders, heads, groups, shape)
    takes_requests = config.serve.requests is not None
    if not heads and not takes_requests and not config.base_only:
        raise ValueError(
            "no head: nothing would be unlearned; give --config.head=FOLDER, or a folder for "
            "requests to forget, --config.serve.requests=FOLDER, or say --config.base_only=True"
        )
    ranks = [head.config.rank for head in heads] + [config.classifier.rank] * takes_requests
    engine_options = narrow(
        EngineOptions, config.serve, rank=config.serve.rank or max(ranks, default=1)
    )
    if takes_requests:
        preflight.check_sources(config, "retain")
        files.check_writable(pathlib.Path(config["serve.requests"]))
    _serve(config, mesh, dict(zip(folders, heads, strict=True)), engine_options, options, keys)


def _serve(
    config: Settings,
    mesh: Mesh,
    heads: dict[str, t3jax.Head],
    engine_options: EngineOptions,
    options: ServerOptions,
    keys: "Keys",
) -> None:
    import uvicorn

    from t3jax.serving.app import make_app
    from t3jax.serving.engine import Engine
    from t3jax.serving.protocol import Reader
    from t3jax.serving.requests import RequestBook

    lm = t3jax.load_lm(config["model"], config.dtype, mesh)
    defaults = {"base_temperature": config.train.distilled_temperature, "guidance_scale": 1.0}
    policy = {
        name: config[name]
        if config[name] is not None
        else common_default(list(heads.values()), name, otherwise)
        for name, otherwise in defaults.items()
    }
    engine = Engine(
        lm,
        engine_options,
        truncate_on=config.sampling.truncate_on,
        refinements=pipeline.refinements(config.refinements, lm),
        **policy,
    )
    for folder, head in heads.items():
        engine.install(folder, head)
    if config.serve.warm_up:
        engine.warm_up(_report)
    if not hosts.is_lead():
        engine.follow()
        return
    engine.start()
    book = None
    if config.serve.requests is not None:
        maker = _make_head_maker(config, lm, policy)
        book = RequestBook(pathlib.Path(config["serve.requests"]), engine, maker, _report)
    name = options.model_name or config["model"]
    reader = Reader(lm, [name], config.prompt_format, config.sampling.max_new_tokens)
    app = make_app(engine, reader, options, keys, book)
    server_config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=int(options.timeout),
    )
    listening = server_config.bind_socket()
    host, port = listening.getsockname()[:2]
    _report(
        f"{name} at http://{host}:{port}, T = {engine.base_temperature:g}, "
        f"s = {engine.guidance_scale:g}, heads: {', '.join(engine.active_heads) or '(none)'}"
    )
    uvicorn.Server(server_config).run(sockets=[listening])


def _make_head_maker(config: Settings, lm: LM, policy: dict[str, float]) -> "HeadMaker":
    from t3jax.serving.training import HeadMaker, HeadRecipe

    recipe = HeadRecipe(
        head=pipeline.head_config(config, lm),
        training=config.train,
        synthetic=pipeline.synthetic_options(config),
        prompt_format=config.prompt_format,
        retain=data.load_dataset(config.retain, config.tofu_dir) if config.retain else [],
        feature_store=pathlib.Path(config.feature_store),
        seed=config.seeds[0],
        max_new_tokens=min(config.sampling.max_new_tokens, 64),
        most_leaks=config.serve.most_leaks,
        least_retained=config.serve.least_retained,
        **policy,
    )
    return HeadMaker(lm, recipe, _report)


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
