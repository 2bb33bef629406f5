"""Weights from and to Hugging Face safetensors, straight onto the device or mesh, without torch.

Names and shapes are checked against the config before a byte of weights is read, and everything
that is wrong is reported in one error. A process reads what its own devices hold, rows and columns,
and each part once.
"""

import dataclasses
import functools
import operator
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np
import safetensors
import safetensors.numpy

from t3jax import files, hosts
from t3jax.json_files import check_regular, read_json
from t3jax.lm.adapter import merge_adapter
from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import checkpoint_name, hf_config
from t3jax.lm.decoder import Params, abstract_params
from t3jax.lm.expert_tensors import split_experts, stack_experts
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.folder import check_inside, indexed_file
from t3jax.lm.quantized import quantize

_VOCABULARY = ("embed", "lm_head")
_MAX_REPORTED = 12
_ROWS_COMPARED = 8192
_LOOKED_AT = 1 << 18  # numbers at a time: they stay in the cache
_WEIGHT, _SCALE = (jax.tree_util.DictKey(name) for name in ("weight", "scale"))


class _Index(msgspec.Struct):
    """`model.safetensors.index.json`: which file has which tensor."""

    weight_map: dict[str, str]


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
    family = FAMILIES[config.model_type]
    tensors = _open_merged(folder, family, adapter)
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
    family = FAMILIES[config.model_type]
    tensors = _open_merged(folder, family, adapter)
    config, tensors = _as_stored(folder, config, family, tensors)
    places = _places(config, family, abstract_params(config, jnp.float32))
    _check(folder, config, family, places, tensors)


