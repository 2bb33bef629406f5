"""Describes a model folder, whether it loads and its memory: python -m t3jax.lm FOLDER.

It reads configs, the tokenizer and the headers of safetensors files, no weights.
"""

import argparse
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from t3jax.lm.adapter import is_adapter, read_base
from t3jax.lm.cache import Borrowed, ConvState, DeltaState, KeyValues, init_cache
from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import wrapper_of
from t3jax.lm.decoder import abstract_params
from t3jax.lm.model import check_lm, load_config, model_path
from t3jax.lm.quantization_json import quantization_of

_GIB = 1 << 30


def main() -> int:
    """Prints the description of a model; the status is 1 if it does not load."""
    parser = argparse.ArgumentParser(
        prog="python -m t3jax.lm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a Hugging Face folder, a hub id or a GGUF file")
    name = parser.parse_args().model
    try:
        path = model_path(name)
        config = load_config(path)
        check_lm(path)
    except (OSError, ValueError, ImportError) as error:
        print(f"{name}: does not load\n{error}", file=sys.stderr)
        return 1
    print("\n".join(describe(path, config)))
    return 0


def describe(path: pathlib.Path, config: LMConfig) -> list[str]:
    """Lines about a model that loads: its kind, its shape, the memory of its weights and cache."""
    kind = f"a {config.model_type} model"
    if path.is_file():
        kind += " in a GGUF file"
    elif is_adapter(path):
        kind = f"a LoRA adapter of {read_base(path)}, {kind}"
    elif wrapper := wrapper_of(path):
        kind = f"the text model of a {wrapper}, {kind}"
    if path.is_dir() and (stored := quantization_of(path)):
        kind += f" stored as {stored.method}"
    shape = f"MLPs of width {config.intermediate_size}"
    if (experts := config.experts) is not None:
        mixture = f"{experts.count} experts of width {experts.size}, {experts.chosen} for a token"
        mixture += f" and one of width {experts.shared} for all" if experts.shared else ""
        layers = _count_expert_layers(config)
        if experts.beside:
            shape += f" beside {mixture}"
        else:
            rest = "" if layers == config.num_layers else f" in {layers} layers, else {shape}"
            shape = mixture + rest
    kinds = (
        f", {sum(config.local)} of them with a window of {config.window}" if config.local else ""
    )
    if config.delta is not None:
        kinds += f", {sum(config.delta.layers)} of them gated delta nets"
    if config.conv is not None:
        kinds += f", {sum(config.conv.layers)} of them short convolutions"
    if config.borrows:
        kinds += f", {sum(config.borrows)} of them with the keys and values of others"
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, jnp.float32)))
    return [
        f"{path}: {kind}; it loads",
        f"{config.num_layers} layers{kinds}, width {config.hidden_size}, "
        f"{_describe_heads(config)}, {shape}",
        f"context {config.max_position} tokens, vocabulary {config.vocab_size}",
        f"{count:,} weights{_describe_used(config, count)}: "
        + ", ".join(
            f"{_count_bytes(config, dtype) / _GIB:.2f} GiB in {dtype}"
            for dtype in ("float32", "bfloat16", "int8")
        ),
        _describe_cache(config),
    ]


def _describe_heads(config: LMConfig) -> str:
    text = f"{config.num_heads} query heads"
    if config.num_kv_heads != config.num_heads:
        text += f" over {config.num_kv_heads} key heads"
    text += f" of width {config.head_dim}"
    if (heads := config.whole_heads) is not None:
        text += f" ({heads.num_kv_heads} of {heads.head_dim} in other layers)"
    return text


def _describe_cache(config: LMConfig) -> str:
    """The memory that a text takes while it is decoded."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, 1, jnp.bfloat16))
    sizes = {KeyValues: 0, DeltaState: 0, ConvState: 0, Borrowed: 0}
    for state in cache.layers:
        sizes[type(state)] += sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    text = f"cache: {sizes[KeyValues] / 1024:.1f} KiB a token in bfloat16"
    if fixed := sizes[DeltaState] + sizes[ConvState]:
        text += f", and {fixed / 2**20:.1f} MiB a text"
    return text


def _describe_used(config: LMConfig, count: int) -> str:
    """The number of weights that a token uses, unless it uses all."""
    if config.experts is None:
        return ""
    unused = config.experts.count - config.experts.chosen
    width, size = config.hidden_size, config.experts.size
    expert_size = 3 * width * size + (2 * size + width if config.experts.bias else 0)
    used = count - _count_expert_layers(config) * unused * expert_size
    return f", {used:,} of them for a token"


def _count_expert_layers(config: LMConfig) -> int:
    return sum(map(config.has_experts, range(config.num_layers)))


def _count_bytes(config: LMConfig, dtype: str) -> int:
    quantized = dtype == "int8"
    shape = dataclasses.replace(config, quantized=quantized)
    leaves = jax.tree.leaves(abstract_params(shape, jnp.bfloat16 if quantized else dtype))
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)


if __name__ == "__main__":
    sys.exit(main())
