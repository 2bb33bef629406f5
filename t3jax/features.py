"""Frozen features, the head's input before each answer token, and their store on disk.

One forward pass of the base model over a set of texts gives the features of every prefix, in the
paper the causal mean of its hidden states; only those before answer tokens are kept. No logits are
computed. Axes: B batch, T time, F width of the features, N answer tokens of a set, S its sequences.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from t3jax import batching, checked, digests, files, hosts, pooling
from t3jax.data.chat import Example
from t3jax.distillation import SoftTargets
from t3jax.lm.model import LM

_POOLED, _DESCRIPTION = "pooled.bin", "features.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The answer tokens of a set of texts with the feature of the prefix before each.

    Attributes:
        pooled: Features of the prefix before the answer token, `[N, F]`.
        targets: The answer token, int32 `[N]`.
        starts: Sequence i has the rows `starts[i]:starts[i + 1]`, int64 `[S + 1]`.
        key: Cache key, a digest of model, tokens, dtype and code; "" if unknown.
        soft: Targets of a distilled head for the same answer tokens, NumPy arrays `[N, ...]`; None
            for the paper's classifier.
    """

    pooled: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    key: str = ""
    soft: SoftTargets | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.targets)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.starts) - 1

    @classmethod
    def concatenate(cls, sets: Sequence["Features"]) -> "Features":
        """The sequences of all sets, set by set; a single set is returned itself."""
        if len(sets) == 1:
            return sets[0]
        soft = [features.soft for features in sets]
        if len({targets is None for targets in soft}) > 1:
            raise ValueError("some of the sets have targets for distillation and others have none")
        starts = np.concatenate([[0], *(np.diff(features.starts) for features in sets)])
        return cls(
            np.concatenate([features.pooled for features in sets]),
            np.concatenate([features.targets for features in sets]),
            np.cumsum(starts),
            " ".join(features.key for features in sets) if all(f.key for f in sets) else "",
            None if soft[0] is None else jax.tree.map(lambda *x: np.concatenate(x), *soft),
        )

    def select(self, sequences: Sequence[int] | np.ndarray) -> "Features":
        """The features of some sequences, in the order of the argument."""
        sequences = np.asarray(sequences, np.int64)
        rows = [np.arange(self.starts[i], self.starts[i + 1]) for i in sequences]
        flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        starts = np.cumsum([0, *(len(r) for r in rows)])
        soft = None if self.soft is None else jax.tree.map(lambda x: x[flat], self.soft)
        return Features(self.pooled[flat], self.targets[flat], starts, self.key, soft)


def load_or_compute_features(
    lm: LM,
    examples: Sequence[Example],
    store: pathlib.Path | str,
    *,
    kind: str = "mean",
    dtype: str = "float32",
    tokens_per_batch: int | None = None,
    progress: str | None = None,
) -> Features:
    """The features of `examples`, read from the store, or computed and stored.

    Features are stored under a cache key of everything that they depend on, see `t3jax.digests`,
    and are written atomically. A checksum is stored beside them and compared once here, which reads
    them once (1.2 GB/s on two busy cores); damaged features are computed again, with a warning.

    Args:
        lm: The base model.
        examples: Tokenised texts with their answers.
        store: Folder of the store; created if missing.
        kind: The features that the head reads, one of `pooling.FEATURES`.
        dtype: "float32" or "bfloat16" on disk; the mean itself is always computed in float32.
        tokens_per_batch: Tokens of one forward pass, padding included; None: by the device.
        progress: Label of a progress bar with rate and remaining time; None shows none.

    Returns:
        The features, memory-mapped.

    Raises:
        ValueError: If there are no examples, or a text is longer than the model's context.
        FloatingPointError: If a text has hidden states that are not finite; names the text and the
            likely cause.

    Example:
        >>> lm = t3jax.load_lm("demo/base")
        >>> rows = [{"question": "Who are you?", "answer": "A model."}]
        >>> examples = data.encode_records(lm.tokenizer, rows, data.PromptFormat())
        >>> features = t3jax.load_or_compute_features(lm, examples, "out/features")
        >>> features.pooled.shape == (examples[0].num_answer_tokens, lm.hidden_size)
        True
    """
    batching.check_examples(lm, examples)
    key = feature_key(lm, examples, dtype, kind)
    folder = pathlib.Path(store) / key
    counts = [example.num_answer_tokens for example in examples]
    starts = np.cumsum([0, *counts], dtype=np.int64)
    if not starts[-1]:
        raise ValueError("no example has an answer token: there is nothing to compute features of")
    shape = (int(starts[-1]), pooling.feature_size(kind, lm.hidden_size))
    size = shape[0] * shape[1] * jnp.dtype(dtype).itemsize
    if not hosts.of_lead(hosts.is_lead() and _is_whole(folder, size)):
        writing = files.replacing_folder(folder) if hosts.is_lead() else contextlib.nullcontext()
        with writing as temporary:
            pooled = None
            if temporary is not None:
                files.allocate(temporary / _POOLED, size)
                pooled = np.memmap(temporary / _POOLED, jnp.dtype(dtype), "r+", shape=shape)
            _compute(lm, examples, starts, kind, pooled, tokens_per_batch, progress)
            if temporary is not None:
                _describe(temporary, shape, kind=kind, dtype=dtype, model=lm.name)
    hosts.wait_for(folder)
    targets = np.concatenate([example.tokens[example.answer_start :] for example in examples])
    pooled = np.memmap(folder / _POOLED, jnp.dtype(dtype), "r", shape=shape)
    return Features(pooled, targets.astype(np.int32), starts, key)