def _open_merged(
    folder: pathlib.Path, family: Family, adapter: pathlib.Path | None
) -> Mapping[str, tuple[Any, str]]:
    """The tensors of a folder, those of an adapter merged into them."""
    tensors: Mapping[str, tuple[Any, str]] = _open_all(folder, family)
    if adapter is not None:
        tensors = merge_adapter(adapter, tensors)
    try:
        return stack_experts(tensors, family)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def place_params(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    tensors: Mapping[str, tuple[Any, str]],
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
    places = dict(zip(paths, _places(config, family, stored), strict=True))
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
            read = functools.partial(_plain, place, view, dtype)
        else:
            read = functools.partial(_part, whole_rows, keys[-1] == _SCALE)
        loaded.append(load(leaf, sharding, read))
        if leaf.dtype != np.int8:
            finite[f"{stored_name} {jax.tree_util.keystr(keys)}"] = _is_finite(loaded[-1])
    wrong = [name.split()[0] for name, flag in hosts.fetch(finite).items() if not flag]
    if wrong:
        raise ValueError(f"{path}: {_not_finite(sorted(set(wrong)), dtype)}")
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
    return config.tied and _as_stored(folder, config, family, _open_all(folder, family))[0].tied


def _as_stored(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    tensors: Mapping[str, tuple[Any, str]],
) -> tuple[LMConfig, Mapping[str, tuple[Any, str]]]:
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


def _is_finite(x: jax.Array) -> Any:
    """Whether an array holds finite numbers only, as a truth value or an array of one."""
    if jax.process_count() > 1 or any(device.platform != "cpu" for device in x.devices()):
        return _all_finite(x)
    # A CPU would compile for longer than it looks.
    parts = {str(shard.index): shard.data for shard in x.addressable_shards}
    return not any(_holds_no_number(np.asarray(part)) for part in parts.values())


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _holds_no_number(array: np.ndarray) -> bool:
    """Whether there is NaN or Inf: all bits of an exponent are set."""
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[array.dtype.name]
    mask = np.array(exponent, f"uint{8 * array.itemsize}")
    bits = np.ascontiguousarray(array).view(mask.dtype).reshape(-1)
    parts = (bits[i : i + _LOOKED_AT] for i in range(0, len(bits), _LOOKED_AT))
    return any(bool(((part & mask) == mask).any()) for part in parts)


def _not_finite(names: list[str], dtype: Any) -> str:
    """What is wrong with tensors that hold no finite numbers."""
    more = f" and {len(names) - _MAX_REPORTED} more" if len(names) > _MAX_REPORTED else ""
    cause = (
        "or numbers too large for float16, which ends at 65504; load it as bfloat16 or float32"
        if jnp.dtype(dtype) == jnp.float16
        else "expected finite numbers; was it trained until it diverged, or is the file damaged?"
    )
    return f"NaN or Inf in {', '.join(names[:_MAX_REPORTED])}{more}, {cause}"


def save_hf(
    folder: pathlib.Path,
    config: LMConfig,
    params: Params,
    eos_ids: list[int],
    dtype: Any = jnp.float32,
) -> None:
    """Writes a folder that transformers opens: weights, `config.json`, `generation_config.json`.

    Args:
        folder: Where to write; created if missing, files in it are replaced.
        config: The model's shape.
        params: The parameter tree.
        eos_ids: Tokens that end a text.
        dtype: Dtype of the weights on disk.

    Raises:
        ValueError: If a tensor holds NaN or Inf in that dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stacks: dict[str, list[tuple[_Place, np.ndarray]]] = {}
    places = _places(config, FAMILIES[config.model_type], params)
    for place, leaf in zip(places, jax.tree.leaves(params), strict=True):
        stacks.setdefault(place.name, []).append((place, _cast(np.asarray(leaf), dtype)))
    tensors = {name: np.ascontiguousarray(_stacked(parts)) for name, parts in stacks.items()}
    tensors = split_experts(tensors, FAMILIES[config.model_type])
    if wrong := [name for name, tensor in tensors.items() if _holds_no_number(tensor)]:
        raise ValueError(f"{folder}: not written: {_not_finite(wrong, dtype)}")
    with files.replacing(folder / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    description = hf_config(config) | {
        "dtype": jnp.dtype(dtype).name,
        "eos_token_id": eos_ids,
        "pad_token_id": None,  # transformers' own default may lie outside of the vocabulary
    }
    files.write_json(folder / "config.json", description)
    files.write_json(folder / "generation_config.json", {"eos_token_id": eos_ids})


class _Place(NamedTuple):
    """Where a parameter stands in a checkpoint: in rows of a tensor that others may share.

    The rows of the tensor fall into equal groups; each holds some rows of the parameter in turn. A
    tensor of one parameter alone is one group. The matrices of a layer's experts are one group in
    each expert.

    Attributes:
        name: Name of the tensor, in the family's table.
        groups: Number of groups.
        start: The parameter's first row in a group.
        rows: Its rows in a group.
        group_rows: Rows of a group, those of all parameters.
        columns: The other dimension, `(in,)`; () of a vector.
        transposed: The tensor is stored [in, out].
        experts: Of the matrices of experts, how many there are; 0 of others.
        channelwise: The tensor is stored [out, 1, in].
    """

    name: str
    groups: int
    start: int
    rows: int
    group_rows: int
    columns: tuple[int, ...]
    transposed: bool
    experts: int = 0
    channelwise: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = (self.groups * self.group_rows, *self.columns)
        if self.experts:
            return (self.experts, *shape)
        if self.channelwise:
            return (shape[0], 1, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def read(self, view: Any, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the parameter from the tensor, and nothing else."""
        if self.experts:
            experts, rows, inputs = index
            own = slice(rows.start + self.start, rows.stop + self.start)
            return np.asarray(view[(experts, own, inputs)])
        wanted, *columns = index
        parts = []
        for group in range(wanted.start // self.rows, -(-wanted.stop // self.rows)):
            first = max(wanted.start, group * self.rows)
            last = min(wanted.stop, (group + 1) * self.rows)
            shift = group * (self.group_rows - self.rows) + self.start
            rows = slice(first + shift, last + shift)
            if self.channelwise:
                parts.append(np.asarray(view[(rows, slice(0, 1), *columns)])[:, 0])
                continue
            parts.append(view[(*columns, rows)].T if self.transposed else view[(rows, *columns)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _places(config: LMConfig, family: Family, params: Params) -> list[_Place]:
    """The place of every parameter, in the order of the tree's leaves."""
    order = list(family.weights)
    stacks: dict[str, dict[str, tuple[int, ...]]] = {}  # tensor: the shapes of what it holds
    names = []
    for path, leaf in jax.tree.leaves_with_path(params):
        *parts, kind = [str(part.key) for part in path]
        layer = next((part for part in parts if part.isdigit()), "")
        key = ".".join("{i}" if part.isdigit() else part for part in parts)
        if f"{key}.{kind}" in family.weights:
            key = f"{key}.{kind}"
            name = family.weights[key]
        else:
            name = f"{family.weights[key]}.{kind}"
        name = name.replace("{i}", layer)
        names.append((key, name))
        stacks.setdefault(name, {})[key] = leaf.shape
    places = []
    for key, name in names:
        shapes = {k: stacks[name][k] for k in sorted(stacks[name], key=order.index)}
        experts = shapes[key][0] if len(shapes[key]) == 3 else 0
        if experts:
            shapes = {k: shape[1:] for k, shape in shapes.items()}
        module, kind = name.rsplit(".", 1)
        groups = _count_groups(config, family, module) if len(shapes) > 1 else 1
        rows = {k: shape[0] // groups for k, shape in shapes.items()}
        before = list(rows)[: list(rows).index(key)]
        places.append(
            _Place(
                name,
                groups,
                start=sum(rows[k] for k in before),
                rows=rows[key],
                group_rows=sum(rows.values()),
                columns=shapes[key][1:],
                transposed=kind == "weight" and module.endswith(family.transposed),
                experts=experts,
                channelwise=module.endswith(family.channelwise),
            )
        )
    return places


def _count_groups(config: LMConfig, family: Family, module: str) -> int:
    """How many groups what is stacked in a module falls into."""
    fields = (field for end, field in family.grouped.items() if module.endswith(end))
    field = next(fields, None)
    return 1 if field is None else operator.attrgetter(field)(config)


def _stacked(parts: list[tuple[_Place, np.ndarray]]) -> np.ndarray:
    """A tensor of a checkpoint from the parameters that it holds."""
    place = parts[0][0]
    parts = sorted(parts, key=lambda part: part[0].start)
    if place.experts:
        return np.concatenate([array for _, array in parts], axis=1)
    grouped = [array.reshape(p.groups, p.rows, *p.columns) for p, array in parts]
    tensor = np.concatenate(grouped, axis=1).reshape(-1, *place.columns)
    if place.channelwise:
        return tensor[:, None]
    return tensor.T if place.transposed else tensor


def _open_all(folder: pathlib.Path, family: Family) -> dict[str, tuple[Any, str]]:
    """Every tensor in the folder's checkpoint: a view of it and its name there."""
    tensors: dict[str, tuple[Any, str]] = {}
    places: dict[str, pathlib.Path] = {}
    for path in _files(folder):
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); download or write it again"
            ) from error
        for stored_name in file.keys():  # noqa: SIM118  (not a dict)
            if (name := checkpoint_name(family, stored_name)) is None:
                continue
            if name in tensors:
                raise ValueError(
                    f"{path}: {stored_name} is also in {places[name].name}, as {tensors[name][1]}; "
                    "expected each tensor once. Write the folder anew"
                )
            tensors[name] = (file.get_slice(stored_name), stored_name)
            places[name] = path
    return tensors


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of the folder's checkpoint, each a regular file in the folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if (adapter := folder / "adapter_config.json").exists():
        raise ValueError(
            f"{adapter}: the folder holds an adapter, which is not applied here and which "
            "transformers applies where peft is installed; merge the adapter into the weights, or "
            "remove its files"
        )
    if single.exists():  # as transformers has it: an index beside a whole file is a left-over
        paths = [single]
    elif index.exists():
        names = read_json(index, _Index).weight_map
        if not names:
            raise ValueError(f"{index}: weight_map is empty, expected the file of each tensor")
        paths = sorted({indexed_file(index, *item, ".safetensors") for item in names.items()})
    else:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; expected a "
            "Hugging Face folder with safetensors weights"
        )
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    for path in paths:
        check_inside(folder, path)
        check_regular(path)
    return paths


def _check(
    path: pathlib.Path,
    config: LMConfig,
    family: Family,
    places: list[_Place],
    tensors: Mapping[str, tuple[Any, str]],
) -> None:
    wrong = []
    table = family.weights
    vocabulary = {f"{table[key]}.{kind}" for key in _VOCABULARY for kind in ("weight", "bias")}
    shapes = {place.name: place.stored_shape for place in places}
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"{name}: missing, expected shape {shape}")
            continue
        view, stored_name = tensors[name]
        found = tuple(view.get_shape())
        # A padded vocabulary has more rows than tokens; the surplus is never read.
        padded = name in vocabulary and found[1:] == shape[1:] and found[0] >= shape[0]
        if found != shape and not padded:
            wrong.append(f"{stored_name}: shape {found}, expected {shape}")
    # An LM head beside a tied embedding is harmless.
    spare = {f"{table['lm_head']}.weight"}
    if family.more_layers:
        later = re.compile(r"^model\.layers\.(\d+)\.")
        numbers = {name: later.match(name) for name in tensors}
        spare |= {name for name, n in numbers.items() if n and int(n[1]) >= config.num_layers}
    for name in sorted(set(tensors) - set(shapes) - spare):
        wrong.append(f"{tensors[name][1]}: not a weight of this {config.model_type} model")
    if wrong:
        more = len(wrong) - _MAX_REPORTED
        listed = "\n  ".join(wrong[:_MAX_REPORTED] + ([f"and {more} more"] if more > 0 else []))
        raise ValueError(f"{path}: the weights do not fit the config:\n  {listed}")


def _within(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A device's index with every bound spelt out, so that surplus rows stay unread."""
    assert index is not None  # JAX gives the callback an index unless asked not to
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _plain(place: _Place, view: Any, dtype: Any, wanted: tuple[slice, ...]) -> np.ndarray:
    return _cast(place.read(view, wanted), dtype)


def _quantized(
    place: _Place, view: Any, dtype: Any, *bounds: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of a matrix, or of some experts' matrices, in int8, and their scales."""
    (columns,) = place.columns
    rows = place.read(view, (*(slice(*each) for each in bounds), slice(0, columns)))
    with np.errstate(invalid="ignore", over="ignore"):  # the scale says it
        return quantize(_cast(rows, np.float32), dtype)


def _part(whole_rows: Callable[..., Any], scales: bool, wanted: tuple[slice, ...]) -> np.ndarray:
    """What is wanted of an int8 matrix, or of its scales."""
    rows = wanted if scales else wanted[:-1]
    numbers, scale = whole_rows(*((axis.start, axis.stop) for axis in rows))
    return scale if scales else np.ascontiguousarray(numbers[..., wanted[-1]])


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    if array.dtype not in (np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)):
        raise ValueError(
            f"weights of dtype {array.dtype} are not supported; expected float32, float16, bfloat16"
        )
    with np.errstate(over="ignore"):  # what overflows is found by who looks for Inf
        return array.astype(dtype, copy=False)
