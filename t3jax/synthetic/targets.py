"""Targets of a distilled head: the base model's own distributions, under made-up names.

For each answer token of a forget row the target is the mean of the base model's next-token
distributions at the same position of its counterfactuals, the names' tokens swapped back. Inside a
name, which is not secret, and in retain texts, the target is the base model's own distribution.

Axes: N answer tokens, K counterfactuals of a row, C positions of a chunk, D width of the hidden
states, V vocabulary, S pairs of tokens to swap.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from t3jax import hosts, sharding
from t3jax.batching import round_up
from t3jax.distillation import SoftTargets, overcorrect, soft_targets
from t3jax.features import Features
from t3jax.lm.model import LM
from t3jax.synthetic.counterfactual import Counterfactual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CANDIDATES, REST = 64, 16  # tokens of a position: the likeliest, and a sample of all others
_CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MB
_LARGEST_CHUNK = 2048


def add_base_targets(
    lm: LM, features: Features, *, temperature: float = 1.0, seed: int = 0
) -> Features:
    """Adds the targets of texts to retain: the base model's own distributions.

    The features must be of a kind that ends in "last". The seed draws the tokens that represent the
    rest of the vocabulary.
    """
    references = np.full((features.num_tokens, 0), -1)
    pairs = np.zeros((features.num_tokens, 0, 0, 2), np.int32)
    none = np.zeros((1, lm.hidden_size), np.float32)
    return _add_targets(lm, features, none, references, pairs, 1.0, temperature, seed)


def add_counterfactual_targets(
    lm: LM,
    features: Features,
    counterfactuals: Sequence[Counterfactual],
    hidden: Features,
    *,
    overcorrection: float = 1.25,
    temperature: float = 1.0,
    seed: int = 0,
) -> Features:
    """Adds the targets of texts to forget: the base model's distributions in their counterfactuals.

    The texts are forget rows or other answers to the same questions. The `row` of a counterfactual
    is the index of its text. `hidden` are the features of the counterfactuals, of the kind "last".
    The features of the texts are of a kind that ends in "last".
    """
    of_row: list[list[int]] = [[] for _ in range(features.num_sequences)]
    for index, counterfactual in enumerate(counterfactuals):
        of_row[counterfactual.row].append(index)
    most = max(map(len, of_row))
    references = np.full((features.num_tokens, most), -1, np.int64)
    swaps = [_pair_tokens(lm.tokenizer, item.pairs) for item in counterfactuals]
    width = max((len(pairs) for pairs in swaps), default=0)
    # A pair of equal tokens swaps nothing.
    pairs = np.zeros((features.num_tokens, most, width, 2), np.int32)
    for row, indices in enumerate(of_row):
        tokens = slice(features.starts[row], features.starts[row + 1])
        for k, index in enumerate(indices):
            places = align_answers(_answer(features, row), _answer(hidden, index), swaps[index])
            references[tokens, k] = np.where(places < 0, -1, places + hidden.starts[index])
            pairs[tokens, k, : len(swaps[index])] = swaps[index] or np.zeros((0, 2), np.int32)
    return _add_targets(
        lm, features, hidden.pooled, references, pairs, overcorrection, temperature, seed
    )


def align_answers(
    answer: np.ndarray, swapped: np.ndarray, pairs: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Aligns the tokens of an answer with the tokens of its counterfactual.

    The result has for each token the index of its counterpart, -1 inside a name, `[N]`. The first
    token of a name is aligned with the first token of the made-up name.
    """
    places = np.full(len(answer), -1, np.int64)
    begins = set(pairs)
    matcher = difflib.SequenceMatcher(None, answer.tolist(), swapped.tolist(), autojunk=False)
    for block in matcher.get_matching_blocks():
        i, j, size = block
        places[i : i + size] = np.arange(j, j + size)
        i, j = i + size, j + size
        if i < len(answer) and j < len(swapped) and (int(answer[i]), int(swapped[j])) in begins:
            places[i] = j
    if len(answer) and len(swapped) and (int(answer[0]), int(swapped[0])) in begins:
        places[0] = 0
    return places


def _answer(features: Features, row: int) -> np.ndarray:
    return features.targets[features.starts[row] : features.starts[row + 1]]