def feature_key(lm: LM, examples: Sequence[Example], dtype: str, kind: str = "mean") -> str:
    """The cache key of a set of features."""
    return digests.make_key(
        kind,
        dtype,
        digests.model_digest(lm),
        digests.examples_digest(examples),
        digests.code_digest(__name__),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def feature_pass(
    apply: Callable[..., tuple[jax.Array, PyTree]],
    params: PyTree,
    tokens: jax.Array,
    mask: jax.Array,
    kind: str = "mean",
) -> jax.Array:
    """The features of every prefix of a batch, float32 `[B, T, F]`; `apply` as in `LM`."""
    hidden, _ = apply(params, tokens, None, mask, None)
    return pooling.prefix_features(pooling.causal_mean(hidden, mask), hidden, kind)


@jax.jit
def _finite_rows(features: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(features).all(axis=-1) | ~mask, axis=-1)


def _compute(
    lm: LM,
    examples: Sequence[Example],
    starts: np.ndarray,
    kind: str,
    pooled: np.memmap | None,
    tokens_per_batch: int | None,
    progress: str | None,
) -> None:
    """Computes features into `pooled`, which only process 0 has; all processes compute."""

    def compute(_: list[int], tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = feature_pass(lm.apply, lm.params, tokens, mask, kind)
        return hosts.gather((features, _finite_rows(features, mask)))

    def keep(batch: list[int], result: tuple[jax.Array, jax.Array]) -> None:
        if not (finite := np.asarray(result[1])[: len(batch)]).all():
            raise FloatingPointError(_explain_inf(lm, batch[int(np.argmin(finite))], progress))
        if pooled is None:
            return
        host = np.asarray(result[0])
        for row, i in enumerate(batch):
            first, last = examples[i].answer_start - 1, len(examples[i].tokens) - 1
            pooled[starts[i] : starts[i + 1]] = host[row, first:last].astype(pooled.dtype)

    batching.map_batches(
        lm, examples, compute, keep, tokens_per_batch=tokens_per_batch, progress=progress
    )
    if pooled is not None:
        pooled.flush()


def _describe(folder: pathlib.Path, shape: tuple[int, int], **fields: str) -> None:
    tokens, width = shape
    checksum = checked.file_checksum(folder / _POOLED)
    description = {"checksum": checksum, "tokens": tokens, "width": width, **fields}
    checked.write_json(folder / _DESCRIPTION, description)


def _explain_inf(lm: LM, row: int, progress: str | None) -> str:
    """The message on a text whose hidden states are not finite, with the likely cause."""
    where = f"text {row + 1}" + (f" of {progress}" if progress else "")
    broken = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree.leaves_with_path(lm.params)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all())
    ]
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(lm.params)}
    if broken:
        cause = f"its weights hold NaN or Inf ({', '.join(broken[:3])}); download them again"
    elif "float16" in dtypes:
        cause = "float16 ends at 65504; load the model with dtype bfloat16 or float32"
    else:
        cause = "its weights are finite, but their results are not; they are likely broken"
    return f"{where}: the hidden states of {lm.name} are not finite: {cause}"


def _is_whole(folder: pathlib.Path, size: int) -> bool:
    """Whether a folder holds undamaged features."""

    def read(description: pathlib.Path) -> bool:
        expected = checked.read_json(description)["checksum"]
        path = folder / _POOLED
        if not path.is_file() or path.stat().st_size != size:
            raise checked.DamagedError(f"{path}: damaged (it does not have {size} bytes)")
        if checked.file_checksum(path) != expected:
            raise checked.DamagedError(f"{path}: damaged (its checksum is not the one written)")
        return True

    return bool(checked.read_stored(folder / _DESCRIPTION, read))
