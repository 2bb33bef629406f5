"""Weights from Hugging Face safetensors, straight onto the device or mesh, without torch.

Names and shapes are checked against the config before any weight is read, and one error reports all
faults. A process reads the rows and columns of its own devices, each part once.
"""

import dataclasses
import functools
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from t3jax import hosts
from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import family_in
from t3jax.lm.decoder import Params, abstract_params
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.finite import MAX_REPORTED, describe_not_finite, is_finite
from t3jax.lm.places import Computed, Place, Tensors, View, cast, find_places
from t3jax.lm.quantized import quantize
from t3jax.lm.tensors import open_tensors

_VOCABULARY = ("embed", "lm_head")
_DTYPES = ("F32", "F16", "BF16")  # in safetensors' words
_BORROWED = ("k", "v", "k_norm")  # modules that a layer with borrowed keys and values ignores
_ROWS_COMPARED = 8192
_COMPUTED_AT_ONCE = 1 << 22  # numbers, in float32
_ROWS_OF_A_BLOCK = 128  # in most quantised weights
_WEIGHT, _SCALE = (jax.tree_util.DictKey(name) for name in ("weight", "scale"))


def load_params(
    folder: pathlib.Path,
    config: LMConfig,
    dtype: DTypeLike,
    shardings: Callable[[Params], Any] | None = None,
    adapter: pathlib.Path | None = None,
) -> Params:
    """Reads the weights of a Hugging Face folder, with those of an adapter; see `place_params`.

    Raises:
        FileNotFoundError: If the folder has no safetensors weights, or lacks one of the files.
        ValueError: If a file is broken or truncated, or lies outside of the folder; if the folder
            itself holds an adapter; if names or shapes do not fit the config; or if a tensor is in
            two files, or holds NaN or Inf.
    """
    tensors = open_tensors(folder, FAMILIES[config.model_type], adapter)
    family = family_in(folder, config, tensors)
    return place_params(folder, config, family, tensors, dtype, shardings)


def check_params(
    folder: pathlib.Path, config: LMConfig, adapter: pathlib.Path | None = None
) -> None:
    """Checks that the names and shapes of a folder's weights fit a config, as `load_params` does.

    It reads no weights but an adapter's factors.
    """
    tensors = open_tensors(folder, FAMILIES[config.model_type], adapter)
    check_tensors(folder, config, family_in(folder, config, tensors), tensors)


def check_tensors(path: pathlib.Path, config: LMConfig, family: Family, tensors: Tensors) -> None:
    """Checks that the names and shapes of a checkpoint's tensors fit a config.

    Raises:
        ValueError: If they do not fit.
    """
    config, tensors = _resolve_head(path, config, family, tensors)
    places = find_places(config, family, abstract_params(config, jnp.float32))
    _check_shapes(path, config, family, places, tensors)


