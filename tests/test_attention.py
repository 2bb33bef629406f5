"""Attention with biases by distance and with norms that have a weight for each head."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from t3jax import make_mesh
from t3jax.finetuning import recipe
from t3jax.lm.attention import alibi_slopes
from t3jax.lm.decoder import abstract_params

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    model_type="cohere",
    num_layers=1,
    norm="layer",
    norm_bias=False,
    qk_norm="each",
    rope=None,
    alibi=True,
    embedding_norm=True,
)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [(4, [2, 4, 6, 8]), (2, [4, 8]), (6, [2, 4, 6, 8, 1, 3]), (3, [4, 8, 2]), (1, [8])],
)
def test_slopes_of_further_heads_stand_between_those_of_a_power_of_two(heads, exponents):
    np.testing.assert_allclose(alibi_slopes(heads), 2.0 ** -np.array(exponents), rtol=1e-6)


def test_what_is_read_on_eight_devices_and_in_pieces_is_what_one_reads_at_once():
    tokens = np.random.default_rng(0).integers(0, 264, (2, 9)).astype(np.int32)
    mask = np.arange(9) >= np.array([[0], [4]])
    one, several = tiny.make_lm(CONFIG), tiny.make_lm(CONFIG, make_mesh((1, 2, 4)))
    expected = np.asarray(tiny.read(one.apply, one.unembed, one.params, tokens, mask)[1])
    cache, found = several.init_cache(2, 9), []
    for piece in (slice(0, 6), slice(6, 9)):
        _, logits, cache = tiny.read(
            *(several.apply, several.unembed, several.params),
            *(tokens[:, piece], mask[:, piece], cache),
        )
        found.append(np.asarray(logits))
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5 * np.abs(expected).max())


def test_norms_do_not_decay_whatever_their_shape():
    params = abstract_params(CONFIG, np.float32)
    attention = params["layers"][0]["attention"]
    assert attention["q_norm"]["weight"].shape == (8, 8)
    decays = jax.tree.map_with_path(recipe._decays, attention)
    assert decays["q"]["weight"]
    assert not decays["q_norm"]["weight"]
