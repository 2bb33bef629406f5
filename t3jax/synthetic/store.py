"""Rows that a model wrote, stored under a cache key of all that they depend on."""

import pathlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from t3jax import checked, digests, hosts
from t3jax.lm.model import LM

_CODE = ("t3jax.synthetic.counterfactual", "t3jax.synthetic.writing")

Written = TypeVar("Written")  # plain values of JSON


def load_or_write(
    folder: pathlib.Path | str,
    name: str,
    lm: LM,
    depends_on: Sequence[object],
    write: Callable[[], Written],
) -> Written:
    """Reads the texts that a model wrote before; where there are none, it writes and stores them.

    `depends_on` has everything beside the model that decides the text: rows, names, options, seed.
    A damaged file is written anew, with a warning.
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
    result: Written = checked.read_json(path)
    return result
