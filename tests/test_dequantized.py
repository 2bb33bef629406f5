"""Quantised folders: each layout against its formula, stated number by number, and transformers."""

import dataclasses
import functools
import json
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from t3jax import make_mesh, sharding
from t3jax.lm import ExpertsConfig, load_config, places, save_hf
from t3jax.lm import __main__ as describe
from t3jax.lm.dequantized import dequantize
from t3jax.lm.quantization_json import Quantization, read_quantization
from t3jax.lm.weights import load_params

# Widths that blocks of 12 rows and 24 columns do not divide, and words of 8 numbers do.
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1, num_heads=4, num_kv_heads=2)
MXFP4 = dataclasses.replace(
    CONFIG,
    model_type="gpt_oss",
    tied=False,
    activation="quick_gelu",
    attention_bias=True,
    sinks=True,
    window=128,
    local=(True,),
    experts=ExpertsConfig(4, 2, 64, normed=True, bias=True, clamp=7.0),
)
FLOAT8 = ml_dtypes.float8_e4m3fn
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ: which column each four bits of a word are
GROUP = 16


def in_groups(matrix, generator):
    """Numbers of 4 bits, scales and zero points of groups of columns, and what they stand for."""
    out, width = matrix.shape
    groups = np.arange(width) // GROUP
    codes = generator.integers(0, 16, matrix.shape)
    scales = generator.uniform(0.01, 0.1, (out, width // GROUP)).astype(np.float16)
    zeros = generator.integers(1, 16, scales.shape)
    exact = (codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]
    return codes, scales, zeros, exact.astype(np.float32)


def pack(numbers, axis, order=range(8)):
    """Eight numbers of an axis in each int32."""
    numbers = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // 8), np.uint32)
    for place, source in enumerate(order):
        words |= numbers[..., source::8] << np.uint32(4 * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def scaled(matrix, scale, expanded, dtype=FLOAT8):
    """A matrix of 8 bits and its scales, and what they stand for."""
    limit = 127 if dtype == np.int8 else 448
    numbers = np.clip(matrix * 20, -limit, limit).astype(dtype)
    return numbers, scale, numbers.astype(np.float32) * expanded.astype(np.float32)


def fp8_blocks(matrix, generator):
    out, width = matrix.shape
    scale = generator.uniform(0.1, 1, (-(-out // 12), -(-width // 24))).astype(np.float32)
    expanded = np.array([[scale[o // 12, i // 24] for i in range(width)] for o in range(out)])
    weight, scale, exact = scaled(matrix, scale, expanded)
    return {"weight": weight, "weight_scale_inv": scale}, exact


def fp8_whole(matrix, generator):
    """With the scale of activations, of static ones."""
    scale = np.float32(generator.uniform(0.1, 1))
    weight, scale, exact = scaled(matrix, np.asarray(scale), scale)
    return {"weight": weight, "weight_scale_inv": scale, "activation_scale": np.ones(1)}, exact


def fp8_rows(matrix, generator):
    """In bfloat16, to which products are rounded."""
    scale = generator.uniform(0.1, 1, (len(matrix), 1)).astype(ml_dtypes.bfloat16)
    weight, scale, exact = scaled(matrix, scale, scale)
    return {"weight": weight, "weight_scale": scale}, exact.astype(ml_dtypes.bfloat16)


def int8_rows(matrix, generator):
    scale = generator.uniform(0.01, 0.1, (len(matrix), 1)).astype(np.float32)
    weight, scale, exact = scaled(matrix, scale, scale, np.int8)
    return {"weight": weight, "weight_scale": scale}, exact


def gptq(matrix, generator, shift=1):
    """Columns in the order of their groups, and in another that g_idx says."""
    codes, scales, zeros, exact = in_groups(matrix, generator)
    order = generator.permutation(matrix.shape[1])
    return {
        "qweight": pack(codes[:, order].T, 0),
        "qzeros": pack(zeros.T - shift, 1),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (order // GROUP).astype(np.int32),
    }, exact[:, order]


def awq(matrix, generator):
    codes, scales, zeros, exact = in_groups(matrix, generator)
    return {
        "qweight": pack(codes.T, 1, ORDER),
        "qzeros": pack(zeros.T, 1, ORDER),
        "scales": np.ascontiguousarray(scales.T),
    }, exact


def rows_of_words(matrix, generator, zero_points=False):
    codes, scales, zeros, exact = in_groups(matrix, generator)
    if not zero_points:
        groups = np.arange(matrix.shape[1]) // GROUP
        exact = (codes - 8) * scales.astype(np.float32)[:, groups]
    stored = {
        "weight_packed": pack(codes, 1),
        "weight_scale": scales,
        "weight_shape": np.array(matrix.shape),
    }
    return stored | ({"weight_zero_point": pack(zeros, 0)} if zero_points else {}), exact.astype(
        np.float16
    )


def compressed(stored_format, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


PACKED = {"bits": 4, "group_size": GROUP}
LAYOUTS = {
    "fp8 blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [12, 24]}),
    "fp8, a scale for each matrix": (
        fp8_whole,
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "fp8 rows": (
        fp8_rows,
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "int8 rows": (int8_rows, compressed("int-quantized", num_bits=8, strategy="channel")),
    "gptq": (gptq, {"quant_method": "gptq", "desc_act": True, **PACKED}),
    "gptq_v2": (
        functools.partial(gptq, shift=0),
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2", **PACKED},
    ),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "zero_point": True, **PACKED}),
    "words in rows": (
        rows_of_words,
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP),
    ),
    "words in rows, with zero points": (
        functools.partial(rows_of_words, zero_points=True),
        compressed(
            "pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False
        ),
    ),
}


def store(folder, name, changed=None):
    """Writes a folder with the matrices of layers quantised; gives what it stands for."""
    save_hf(folder, CONFIG, tiny.make_params(CONFIG), [263])
    how, quantization = LAYOUTS[name]
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    generator, plain = np.random.default_rng(0), dict(tensors)
    for tensor in [each for each in tensors if each.endswith("_proj.weight")]:
        stored, exact = how(tensors.pop(tensor), generator)
        module = tensor.removesuffix("weight")
        tensors |= {f"{module}{part}": array for part, array in stored.items()}
        plain[tensor] = np.ascontiguousarray(exact)
    if changed is not None:
        changed(tensors)
    write(folder, tensors, quantization)
    return plain


def write(folder, tensors, quantization):
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    tensors = {  # which makes a vector of a number
        name: array.reshape(()) if array.shape == (1,) and "scale_inv" in name else array
        for name, array in tensors.items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture(params=LAYOUTS)
def folders(request, tmp_path, monkeypatch):
    """A quantised folder, and one with the numbers that it stands for; read in small parts."""
    monkeypatch.setattr("t3jax.lm.weights._COMPUTED_AT_ONCE", 300)
    monkeypatch.setattr("t3jax.lm.weights._ROWS_OF_A_BLOCK", 5)
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    exact = store(quantized, request.param)
    save_hf(plain, CONFIG, tiny.make_params(CONFIG), [263])
    safetensors.numpy.save_file(exact, plain / "model.safetensors")
    return quantized, plain


def test_what_is_read_is_what_the_formula_says(folders):
    """Whole, by halves and quarters, in bfloat16, and rounded again to int8."""
    assert load_config(folders[0]) == CONFIG
    split = functools.partial(sharding.param_shardings, make_mesh((2, 2, 2)))
    for config, dtype, shardings in (
        (CONFIG, jnp.float32, None),
        (CONFIG, jnp.bfloat16, split),
        (dataclasses.replace(CONFIG, quantized=True), jnp.float32, split),
    ):
        found, expected = (load_params(each, config, dtype, shardings) for each in folders)
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))
    assert np.abs(np.asarray(found["layers"][0]["mlp"]["up"]["weight"])).max() == 127


def mxfp4(shape, generator):
    """Blocks and scales for matrices of experts, `[E, out, in]`, and what they stand for."""
    codes = generator.integers(0, 16, shape)
    scales = generator.integers(120, 132, (*shape[:-1], shape[-1] // 32))
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.where(codes < 8, 1.0, -1.0) * magnitudes[codes % 8]
    exact = values * 2.0 ** (np.repeat(scales, 32, axis=-1) - 127)
    bytes_ = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*scales.shape, 16)
    return bytes_.astype(np.uint8), scales.astype(np.uint8), exact.astype(np.float32)


def store_mxfp4(folder):
    """A gpt_oss with experts in MXFP4; the same as plain numbers, [in, out]."""
    save_hf(folder, MXFP4, tiny.make_params(MXFP4), [263])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    plain, generator = dict(tensors), np.random.default_rng(0)
    for name, shape in (("gate_up_proj", (4, 128, 32)), ("down_proj", (4, 32, 64))):
        name = f"model.layers.0.mlp.experts.{name}"
        assert tensors.pop(name).shape == (shape[0], shape[2], shape[1])
        blocks, scales, exact = mxfp4(shape, generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = exact.swapaxes(1, 2)
    write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return tensors, plain


def test_mxfp4_is_read_as_the_folder_of_plain_numbers(tmp_path, monkeypatch, capsys):
    """Gate and up, which stand row by row in turn, apart; and back in the form of plain numbers."""
    tensors, plain = store_mxfp4(tmp_path / "mxfp4")
    assert load_config(tmp_path / "mxfp4") == MXFP4
    split = functools.partial(sharding.param_shardings, make_mesh((2, 2, 2)))
    found = load_params(tmp_path / "mxfp4", MXFP4, jnp.float32, split)
    experts = found["layers"][0]["experts"]
    gate_up = plain["model.layers.0.mlp.experts.gate_up_proj"].swapaxes(1, 2)
    np.testing.assert_array_equal(experts["gate"]["weight"], gate_up[:, ::2])
    np.testing.assert_array_equal(experts["up"]["weight"], gate_up[:, 1::2])
    added = tensors["model.layers.0.mlp.experts.gate_up_proj_bias"]
    np.testing.assert_array_equal(experts["up"]["bias"], added[:, 1::2])
    save_hf(tmp_path / "back", MXFP4, found, [263], ml_dtypes.bfloat16)
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(plain)
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        np.testing.assert_array_equal(back[name].astype(np.float32), plain[name])
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    rounded = dataclasses.replace(MXFP4, quantized=True)
    one, other = (
        load_params(tmp_path / folder, rounded, jnp.bfloat16)["layers"][0]["experts"]
        for folder in ("mxfp4", "back")
    )
    chex.assert_trees_all_equal(one, other)

    tiny.make_tokenizer().save_pretrained(tmp_path / "mxfp4")
    monkeypatch.setattr(sys, "argv", ["t3jax.lm", str(tmp_path / "mxfp4")])
    monkeypatch.setattr(places.Place, "read", None)  # a weight that is read ends the test
    assert describe.main() == 0
    said = capsys.readouterr().out
    assert "a gpt_oss model stored as mxfp4; it loads" in said
    assert "4 experts of width 64, 2 for a token" in said
    count = sum(array.size for array in plain.values())
    spared = sum(array.size for name, array in plain.items() if ".experts." in name) // 2
    assert f"{count:,} weights, {count - spared:,} of them for a token" in said


def views(**tensors):
    class View(np.ndarray):
        def get_shape(self):
            return list(self.shape)

    return {name: (array.view(View), name) for name, array in tensors.items()}


def test_the_last_scale_of_mxfp4_is_no_number_and_the_others_are_powers_of_2():
    blocks = np.full((1, 3, 1, 16), 0x20, np.uint8)
    scales = np.array([0, 254, 255], np.uint8).reshape(1, 3, 1)
    found = dequantize(views(w_blocks=blocks, w_scales=scales), Quantization("mxfp4", "mxfp4"))
    ((view, _),) = found.values()
    part = np.asarray(view[(slice(0, 1), slice(3, 5), slice(0, 3))], np.float32)
    np.testing.assert_array_equal(part[0].T, [[2.0**-127, 0], [2.0**127, 0], [np.nan, np.nan]])


UP = "model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "gptq",
            lambda t: t.pop(f"{UP}scales"),
            r"up_proj\.scales: missing, as is needed with .*q",
        ),
        (
            "awq",
            lambda t: t.update({f"{UP}qzeros": np.zeros((1, 1), np.int32)}),
            r"up_proj\.qzeros: shape \(1, 1\), expected \(2, 8\) beside .*up_proj\.qweight",
        ),
        (
            "fp8 blocks",
            lambda t: t.update({f"{UP}weight_scale_inv": np.ones((3, 3), np.float32)}),
            r"weight_scale_inv: shape \(3, 3\), expected \(6, 2\) for \(64, 32\)",
        ),
        ("fp8 rows", lambda t: t.pop(f"{UP}weight_scale"), r"up_proj\.weight is float8 without a"),
        (
            "fp8 rows",
            lambda t: t.update({f"{UP}weight": np.ones((64, 32), np.float32)}),
            "weights of dtype float32 have scales; expected 8 bits",
        ),
        ("int8 rows", lambda t: t.pop(f"{UP}weight"), r"there is no .*up_proj.weight that it scal"),
    ],
)
def test_what_is_wrong_with_a_quantised_matrix_is_named(tmp_path, name, changed, message):
    store(tmp_path, name, changed)
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path, CONFIG, jnp.float32)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"bits": 4}, "quantised by an unnamed method are not supported; known: awq, compressed-"),
        ("fp8", "quantised by an unnamed method"),
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes are not supported"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3 is not .*, expected 4"),
        ({"quant_method": "gptq", "bits": 4}, "field group_size is missing"),
        (LAYOUTS["gptq"][1] | {"checkpoint_format": "marlin"}, 'checkpoint_format "marlin" is not'),
        (LAYOUTS["gptq"][1] | {"dynamic": {"-:.*": {}}}, "dynamic an object of 1 fields is not"),
        (LAYOUTS["awq"][1] | {"version": "gemv"}, 'version "gemv" is not supported'),
        (LAYOUTS["fp8 blocks"][1] | {"weight_block_size": [0, 1]}, "weight_block_size"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), 'format "nvfp4-pack-quant'),
        (compressed("float-quantized", num_bits=8, strategy="group"), 'strategy "group" is not'),
        (compressed("int-quantized", num_bits=8, symmetric=False), "strategy null is not"),
    ],
)
def test_other_ways_to_quantise_are_refused_by_name_with_the_way_out(quantization, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_quantization({"quantization_config": quantization})
    assert str(raised.value).startswith("quantization_config: ")
    assert "Load the unquantised folder" in str(raised.value)
    with pytest.raises(ValueError, match=message):
        read_quantization({"text_config": {"quantization_config": quantization}})
