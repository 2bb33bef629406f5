"""Models as Hugging Face folders that transformers opens, written without torch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from t3jax import files
from t3jax.lm.config import LMConfig
from t3jax.lm.config_writing import hf_config
from t3jax.lm.decoder import Params, abstract_params
from t3jax.lm.expert_tensors import split_experts
from t3jax.lm.families import FAMILIES
from t3jax.lm.finite import describe_not_finite, holds_no_number
from t3jax.lm.places import Place, cast, find_places, join_parts


def save_hf(
    folder: pathlib.Path,
    config: LMConfig,
    params: Params,
    eos_ids: list[int],
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Writes a folder that transformers opens: weights, `config.json`, `generation_config.json`.

    Files in it are replaced. `eos_ids` end a text; `dtype` is that of the weights on disk.

    Raises:
        ValueError: If a tensor holds NaN or Inf in that dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stacks: dict[str, list[tuple[Place, np.ndarray]]] = {}
    family = FAMILIES[config.model_type]
    places = find_places(config, family, params)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(abstract_params(config, dtype))]
    for place, leaf, leaf_dtype in zip(places, jax.tree.leaves(params), dtypes, strict=True):
        stacks.setdefault(place.name, []).append((place, cast(np.asarray(leaf), leaf_dtype)))
    tensors = {name: np.ascontiguousarray(join_parts(parts)) for name, parts in stacks.items()}
    tensors = split_experts(tensors, family)
    for name, value in family.constants.items():
        for layer in range(config.num_layers):
            tensors[name.replace("{i}", str(layer))] = np.array(value, dtype)
    if names := [name for name, tensor in tensors.items() if holds_no_number(tensor)]:
        raise ValueError(f"{folder}: not written: {describe_not_finite(names, dtype)}")
    with files.replacing(folder / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    content = hf_config(config) | {
        "dtype": jnp.dtype(dtype).name,
        "eos_token_id": eos_ids,
        "pad_token_id": None,  # transformers' own default may lie outside of the vocabulary
    }
    files.write_json(folder / "config.json", content)
    files.write_json(folder / "generation_config.json", {"eos_token_id": eos_ids})
