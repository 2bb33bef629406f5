"""Scores of given texts under many settings of the method, from one forward pass each.

The scores of an answer token under a setting are all that the teacher-forced metrics need: its
log-probability, whether it is the likeliest token, the head's score and, on request, the mean and
variance of the log-probability under the distribution. Arrays over the vocabulary exist for one
chunk of answer positions at a time, on the device.

Axes: B batch, T time, C answer positions of a chunk, D features, V vocabulary, K settings of a
head, N answer tokens of all texts.

References:
    Temper-Then-Tilt, arXiv 2602.10217; Min-K%++, arXiv 2404.02936, equation 3 (mean, variance).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from t3jax import batching, hosts, pooling, sharding
from t3jax import head as head_lib
from t3jax.data.chat import Example
from t3jax.evaluation.settings import Setting
from t3jax.head import HeadConfig, HeadParams
from t3jax.head_io import Head, check_head_fits, place_head
from t3jax.lm.model import LM
from t3jax.refinements import Refinements, combine_heads, refined_logits

POSITIONS_PER_CHUNK = 128  # C; `[C, V]` float32 is the largest array over the vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class TextScores:
    """Scores of the answer tokens of a list of texts under one setting.

    Attributes:
        starts: Text i owns the tokens `starts[i]:starts[i + 1]`, int64 `[texts + 1]`.
        logprobs: Log-probability of each answer token, nats, float32 `[N]`.
        correct: Whether it is the likeliest token (the first of equally likely ones), `[N]`.
        retain_scores: The logit of "retain" of the head, or of several combined, prior shift
            included, float32 `[N]`; None without a head.
        mean: Mean over the vocabulary of log p(v) under p, nats, float32 `[N]`; None if not
            requested.
        variance: Its variance, float32 `[N]`; None if not requested.
    """

    starts: np.ndarray
    logprobs: np.ndarray
    correct: np.ndarray
    retain_scores: np.ndarray | None = None
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None

    @property
    def num_texts(self) -> int:
        """Number of texts."""
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> np.ndarray:
        """Answer tokens of each text, `[texts]`."""
        return np.diff(self.starts)

    @property
    def avg_loss(self) -> np.ndarray:
        """Mean cross-entropy of each answer, end of turn included, nats, float64 `[texts]`."""
        return -self.text_means(self.logprobs)

    @property
    def retain_prob(self) -> np.ndarray:
        """P(retain) of each answer token, float64 `[N]`."""
        if self.retain_scores is None:
            raise ValueError("these scores are of a setting without a head")
        return 0.5 * (1.0 + np.tanh(0.5 * self.retain_scores.astype(np.float64)))

    def text_means(self, values: np.ndarray) -> np.ndarray:
        """Mean over each text of one value for each token, float64 `[texts]`."""
        return np.add.reduceat(values.astype(np.float64), self.starts[:-1]) / self.num_tokens

    def select(self, start: int, stop: int) -> "TextScores":
        """The scores of the texts `start:stop`."""
        tokens = slice(self.starts[start], self.starts[stop])
        cut = {
            name: values[tokens]
            for name in _Scores._fields
            if (values := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, starts=self.starts[start : stop + 1] - tokens.start, **cut)

    def mask_without_last(self) -> Bool[np.ndarray, "texts tokens"]:
        """True on answer tokens except each text's last, the closing token of an answer."""
        widest = int(self.num_tokens.max())
        return np.arange(widest) < (self.num_tokens - 1)[:, None]

    def padded(self, values: np.ndarray) -> np.ndarray:
        """One value for each token as rows of texts, `[texts, tokens]`; padding is 0."""
        rows = np.zeros((self.num_texts, int(self.num_tokens.max())), values.dtype)
        rows[np.arange(rows.shape[1]) < self.num_tokens[:, None]] = values
        return rows


class _Scores(NamedTuple):
    """The fields of `TextScores` for a chunk, `[K, C]`; settings in the order of the groups."""

    logprobs: Array
    correct: Array
    retain_scores: Array
    mean: Array | None
    variance: Array | None


class _Group(NamedTuple):
    """The static part of settings that differ in T and s alone; heads by index and shape."""

    heads: tuple[tuple[int, HeadConfig], ...]
    refinements: Refinements


class _Served(NamedTuple):
    """A head as arrays."""

    params: HeadParams
    prior_shift: np.float32 | Array


class _Knobs(NamedTuple):
    """T and s of the settings of a group, `[K]`."""

    base_temperature: np.ndarray | Array
    guidance_scale: np.ndarray | Array


class _Grouped(NamedTuple):
    """The traced part of all groups: the heads, and T and s of each group."""

    heads: tuple[_Served, ...]
    knobs: tuple[_Knobs, ...]


