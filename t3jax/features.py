"""Frozen features: what the head sees before each answer token, and their store on disk.

One forward pass of the base model over a set of texts gives the causal mean of every prefix; only
those of answer positions are kept. No logits are formed. Axes: B batch, T time, D features, N
answer tokens of a set, S its sequences.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t3jax import batching, files, hosts, pooling
from t3jax.data.chat import Example
from t3jax.lm.model import LM

LM_CODE = (  # what hidden states and logits depend on
    "lm/config.py",
    "lm/decoder.py",
    "lm/families.py",
    "lm/product.py",
    "lm/quantized.py",
    "lm/weights.py",
)
_CODE = ("batching.py", "features.py", "pooling.py", *LM_CODE)


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The answer tokens of a set of texts with the feature of the prefix before each.

    Attributes:
        pooled: Causal mean of the last hidden states up to the token before, `[N, D]`.
        targets: The answer token that came next, int32 `[N]`.
        starts: Sequence i owns rows `starts[i]:starts[i + 1]`, int64 `[S + 1]`.
        key: What these features are of: model, tokens, dtype and code; "" if unknown.
    """

    pooled: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    key: str = ""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.targets)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.starts) - 1

    def select(self, sequences: Sequence[int] | np.ndarray) -> "Features":
        """The features of some of the sequences, in the order given."""
        sequences = np.asarray(sequences, np.int64)
        rows = [np.arange(self.starts[i], self.starts[i + 1]) for i in sequences]
        flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        starts = np.cumsum([0, *(len(r) for r in rows)])
        return Features(self.pooled[flat], self.targets[flat], starts, self.key)


def load_or_compute_features(
    lm: LM,
    examples: Sequence[Example],
    store: pathlib.Path | str,
    *,
    dtype: str = "float32",
    tokens_per_batch: int | None = None,
    progress: str | None = None,
) -> Features:
    """The features of `examples`, from the store if they are there, else computed and stored.

    Features are stored under a key made of the model's weights, the token ids (hence tokenizer,
    chat template and data), the dtype and the code that computes them: a change of any of them
    computes anew, and what is stored appears whole or not at all.

    Args:
        lm: The base model.
        examples: Tokenised texts with their answers.
        store: Folder of the store; created if missing.
        dtype: "float32" or "bfloat16" on disk; the mean itself is always computed in float32.
        tokens_per_batch: Tokens of one forward pass, padding included; None: by the device.
        progress: Label of a progress bar with rate and remaining time; None shows none.

    Returns:
        The features, memory-mapped.

    Raises:
        ValueError: If there are no examples, or a text is longer than the model's context.
    """
    batching.check_examples(lm, examples)
    key = feature_key(lm, examples, dtype)
    folder = pathlib.Path(store) / key
    if not hosts.of_lead(folder.is_dir()):
        writing = files.replacing_folder(folder) if hosts.is_lead() else contextlib.nullcontext()
        with writing as temporary:
            _compute(lm, examples, temporary, dtype, tokens_per_batch, progress)
    hosts.wait_for(folder)
    return _open(folder, key)


def feature_key(lm: LM, examples: Sequence[Example], dtype: str) -> str:
    """Name of a set of features: a digest of all that they depend on."""
    digest = hashlib.sha256(f"{dtype} {jax.tree.leaves(lm.params)[0].dtype}".encode())
    digest.update(params_digest(lm.params).encode())
    digest.update(examples_digest(examples).encode())
    digest.update(code_digest(*_CODE).encode())
    return digest.hexdigest()[:32]


def examples_digest(examples: Sequence[Example]) -> str:
    """A digest of token ids and of where the answers start."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.tokens)} {example.answer_start} ".encode())
        digest.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
    return digest.hexdigest()


def params_digest(params: Any) -> str:
    """A digest of a parameter tree's names, shapes, dtypes and bits, wherever they are placed.

    Two weighted sums of each leaf's bits, modulo 2^32, are taken on the device: at memory
    bandwidth, without moving weights, and the same for every sharding. It tells models apart; it
    is not meant to withstand forgery.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        sums = hosts.fetch(_checksum(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {sums}\n".encode())
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


@functools.cache
def code_digest(*names: str) -> str:
    """A digest of the package's files of these names: what is stored must not outlive its code."""
    root = pathlib.Path(__file__).parent
    return hashlib.sha256(b"".join((root / name).read_bytes() for name in names)).hexdigest()


@functools.partial(jax.jit, static_argnums=0)
def feature_pass(apply: Any, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The feature of every prefix of a batch, float32 `[B, T, D]`; `apply` as in `LM`."""
    hidden, _ = apply(params, tokens, None, mask, None)
    return pooling.causal_mean(hidden, mask)


def _compute(
    lm: LM,
    examples: Sequence[Example],
    folder: pathlib.Path | None,
    dtype: str,
    tokens_per_batch: int | None,
    progress: str | None,
) -> None:
    """Computes and writes features; without a folder it computes with those that write."""
    counts = [len(example.tokens) - example.answer_start for example in examples]
    starts = np.cumsum([0, *counts])
    targets = np.concatenate([example.tokens[example.answer_start :] for example in examples])
    pooled = None
    if folder is not None:
        np.save(folder / "targets.npy", targets.astype(np.int32))
        np.save(folder / "starts.npy", starts.astype(np.int64))
        pooled = np.memmap(
            folder / "pooled.bin", jnp.dtype(dtype), "w+", shape=(len(targets), lm.hidden_size)
        )

    def compute(_: list[int], tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return hosts.gathered(feature_pass(lm.apply, lm.params, tokens, mask))

    def keep(batch: list[int], result: jax.Array) -> None:
        if pooled is None:
            return
        host = np.asarray(result)
        for row, i in enumerate(batch):
            first, last = examples[i].answer_start - 1, len(examples[i].tokens) - 1
            pooled[starts[i] : starts[i + 1]] = host[row, first:last].astype(pooled.dtype)

    batching.map_batches(
        lm, examples, compute, keep, tokens_per_batch=tokens_per_batch, progress=progress
    )
    if folder is None or pooled is None:
        return
    pooled.flush()
    description = {
        "tokens": len(targets),
        "width": lm.hidden_size,
        "dtype": dtype,
        "model": lm.name,
    }
    files.write_json(folder / "features.json", description)


def _open(folder: pathlib.Path, key: str) -> Features:
    description = json.loads((folder / "features.json").read_text())
    shape = (description["tokens"], description["width"])
    dtype = jnp.dtype(description["dtype"])
    path = folder / "pooled.bin"
    if path.stat().st_size != shape[0] * shape[1] * dtype.itemsize:
        raise ValueError(f"{path}: damaged (wrong size); delete {folder} to compute it anew")
    return Features(
        pooled=np.memmap(path, dtype, "r", shape=shape),
        targets=np.load(folder / "targets.npy"),
        starts=np.load(folder / "starts.npy"),
        key=key,
    )
