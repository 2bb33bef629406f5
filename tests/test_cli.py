"""What the scripts make of a config: heads and refinements by name."""

import dataclasses
import math

import pytest
import tiny

from configs import default, llama31_tofu
from t3jax import pipeline
from t3jax.head_io import save_head


@pytest.mark.parametrize("name", ["plain", "gated", "protected-product", "gated-protected-product"])
def test_refinements_go_by_their_name(tiny_lm, name):
    found = pipeline.refinements(name, tiny_lm)
    assert found.name == name
    assert found.protected == (tiny_lm.eos_ids if "protected" in name else ())


def test_an_unknown_refinement_is_named(tiny_lm):
    with pytest.raises(ValueError, match=r"'gate-protected': unknown \['gate'\]"):
        pipeline.refinements("gate-protected", tiny_lm)


def test_heads_are_loaded_once_and_grouped_as_they_are_named(tiny_lm, tmp_path):
    config = tiny.make_settings(default)
    names = [str(tmp_path / name) for name in "ab"]
    for i, name in enumerate(names):
        head = tiny.make_head(tiny_lm, rank=2 + i)
        save_head(name, dataclasses.replace(head, prior_shift=float(i)))
    asked = [names[1], ",".join(names)]
    folders, heads, groups = pipeline.load_heads(config, asked, tiny_lm.mesh)
    assert folders == [names[1], names[0]]
    assert [(head.config.rank, head.prior_shift) for head in heads] == [(3, 1.0), (2, 0.0)]
    assert groups == [(0,), (1, 0)]
    config = dataclasses.replace(config, forget_fraction=0.2)
    _, heads, _ = pipeline.load_heads(config, asked, tiny_lm.mesh)
    assert [head.prior_shift for head in heads] == [pytest.approx(math.log(4))] * 2
    assert pipeline.load_heads(config, [], tiny_lm.mesh) == ([], [], [])


def test_the_splits_of_a_config_are_told_apart():
    assert llama31_tofu.get_config("forget10").retain == "tofu:retain90"
    with pytest.raises(ValueError, match="known: forget01, forget05, forget10"):
        llama31_tofu.get_config("forget20")
