"""A loaded language model: pure functions, frozen parameters, tokenizer."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import Mesh

from t3jax import sharding
from t3jax.json_files import read_json
from t3jax.lm import cache, decoder, gguf
from t3jax.lm.adapter import CONFIG as ADAPTER_CONFIG
from t3jax.lm.adapter import is_adapter, read_base
from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import read_config, wrapper_of
from t3jax.lm.folder import check_links
from t3jax.lm.weights import check_params, is_tied, load_params

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
        config: The decoder's shape, a part of every cache key; None for a model of your own.
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
    config: LMConfig | None = None


@functools.cache
def pure_functions(
    config: LMConfig, dtype: Any, mesh: Mesh | None = None
) -> tuple[Callable, Callable, Callable]:
    """`apply`, `unembed` and `init_cache` of a shape: the same objects each time, so jit caches."""
    return (
        functools.partial(decoder.apply, config, mesh=mesh),
        functools.partial(decoder.unembed, config, mesh=mesh),
        functools.partial(cache.init_cache, config, dtype=dtype),
    )


def load_lm(
    name: str | pathlib.Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> LM:
    """Loads a language model from a Hugging Face folder, a hub id or a GGUF file.

    What is local needs no network, and nothing of a folder is run. Weights go straight to their
    place on the mesh. Answers end at the tokens that generation_config.json, config.json and the
    tokenizer name, all of them, in this order.

    Args:
        name: A folder with `config.json`, safetensors weights and tokenizer; a folder of PEFT with
            a LoRA adapter, which is merged into its base as that is read; a hub id of either; or a
            GGUF file, which needs the extra `t3jax[gguf]`.
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
        ValueError: If the model is of an unknown family, its weights, tokenizer or eos tokens do
            not fit its config, a weight is NaN or Inf, a file is broken or leads out of the folder,
            or the dtype is unknown.
    """
    quantized, computed = read_dtype(dtype or default_dtype(), default_dtype())
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    path = model_path(name)
    shardings = functools.partial(sharding.param_shardings, mesh)
    if path.is_file():
        file = gguf.open_gguf(path)
        config = dataclasses.replace(gguf.read_config(file), quantized=quantized)
        tokenizer = gguf.read_tokenizer(file)
        _check_vocabulary(path, tokenizer, config)
        eos_ids = _within(path, gguf.read_eos_ids(file), config.vocab_size)
        params = gguf.load_params(file, config, computed, shardings)
    else:
        path, adapter = _base_and_adapter(path)
        config = dataclasses.replace(read_config(path), quantized=quantized)
        if wrapper := wrapper_of(path):
            warnings.warn(
                f"{path}: of this {wrapper} the text model is read, a {config.model_type}; images "
                "and sound are not",
                stacklevel=2,
            )
        named = _named_ends(path, config.vocab_size)  # first: transformers' errors are its own
        own = adapter is not None and any((adapter / name).is_file() for name in _TOKENIZER_FILES)
        tokenizer = _tokenizer(adapter if adapter is not None and own else path)
        _check_vocabulary(path, tokenizer, config)
        eos_ids = _eos_ids(path, named, tokenizer, config.vocab_size)
        params = load_params(path, config, computed, shardings, adapter)
        config = dataclasses.replace(config, tied=config.tied and "lm_head" not in params)
    return from_params(config, params, tokenizer, eos_ids, str(name), mesh)


def load_config(name: str | pathlib.Path) -> LMConfig:
    """The shape of a model that `load_lm` loads; see there."""
    path = model_path(name)
    if path.is_file():
        return gguf.read_config(gguf.open_gguf(path))
    path, _ = _base_and_adapter(path)
    config = read_config(path)
    return dataclasses.replace(config, tied=is_tied(path, config)) if config.tied else config


def check_weights(path: pathlib.Path) -> None:
    """Checks that a folder's weights are there and fit its config, without reading them.

    Args:
        path: From `model_path`. Of a GGUF file nothing is checked: its shape is that of its
            tensors.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If names or shapes do not fit, or a file is broken.
    """
    if path.is_file():
        return
    base, adapter = _base_and_adapter(path)
    check_params(base, read_config(base), adapter)


def _base_and_adapter(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
    """The folder of the whole model, and the adapter's if `path` is one."""
    check_links(path)
    if not is_adapter(path):
        return path, None
    base = model_path(read_base(path))
    if base.is_file() or is_adapter(base):
        kind = "a file" if base.is_file() else "an adapter"
        raise ValueError(
            f"{path / ADAPTER_CONFIG}: the base model {base} is {kind}; expected a Hugging Face "
            "folder with whole weights"
        )
    check_links(base)
    return base, path


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
        config=config,
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
        init_cache: `(batch, slots) -> cache`: an empty cache for texts of `slots` tokens, padding
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
        ValueError: If the functions' results do not have these shapes, or an eos token is outside
            of the vocabulary.
    """
    if eos_ids is None:
        eos = None if tokenizer is None else tokenizer.eos_token_id
        eos_ids = () if eos is None else (eos,)
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
    eos_ids = _within(name, eos_ids, logits.shape[-1])
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
    """The folder's tokenizer: of a class of transformers, never of the folder's own code."""
    from transformers import AutoTokenizer  # slow to import: only who loads a model waits

    settings = folder / "tokenizer_config.json"
    if settings.exists():
        read_json(settings, _TokenizerSettings)
    try:
        # Without any of these some versions of transformers make an empty tokenizer up.
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(f"there is none of {', '.join(_TOKENIZER_FILES)}")
        # Left open, transformers would ask on stdin whether to run the folder's code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # transformers has pages
        raise ValueError(
            f"{folder}: the tokenizer could not be read ({reason:.300}); expected tokenizer.json "
            "and tokenizer_config.json beside config.json, of a class that transformers has: code "
            "of the folder (auto_map) is never run"
        ) from error


def _check_vocabulary(path: pathlib.Path, tokenizer: Any, config: LMConfig) -> None:
    """Checks that a tokenizer is the model's.

    Some tokens may lie beyond the embedding, such as Gemma 3's of images or a [PAD] that was added:
    a text that holds one is refused when it is read.
    """
    ids = tokenizer.get_vocab().values()
    beyond = sum(i >= config.vocab_size for i in ids)
    if beyond > len(ids) / 10:
        raise ValueError(
            f"{path}: {beyond} of the tokenizer's {len(ids)} tokens, up to id {max(ids)}, lie "
            f"beyond the vocab_size {config.vocab_size} of the config; the tokenizer belongs to "
            "another model"
        )


class _TokenizerSettings(msgspec.Struct):
    """What of tokenizer_config.json would fail late if it were of another type."""

    model_max_length: float | None = None


class _Ends(msgspec.Struct):
    """What a JSON file of a folder says about the end of a text."""

    eos_token_id: int | list[int] | None = None

    def ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


class _ConfigEnds(_Ends):
    text_config: _Ends | None = None


def _named_ends(folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a text: of generation_config.json, and of config.json."""
    ids: tuple[int, ...] = ()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            ends = read_json(path, _ConfigEnds)
            ids += _within(path, ends.ids(), vocab_size)
            if ends.text_config is not None:
                ids += _within(path, ends.text_config.ids(), vocab_size)
    return ids


def _eos_ids(
    folder: pathlib.Path, named: tuple[int, ...], tokenizer: Any, vocab_size: int
) -> tuple[int, ...]:
    """Tokens that end a text: those that files of the folder name, then the tokenizer's."""
    own = tokenizer.eos_token_id
    ids = named if own is None else named + _within(f"{folder}: the tokenizer", [own], vocab_size)
    if not ids:
        raise ValueError(
            f"{folder}: no end-of-text token: neither generation_config.json, config.json nor the "
            "tokenizer names one"
        )
    return tuple(dict.fromkeys(ids))


def _within(where: Any, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids of eos tokens, each in the vocabulary."""
    ids = tuple(ids)
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise ValueError(
                f"{where}: eos_token_id {i!r}, expected a token id from 0 to {vocab_size - 1}, "
                "within the model's vocabulary"
            )
    return ids
