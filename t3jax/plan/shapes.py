"""Devices and models to plan for without having them."""

import pathlib

from t3jax.lm import LMConfig, lm_config, read_config

GIB = 2**30
# Memory of a device that a program may use, bytes.
DEVICES = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.74 * GIB),
    "H100": 80 * 10**9,
    "H200": 141 * 10**9,
}


def _llama(width: int, mlp: int, layers: int, heads: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    }


# `config.json` of models that need not be downloaded.
SHAPES = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128),
}


def read_shape(model: str) -> LMConfig:
    """The shape of a model: one of `SHAPES`, or of a folder with a `config.json`."""
    if model in SHAPES:
        return lm_config(SHAPES[model])
    if not pathlib.Path(model).is_dir():
        raise FileNotFoundError(
            f"{model}: no such folder; give one with a config.json, or one of {', '.join(SHAPES)}"
        )
    return read_config(pathlib.Path(model))
