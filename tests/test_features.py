import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from damage import damaged

import t3jax
from t3jax import features
from t3jax.data import Example

LENGTHS = [(5, 2), (40, 17), (17, 16), (16, 1), (33, 30), (7, 6), (20, 4), (90, 60), (12, 3)]


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 256, n).astype(np.int32), start) for n, start in LENGTHS]


def one_by_one(lm, examples):
    """The definition, a text at a time, in float64."""
    pooled, targets = [], []
    apply = jax.jit(lm.apply)
    for example in examples:
        padded = np.zeros((1, 96), np.int32)  # what follows a token does not change it
        padded[0, : len(example.tokens)] = example.tokens
        hidden, _ = apply(lm.params, jnp.asarray(padded))
        mean = np.cumsum(np.asarray(hidden[0, : len(example.tokens)], np.float64), axis=0)
        mean /= np.arange(1, len(mean) + 1)[:, None]
        pooled.append(mean[example.answer_start - 1 : -1])
        targets.append(example.tokens[example.answer_start :])
    return pooled, targets


@pytest.mark.parametrize("tokens_per_batch", [64, 4096])
def test_features_are_the_causal_means_before_each_answer_token(
    tiny_lm, examples, tmp_path, tokens_per_batch
):
    found = t3jax.load_or_compute_features(
        tiny_lm, examples, tmp_path, tokens_per_batch=tokens_per_batch
    )
    pooled, targets = one_by_one(tiny_lm, examples)
    assert found.num_sequences == len(examples)
    assert np.diff(found.starts).tolist() == [n - start for n, start in LENGTHS]
    np.testing.assert_array_equal(found.targets, np.concatenate(targets))
    np.testing.assert_allclose(found.pooled, np.concatenate(pooled), atol=2e-5)
    some = found.select([7, 0])
    np.testing.assert_array_equal(some.targets, np.concatenate([targets[7], targets[0]]))
    np.testing.assert_allclose(some.pooled, np.concatenate([pooled[7], pooled[0]]), atol=2e-5)


def test_bfloat16_storage_rounds_only_the_mean(tiny_lm, examples, tmp_path):
    exact = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
    stored = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path, dtype="bfloat16")
    assert stored.pooled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored.pooled, np.asarray(exact.pooled, jnp.bfloat16))


def test_a_second_call_reads_the_store(tiny_lm, examples, tmp_path, monkeypatch):
    first = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
    monkeypatch.setattr(features, "_compute", None)  # would fail if it were called
    second = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
    np.testing.assert_array_equal(first.pooled, second.pooled)


def test_the_key_follows_weights_tokens_labels_dtype_kind_and_code(tiny_lm, examples, monkeypatch):
    params = jax.tree.map(lambda leaf: leaf, tiny_lm.params)
    weight = params["layers"][1]["mlp"]["up"]["weight"]
    params["layers"][1]["mlp"]["up"]["weight"] = weight.at[3, 5].add(1e-7)
    swapped = jax.tree.map(lambda leaf: leaf, tiny_lm.params)
    swapped["embed"]["weight"] = swapped["embed"]["weight"][::-1]
    token = examples[0].tokens.copy()
    token[3] += 1
    keys = [
        features.feature_key(tiny_lm, examples, "float32"),
        features.feature_key(tiny_lm, examples, "bfloat16"),
        features.feature_key(tiny_lm, examples, "float32", "mean+last"),
        features.feature_key(tiny_lm, examples[:-1], "float32"),
        features.feature_key(tiny_lm, [Example(token, 2), *examples[1:]], "float32"),
        features.feature_key(tiny_lm, [Example(examples[0].tokens, 3), *examples[1:]], "float32"),
        features.feature_key(dataclasses.replace(tiny_lm, params=params), examples, "float32"),
        features.feature_key(dataclasses.replace(tiny_lm, params=swapped), examples, "float32"),
    ]
    monkeypatch.setattr(features.digests, "code_digest", lambda *_: "another version")
    keys.append(features.feature_key(tiny_lm, examples, "float32"))
    assert len(set(keys)) == len(keys)


def test_features_on_a_mesh_equal_those_of_one_device(tiny_lm, examples, tmp_path):
    sharded = tiny.make_lm(mesh=t3jax.make_mesh((2, 2, 2)))
    one = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path / "one")
    eight = t3jax.load_or_compute_features(sharded, examples, tmp_path / "eight")
    np.testing.assert_allclose(one.pooled, eight.pooled, atol=2e-5)


def test_an_interrupted_pass_leaves_nothing_that_looks_whole(
    tiny_lm, examples, tmp_path, monkeypatch
):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.checked, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_whose_bytes_have_changed_are_computed_anew(tiny_lm, examples, tmp_path):
    expected = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
    pooled = np.array(expected.pooled)
    folder = tmp_path / expected.key
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for i, data in enumerate(damaged(whole, count=4)):
            path.unlink()  # the bytes before stay mapped
            path.write_bytes(data)
            with pytest.warns(UserWarning, match=f"{path.name}: damaged.*computed anew"):
                found = t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
            assert found.key == expected.key, i
            np.testing.assert_array_equal(found.pooled, pooled)
            np.testing.assert_array_equal(found.targets, expected.targets)
        path.unlink()  # a folder that is not whole, with nothing to be said of it or half
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t3jax.load_or_compute_features(tiny_lm, examples, tmp_path)
        assert path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [expected.key]


def test_hidden_states_that_are_not_finite_are_named_with_their_cause(tiny_lm, examples, tmp_path):
    def compute(lm):
        t3jax.load_or_compute_features(lm, examples, tmp_path, progress="forget")

    params = jax.tree.map(lambda leaf: leaf, tiny_lm.params)
    token = int(examples[7].tokens[20])  # is in no other text before an answer
    table = params["embed"]["weight"]
    params["embed"]["weight"] = table.at[token, 3].set(jnp.nan)
    holding = [i + 1 for i, example in enumerate(examples) if token in example.tokens]
    named = "|".join(map(str, holding))
    with pytest.raises(
        FloatingPointError, match=rf"text ({named}) of forget: .*NaN or Inf \(embed.weight\)"
    ):
        compute(dataclasses.replace(tiny_lm, params=params))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tiny_lm.params)
    half["layers"][0]["mlp"]["down"]["weight"] *= jnp.float16(3e4)
    large = t3jax.lm.from_params(
        tiny.CONFIG, half, tiny_lm.tokenizer, tiny_lm.eos_ids, "tiny", tiny_lm.mesh
    )
    with pytest.raises(FloatingPointError, match=r"text .* float16 ends at 65504; load .*bfloat16"):
        compute(large)
    assert not list(tmp_path.iterdir())


def test_bad_sets_are_refused(tiny_lm, tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        t3jax.load_or_compute_features(tiny_lm, [], tmp_path)
    with pytest.raises(ValueError, match="no example has an answer token"):
        t3jax.load_or_compute_features(tiny_lm, [Example(np.zeros(4, np.int32), 4)], tmp_path)
    long = Example(np.zeros(tiny_lm.max_position + 1, np.int32), 1)
    with pytest.raises(ValueError, match="example 0 has 257 tokens, more than the 256"):
        t3jax.load_or_compute_features(tiny_lm, [long], tmp_path)
