"""Tiny models for tests, without torch: a decoder with random weights, a tokenizer, a head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

from t3jax import sharding
from t3jax.head import HeadConfig, init_head
from t3jax.head_io import Head
from t3jax.lm import (
    LM,
    ConvConfig,
    DeltaConfig,
    ExpertsConfig,
    HeadsConfig,
    LMConfig,
    RopeConfig,
    from_params,
    init_params,
)
from t3jax.settings import Settings, from_config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>")
# 256 bytes, these merges and the special tokens: 264 tokens, which 8 devices divide.
MERGES = (("t", "h"), ("Ġ", "t"), ("i", "n"), ("e", "r"), ("a", "n"))

# Every width is a multiple of 8, so that 8 simulated devices divide it.
CONFIG = LMConfig(
    model_type="llama",
    vocab_size=264,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position=256,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tied=True,
)
# One layer without a width that 2 divides: a head must be even (rotary pairs), their number not.
ODD_CONFIG = dataclasses.replace(
    CONFIG,
    vocab_size=267,
    hidden_size=33,
    intermediate_size=51,
    num_layers=1,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
)


# A layer with an MLP and one with experts, a number of them that 8 devices divide.
MIXTURE = dataclasses.replace(
    CONFIG,
    model_type="qwen2_moe",
    tied=False,
    qkv_bias=True,
    experts=ExpertsConfig(8, 2, 16, shared=24, shared_gate=True, dense=(True, False)),
)


def make_settings(module, fields=None):
    """The settings of a module of `configs`, with these fields by their names in a config."""
    config = module.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(fields or {})
    return from_config(Settings, config)


# A gated delta net and a layer of attention with a gate.
DELTA = dataclasses.replace(
    CONFIG,
    model_type="qwen3_5_text",
    tied=False,
    norm="rms_offset",
    qk_norm="head",
    output_gate=True,
    rope=RopeConfig(rotated=0.5),
    delta=DeltaConfig(4, 8, 8, 8, 4, layers=(True, False)),
)


# A short convolution and a layer of attention.
CONV = dataclasses.replace(
    CONFIG, model_type="lfm2", qk_norm="head", conv=ConvConfig(32, 3, layers=(True, False))
)
# Layers of unequal shape: those that attend to the whole text have other heads, and the last two
# have the keys and values of others.
UNEQUAL = dataclasses.replace(
    CONFIG,
    model_type="gemma4_text",
    num_layers=4,
    norm="rms_float32",
    norms="both",
    qk_norm="head",
    value_norm=True,
    whole_heads=HeadsConfig(1, 16, values_are_keys=True),
    borrows=(False, False, True, True),
    borrowing_size=128,
    layer_inputs=8,
    layer_multiplier=True,
    scaled_embedding=True,
    attention_multiplier=1.0,
    logit_softcap=30.0,
    activation="gelu_pytorch_tanh",
    window=6,
    local=(True, False, True, False),
    rope=RopeConfig(kind="proportional", rotated=0.25),
    local_rope=RopeConfig(),
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes and a few merges as tokens, and a ChatML template; nothing is downloaded."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + ["".join(merge) for merge in MERGES]
    model = tokenizers.models.BPE({symbol: i for i, symbol in enumerate(symbols)}, list(MERGES))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_params(config: LMConfig = CONFIG, seed: int = 0):
    """Random weights, large enough that attention and next tokens are far from uniform."""
    params = init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * 10.0 if leaf.ndim > 1 else leaf, params)


def make_lm(config: LMConfig = CONFIG, mesh: jax.sharding.Mesh | None = None, seed: int = 0) -> LM:
    """A language model with random weights, placed on the mesh."""
    params = make_params(config, seed)
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
    tokenizer = make_tokenizer()
    return from_params(config, params, tokenizer, (tokenizer.eos_token_id,), "tiny", mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(apply, unembed, params, tokens, mask, cache=None):
    """Hidden states, logits and cache."""
    hidden, cache = apply(params, tokens, None, mask, cache)
    return hidden, unembed(params, hidden), cache


def continue_batch(lm: LM, logits: jax.Array, cache, steps: int) -> np.ndarray:
    """Greedy tokens `[B, steps]` after prompts, padded on the left, that `read` has read."""
    tokens = [np.argmax(np.asarray(logits)[:, -1:], axis=-1).astype(np.int32)]
    mask = np.ones(tokens[0].shape, bool)
    for _ in range(steps - 1):
        _, logits, cache = read(lm.apply, lm.unembed, lm.params, tokens[-1], mask, cache)
        tokens.append(np.argmax(np.asarray(logits), axis=-1).astype(np.int32))
    return np.concatenate(tokens, axis=1)


def make_head(
    lm: LM,
    rank: int = 8,
    scale: float = 5.0,
    base_temperature: float = 2.5,
    seed: int = 1,
    **shape: Any,
) -> Head:
    """A random head for a model, scaled so that its scores are of the order of the logits."""
    config = HeadConfig(lm.hidden_size, lm.vocab_size, rank, **shape)
    params = init_head(jax.random.key(seed), config)
    params["output"] = params["output"] * jnp.float32(scale)
    return Head(config, params, base_temperature, guidance_scale=1.0, model=lm.name)
