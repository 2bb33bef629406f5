"""Language models: config, decoder, weights, and the loaded `LM`."""

from t3jax.lm.cache import Cache
from t3jax.lm.config import (
    ConvConfig,
    DeltaConfig,
    ExpertsConfig,
    HeadsConfig,
    LMConfig,
    RopeConfig,
)
from t3jax.lm.config_json import lm_config, read_config
from t3jax.lm.decoder import init_params
from t3jax.lm.model import LM, default_dtype, from_params, load_config, load_lm
from t3jax.lm.own_model import make_lm
from t3jax.lm.saving import save_hf

__all__ = [
    "LM",
    "Cache",
    "ConvConfig",
    "DeltaConfig",
    "ExpertsConfig",
    "HeadsConfig",
    "LMConfig",
    "RopeConfig",
    "default_dtype",
    "from_params",
    "init_params",
    "lm_config",
    "load_config",
    "load_lm",
    "make_lm",
    "read_config",
    "save_hf",
]