def score_texts(
    lm: LM,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    heads: Sequence[Head] = (),
    *,
    reference_mask: bool = False,
    moments: bool = False,
    tokens_per_batch: int | None = None,
    progress: str | None = None,
) -> list[TextScores]:
    """Scores the answers of texts under every setting; the model reads each text once.

    Settings refer to the heads by index. `reference_mask` masks attention as the reference
    evaluator does: wherever a token equals the padding token, which is mostly the end-of-turn
    token, prompts included; positions count masked tokens. Published numbers have this quirk.
    `moments` adds mean and variance, which Min-K%++ needs, at twice the cost. `tokens_per_batch`
    counts the tokens of one forward pass, padding included; None: by the device. The result is in
    the order of the settings.

    Raises:
        ValueError: If there are no examples or settings, a text is longer than the model's context
            or has no answer, or a setting's head does not exist or does not fit the model.
    """
    starts = _find_starts(lm, examples, settings, heads)
    order, groups, grouped = _group(lm, settings, heads)
    collected = {
        name: np.zeros((len(settings), starts[-1]), bool if name == "correct" else np.float32)
        for name in _Scores._fields
        if moments or name not in ("mean", "variance")
    }

    def compute(batch: list[int], tokens: jax.Array, mask: jax.Array) -> list[_Scores]:
        positions = None
        if reference_mask:
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
            mask = mask & (tokens != padding_id(lm))
        hidden, pooled = _read(lm.apply, lm.params, tokens, positions, mask)
        chunks = []
        size = batching.round_up(POSITIONS_PER_CHUNK, sharding.row_shards(lm.mesh))
        places, targets = _find_places(examples, batch, tokens.shape[1], size)
        for place, target in zip(places, targets, strict=True):
            states, features = _gather_rows(lm.mesh, hidden, pooled, place)
            chunks.append(
                _score(lm.unembed, groups, moments, lm.params, grouped, states, features, target)
            )
        return hosts.gather(chunks)

    def collect(batch: list[int], chunks: list[_Scores]) -> None:
        where = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        for name, field in collected.items():
            values = np.concatenate([np.asarray(getattr(chunk, name)) for chunk in chunks], axis=1)
            for row, k in zip(values, order, strict=True):
                field[k, where] = row[: len(where)]

    batching.map_batches(
        lm, examples, compute, collect, tokens_per_batch=tokens_per_batch, progress=progress
    )
    results = []
    for k, setting in enumerate(settings):
        scores = TextScores(starts, **{name: field[k] for name, field in collected.items()})
        results.append(scores if setting.heads else dataclasses.replace(scores, retain_scores=None))
    return results


def _find_starts(
    lm: LM, examples: Sequence[Example], settings: Sequence[Setting], heads: Sequence[Head]
) -> np.ndarray:
    """Checks texts and settings; gives the `starts` of `TextScores`."""
    batching.check_examples(lm, examples)
    if not settings:
        raise ValueError("no settings to score under; name at least one")
    for setting in settings:
        for index in setting.heads:
            if not 0 <= index < len(heads):
                raise ValueError(
                    f"setting {setting.name}: there is no head {index}, only {len(heads)} heads"
                )
    counts = np.array([example.num_answer_tokens for example in examples], np.int64)
    if not counts.all():
        raise ValueError(f"example {int(np.argmin(counts))} has no answer token to score")
    return np.concatenate([[0], np.cumsum(counts)])


def padding_id(lm: LM) -> int:
    """The token that the reference evaluator pads with: the tokenizer's own, else end of text."""
    padding = lm.tokenizer.pad_token_id
    return lm.tokenizer.eos_token_id if padding is None else padding


def _group(
    lm: LM, settings: Sequence[Setting], heads: Sequence[Head]
) -> tuple[list[int], tuple[_Group, ...], _Grouped]:
    """Groups settings; gives their indices in the order of the groups, and both parts of these."""
    used = sorted({index for setting in settings for index in setting.heads})
    served = []
    for index in used:
        check_head_fits(heads[index], lm)
        params = place_head(heads[index].params, lm.mesh)
        served.append(_Served(params, np.float32(heads[index].prior_shift)))
    members: dict[_Group, list[int]] = {}
    for k, setting in enumerate(settings):
        places = [(used.index(index), heads[index].config) for index in setting.heads]
        members.setdefault(_Group(tuple(places), setting.refinements), []).append(k)
    # Sorted by heads: the scores of one group of heads are freed before the next are computed.
    groups = sorted(members, key=lambda group: [place for place, _ in group.heads])
    knobs = [
        _Knobs(
            np.array([settings[k].base_temperature for k in members[group]], np.float32),
            np.array([settings[k].guidance_scale for k in members[group]], np.float32),
        )
        for group in groups
    ]
    order = [k for group in groups for k in members[group]]
    return order, tuple(groups), _Grouped(tuple(served), tuple(knobs))


