"""GGUF files: the same model and tokenizer as from a Hugging Face folder, and every fault named.

The files are written here, as llama.cpp's converter writes them.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys

import chex
import gguf as library
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from t3jax import load_lm, make_mesh, sharding
from t3jax.lm import __main__ as describe
from t3jax.lm import from_params, gguf, lm_config, load_config, rotation, save_hf, weights
from t3jax.lm.config_writing import hf_config
from t3jax.lm.gguf_config import ARCHITECTURES
from t3jax.lm.gguf_file import GGUFFile, open_gguf
from t3jax.lm.gguf_tokenizer import read_eos_ids, read_tokenizer
from t3jax.lm.quantized import quantize

GOLDEN = pathlib.Path(__file__).parent / "golden"
LLAMAS = ("llama3_untied", "gqa_tied", "biases")
# llama.cpp's names of the families; of two it knows by what else a file says.
NAMES = {each.model_type: name for name, each in ARCHITECTURES.items()}
NAMES |= {"mixtral": "llama", "olmo3": "olmo2"}
FAMILIES = sorted(set(NAMES) - {"llama"})
PERMUTED = ("arcee", "granite", "granitemoe", "llama", "mistral3", "olmo", "smollm3")
Q, KIND = library.quants, library.GGMLQuantizationType


def write(path, config, tensors, kind="F32", tokenizer=None, more=(), leave_out=()):
    """Writes a model, given as a config and the tensors of a Hugging Face folder.

    Args:
        path: The file.
        config: The model's shape.
        tensors: By their names in the folder.
        kind: How matrices are stored; vectors are F32 always.
        tokenizer: Written too, if given.
        more: Further tensors, or others, by their names in the file.
        leave_out: Keys of the metadata.
    """
    architecture = NAMES[config.model_type]
    writer = library.GGUFWriter(path, architecture)
    for key, value in metadata(config, architecture).items() | tokenizer_metadata(tokenizer):
        if value is not None and key not in leave_out:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            add |= {str: writer.add_string, tuple: writer.add_array}
            add[type(value)](key, value)
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    names = library.get_tensor_name_map(kinds[architecture], config.num_layers)
    stored = {}
    for name, tensor in tensors.items():
        module, what = name.rsplit(".", 1)
        if what == "A_log":
            stored[f"blk.{module.split('.')[2]}.ssm_a"] = converted(config, name, tensor)
            continue
        if what == "dt_bias":
            module, what = module.replace("linear_attn", "linear_attn.dt_proj"), "bias"
        if what in ("layer_scalar", "sinks"):  # a tensor of that whole name
            module, what = name, "weight"
        place = names.get_name(module) or names.get_name(module.removeprefix("transformer."))
        stored[f"{place}.{what}"] = converted(config, name, tensor)
    for name, tensor in (stored | rope_tensors(config) | dict(more)).items():
        if tensor.ndim == 1 or tensor.dtype != np.float32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, Q.quantize(tensor, KIND[kind]), raw_dtype=KIND[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(config, architecture):
    norm = "layer_norm" if config.norm.startswith("layer") else "layer_norm_rms"
    scale = hf_config(config).get("logits_scaling", hf_config(config).get("logit_scale"))
    experts = config.experts
    values = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        f"attention.{norm}_epsilon": config.norm_eps,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "use_parallel_residual": config.parallel,
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": scale,
        "attention.clamp_kqv": config.qkv_clip,
        "expert_count": experts and experts.count,
        "expert_used_count": experts and experts.chosen,
        "expert_feed_forward_length": experts and experts.size,
        "expert_shared_feed_forward_length": experts and experts.shared,
        "attention.sliding_window": config.window or None,
        "attention.sliding_window_pattern": config.local or None,
    }
    if (rope := config.rope) is not None:
        scaled = rope.kind in ("linear", "yarn")
        yarn = rope.kind == "yarn"
        values |= {
            "rope.freq_base": rope.theta,
            "rope.freq_base_swa": config.local_rope and config.local_rope.theta,
            "rope.dimension_count": int(config.head_dim * rope.rotated),
            "rope.scaling.type": rope.kind if scaled else None,
            "rope.scaling.factor": rope.factor if scaled else None,
            "rope.scaling.yarn_attn_factor": rope.attention_factor if yarn else None,
            "attention.temperature_scale": rope.query_growth or None,
            "rope.scaling.yarn_beta_fast": rope.beta_fast if yarn else None,
            "rope.scaling.yarn_beta_slow": rope.beta_slow if yarn else None,
        }
        if rope.kind in ("yarn", "longrope"):
            values["rope.scaling.original_context_length"] = rope.original_max_position
        if rope.kind == "longrope":
            values["rope.scaling.attn_factor"] = rope.attention_factor
            values["context_length"] = int(rope.original_max_position * rope.factor)
    if architecture in ("glm4moe", "ernie4_5-moe", "minimax-m2"):
        glm = architecture == "glm4moe"
        values |= {
            "block_count": config.num_layers + glm,  # the last predicts further tokens
            "nextn_predict_layers": int(glm),
            "leading_dense_block_count": sum(experts.dense),
            "interleave_moe_layer_step": 1,
            "expert_shared_count": experts.shared // experts.size,
            "expert_shared_feed_forward_length": None,
            "expert_gating_func": 2 if experts.router == "sigmoid" else 1,
            "expert_weights_norm": experts.normed,
            "expert_weights_scale": experts.scale,
            "expert_group_count": experts.groups,
            "expert_group_used_count": experts.chosen_groups,
        }
    if (delta := config.delta) is not None:
        values |= {
            "block_count": config.num_layers + 1,
            "nextn_predict_layers": 1,
            "full_attention_interval": config.num_layers,
            "ssm.time_step_rank": delta.value_heads,
            "ssm.group_count": delta.key_heads,
            "ssm.inner_size": delta.value_heads * delta.value_dim,
            "ssm.conv_kernel": delta.taps,
            "ssm.state_size": delta.key_dim,
        }
    if architecture in ("lfm2", "lfm2moe", "gemma4"):
        values |= metadata_by_layer(config)
    return {f"{architecture}.{key}": value for key, value in values.items()}


def metadata_by_layer(config):
    """Of architectures whose layers are of several kinds."""
    layers = range(config.num_layers)
    if config.conv is not None:
        experts = config.experts
        heads = [0 if config.has_conv(i) else config.num_kv_heads for i in layers]
        return {
            "attention.head_count_kv": tuple(heads),
            "shortconv.l_cache": config.conv.taps,
            "leading_dense_block_count": experts and sum(experts.dense),
            "expert_gating_func": experts and 2,
            "expert_weights_scale": experts and experts.scale,
        }
    return {
        "attention.head_count_kv": tuple(config.heads(i).num_kv_heads for i in layers),
        "attention.key_length": config.whole_heads.head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.shared_kv_layers": sum(config.borrows),
        "attention.scale": None,
        "embedding_length_per_layer_input": config.layer_inputs,
        "feed_forward_length": tuple(config.mlp_size(i) for i in layers),
        "rope.dimension_count": config.whole_heads.head_dim,
        "rope.dimension_count_swa": config.head_dim,
    }


def rope_tensors(config):
    rope = config.rope
    if rope is not None and rope.kind == "proportional":
        pairs = config.whole_heads.head_dim // 2
        rotated = int(pairs * rope.rotated)
        return {"rope_freqs.weight": np.float32([1] * rotated + [1e30] * (pairs - rotated))}
    if rope is None or rope.kind not in ("llama3", "longrope"):
        return {}
    if rope.kind == "longrope":
        factors = {"short": rope.short_factors, "long": rope.long_factors}
        return {f"rope_factors_{k}.weight": np.float32(v) for k, v in factors.items()}
    plain = dataclasses.replace(rope, kind="default")
    plain, stretched = (rotation.inverse_wavelengths(r, config.head_dim) for r in (plain, rope))
    return {"rope_freqs.weight": plain / stretched}


def converted(config, name, tensor):
    """A tensor of a folder as it stands in a file."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    module = name.split(".")[-2]
    # A rotary pair's rows side by side.
    if NAMES[config.model_type] in PERMUTED and module in heads:
        halves = tensor.reshape(heads[module], 2, config.head_dim // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if ".linear_attn." in name:
        return tile_heads(config.delta, name, tensor)
    if config.norm.endswith("_offset") and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    if config.model_type == "gpt2" and module in ("c_attn", "c_proj", "c_fc"):
        return np.ascontiguousarray(tensor.T)
    if module == "query_key_value":
        group = config.num_heads // config.num_kv_heads
        shape = (config.num_kv_heads, group + 2, config.head_dim, *tensor.shape[1:])
        q, k, v = np.split(tensor.reshape(shape), [group, group + 1], axis=1)
        return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in (q, k, v)])
    return tensor[:, 0] if name.endswith("conv.conv.weight") else tensor


