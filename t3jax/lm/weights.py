"""Weights from and to Hugging Face safetensors, straight onto the device or mesh, without torch.

Names and shapes are checked against the config before a byte of weights is read, and everything
that is wrong is reported in one error. Each device reads only its own slice.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from t3jax import files
from t3jax.lm.config import LMConfig, hf_config
from t3jax.lm.decoder import Params, abstract_params

# Where each of the decoder's parameters stands in a checkpoint; {i} is the layer. One table for
# each family.
LLAMA = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
}
NAMES: Mapping[str, Mapping[str, str]] = {"llama": LLAMA}

_MAX_REPORTED = 12


def load_params(
    folder: pathlib.Path,
    config: LMConfig,
    dtype: Any,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Reads a model's weights.

    Args:
        folder: A Hugging Face folder with `model.safetensors`, or with several files and their
            `model.safetensors.index.json`.
        config: The model's shape.
        dtype: Dtype of the weights in memory; they are cast slice by slice.
        shardings: Gives the tree of shardings for the abstract parameter tree; None puts
            everything on the default device.

    Returns:
        The parameter tree, placed.

    Raises:
        FileNotFoundError: If the folder has no safetensors weights, or lacks one of the files.
        ValueError: If a file is broken or truncated, or names or shapes do not fit the config.
    """
    abstract = abstract_params(config, dtype)
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    names = [_checkpoint_name(config, path) for path, _ in leaves]
    where = _open_all(folder)
    _check(folder, config, names, [leaf.shape for _, leaf in leaves], where)
    placed = (
        jax.tree.leaves(shardings(abstract))
        if shardings is not None
        else [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(leaves)
    )

    def read(name: str, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        view = where[name].get_slice(name)
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: _cast(view[_within(index, leaf.shape)], dtype)
        )

    loaded = [
        read(name, leaf, sharding)
        for name, (_, leaf), sharding in zip(names, leaves, placed, strict=True)
    ]
    return jax.tree.unflatten(treedef, loaded)


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
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree.flatten_with_path(params)
    tensors = {
        _checkpoint_name(config, path): np.ascontiguousarray(_cast(np.asarray(leaf), dtype))
        for path, leaf in leaves
    }
    with files.replacing(folder / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    description = hf_config(config) | {"dtype": jnp.dtype(dtype).name, "eos_token_id": eos_ids}
    files.write_json(folder / "config.json", description)
    files.write_json(folder / "generation_config.json", {"eos_token_id": eos_ids})


def _checkpoint_name(config: LMConfig, path: tuple) -> str:
    *module, kind = [str(part.key) for part in path]
    layer = next((part for part in module if part.isdigit()), "")
    key = ".".join("{i}" if part.isdigit() else part for part in module)
    return NAMES[config.model_type][key].replace("{i}", layer) + f".{kind}"


def _open_all(folder: pathlib.Path) -> dict[str, Any]:
    """Every tensor name in the folder's checkpoint, with the open file that holds it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            paths = sorted(
                {folder / p for p in json.loads(index.read_text())["weight_map"].values()}
            )
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
    elif single.is_file():
        paths = [single]
    else:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; expected a "
            "Hugging Face folder with safetensors weights"
        )
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    where: dict[str, Any] = {}
    for path in paths:
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); download or write it again"
            ) from error
        where |= dict.fromkeys(file.keys(), file)
    return where


def _check(
    folder: pathlib.Path,
    config: LMConfig,
    names: list[str],
    shapes: list[tuple[int, ...]],
    where: Mapping[str, Any],
) -> None:
    wrong = []
    vocabulary = {f"{NAMES[config.model_type][key]}.weight" for key in ("embed", "lm_head")}
    for name, shape in zip(names, shapes, strict=True):
        if name not in where:
            wrong.append(f"{name}: missing, expected shape {shape}")
            continue
        found = tuple(where[name].get_slice(name).get_shape())
        # A padded vocabulary has more rows than tokens; the surplus is never read.
        padded = name in vocabulary and found[1:] == shape[1:] and found[0] >= shape[0]
        if found != shape and not padded:
            wrong.append(f"{name}: shape {found}, expected {shape}")
    # Buffers of old checkpoints, and an LM head beside a tied embedding, are harmless.
    ignored = (".rotary_emb.inv_freq", "lm_head.weight")
    for name in sorted(set(where) - set(names)):
        if not name.endswith(ignored):
            wrong.append(f"{name}: not a weight of this {config.model_type} model")
    if wrong:
        more = len(wrong) - _MAX_REPORTED
        listed = "\n  ".join(wrong[:_MAX_REPORTED] + ([f"and {more} more"] if more > 0 else []))
        raise ValueError(f"{folder}: the weights do not fit config.json:\n  {listed}")


def _within(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A device's index with every bound spelt out, so that surplus rows stay unread."""
    assert index is not None  # JAX gives the callback an index unless it is told not to
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    if array.dtype not in (np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)):
        raise ValueError(
            f"weights of dtype {array.dtype} are not supported; expected float32, float16, bfloat16"
        )
    return array.astype(dtype)
