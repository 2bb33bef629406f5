"""Weak scaling: rows grow with the devices, and what one device has to do stays the same."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from benchmarks import aot, scaling
from t3jax.sharding import make_mesh

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)


@pytest.mark.parametrize("name", scaling.PROGRAMS)
def test_eight_devices_with_eight_times_the_rows_do_the_work_of_one(name):
    jobs = [
        scaling.make_job(CONFIG, mesh, 8, 32)
        for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh())
    ]
    one, many = (scaling.count(scaling.PROGRAMS[name](job).compile()) for job in jobs)
    assert one["exchanged"] == 0
    for count in ("operations", "accessed", "arguments", "temporaries"):
        np.testing.assert_allclose(many[count], one[count], rtol=0.05, err_msg=count)
    # No rows: in training the gradient of the head and the loss; of answers, for every host to
    # read, a chunk of tokens each, with log-probability and entropy under the base and a byte for
    # numbers that are not finite, and whether they are finished.
    head = 4 * 20 * (CONFIG.hidden_size + CONFIG.vocab_size)
    answers = jobs[1].rows * (jobs[1].chunk * (4 + 4 + 4 + 1) + 1)
    bounds = {"features": 0, "head training": head + 64, "decoding": answers + 64}
    assert many["exchanged"] <= bounds[name]


def test_collectives_are_found_in_a_program():
    text = """
      %all-gather.1 = f32[8,66]{1,0} all-gather(%x), channel_id=1
      ROOT %r = (f32[4]{0}, s32[]) all-reduce(%a, %b), to_apply=%add
      %add.2 = f32[8,66]{1,0} add(%all-gather.1, %all-gather.1)"""
    assert aot.collectives(text) == [
        aot.Collective("all-gather", "f32[8,66]", 8 * 66 * 4, 1),
        aot.Collective("all-reduce", "f32[4] + s32[]", 5 * 4, 1),
    ]