def tile_heads(delta, name, tensor):
    """Heads of values in the order of files: one of each head of keys, then the next of each."""

    def tile(part, width):
        heads = (delta.key_heads, delta.value_heads // delta.key_heads, width)
        return part.reshape(*heads, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if "conv1d" in name or "in_proj_qkv" in name:
        tensor = tensor[:, 0] if "conv1d" in name else tensor
        before = 2 * delta.key_heads * delta.key_dim
        return np.concatenate([tensor[:before], tile(tensor[before:], delta.value_dim)])
    if "in_proj_z" in name:
        return tile(tensor, delta.value_dim)
    if "out_proj" in name:
        return np.ascontiguousarray(tile(tensor.T, delta.value_dim).T)
    if name.endswith("norm.weight"):
        return tensor
    return tile(-np.exp(tensor) if name.endswith("A_log") else tensor, 1)


def tokenizer_metadata(tokenizer, pre="gpt-2"):
    if tokenizer is None:
        return {}.items()
    tokens = tuple(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": tuple(3 if token in tiny.SPECIAL else 1 for token in tokens),
        "merges": tuple(" ".join(merge) for merge in tiny.MERGES),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    values = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return (values | {"tokenizer.chat_template": tokenizer.chat_template}).items()


def golden_folder(name, folder):
    """A model of the golden files as a folder; with settings that a GGUF file can express."""
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    hf = json.loads(str(golden["config"]))
    if "query_pre_attn_scalar" in hf:
        hf["query_pre_attn_scalar"] = hf["head_dim"]
    if "swiglu_limit" in hf:
        hf["swiglu_limit"] = 7.0
    if hf.get("use_sliding_window"):
        hf |= {"use_sliding_window": False, "layer_types": None, "sliding_window": None}
        hf.pop("no_rope_layers", None)
    tensors = {
        key.removeprefix("weights/"): value.astype(np.float32)
        for key, value in golden.items()
        if key.startswith("weights/")
    }
    if "mlp_only_layers" in hf:  # files have no layers without experts
        config = lm_config(hf | {"mlp_only_layers": [], "decoder_sparse_step": 1})
        save_hf(folder, config, tiny.make_params(config), [95])
        return golden, config, safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return golden, lm_config(hf), tensors


def is_of_experts(config, name):
    """Whether a tensor of a folder is of a layer's experts; `expert_tensors` has those."""
    kinds = "mlp|block_sparse_moe|feed_forward"
    if config.model_type == "gemma4_text":  # there it has an MLP beside
        kinds = "experts|router"
    layer = re.match(rf".*layers\.(\d+)\.({kinds})\.", name)
    return layer is not None and config.has_experts(int(layer[1]))


def expert_tensors(params):
    """Those of layers with experts, from parameters."""
    found = {}
    for i, layer in params["layers"].items():
        for name, part in layer.get("experts", {}).items():
            key = {"shared_gate": "gate_inp_shexp"}.get(name, f"{name}_exps")
            if name == "shared":
                for each, module in part.items():
                    found[f"blk.{i}.ffn_{each}_shexp.weight"] = module["weight"]
            elif name == "router":
                names = {
                    "weight": "ffn_gate_inp.weight",
                    "input_scale": "ffn_gate_inp.scale",
                    "expert_scale": "ffn_down_exps.scale",
                    "correction": "exp_probs_b.bias",
                    "bias": "ffn_gate_inp.bias",
                }
                found |= {f"blk.{i}.{names[kind]}": weight for kind, weight in part.items()}
            else:
                weight = part["weight"]
                found[f"blk.{i}.ffn_{key}.weight"] = weight[0] if name == "shared_gate" else weight
                found |= {
                    f"blk.{i}.ffn_{key}.bias": b for kind, b in part.items() if kind == "bias"
                }
    found = {name: np.asarray(weight) for name, weight in found.items()}
    # Gemma 4's files have gate and up in one tensor.
    if any(name.endswith("ffn_down_exps.scale") for name in found):
        for name in [name for name in found if name.endswith("ffn_gate_exps.weight")]:
            up = found.pop(name.replace("gate_exps", "up_exps"))
            fused = np.concatenate([found.pop(name), up], axis=1)
            found[name.replace("gate_exps", "gate_up_exps")] = fused
    return found


def close(found, expected, atol):
    np.testing.assert_allclose(np.asarray(found), expected, atol=atol, rtol=0)


def same_config(found, expected):
    without = dataclasses.replace(found, rope=expected.rope, local_rope=expected.local_rope)
    assert without == expected
    for ours, theirs in ((found.rope, expected.rope), (found.local_rope, expected.local_rope)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            ropes = [rotation.inverse_wavelengths(r, found.head_dim) for r in (ours, theirs)]
            np.testing.assert_allclose(*ropes, rtol=1e-6)
            close(ours.attention_factor, theirs.attention_factor, 1e-6)


@pytest.mark.parametrize("name", [*LLAMAS, *FAMILIES])
def test_a_file_is_the_folder(name, tmp_path):
    """Shape and weights in every family, each device's part read by itself."""
    _, config, tensors = golden_folder(name, tmp_path)
    shardings = functools.partial(sharding.param_shardings, make_mesh((1, 2, 4)))
    expected = weights.load_params(tmp_path, config, jnp.float32, shardings)
    more = expert_tensors(expected)
    dense = {name: tensor for name, tensor in tensors.items() if not is_of_experts(config, name)}
    if name in ("glm4_moe", "qwen3_5_text"):
        more[f"blk.{config.num_layers}.nextn.eh_proj.weight"] = np.ones((16, 32), np.float32)
    file = open_gguf(write(tmp_path / "model.gguf", config, dense, more=more))
    found = gguf.read_config(file)
    same_config(found, config)
    assert lm_config(hf_config(found)) == found  # it can be written as a folder
    params = gguf.load_params(file, found, jnp.float32, shardings)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    # Such norms are stored with 1 added.
    tolerance = 1e-6 if config.norm.endswith("_offset") else 0  # so are rates as logarithms
    jax.tree.map(lambda ours, theirs: close(ours, theirs, tolerance), params, expected)
    q = next(e["attention"] for e in params["layers"].values() if "attention" in e)["q"]["weight"]
    assert q.addressable_shards[0].data.shape[0] == q.shape[0] // 4


GEMMA4 = {
    "model_type": "gemma4_text",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMAS4 = {
    "E2B": {
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "31B": {
        "num_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
}


def gemma4_file(name, folder, **changes):
    """A file of a small Gemma 4 with that name's kinds of layers."""
    config = lm_config(GEMMA4 | GEMMAS4[name])
    save_hf(folder, config, tiny.make_params(config), [95])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    path = write(folder / "model.gguf", config, tensors, **changes)
    return config, open_gguf(path)


@pytest.mark.parametrize("name", GEMMAS4)
def test_a_gemma_4_of_each_kind(name, tmp_path):
    """One number for all layers is as good as a list of it."""
    config, file = gemma4_file(name, tmp_path)
    same_config(gguf.read_config(file), config)
    found = gguf.load_params(file, config, jnp.float32)
    chex.assert_trees_all_equal(found, weights.load_params(tmp_path, config, jnp.float32))
    key = "attention.head_count_kv" if name == "E2B" else "feed_forward_length"
    file.metadata[f"gemma4.{key}"] = file.get(key)[0]
    same_config(gguf.read_config(file), config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count_kv", [1, 2], "expected a whole number for each of the 4 layers"),
        ("attention.head_count_kv", [2, 1, 4, 1], "expected one number for the layers with a"),
        ("attention.sliding_window_pattern", [True] * 4, "every layer has a window"),
        (
            "attention.sliding_window_pattern",
            None,
            "expected true or false for each of the 4 layers",
        ),
        ("attention.key_length_swa", None, "key_length_swa is None, expected an integer >= 1"),
        (
            "feed_forward_length",
            [24, "x", 24, 24],
            "expected a whole number for each of the 4 layers",
        ),
        ("rope.dimension_count_swa", 4, 'obeyed with rope_type "proportional" alone'),
        ("expert_weights_scale", 2.0, r"expert_weights_scale 2\.0 is not supported"),
    ],
)
def test_layers_of_a_gemma_4_that_do_not_fit(tmp_path, key, value, message):
    _, file = gemma4_file("31B", tmp_path)
    file.metadata[f"gemma4.{key}"] = value
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        gguf.read_config(file)


def test_rotation_that_no_gemma_4_has(tmp_path):
    wrong = {"rope_freqs.weight": np.float32([1, 2, 1e30, 1, 1, 1, 1, 1])}
    _, file = gemma4_file("31B", tmp_path, more=wrong)
    with pytest.raises(ValueError, match="expected 1 for the first pairs of a head"):
        gguf.read_config(file)


def test_layers_of_an_lfm2_that_do_not_fit(tmp_path):
    _, config, tensors = golden_folder("lfm2", tmp_path)
    file = open_gguf(write(tmp_path / "model.gguf", config, tensors))
    file.metadata["lfm2.attention.head_count_kv"] = [0, 0]
    with pytest.raises(ValueError, match="expected 0 for convolutions, and the same number"):
        gguf.read_config(file)
    file.metadata["lfm2.shortconv.l_cache"] = None
    file.metadata["lfm2.attention.head_count_kv"] = [0, 1]
    with pytest.raises(ValueError, match=r"lfm2\.shortconv\.l_cache is None, expected"):
        gguf.read_config(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ssm.state_size", None, r"qwen35\.ssm\.state_size is None, expected an integer >= 1"),
        ("ssm.time_step_rank", 5, "expected a divisor of ssm.inner_size 48 and a multiple of"),
        ("nextn_predict_layers", -1, "nextn_predict_layers is -1, expected an integer >= 0"),
        ("nextn_predict_layers", 9, "num_hidden_layers is -6, expected an integer >= 1"),
    ],
)
def test_delta_nets_that_do_not_fit(tmp_path, key, value, message):
    _, config, tensors = golden_folder("qwen3_5_text", tmp_path)
    file = open_gguf(write(tmp_path / "model.gguf", config, tensors))
    file.metadata[f"qwen35.{key}"] = value
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        gguf.read_config(file)


def test_a_gate_of_another_kind_is_refused(tmp_path):
    _, config, tensors = golden_folder("lfm2_moe", tmp_path)
    expected = weights.load_params(tmp_path, config, jnp.float32)
    dense = {name: tensor for name, tensor in tensors.items() if not is_of_experts(config, name)}
    file = open_gguf(write(tmp_path / "model.gguf", config, dense, more=expert_tensors(expected)))
    assert gguf.read_config(file).experts.scale == 1.5
    file.metadata["lfm2moe.expert_weights_scale"] = 0.0  # as if it was not there
    assert gguf.read_config(file).experts.scale == 1
    file.metadata["lfm2moe.expert_gating_func"] = 1
    with pytest.raises(ValueError, match=r"lfm2moe\.expert_gating_func 1 is not supported"):
        gguf.read_config(file)


def test_logits_of_a_llama_3_are_those_of_pytorch(tmp_path):
    """A file has no parameters of the stretched rotary positions, but each pair's factor."""
    golden, config, tensors = golden_folder("llama3_untied", tmp_path)
    file = open_gguf(write(tmp_path / "model.gguf", config, tensors))
    found = gguf.read_config(file)
    lm = from_params(found, gguf.load_params(file, found, jnp.float32), None, (95,), "llama 3")
    mask = golden["left/mask"]
    hidden, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, golden["left/tokens"], mask)
    close(np.asarray(hidden)[mask], golden["left/hidden"], 1e-4)
    close(np.asarray(logits)[mask][::4], golden["left/logits"], 1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with a tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, tiny.CONFIG, tiny.make_params(), eos_ids=[263])
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def write_like(folder, path, kind="F32", **options):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return write(path, tiny.CONFIG, tensors, kind, tiny.make_tokenizer(), **options)


def rounded(kind, weight):
    """What is left of a weight."""
    weight = np.asarray(weight)
    if weight.ndim == 1 or kind == "F32":
        return weight
    return weight.astype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_load_lm(folder, tmp_path, kind):
    """Weights and logits, the tokenizer with its template, the end of a text."""
    path = write_like(folder, tmp_path / "model.gguf", kind)
    assert load_config(path) == load_config(folder) == tiny.CONFIG
    lm, expected = load_lm(str(path), "float32"), load_lm(folder, "float32")
    tokens = np.random.default_rng(0).integers(0, 264, (2, 24)).astype(np.int32)
    logits, theirs = (
        np.asarray(tiny.read(m.apply, m.unembed, m.params, tokens, np.ones_like(tokens, bool))[1])
        for m in (lm, expected)
    )
    if kind == "Q8_0":
        # 32 numbers share a step, the largest / 127, in float16: off by half a step and a little.
        def within(ours, exact):
            step = np.abs(np.asarray(exact)).max() / 127 if exact.ndim > 1 else 0
            close(ours, exact, 0.57 * step)

        jax.tree.map(within, lm.params, expected.params)
        assert 1e-3 < np.abs(logits - theirs).max() < 0.03 * np.abs(theirs).max()
    else:
        expected_params = jax.tree.map(functools.partial(rounded, kind), expected.params)
        chex.assert_trees_all_equal(lm.params, expected_params)
        bound = {"F32": 0, "F16": 2**-9, "BF16": 2**-6}[kind]
        close(logits, theirs, bound * np.abs(theirs).max())
    assert (lm.eos_ids, lm.name) == (expected.eos_ids, str(path))
    ours, theirs = lm.tokenizer, expected.tokenizer
    text = "The hero's 12 entries, in 1985: naïve — and\n\n  the end<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name) is not None
    turns = [{"role": "user", "content": "Who?"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(
        turns, tokenize=False
    )


def test_a_file_is_described_without_its_weights(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf._Tensor, "__getitem__", None)  # a weight that is read ends the test
    path = write_like(folder, tmp_path / "model.gguf")
    monkeypatch.setattr(sys, "argv", ["t3jax.lm", str(path)])
    assert describe.main() == 0
    assert capsys.readouterr().out.startswith(f"{path}: a llama model in a GGUF file; it loads\n")
    write_like(folder, path, more={"blk.0.ffn_up.weight": np.zeros((8, 32), np.float32)})
    assert describe.main() == 1
    assert "blk.0.ffn_up.weight: shape (8, 32), expected (64, 32)" in capsys.readouterr().err


def test_weights_are_cast_and_sharded(folder, tmp_path):
    path = write_like(folder, tmp_path / "model.gguf", "Q8_0")
    whole = load_lm(path, "float32")
    lm = load_lm(path, "bfloat16", make_mesh((2, 1, 4)))
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole.params)
    chex.assert_trees_all_equal(lm.params, expected)
    down = lm.params["layers"][0]["mlp"]["down"]["weight"]
    assert down.addressable_shards[0].data.shape == (32, 16)  # half a block's columns
    rounded = load_lm(path, "int8", make_mesh((2, 1, 4))).params["layers"][0]["mlp"]["down"]
    numbers, scale = quantize(
        np.asarray(whole.params["layers"][0]["mlp"]["down"]["weight"]), np.float32
    )
    np.testing.assert_array_equal(rounded["weight"], numbers)
    np.testing.assert_array_equal(rounded["scale"], scale)


def test_weights_do_not_change_with_the_file(folder, tmp_path):
    path = write_like(folder, tmp_path / "model.gguf")
    lm, expected = load_lm(path, "float32"), load_lm(folder, "float32")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    chex.assert_trees_all_equal(lm.params, expected.params)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("head_width", [0, 6])
def test_parts_of_a_tensor(monkeypatch, kind, head_width):
    """Whatever the part, it is what dequantising all gives, and no other block is dequantised."""
    shape = (24, 1024)
    stored = tensor(kind, shape)
    whole = Q.dequantize(stored.data, stored.tensor_type).reshape(shape)
    if head_width:
        whole = whole.reshape(4, 3, 2, 1024).swapaxes(1, 2).reshape(shape)
    done = []

    def counting(data, qtype):
        done.append(data.size)
        return Q.dequantize(data, qtype)

    monkeypatch.setattr(library, "dequantize", counting)
    monkeypatch.setattr(gguf, "_DEQUANTIZED_AT_ONCE", 2048)
    view = gguf._Tensor(stored, head_width, 0.0, np.float32)
    assert view.get_shape() == shape
    numbers, size = library.GGML_QUANT_SIZES[KIND[kind]]
    for rows, columns in (
        (slice(0, 24), slice(0, 1024)),
        (slice(6, 12), slice(0, 1024)),
        (slice(5, 17), slice(512, 768)),
        (slice(23, 24), slice(250, 530)),
        (slice(3, 3), slice(0, 1024)),
    ):
        done.clear()
        part = view[rows, columns]
        np.testing.assert_array_equal(part, whole[rows, columns])
        blocks = -(-columns.stop // numbers) - columns.start // numbers
        quantised = kind not in gguf._PLAIN
        assert sum(done) == quantised * (rows.stop - rows.start) * blocks * size
        assert max(done, default=0) <= max(2048, blocks * numbers) // numbers * size


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K", "MXFP4"])
def test_parts_of_the_matrices_of_experts(kind):
    stored = tensor(kind, (24, 1024))
    whole = Q.dequantize(stored.data, stored.tensor_type).reshape(4, 6, 1024)
    stored = stored._replace(data=stored.data.reshape(4, 6, -1), shape=np.array([1024, 6, 4]))
    view = gguf._Tensor(stored, 0, 0.0, np.float32)
    assert view.get_shape() == whole.shape
    part = slice(1, 3), slice(2, 6), slice(250, 530)
    np.testing.assert_array_equal(view[part], whole[part])


def tensor(kind, shape):
    """A stored tensor of random blocks whose scales are finite."""
    numbers, size = library.GGML_QUANT_SIZES[KIND[kind]]
    random = np.random.default_rng(0)
    if kind in ("F32", "F16", "BF16"):
        values = random.standard_normal(shape).astype(np.float32)
        data = Q.quantize(values, KIND[kind])
    else:
        data = random.integers(0, 60, (shape[0], shape[1] // numbers * size), np.uint8)
    return library.gguf_reader.ReaderTensor(
        "x", KIND[kind], np.array(shape[::-1]), 0, 0, 0, data, None
    )


# ---- tokenizers ----


def only_tokenizer(**values):
    """A file that is all tokenizer."""
    values = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return GGUFFile(pathlib.Path("x.gguf"), {"general.architecture": "llama", **values}, {})


def byte_level(**more):
    values = dict(tokenizer_metadata(tiny.make_tokenizer()))
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    return only_tokenizer(**{**values, **more})


def test_the_cut_and_the_bos_follow_the_name_of_the_tokenizer():
    text = "x12345"
    plain, llama, tekken, glm, lfm2 = (
        read_tokenizer(byte_level(pre=pre))
        for pre in ("smollm", "llama-bpe", "tekken", "glm4", "lfm2")
    )
    bos = plain.bos_token_id
    digits = plain.convert_tokens_to_ids(list("x12345"))
    assert plain(text)["input_ids"] == digits
    assert llama(text)["input_ids"] == lfm2(text)["input_ids"] == [bos, *digits]
    assert llama(text, add_special_tokens=False)["input_ids"] == digits
    cuts = [
        [piece for piece, _ in each.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        for each in (plain, llama, tekken, glm)
    ]
    assert cuts == [["x", "12345"], ["x", "123", "45"], ["x", *"12345"], ["x", "123", "45"]]
    assert glm(text)["input_ids"] == digits
    without = read_tokenizer(byte_level(pre="llama-bpe", add_bos_token=False))
    assert without(text)["input_ids"] == digits


def test_whole_words_come_before_merges_in_a_tokenizer_of_tiktoken():
    stored = dict(tokenizer_metadata(tiny.make_tokenizer()))
    more = {
        "tokens": (*stored["tokenizer.ggml.tokens"], "cat"),
        "token_type": (*stored["tokenizer.ggml.token_type"], 1),
        "add_bos_token": False,
    }
    for pre, count in (("gpt-2", 3), ("llama-bpe", 1)):
        assert len(read_tokenizer(byte_level(pre=pre, **more))("cat")["input_ids"]) == count


def test_sentencepiece():
    letters = ["▁", *"cats", "▁c", "at", "▁cat"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(letters)]
    scores = [*[0.0] * 259, *(-float(i) for i in range(len(letters)))]
    file = only_tokenizer(
        model="llama",
        tokens=tokens,
        token_type=kinds,
        scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = read_tokenizer(file)
    ids = tokenizer("cats é</s>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<s>", "▁cat", "s", "▁", "<0xC3>", "<0xA9>", "</s>")
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cats é"
    file.metadata["tokenizer.ggml.add_space_prefix"] = False
    ids = read_tokenizer(file)("cats cat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "c", "at", "s", "▁cat"]
    assert read_eos_ids(file) == (2,)


def test_gemma_4s_tokenizer(tmp_path):
    """As that of a folder: spaces are symbols, bytes stand in, and no bos is added."""
    from transformers import AutoTokenizer, GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn|>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"cats\n", "▁c", "at"]
    merges = [("▁", "c"), ("a", "t")]
    folder = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    folder.add_special_tokens({"additional_special_tokens": ["<turn|>"]})
    folder.save_pretrained(tmp_path)
    file = only_tokenizer(
        model="gemma4",
        tokens=tokens,
        token_type=[3, 3, 3, 2, 3, *[6] * 256, *[1] * (len(tokens) - 261)],
        scores=[0.0] * len(tokens),
        merges=[" ".join(merge) for merge in merges],
        add_bos_token=True,
        add_space_prefix=False,
        bos_token_id=2,
        eos_token_id=1,
        unknown_token_id=3,
    )
    file.metadata["general.architecture"] = "gemma4"
    tokenizer = read_tokenizer(file)
    text = "cats cat  é<turn|>\n\ncat"
    ids = tokenizer(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["c", "at", "s", "▁c", "at", "▁"]
    assert tokenizer.decode(ids) == text
    assert read_eos_ids(file) == (1, 4)


def test_ends_of_turns_end_an_answer_too():
    tokens = ["a", "<|im_end|>", "<eos>", "<end_of_turn>", "b"]
    file = only_tokenizer(tokens=tokens, eos_token_id=2, eot_token_id=3)
    assert read_eos_ids(file) == (2, 3, 1)
    phi = only_tokenizer(tokens=["<|endoftext|>", "<|end|>", "a"], eos_token_id=0)
    assert read_eos_ids(phi) == (0, 1)
    channels = only_tokenizer(tokens=["<|return|>", "<|end|>", "<|call|>"], eos_token_id=0)
    assert read_eos_ids(channels) == (0, 2)
    with pytest.raises(ValueError, match=r"x\.gguf: no end-of-text token"):
        read_eos_ids(only_tokenizer(tokens=["a"]))


@pytest.mark.parametrize("name", ["eos", "bos", "padding"])
@pytest.mark.parametrize("value", [264, -1, "a", 1.0, True])
def test_special_tokens_are_tokens_of_the_file(name, value):
    with pytest.raises(ValueError, match=rf"{name}_token_id is .*, expected a token id from 0"):
        read_tokenizer(byte_level(**{f"{name}_token_id": value}))


@pytest.mark.parametrize(
    "values", [{"merges": [1]}, {"merges": ["x y"]}, {"token_type": [1]}, {"merges": None}]
)
def test_a_tokenizer_that_does_not_fit_itself_is_refused(values):
    with pytest.raises(ValueError, match=r"x\.gguf: the tokenizer could not be read"):
        read_tokenizer(byte_level(**values))


@pytest.mark.parametrize(
    "key", ["embedding_length", "attention.head_count", "attention.key_length"]
)
@pytest.mark.parametrize("value", [0, -2, "x", 1.5])
def test_a_size_that_is_none_is_refused(folder, tmp_path, key, value):
    file = open_gguf(write_like(folder, tmp_path / "model.gguf"))
    file.metadata[f"llama.{key}"] = value
    with pytest.raises(ValueError, match=rf"llama\.{key} is .*, expected an integer >= 1"):
        gguf.read_config(file)


def test_absurd_numbers_and_weights_are_refused(folder, tmp_path):
    file = open_gguf(write_like(folder, tmp_path / "model.gguf"))
    for key, value in (
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", -1.0),
    ):
        wrong = dataclasses.replace(file, metadata=file.metadata | {f"llama.{key}": value})
        with pytest.raises(ValueError, match=r"model\.gguf: .*expected a (finite )?number"):
            gguf.read_config(wrong)
    norm = {"output_norm.weight": np.full(tiny.CONFIG.hidden_size, np.inf, np.float32)}
    path = write_like(folder, tmp_path / "inf.gguf", more=norm)
    with pytest.raises(ValueError, match=r"inf\.gguf: NaN or Inf in output_norm\.weight"):
        load_lm(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": None}, r"x\.gguf: no tokenizer in it"),
        ({"model": "bert"}, r"x\.gguf: tokenizer 'bert' is not supported; known: gpt2, llama, g"),
        ({"pre": "new"}, r"tokenizer\.ggml\.pre 'new' is not supported.*gpt-2, .*llama-bpe"),
        ({"pre": None}, r"tokenizer\.ggml\.pre None is not supported"),
    ],
)
def test_a_tokenizer_that_cannot_be_made(values, message):
    with pytest.raises(ValueError, match=message):
        read_tokenizer(byte_level(**values))


# ---- faults ----


def metadata_of(folder, tmp_path, **changes):
    """An open file with other metadata."""
    file = open_gguf(write_like(folder, tmp_path / "model.gguf"))
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return dataclasses.replace(file, metadata=file.metadata | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba' is not supported; known: arcee"),
        ({"general__architecture": "qwen4"}, "nearest supported one is 'qwen3'"),
        ({"llama__expert_count": 8}, r"llama\.expert_used_count is missing"),
        ({"llama__embedding_scale": 2.0}, r"llama\.embedding_scale 2\.0 is not supported"),
        ({"llama__block_count": 1 << 31}, r"llama\.block_count 2147483648: expected 1024 at most"),
        ({"llama__block_count": None}, r"llama\.block_count is missing"),
        ({"llama__attention.head_count_kv": [4, 2]}, r"different sizes .*head_count_kv"),
        ({"llama__attention.sliding_window": 8}, "sliding_window is not supported"),
        (
            {"llama__rope.scaling.type": "other", "llama__rope.scaling.factor": 2.0},
            "rope_type 'other' is not supported",
        ),
    ],
)
def test_metadata_that_is_not_supported(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        gguf.read_config(metadata_of(folder, tmp_path, **changes))


def test_a_missing_and_a_foreign_tensor_are_named(folder, tmp_path):
    foreign = {"blk.0.attn_q.scale": np.zeros(4, np.float32)}
    path = write_like(folder, tmp_path / "model.gguf", more=foreign)
    file = open_gguf(path)
    del file.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match="do not fit") as raised:
        gguf.load_params(file, tiny.CONFIG, jnp.float32)
    assert str(path) in str(raised.value)
    assert "\n  blk.1.ffn_up.weight: missing, expected shape (64, 32)" in str(raised.value)
    assert "\n  blk.0.attn_q.scale: not a weight of this llama model" in str(raised.value)


def test_a_quantisation_that_is_not_known(folder, tmp_path):
    path = tmp_path / "model.gguf"
    write_like(folder, path, more={"blk.0.ffn_up.weight": np.zeros((64, 32), np.float64)})
    with pytest.raises(ValueError, match=r"ffn_up\.weight is stored as F64, which .* Q8_0"):
        load_lm(path)


@pytest.mark.parametrize("keep", [0, 3, 1000, 9000, -64])
def test_a_truncated_file(folder, tmp_path, keep):
    path = write_like(folder, tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.gguf: not a whole GGUF file"):
        load_lm(path)


def test_another_file_and_none_at_all(folder, tmp_path):
    with pytest.raises(ValueError, match=r"not a whole GGUF file.*or a Hugging Face folder"):
        load_lm(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no such folder or file; expected .* GGUF"):
        load_lm(tmp_path / "absent.gguf")


def test_one_of_several_files(folder, tmp_path, monkeypatch):
    path = write_like(folder, tmp_path / "model.gguf")
    reader = library.GGUFReader(path)
    field = reader.fields["llama.block_count"]
    reader.fields["split.count"] = field  # 2
    monkeypatch.setattr(library, "GGUFReader", lambda _: reader)
    with pytest.raises(ValueError, match=r"one of 2 files of a model; join them with"):
        load_lm(path)


def test_the_extra_is_named_where_it_is_missing(folder, tmp_path, monkeypatch):
    path = write_like(folder, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"package gguf: pip install 't3jax\[gguf\]'"):
        load_lm(path)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    with pytest.raises(ImportError, match=r"transformers 5\.22: pip install 't3jax\[gguf\]'"):
        load_lm(path)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text"])
def test_transformers_reads_the_same_layers_with_a_memory(name, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import transformers

    # Asked for and not needed.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: True)
    _, config, tensors = golden_folder(name, tmp_path)
    config = dataclasses.replace(config, attention_bias=False)  # published files have none
    tensors = {k: v for k, v in tensors.items() if not k.endswith("_proj.bias")}
    more = {
        "tokenizer.ggml.tokens": tuple(map(str, range(config.vocab_size))),
        "qwen35.rope.dimension_sections": (1, 1, 1, 0),
    }
    monkeypatch.setattr(sys.modules[__name__], "tokenizer_metadata", lambda _: more.items())
    file = open_gguf(write(tmp_path / "model.gguf", config, tensors))
    found = gguf.read_config(file)
    lm = from_params(found, gguf.load_params(file, found, jnp.float32), None, (95,), name)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)
    _, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, tokens, np.ones_like(tokens, bool))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        close(logits, model(torch.tensor(tokens)).logits.numpy(), 1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_transformers_reads_the_same(folder, tmp_path, kind):
    torch = pytest.importorskip("torch")
    import transformers

    path = write_like(folder, tmp_path / "model.gguf", kind)
    # What `from_pretrained` does with a file, which asks for accelerate too.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint as read

    config = read(path, return_tensors=False)["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    model.load_state_dict(read(path, return_tensors=True, model_to_load=model)["tensors"], False)
    lm = load_lm(path, "float32")
    tokens = np.random.default_rng(0).integers(0, 264, (2, 24)).astype(np.int32)
    _, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, tokens, np.ones_like(tokens, bool))
    with torch.no_grad():
        close(logits, model(torch.tensor(tokens)).logits.numpy(), 1e-4)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "The hero's 12 entries<|im_end|>"
    assert lm.tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