def _pair_tokens(
    tokenizer: "PreTrainedTokenizerBase", pairs: Mapping[str, str]
) -> list[tuple[int, int]]:
    """Pairs the first tokens of each word and of its made-up word; no token is in two pairs."""
    table: dict[int, int] = {}
    for name, made_up in pairs.items():
        for words in zip(name.split(), made_up.split(), strict=True):
            for space in (" ", ""):
                a, b = (
                    int(tokenizer(space + word, add_special_tokens=False)["input_ids"][0])
                    for word in words
                )
                if a != b and not {a, b} & (set(table) | set(table.values())):
                    table[a] = b
    return list(table.items())


def _add_targets(
    lm: LM,
    features: Features,
    reference_states: np.ndarray,
    references: np.ndarray,
    pairs: np.ndarray,
    overcorrection: float,
    temperature: float,
    seed: int,
) -> Features:
    if features.pooled.shape[-1] not in (lm.hidden_size, 2 * lm.hidden_size):
        raise ValueError(
            f"features of width {features.pooled.shape[-1]} do not hold the last hidden states of "
            f"{lm.name}, of width {lm.hidden_size}; compute them as 'last' or 'mean+last'"
        )
    size = min(_LARGEST_CHUNK, max(1, _CHUNK_ELEMENTS // lm.vocab_size), features.num_tokens)
    size = round_up(size, sharding.row_shards(lm.mesh))
    dtype = jax.tree.leaves(lm.params)[0].dtype
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.bfloat16
    key = jax.random.key(seed)
    parts = []
    for first in range(0, features.num_tokens, size):
        rows = np.arange(first, first + size) % features.num_tokens  # the last chunk is filled up
        hidden = features.pooled[rows][:, -lm.hidden_size :]
        places = references[rows]
        batch = (
            hidden.astype(dtype),
            reference_states[np.maximum(places, 0)].astype(dtype),
            places >= 0,
            pairs[rows],
        )
        by_rows = sharding.batch_sharding(lm.mesh, (size,))
        soft = _compute_targets(
            lm.unembed,
            lm.params,
            jax.random.fold_in(key, first),
            _Chunk(*hosts.place(batch, by_rows)),
            jnp.float32(overcorrection),
            temperature,
        )
        parts.append(jax.tree.map(np.asarray, hosts.gather(soft)))
    whole = jax.tree.map(lambda *x: np.concatenate(x)[: features.num_tokens], *parts)
    return dataclasses.replace(features, soft=whole)


class _Chunk(NamedTuple):
    """Positions whose targets are computed together.

    Attributes:
        hidden: Their last hidden states.
        reference: Last hidden states of the aligned position in each counterfactual.
        present: Whether a counterfactual has an aligned position.
        pairs: Tokens to swap in each counterfactual.
    """

    hidden: Float[Array, "C D"]
    reference: Float[Array, "C K D"]
    present: Bool[Array, "C K"]
    pairs: Int[Array, "C K S 2"]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _compute_targets(
    unembed: Callable[[PyTree, jax.Array], jax.Array],
    params: PyTree,
    key: PRNGKeyArray,
    chunk: _Chunk,
    overcorrection: Float[Array, ""],
    temperature: float,
) -> SoftTargets:
    logits = unembed(params, chunk.hidden)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    base = jnp.exp(logprobs)
    if not chunk.reference.shape[1]:
        return soft_targets(key, logits, base, CANDIDATES, REST, temperature)

    def add(total: Array, of_name: tuple[Array, Array, Array]) -> tuple[Array, None]:
        states, there, swaps = of_name
        probs = jax.vmap(_swap_tokens)(jax.nn.softmax(unembed(params, states), axis=-1), swaps)
        return total + jnp.where(there[:, None], probs, 0.0), None

    by_name = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tuple(chunk[1:]))
    total, _ = jax.lax.scan(add, jnp.zeros_like(base), by_name)
    count = jnp.sum(chunk.present.astype(jnp.float32), axis=1, keepdims=True)
    mean = total / jnp.maximum(count, 1.0)
    target = jnp.where(count > 0, overcorrect(logprobs, mean, overcorrection), base)
    return soft_targets(key, logits, target, CANDIDATES, REST, temperature)


def _swap_tokens(probs: Float[Array, " V"], pairs: Int[Array, "S 2"]) -> Float[Array, " V"]:
    """Exchanges the probabilities of the two tokens of each pair."""
    for s in range(pairs.shape[0]):
        a, b = pairs[s, 0], pairs[s, 1]
        of_a, of_b = probs[a], probs[b]
        probs = probs.at[a].set(of_b).at[b].set(of_a)
    return probs
