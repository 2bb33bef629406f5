"""Weights from Hugging Face safetensors, straight onto the device or mesh, without torch.

Names and shapes are checked against the config before a byte of weights is read, and everything
that is wrong is reported in one error. A process reads what its own devices hold, rows and columns,
and each part once.
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

from t3jax import hosts
from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import family_in
from t3jax.lm.decoder import Params, abstract_params
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.finite import MAX_REPORTED, describe_not_finite, is_finite
from t3jax.lm.places import Computed, Place, cast, find_places
from t3jax.lm.quantized import quantize
from t3jax.lm.tensors import Tensors, open_tensors

_VOCABULARY = ("embed", "lm_head")
_DTYPES = ("F32", "F16", "BF16")  # in safetensors' words
_BORROWED = ("k", "v", "k_norm")  # what a layer has no use for that borrows keys and values
_ROWS_COMPARED = 8192
_COMPUTED_AT_ONCE = 1 << 22  # numbers, in float32
_ROWS_OF_A_BLOCK = 128  # of most quantised weights
_WEIGHT, _SCALE = (jax.tree_util.DictKey(name) for name in ("weight", "scale"))


def load_params(
    folder: pathlib.Path,
    config: LMConfig,
    dtype: Any,
    shardings: Callable[[Params], Any] | None = None,
    adapter: pathlib.Path | None = None,
) -> Params:
    """Reads a model's weights.

    Args:
        folder: A Hugging Face folder with `model.safetensors`, or with several files and their
            `model.safetensors.index.json`.
        config: The model's shape.
        dtype: Dtype of the weights in memory; they are cast slice by slice. Where the config is
            quantised, that of all but matrices, which are rounded to int8.
        shardings: Gives the tree of shardings for the abstract parameter tree; None puts
            everything on the default device.
        adapter: Folder of a LoRA adapter that is merged into them.

    Returns:
        The parameter tree, placed; see `place_params`.

    Raises:
        FileNotFoundError: If the folder has no safetensors weights, or lacks one of the files.
        ValueError: If a file is broken or truncated, lies outside of the folder, or there is an
            adapter; if names or shapes do not fit the config; or if a tensor is in two files, or
            holds NaN or Inf.
    """
    tensors = open_tensors(folder, FAMILIES[config.model_type], adapter)
    family = family_in(folder, config, tensors)
    return place_params(folder, config, family, tensors, dtype, shardings)


def check_params(
    folder: pathlib.Path, config: LMConfig, adapter: pathlib.Path | None = None
) -> None:
    """Checks that the names and shapes of a folder's weights fit a config; reads no weight.

    Args:
        folder: As in `load_params`.
        config: The model's shape.
        adapter: As in `load_params`; its factors are read.

    Raises:
        FileNotFoundError: As `load_params`.
        ValueError: As `load_params`, but for NaN and Inf.
    """
    tensors = open_tensors(folder, FAMILIES[config.model_type], adapter)
    check_tensors(folder, config, family_in(folder, config, tensors), tensors)


def check_tensors(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    tensors: Tensors,
) -> None:
    """Checks that the names and shapes of a checkpoint's tensors fit a config.

    Args:
        path: The checkpoint, for messages.
        config: The model's shape.
        family: As in `place_params`.
        tensors: As in `place_params`.

    Raises:
        ValueError: If they do not fit.
    """
    config, tensors = _as_stored(path, config, family, tensors)
    places = find_places(config, family, abstract_params(config, jnp.float32))
    _check(path, config, family, places, tensors)


def place_params(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    tensors: Tensors,
    dtype: Any,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Puts a checkpoint's tensors in their places, each device reading its own slice.

    They are then looked through for NaN and Inf, which takes one pass over the weights: on an
    accelerator a program for each shape; on a CPU about a third of a second for 10^9 numbers.

    Args:
        path: The checkpoint, for messages.
        config: The model's shape.
        family: Where the checkpoint has the decoder's parameters.
        tensors: By the family's names, what is there: a view with `get_shape()` that is indexed by
            slices, as safetensors gives it, and the tensor's own name.
        dtype: As in `load_params`.
        shardings: As in `load_params`.

    Returns:
        The parameter tree, placed. It has an LM head where the checkpoint has one that is not the
        embedding, whatever the config says.

    Raises:
        ValueError: If names or shapes do not fit the config, or a tensor holds NaN or Inf.
    """
    config, tensors = _as_stored(path, config, family, tensors)
    abstract = abstract_params(config, dtype)
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    stored = abstract_params(dataclasses.replace(config, quantized=False), dtype)
    paths = [path for path, _ in jax.tree.leaves_with_path(stored)]
    places = dict(zip(paths, find_places(config, family, stored), strict=True))
    _check(path, config, family, list(places.values()), tensors)
    placed = (
        jax.tree.leaves(shardings(abstract))
        if shardings is not None
        else [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(leaves)
    )

    def load(leaf: jax.ShapeDtypeStruct, sharding: Any, read: Callable[..., Any]) -> jax.Array:
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices may hold the same one

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            wanted = _within(index, leaf.shape)
            key = tuple((axis.start, axis.stop) for axis in wanted)
            if key not in parts:
                parts[key] = read(wanted)
            return parts[key]

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    loaded = []
    finite: dict[str, Any] = {}
    whole_rows: Any = None
    for (keys, leaf), sharding in zip(leaves, placed, strict=True):
        place = places[(*keys[:-1], _WEIGHT) if keys[-1] == _SCALE else keys]
        view, stored_name = tensors[place.name]
        if keys[-1] == _SCALE:  # its matrix follows
            whole_rows = functools.cache(functools.partial(_quantized, place, view, dtype))
        if keys[-1] != _SCALE and leaf.dtype != np.int8:
            read = functools.partial(_plain, place, view, leaf.dtype)
        else:
            read = functools.partial(_part, whole_rows, keys[-1] == _SCALE)
        loaded.append(load(leaf, sharding, read))
        if leaf.dtype != np.int8:
            finite[f"{stored_name} {jax.tree_util.keystr(keys)}"] = is_finite(loaded[-1])
    wrong = [name.split()[0] for name, flag in hosts.fetch(finite).items() if not flag]
    if wrong:
        raise ValueError(f"{path}: {describe_not_finite(sorted(set(wrong)), dtype)}")
    return jax.tree.unflatten(treedef, loaded)


def is_tied(folder: pathlib.Path, config: LMConfig) -> bool:
    """Whether a folder's LM head is its embedding, as its weights have it.

    Args:
        folder: As in `load_params`.
        config: The model's shape.

    Returns:
        What `config.tied` says, but False where the checkpoint has a head of its own.

    Raises:
        FileNotFoundError: As `load_params`.
        ValueError: If a file is broken or truncated, or lies outside of the folder.
    """
    family = FAMILIES[config.model_type]
    return config.tied and _as_stored(folder, config, family, open_tensors(folder, family))[0].tied


def _as_stored(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    tensors: Tensors,
) -> tuple[LMConfig, Tensors]:
    """The config and the tensors after what transformers makes of a head beside a tied embedding.

    The one of the two that is there serves as both. Where both are there and differ, the config is
    wrong, and the model has two.
    """
    embed, head = (f"{family.weights[key]}.weight" for key in _VOCABULARY)
    if not config.tied or head not in tensors:
        return config, tensors
    if embed not in tensors:
        return config, {**tensors, embed: tensors[head]}
    if _equal_rows(tensors[embed][0], tensors[head][0], config.vocab_size):
        return config, tensors
    warnings.warn(
        f"{path}: config.json says that the LM head is the embedding (tie_word_embeddings), but "
        f"{tensors[head][1]} differs from {tensors[embed][1]}; the head is kept, as transformers "
        "does. Set tie_word_embeddings to false",
        stacklevel=2,
    )
    return dataclasses.replace(config, tied=False), tensors


def _equal_rows(one: Any, other: Any, rows: int) -> bool:
    """Whether the first rows of two stored matrices are the same, read until they differ."""
    shapes = [tuple(view.get_shape()) for view in (one, other)]
    if len({shape[1:] for shape in shapes}) > 1 or any(len(shape) != 2 for shape in shapes):
        return False
    if min(shape[0] for shape in shapes) < rows:
        return False
    for start in range(0, rows, _ROWS_COMPARED):
        part = (slice(start, min(start + _ROWS_COMPARED, rows)), slice(0, shapes[0][1]))
        ours, theirs = (np.asarray(view[part], np.float32) for view in (one, other))
        if not np.array_equal(ours, theirs):
            return False
    return True


def _check(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    places: list[Place],
    tensors: Tensors,
) -> None:
    wrong = []
    table = family.weights
    expected = {place.name for place in places}
    if tensors and not expected & set(tensors):
        wrong.append(
            f"none of the {len(tensors)} tensors has a name of a {config.model_type} model: "
            f"{min(tensors)} is there, {min(expected)} was expected. Write the folder anew with "
            "save_pretrained of the whole model, without what is wrapped around it"
        )
    kinds = ("weight", "bias")
    by_token = [table[key] for key in (*_VOCABULARY, "layer_embed") if key in table]
    vocabulary = {f"{module}.{kind}" for module in by_token for kind in kinds}
    shapes = {place.name: place.stored_shape for place in places}
    hints = {f"{table['lm_head']}.weight": ", or tie_word_embeddings true if there is none"}
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"{name}: missing, expected shape {shape}{hints.get(name, '')}")
            continue
        view, stored_name = tensors[name]
        found = tuple(view.get_shape())
        # A padded vocabulary has more rows than tokens; the surplus is never read.
        padded = name in vocabulary and found[1:] == shape[1:] and found[0] >= shape[0]
        if found != shape and not padded:
            wrong.append(f"{stored_name}: shape {found}, expected {shape}")
        # Only what is read as it is stored says its dtype.
        dtype = view.get_dtype() if hasattr(view, "get_dtype") else _DTYPES[0]
        if dtype not in _DTYPES:
            wrong.append(f"{stored_name}: dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    # An LM head beside a tied embedding is harmless.
    spare = {f"{table['lm_head']}.weight"}
    if family.more_layers:
        later = re.compile(r"^model\.layers\.(\d+)\.")
        numbers = {name: later.match(name) for name in tensors}
        spare |= {name for name, n in numbers.items() if n and int(n[1]) >= config.num_layers}
    borrowing = [layer for layer, each in enumerate(config.borrows) if each]
    for key in (f"layers.{{i}}.attention.{part}" for part in _BORROWED if borrowing):
        modules = [table[key].replace("{i}", str(layer)) for layer in borrowing if key in table]
        spare |= {f"{module}.{kind}" for module in modules for kind in kinds}
    for name in sorted(set(tensors) - set(shapes) - spare):
        wrong.append(f"{tensors[name][1]}: not a weight of this {config.model_type} model")
    if wrong:
        more = len(wrong) - MAX_REPORTED
        listed = "\n  ".join(wrong[:MAX_REPORTED] + ([f"and {more} more"] if more > 0 else []))
        raise ValueError(f"{path}: the weights do not fit the config:\n  {listed}")


def _within(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A device's index with every bound spelt out, so that surplus rows stay unread."""
    assert index is not None  # JAX gives the callback an index unless asked not to
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _plain(place: Place, view: Any, dtype: Any, wanted: tuple[slice, ...]) -> np.ndarray:
    """A part of a parameter; what is worked out is so in small parts, each cast at once."""
    if not isinstance(view, Computed):
        return cast(place.read(view, wanted), dtype)
    array = np.empty([axis.stop - axis.start for axis in wanted], dtype)
    for part, index in _in_parts(wanted):
        array[part] = cast(place.read(view, index), dtype)
    return array


def _quantized(
    place: Place, view: Any, dtype: Any, *bounds: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of a matrix, or of some experts' matrices, in int8, and their scales."""
    wanted = (*(slice(*each) for each in bounds), slice(0, *place.columns))
    shape = [axis.stop - axis.start for axis in wanted]
    numbers, scale = np.empty(shape, np.int8), np.empty(shape[:-1], dtype)
    for part, index in _in_parts(wanted):
        with np.errstate(invalid="ignore", over="ignore"):  # the scale says it
            numbers[part], scale[part] = quantize(cast(place.read(view, index), np.float32), dtype)
    return numbers, scale


def _in_parts(wanted: tuple[slice, ...]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """What is wanted as some rows, or experts, after the other: their place there, and each."""
    rows, *rest = wanted
    width = math.prod(axis.stop - axis.start for axis in rest)
    step = max(1, _COMPUTED_AT_ONCE // max(width, 1))
    if len(rest) < 2:
        step = -(-step // _ROWS_OF_A_BLOCK) * _ROWS_OF_A_BLOCK
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        yield slice(first - rows.start, last - rows.start), (slice(first, last), *rest)


def _part(whole_rows: Callable[..., Any], scales: bool, wanted: tuple[slice, ...]) -> np.ndarray:
    """What is wanted of an int8 matrix, or of its scales."""
    rows = wanted if scales else wanted[:-1]
    numbers, scale = whole_rows(*((axis.start, axis.stop) for axis in rows))
    return scale if scales else np.ascontiguousarray(numbers[..., wanted[-1]])
