"""Rows that a model wrote, kept on disk under a key of all that they depend on."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from t3jax import checked, digests, hosts
from t3jax.lm.model import LM

_CODE = ("t3jax.synthetic.counterfactual", "t3jax.synthetic.writing")


def load_or_write(
    folder: pathlib.Path | str,
    name: str,
    lm: LM,
    depends_on: Sequence[object],
    write: Callable[[], Any],
) -> Any:
    """Reads what a model wrote before, or lets it write, as plain values of JSON, and keeps that.

    `depends_on` is all else that decides the text: rows, names, options, seed. A damaged file is
    written anew, with a warning.
    """
    key = digests.make_key(
        digests.model_digest(lm), repr(list(depends_on)), digests.code_digest(*_CODE)
    )
    path = pathlib.Path(folder) / f"{name}-{key[:20]}.json"
    stored = checked.read_stored(path, checked.read_json) if hosts.is_lead() else None
    if not hosts.of_lead(stored is not None):
        written = write()
        if hosts.is_lead():
            checked.write_json(path, written)
        hosts.wait_for(path)
    return checked.read_json(path)
