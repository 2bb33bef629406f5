"""An `LM` from the user's own functions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t3jax import sharding
from t3jax.lm.model import LM
from t3jax.lm.vocabulary import ids_within


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
            `[B, T, D]`, those that `unembed` takes, of tokens `[B, T]`. A state depends only on its
            own token and earlier ones; where the mask `[B, T]` is False there is padding, on either
            side, and no state of a real token may depend on it. Without `init_cache` the positions
            `[B, T]` are always given, and the cache is None and is returned as such. With it,
            positions may be None: count the real tokens, on from the cache. Sampling then passes a
            cache, and expects it back with the new tokens.
        unembed: `(params, hidden) -> logits`: `[..., D]` to float32 `[..., V]`.
        params: The parameter tree, placed on its devices.
        max_position: Longest text the model was made for, tokens.
        init_cache: `(batch, slots) -> cache`: an empty cache for texts of `slots` tokens, padding
            included; a tree of arrays. Each has an axis of rows, and one of slots or none: new
            tokens of all rows take the same slots, at a scalar that counts those taken. Sampling
            moves slots and the scalar together, and gives rows to new prompts. None: sampling reads
            the whole text again for each token.
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
    integers, flags = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
    hidden, _ = jax.eval_shape(lambda *args: apply(*args, None), params, integers, integers, flags)
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
    eos_ids = ids_within(name, eos_ids, logits.shape[-1])
    if init_cache is None:
        apply, init_cache = _make_rereader(apply), _init_text
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
    """The cache of a model without its own: the text read so far, `[B, S]`."""

    tokens: jax.Array
    mask: jax.Array
    cursor: jax.Array


def _init_text(batch: int, slots: int) -> _Text:
    shape = (batch, slots)
    return _Text(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros((), jnp.int32))


@functools.lru_cache(maxsize=64)  # models of the same function share compiled programs
def _make_rereader(apply: Callable[..., tuple[jax.Array, Any]]) -> Callable[..., Any]:
    return functools.partial(_reread, apply)


def _reread(
    apply: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
    text: _Text | None = None,
) -> tuple[jax.Array, _Text | None]:
    """`apply` with a cache, for a model that has none."""
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
