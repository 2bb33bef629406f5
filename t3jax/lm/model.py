"""A loaded language model: pure functions, frozen parameters, tokenizer."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t3jax import sharding
from t3jax.lm import decoder, gguf
from t3jax.lm.config import LMConfig
from t3jax.lm.families import read_config
from t3jax.lm.weights import load_params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A frozen language model as the rest of the library sees it.

    Features, sampling and evaluation use only these fields; `make_lm` fills them in for a model of
    your own.

    Attributes:
        apply: `(params, tokens, positions=None, mask=None, cache=None) -> (hidden, cache)`: last
            hidden states `[B, T, D]` after the final norm; see `t3jax.lm.decoder.apply`.
        unembed: `(params, hidden) -> logits`, `[..., D]` to float32 `[..., V]`.
        init_cache: `(batch, slots) -> cache`, empty.
        params: The parameter tree, placed on the mesh; never changed.
        tokenizer: A transformers tokenizer; None if you handle token ids only.
        vocab_size: V.
        hidden_size: D.
        max_position: Longest text the model was made for, tokens.
        eos_ids: Tokens that end an answer.
        name: Folder or hub id, for records and messages.
        mesh: Where the arrays live.
    """

    apply: Callable[..., tuple[jax.Array, Any]]
    unembed: Callable[[Any, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Any]
    params: Any
    tokenizer: Any
    vocab_size: int
    hidden_size: int
    max_position: int
    eos_ids: tuple[int, ...]
    name: str
    mesh: Mesh


@functools.cache
def pure_functions(
    config: LMConfig, dtype: Any, mesh: Mesh | None = None
) -> tuple[Callable, Callable, Callable]:
    """`apply`, `unembed` and `init_cache` of a shape: the same objects each time, so jit caches."""
    return (
        functools.partial(decoder.apply, config, mesh=mesh),
        functools.partial(decoder.unembed, config, mesh=mesh),
        functools.partial(decoder.init_cache, config, dtype=dtype),
    )


def load_lm(
    name: str | pathlib.Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> LM:
    """Loads a language model from a Hugging Face folder, a hub id or a GGUF file.

    What is local needs no network. Weights go straight to their place on the mesh.

    Args:
        name: A folder with `config.json`, safetensors weights and tokenizer; a hub id; or a GGUF
            file, which needs the extra `t3jax[gguf]`.
        dtype: "float32", "bfloat16" or "float16"; None means float32 on CPU, where it is the fast
            one, and bfloat16 elsewhere. "int8" rounds the matrices as they are read, each row with
            a scale of its own (`t3jax.lm.quantized`), and computes in what None means.
        mesh: From `t3jax.make_mesh`; None means one device.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such folder, file, or model on the hub, or a file of the
            folder is missing.
        ImportError: If a GGUF file is given without the extra.
        ValueError: If the model is of an unknown family, its weights or tokenizer do not fit its
            config, a file is broken, or the dtype is unknown.
    """
    quantized, computed = read_dtype(dtype or default_dtype(), default_dtype())
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    path = model_path(name)
    shardings = functools.partial(sharding.param_shardings, mesh)
    if path.is_file():
        file = gguf.open_gguf(path)
        config = dataclasses.replace(gguf.read_config(file), quantized=quantized)
        tokenizer, eos_ids = gguf.read_tokenizer(file), gguf.read_eos_ids(file)
        _check_vocabulary(path, tokenizer, config)
        params = gguf.load_params(file, config, computed, shardings)
    else:
        config = dataclasses.replace(read_config(path), quantized=quantized)
        tokenizer = _tokenizer(path)
        _check_vocabulary(path, tokenizer, config)
        params = load_params(path, config, computed, shardings)
        eos_ids = _eos_ids(path, tokenizer)
    return from_params(config, params, tokenizer, eos_ids, str(name), mesh)


def load_config(name: str | pathlib.Path) -> LMConfig:
    """The shape of a model that `load_lm` loads; see there."""
    path = model_path(name)
    return gguf.read_config(gguf.open_gguf(path)) if path.is_file() else read_config(path)


def from_params(
    config: LMConfig,
    params: decoder.Params,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    name: str,
    mesh: Mesh | None = None,
) -> LM:
    """An `LM` from parameters at hand, such as those just trained; see `LM` for the arguments."""
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    apply, unembed, init_cache = pure_functions(config, decoder.compute_dtype(params), mesh)
    return LM(
        apply=apply,
        unembed=unembed,
        init_cache=init_cache,
        params=params,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position=config.max_position,
        eos_ids=eos_ids,
        name=name,
        mesh=mesh,
    )


def make_lm(
    apply: Callable[..., tuple[jax.Array, Any]],
    unembed: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    *,
    max_position: int,
    init_cache: Callable[[int, int], Any] | None = None,
    tokenizer: Any = None,
    eos_ids: tuple[int, ...] | None = None,
    name: str = "own model",
    mesh: Mesh | None = None,
) -> LM:
    """An `LM` from pure functions of your own, such as those of a Flax module.

    Args:
        apply: `(params, tokens, positions, mask, cache) -> (hidden, cache)`: the last hidden states
            `[B, T, D]`, those that `unembed` takes, of tokens `[B, T]`. A state knows only its own
            token and earlier ones; where the mask `[B, T]` is False there is padding, on either
            side, and it must be as if the token was not there. Without `init_cache` the positions
            `[B, T]` are always given and the cache is always None, to be returned as it is. With
            it, positions may be None: the attended tokens are counted, on from the cache; and there
            is a cache in sampling, which comes back with the new tokens in it.
        unembed: `(params, hidden) -> logits`: `[..., D]` to float32 `[..., V]`.
        params: The parameter tree, placed where it shall stay.
        max_position: Longest text the model was made for, tokens.
        init_cache: `(batch, slots) -> cache`: an empty cache for texts of so many tokens, padding
            included; a tree of arrays. Each has an axis of rows, and one of slots or none: new
            tokens of all rows take the same slots, at a scalar that counts those taken. Sampling
            moves slots and the scalar together, and gives rows to new prompts. None: sampling reads
            the whole text anew for each token.
        tokenizer: A transformers tokenizer; None if you handle token ids only.
        eos_ids: Tokens that end an answer; None takes the tokenizer's.
        name: For records and messages.
        mesh: From `t3jax.make_mesh`, where batches are placed; None means one device.

    Returns:
        The model.

    Raises:
        ValueError: If the functions' results do not have these shapes.
    """
    if eos_ids is None:
        eos_ids = () if tokenizer is None else (tokenizer.eos_token_id,)
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shape = (2, 3)
    integers, truths = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
    hidden, _ = jax.eval_shape(
        lambda *known: apply(*known, None), params, integers, integers, truths
    )
    if hidden.ndim != 3 or hidden.shape[:2] != shape:
        raise ValueError(
            f"{name}: apply gave hidden states {hidden.shape} for tokens {shape}; expected "
            "(2, 3, D)"
        )
    logits = jax.eval_shape(unembed, params, hidden)
    if logits.ndim != 3 or logits.shape[:2] != shape or logits.dtype != jnp.float32:
        raise ValueError(
            f"{name}: unembed gave {logits.dtype} {logits.shape} for hidden states {hidden.shape}; "
            "expected float32 (2, 3, V)"
        )
    if init_cache is None:
        apply, init_cache = functools.partial(_reread, apply), _init_text
    return LM(
        apply=apply,
        unembed=unembed,
        init_cache=init_cache,
        params=params,
        tokenizer=tokenizer,
        vocab_size=logits.shape[-1],
        hidden_size=hidden.shape[-1],
        max_position=max_position,
        eos_ids=eos_ids,
        name=name,
        mesh=mesh,
    )


class _Text(NamedTuple):
    """What a model without a cache is given in its place: the text read so far, `[B, S]`."""

    tokens: jax.Array
    mask: jax.Array
    cursor: jax.Array


def _init_text(batch: int, slots: int) -> _Text:
    shape = (batch, slots)
    return _Text(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros((), jnp.int32))


def _reread(
    apply: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
    text: _Text | None = None,
) -> tuple[jax.Array, _Text | None]:
    """`apply` with a cache, of a model that has none."""
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    new = tokens.shape[1]
    start = jnp.zeros((), jnp.int32)
    if text is not None:
        start = text.cursor
        place = (jnp.zeros_like(start), start)
        tokens = jax.lax.dynamic_update_slice(text.tokens, tokens, place)
        mask = jax.lax.dynamic_update_slice(text.mask, mask, place)
        text = _Text(tokens, mask, start + new)
        positions = None
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)
    hidden, _ = apply(params, tokens, positions, mask, None)
    return jax.lax.dynamic_slice_in_dim(hidden, start, new, axis=1), text


def default_dtype() -> str:
    """Float32 on CPU, where it is the fast one, and bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def read_dtype(name: str, computed: str) -> tuple[bool, Any]:
    """Whether weights of a dtype are quantised, and the dtype of all that is not.

    Args:
        name: As in `load_lm`.
        computed: What computes beside int8 weights.

    Raises:
        ValueError: If the dtype is unknown.
    """
    if name not in (*DTYPES, "int8"):
        raise ValueError(f"dtype {name!r} is not supported; known: {sorted([*DTYPES, 'int8'])}")
    return name == "int8", DTYPES[computed if name == "int8" else name]


def model_path(name: str | pathlib.Path) -> pathlib.Path:
    """The folder or GGUF file of a model, downloaded if it is a hub id that is not there yet.

    Raises:
        FileNotFoundError: If there is no such folder or file, and no such model on the hub.
    """
    path = pathlib.Path(name)
    if path.exists():
        return path
    not_found = f"{name}: no such folder or file"
    # A hub id is "model" or "owner/model"; anything else can only be a path.
    if isinstance(name, pathlib.Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{not_found}; expected a Hugging Face model folder, a GGUF file or a hub id"
        )
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise FileNotFoundError(
            f"{not_found}, and it could not be had from the Hugging Face hub either "
            f"({type(error).__name__}: {error}); give a model folder or a GGUF file, or a hub id "
            "with a network"
        ) from error


def _tokenizer(folder: pathlib.Path) -> Any:
    from transformers import AutoTokenizer  # slow to import: only who loads a model waits

    try:
        # Without any of these some versions of transformers make an empty tokenizer up.
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(f"there is none of {', '.join(_TOKENIZER_FILES)}")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"{folder}: the tokenizer could not be read ({error}); expected tokenizer.json and "
            "tokenizer_config.json beside config.json"
        ) from error


def _check_vocabulary(path: pathlib.Path, tokenizer: Any, config: LMConfig) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has token id {largest}, but the config says vocab_size "
            f"{config.vocab_size}; the tokenizer belongs to another model"
        )


def _eos_ids(folder: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids: the list in generation_config.json, else the tokenizer's one."""
    ids: Any = None
    path = folder / "generation_config.json"
    if path.is_file():
        ids = json.loads(path.read_text()).get("eos_token_id")
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ValueError(
            f"{folder}: no end-of-text token: neither generation_config.json nor the tokenizer "
            "names one"
        )
    return tuple(ids) if isinstance(ids, list) else (ids,)
