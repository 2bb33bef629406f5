"""Cache keys: digests of everything that a stored result depends on.

Every store of this package makes its keys here. A key covers the model (`model_digest`: shape,
weights and their dtypes, tokens that end an answer, tokenizer and chat template), the tokens or
rows, the options, and the source of the computing module with its imports (`code_digest`). Paths
and names are in no key. A digest is a guard against mistakes, not against forgery.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import pathlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from t3jax import hosts
from t3jax.data.chat import Example
from t3jax.data.records import Record
from t3jax.lm import decoder
from t3jax.lm.cache import init_cache
from t3jax.lm.model import LM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ROOT = pathlib.Path(__file__).parent
_LENGTHS = (3, 128)  # of the texts that a model of the user's own is traced with

_digest_of_model: "weakref.WeakKeyDictionary[LM, str]" = weakref.WeakKeyDictionary()


def make_key(*parts: str) -> str:
    """The key of a stored result, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def model_digest(lm: LM) -> str:
    """A digest of the parts of a model that decide features, scores and answers.

    They are the shape (all of `LMConfig`), the weights with their dtypes, the end tokens, the
    longest text, the tokenizer and its chat template. `code_digest` covers the code of the decoder.
    The functions of a user's own model (`make_lm`) have no shape: their JAX programs for short
    texts, with and without a cache, and with the constants in them, take its place. Two versions of
    JAX may make different programs, and a function that differs only for texts longer than 128
    tokens is not noticed.
    """
    if lm not in _digest_of_model:
        _digest_of_model[lm] = make_key(
            _shape(lm),
            params_digest(lm.params),
            repr((sorted(lm.eos_ids), lm.max_position)),
            tokenizer_digest(lm.tokenizer),
        )
    return _digest_of_model[lm]


def params_digest(params: PyTree) -> str:
    """A digest of a tree's names, shapes, dtypes and bits.

    Two weighted sums of each leaf's bits, modulo 2^32, are computed on the device: at memory
    bandwidth, without moving weights, and the same for every sharding. A change of a single number
    always changes the digest.
    """
    leaves = jax.tree.leaves_with_path(params)
    sums = hosts.fetch([_checksum(leaf) for _, leaf in leaves])
    digest = hashlib.sha256()
    for (path, leaf), both in zip(leaves, sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {both}\n".encode())
    return digest.hexdigest()


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(leaf.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place * jnp.uint32(leaf.shape[axis]) + index
    weight = (place * jnp.uint32(2654435761)) ^ (place >> 15)
    mixed = (bits ^ weight) * jnp.uint32(2246822519)
    mixed = mixed ^ (mixed >> 13)
    return jnp.stack(
        [jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (weight | 1), dtype=jnp.uint32)]
    )


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """A digest of everything that decides a tokenizer's results, chat template included."""
    if tokenizer is None:
        return "none"
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        state = json.loads(backend.to_str())
        # Every call sets these again.
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    attributes = ("chat_template", "special_tokens_map", "clean_up_tokenization_spaces")
    parts = [state, *(getattr(tokenizer, name, None) for name in attributes)]
    return make_key(type(tokenizer).__name__, json.dumps(parts, sort_keys=True, default=str))


def examples_digest(examples: Sequence[Example]) -> str:
    """A digest of token ids and of the starts of the answers."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.tokens)} {example.answer_start} ".encode())
        digest.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
    return digest.hexdigest()


def rows_digest(rows: Sequence[Record]) -> str:
    """A digest of rows of text."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


@functools.cache
def code_digest(*modules: str) -> str:
    """A digest of the source of modules and of their imports from this package.

    A package's `__init__.py` is included where a name is imported from it.
    """
    digest = hashlib.sha256()
    for module in imported_modules(*modules):
        source = _source(module).read_bytes()
        digest.update(f"{module} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def imported_modules(*modules: str) -> list[str]:
    """These modules and their imports from this package, directly or not, sorted."""
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        if (module := waiting.pop()) not in reached:
            reached.add(module)
            waiting += _imports(module)
    return sorted(reached)


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Modules of this package that a module imports anywhere in its source."""
    source = _source(module)
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                names.add(inner if _is_module(inner) else origin)
    return tuple(sorted(filter(_is_module, names)))


def _is_module(name: str) -> bool:
    return name.split(".")[0] == _ROOT.name and _source(name).is_file()


def _source(module: str) -> pathlib.Path:
    path = _ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _shape(lm: LM) -> str:
    decoders = (decoder.apply, decoder.unembed, init_cache)
    functions = (lm.apply, lm.unembed, lm.init_cache)
    if lm.config is not None and all(
        isinstance(part, functools.partial) and part.func is original and part.args == (lm.config,)
        for part, original in zip(functions, decoders, strict=True)
    ):
        return repr(lm.config)
    return make_key(*_programs(lm))


def _programs(lm: LM) -> Iterator[str]:
    """The programs of a model's functions as text."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lm.params)

    def program(function: Callable[..., PyTree], *arguments: PyTree) -> str:
        return jax.jit(function).lower(params, *arguments).as_text()

    def read(params: PyTree, tokens: jax.Array, mask: jax.Array, cache: PyTree = None) -> PyTree:
        hidden, cache = lm.apply(params, tokens, None, mask, cache)
        return lm.unembed(params, hidden), hidden, cache

    def text(length: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((2, length), dtype) for dtype in (jnp.int32, jnp.bool)]

    for length in _LENGTHS:
        yield program(read, *text(min(length, lm.max_position)))
    cache = jax.eval_shape(lambda: lm.init_cache(2, 8))
    yield program(read, *text(1), cache)