def _find_places(
    examples: Sequence[Example], batch: list[int], length: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of answer tokens, and of the places before them in the flattened batch."""
    places = np.concatenate(
        [
            np.arange(examples[i].answer_start - 1, len(examples[i].tokens) - 1) + row * length
            for row, i in enumerate(batch)
        ]
    )
    targets = np.concatenate([examples[i].tokens[examples[i].answer_start :] for i in batch])
    # The padding of the last chunk is scored and discarded.
    rest = -len(places) % size
    places, targets = (np.pad(x.astype(np.int32), (0, rest)) for x in (places, targets))
    return places.reshape(-1, size), targets.reshape(-1, size)


@functools.partial(jax.jit, static_argnums=0)
def _read(
    apply: Callable,
    params: PyTree,
    tokens: Array,
    positions: np.ndarray | Array | None,
    mask: Array,
) -> tuple[Array, Array]:
    """Hidden states and their causal means, `[B, T, D]` each."""
    hidden, _ = apply(params, tokens, positions, mask, None)
    return hidden, pooling.causal_mean(hidden, mask)


@functools.partial(jax.jit, static_argnums=0)
def _gather_rows(mesh: Mesh, hidden: Array, pooled: Array, places: Array) -> tuple[Array, Array]:
    """Gathers the rows of a chunk, `[C, D]` each; a jit of its own, to compile `_score` once."""

    def take(x: Array) -> Array:
        rows = jnp.take(x.reshape(-1, x.shape[-1]), places, axis=0)
        return jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh, rows.shape))

    return take(hidden), take(pooled)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    unembed: Callable,
    groups: tuple[_Group, ...],
    moments: bool,
    params: PyTree,
    grouped: _Grouped,
    hidden: Array,
    pooled: Array,
    targets: Array,
) -> _Scores:
    """Scores a chunk under all settings; one program for all chunks of all texts."""
    logits = unembed(params, hidden)  # [C, V]
    results = []
    for group, of_group in zip(groups, grouped.knobs, strict=True):
        if not group.heads:
            statistics = jax.lax.map(
                lambda k: token_statistics(logits / k.base_temperature, targets, moments), of_group
            )
            of_targets = jnp.zeros(targets.shape, jnp.float32)
        else:
            scores, of_targets = _score_heads(group, grouped.heads, pooled, hidden, targets)
            statistics = jax.lax.map(
                lambda k, scores=scores, group=group: token_statistics(
                    refined_logits(
                        logits, scores, k.base_temperature, k.guidance_scale, group.refinements
                    ),
                    targets,
                    moments,
                ),
                of_group,
            )
        logprobs, correct, *mean_and_variance = statistics
        repeated = jnp.broadcast_to(of_targets[None], logprobs.shape)
        results.append(_Scores(logprobs, correct, repeated, *mean_and_variance))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)


def _score_heads(
    group: _Group, served: tuple[_Served, ...], pooled: Array, hidden: Array, targets: Array
) -> tuple[Array, Array]:
    """The heads' combined scores of all tokens as the next one, `[C, V]`, and of the targets."""
    of_all, of_targets = [], []
    for place, config in group.heads:
        params, shift = served[place]
        features = pooling.prefix_features(pooled, hidden, config.features)
        of_all.append(head_lib.head_scores(params, features, config.activation) + shift)
        of_targets.append(
            head_lib.target_scores(params, features, targets, config.activation) + shift
        )
    how = group.refinements.combine
    return combine_heads(of_all, how), combine_heads(of_targets, how)


def token_statistics(
    logits: Float[Array, "C V"], targets: Int[Array, " C"], moments: bool = False
) -> tuple[
    Float[Array, " C"], Bool[Array, " C"], Float[Array, " C"] | None, Float[Array, " C"] | None
]:
    """Statistics of next-token distributions, in two passes over V.

    They are the log-probability of the target, whether it is the (first) argmax, and mean and
    variance of log p(v) under p (None unless `moments`), `[C]` each, in nats. A logit of -inf bans
    a token.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - peak
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    normaliser = jnp.log(total)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    # Two maxima replace the argmax: a CPU finds a float's maximum four times as fast.
    vocabulary = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    before = jnp.max(jnp.where(vocabulary < targets[:, None], logits, -jnp.inf), axis=-1)
    logprob = (of_target - peak)[:, 0] - normaliser
    correct = (of_target == peak)[:, 0] & (before < peak[:, 0])
    if not moments:
        return logprob, correct, None, None
    # The shift does not change the variance, and the difference below loses fewer digits.
    shifted = jnp.where(weights > 0, shifted, 0.0)
    first = jnp.sum(weights * shifted, axis=-1) / total
    second = jnp.sum(weights * shifted * shifted, axis=-1) / total
    return logprob, correct, first - normaliser, jnp.maximum(second - first * first, 0.0)