def place_params(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    tensors: Tensors,
    dtype: DTypeLike,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Reads the parameters of a checkpoint; each device reads its own slices.

    They are then searched for NaN and Inf, in one pass over the weights: on an accelerator a
    program for each shape; on a CPU about a third of a second for 10^9 numbers.

    Args:
        path: The checkpoint, for messages.
        config: The model's shape.
        family: The table of the decoder's parameters in the checkpoint.
        tensors: The checkpoint's tensors.
        dtype: Dtype of the weights in memory, to which they are cast slice by slice. Matrices are
            rounded to int8 instead if the config is quantised.
        shardings: Makes the tree of shardings for the abstract parameter tree; None puts all on the
            default device.

    Returns:
        The parameter tree, with an LM head if the checkpoint has one that is not the embedding,
        whatever the config says.

    Raises:
        ValueError: If names or shapes do not fit the config, or a tensor holds NaN or Inf.
    """
    config, tensors = _resolve_head(path, config, family, tensors)
    abstract = abstract_params(config, dtype)
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    stored = abstract_params(dataclasses.replace(config, quantized=False), dtype)
    paths = [path for path, _ in jax.tree.leaves_with_path(stored)]
    places = dict(zip(paths, find_places(config, family, stored), strict=True))
    _check_shapes(path, config, family, list(places.values()), tensors)
    targets = (
        jax.tree.leaves(shardings(abstract))
        if shardings is not None
        else [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(leaves)
    )

    def load(
        leaf: jax.ShapeDtypeStruct, sharding: Sharding, read: Callable[..., np.ndarray]
    ) -> jax.Array:
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices may hold the same part

        def read_once(index: tuple[slice, ...] | None) -> np.ndarray:
            index = _bound_index(index, leaf.shape)
            key = tuple((axis.start, axis.stop) for axis in index)
            if key not in parts:
                parts[key] = read(index)
            return parts[key]

        return jax.make_array_from_callback(leaf.shape, sharding, read_once)

    loaded = []
    finite: dict[str, bool | jax.Array] = {}
    read_rows: Any = None
    for (keys, leaf), sharding in zip(leaves, targets, strict=True):
        place = places[(*keys[:-1], _WEIGHT) if keys[-1] == _SCALE else keys]
        view, stored_name = tensors[place.name]
        if keys[-1] == _SCALE:  # its matrix follows
            read_rows = functools.cache(functools.partial(_read_quantized, place, view, dtype))
        if keys[-1] != _SCALE and leaf.dtype != np.int8:
            read = functools.partial(_read_plain, place, view, leaf.dtype)
        else:
            read = functools.partial(_take_part, read_rows, keys[-1] == _SCALE)
        loaded.append(load(leaf, sharding, read))
        if leaf.dtype != np.int8:
            finite[f"{stored_name} {jax.tree_util.keystr(keys)}"] = is_finite(loaded[-1])
    names = {name.split()[0] for name, flag in hosts.fetch(finite).items() if not flag}
    if names:
        raise ValueError(f"{path}: {describe_not_finite(sorted(names), dtype)}")
    return jax.tree.unflatten(treedef, loaded)


def is_tied(folder: pathlib.Path, config: LMConfig) -> bool:
    """Whether a folder's LM head is its embedding: by the config, unless its weights differ.

    Raises:
        FileNotFoundError: As `load_params`.
        ValueError: If a file is broken or truncated, or lies outside of the folder.
    """
    if not config.tied:
        return False
    family = FAMILIES[config.model_type]
    return _resolve_head(folder, config, family, open_tensors(folder, family))[0].tied


def _resolve_head(
    path: pathlib.Path, config: LMConfig, family: Family, tensors: Tensors
) -> tuple[LMConfig, Tensors]:
    """Treats a stored head beside a tied embedding as transformers does.

    If only one of the two is stored, it serves as both. If both are stored and differ, the config
    is wrong, and the model is not tied.
    """
    embed, head = (f"{family.weights[key]}.weight" for key in _VOCABULARY)
    if not config.tied or head not in tensors:
        return config, tensors
    if embed not in tensors:
        return config, {**tensors, embed: tensors[head]}
    if _have_equal_rows(tensors[embed][0], tensors[head][0], rows=config.vocab_size):
        return config, tensors
    warnings.warn(
        f"{path}: config.json says that the LM head is the embedding (tie_word_embeddings), but "
        f"{tensors[head][1]} differs from {tensors[embed][1]}; the head is kept, as transformers "
        "does. Set tie_word_embeddings to false",
        stacklevel=2,
    )
    return dataclasses.replace(config, tied=False), tensors


def _have_equal_rows(*views: View, rows: int) -> bool:
    """Whether the first rows of two stored matrices are equal, read until they differ."""
    shapes = [tuple(view.get_shape()) for view in views]
    if len({shape[1:] for shape in shapes}) > 1 or any(len(shape) != 2 for shape in shapes):
        return False
    if min(shape[0] for shape in shapes) < rows:
        return False
    for start in range(0, rows, _ROWS_COMPARED):
        part = (slice(start, min(start + _ROWS_COMPARED, rows)), slice(0, shapes[0][1]))
        first, second = (np.asarray(view[part], np.float32) for view in views)
        if not np.array_equal(first, second):
            return False
    return True


def _check_shapes(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    places: list[Place],
    tensors: Tensors,
) -> None:
    faults = []
    table = family.weights
    expected = {place.name for place in places}
    if tensors and not expected & set(tensors):
        faults.append(
            f"none of the {len(tensors)} tensors has a name of a {config.model_type} model: "
            f"{min(tensors)} is there, {min(expected)} was expected. Write the folder anew with "
            "save_pretrained of the whole model, without a wrapper around it"
        )
    kinds = ("weight", "bias")
    by_token = [table[key] for key in (*_VOCABULARY, "layer_embed") if key in table]
    vocabulary = {f"{module}.{kind}" for module in by_token for kind in kinds}
    shapes = {place.name: place.stored_shape for place in places}
    hints = {f"{table['lm_head']}.weight": ", or tie_word_embeddings true if there is none"}
    for name, shape in shapes.items():
        if name not in tensors:
            faults.append(f"{name}: missing, expected shape {shape}{hints.get(name, '')}")
            continue
        view, stored_name = tensors[name]
        stored = tuple(view.get_shape())
        # A padded vocabulary has more rows than tokens; the surplus is never read.
        padded = name in vocabulary and stored[1:] == shape[1:] and stored[0] >= shape[0]
        if stored != shape and not padded:
            faults.append(f"{stored_name}: shape {stored}, expected {shape}")
        # Computed views have no dtype.
        dtype = view.get_dtype() if hasattr(view, "get_dtype") else _DTYPES[0]
        if dtype not in _DTYPES:
            faults.append(f"{stored_name}: dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    # An LM head beside a tied embedding is harmless.
    spare = {f"{table['lm_head']}.weight"}
    if family.more_layers:
        later = re.compile(r"^model\.layers\.(\d+)\.")
        numbers = {name: later.match(name) for name in tensors}
        spare |= {name for name, n in numbers.items() if n and int(n[1]) >= config.num_layers}
    borrowing = [layer for layer, borrows in enumerate(config.borrows) if borrows]
    for key in (f"layers.{{i}}.attention.{part}" for part in _BORROWED if borrowing):
        modules = [table[key].replace("{i}", str(layer)) for layer in borrowing if key in table]
        spare |= {f"{module}.{kind}" for module in modules for kind in kinds}
    for name in sorted(set(tensors) - set(shapes) - spare):
        faults.append(f"{tensors[name][1]}: not a weight of this {config.model_type} model")
    if faults:
        more = len(faults) - MAX_REPORTED
        text = "\n  ".join(faults[:MAX_REPORTED] + ([f"and {more} more"] if more > 0 else []))
        raise ValueError(f"{path}: the weights do not fit the config:\n  {text}")


def _bound_index(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A device's index with explicit bounds, so that surplus rows are not read."""
    assert index is not None  # JAX always passes one to the callback
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _read_plain(place: Place, view: View, dtype: DTypeLike, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a parameter; a computed one in small parts, each cast at once."""
    if not isinstance(view, Computed):
        return cast(place.read(view, index), dtype)
    array = np.empty([axis.stop - axis.start for axis in index], dtype)
    for rows, part in _split_index(index):
        array[rows] = cast(place.read(view, part), dtype)
    return array


def _read_quantized(
    place: Place, view: View, dtype: DTypeLike, *bounds: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows of a matrix, or of some experts' matrices, as int8 with their scales."""
    index = (*(slice(*axis) for axis in bounds), slice(0, *place.columns))
    shape = [axis.stop - axis.start for axis in index]
    numbers, scale = np.empty(shape, np.int8), np.empty(shape[:-1], dtype)
    for rows, part in _split_index(index):
        with np.errstate(invalid="ignore", over="ignore"):  # the scales are searched for NaN
            numbers[rows], scale[rows] = quantize(cast(place.read(view, part), np.float32), dtype)
    return numbers, scale


def _split_index(index: tuple[slice, ...]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Splits an index along its first axis: the rows of each part in the result, and its index."""
    rows, *rest = index
    width = math.prod(axis.stop - axis.start for axis in rest)
    step = max(1, _COMPUTED_AT_ONCE // max(width, 1))
    if len(rest) < 2:
        step = -(-step // _ROWS_OF_A_BLOCK) * _ROWS_OF_A_BLOCK
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        yield slice(first - rows.start, last - rows.start), (slice(first, last), *rest)


def _take_part(
    read_rows: Callable[..., tuple[np.ndarray, np.ndarray]], scales: bool, index: tuple[slice, ...]
) -> np.ndarray:
    """Takes a part of an int8 matrix, or of its scales, from whole rows."""
    rows = index if scales else index[:-1]
    numbers, scale = read_rows(*((axis.start, axis.stop) for axis in rows))
    return scale if scales else np.ascontiguousarray(numbers[..., index[-1]])
