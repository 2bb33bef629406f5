"""Weak scaling: rows grow with the devices, and what one device has to do stays the same."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from benchmarks import scaling
from t3jax.head import HeadConfig
from t3jax.sharding import make_mesh

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)


def features(mesh):
    return scaling.counts(scaling.compile_features(mesh, CONFIG, rows=8, length=32))


def training(mesh):
    config = HeadConfig(CONFIG.hidden_size, CONFIG.vocab_size, rank=4)
    return scaling.counts(scaling.compile_training(mesh, config, tokens=256, trained=64))


@pytest.mark.parametrize("compile_for", [features, training])
def test_eight_devices_with_eight_times_the_rows_do_the_work_of_one(compile_for):
    one = compile_for(make_mesh(devices=jax.devices()[:1]))
    many = compile_for(make_mesh())
    assert one["exchanged"] == 0
    for name in ("operations", "accessed", "arguments", "temporaries"):
        np.testing.assert_allclose(many[name], one[name], rtol=0.05, err_msg=name)
    # No features: in training, the gradient of the head and the loss.
    head = 4 * 4 * (CONFIG.hidden_size + 64)
    assert many["exchanged"] <= (0 if compile_for is features else head + 64)


def test_collectives_are_found_in_a_program():
    text = """
      %all-gather.1 = f32[8,66]{1,0} all-gather(%x), channel_id=1
      ROOT %r = (f32[4]{0}, s32[]) all-reduce(%a, %b), to_apply=%add
      %add.2 = f32[8,66]{1,0} add(%all-gather.1, %all-gather.1)"""
    assert scaling.collectives(text) == [
        ("all-gather", "float32", (8, 66)),
        ("all-reduce", "float32", (4,)),
        ("all-reduce", "int32", ()),
    ]
