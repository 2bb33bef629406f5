"""Cache keys: what changes them and what does not, and files whose bytes have changed."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from damage import damaged

import t3jax
from t3jax import checked, digests
from t3jax.lm import from_params


def with_config(lm, **change):
    config = dataclasses.replace(lm.config, **change)
    return from_params(config, lm.params, lm.tokenizer, lm.eos_ids, lm.name, lm.mesh)


def with_tokenizer(lm, change):
    tokenizer = tiny.make_tokenizer()
    change(tokenizer)
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_equal_weights_of_another_model_have_another_digest(tiny_lm):
    rope = dataclasses.replace(tiny.CONFIG.rope, theta=500000.0)
    others = {
        "as it is": tiny_lm,
        "rope_theta": with_config(tiny_lm, rope=rope),
        "norm_eps": with_config(tiny_lm, norm_eps=1e-6),
        "window": with_config(tiny_lm, window=8, local=(True, False)),
        "context": with_config(tiny_lm, max_position=128),
        "eos": dataclasses.replace(tiny_lm, eos_ids=(*tiny_lm.eos_ids, 3)),
        "dtype": dataclasses.replace(
            tiny_lm, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_lm.params)
        ),
        "no tokenizer": dataclasses.replace(tiny_lm, tokenizer=None),
        "template": with_tokenizer(
            tiny_lm, lambda t: setattr(t, "chat_template", t.chat_template + " ")
        ),
        "token": with_tokenizer(tiny_lm, lambda t: t.add_tokens(["new"])),
        "special": with_tokenizer(tiny_lm, lambda t: setattr(t, "pad_token", "<|bos|>")),
        "normaliser": with_tokenizer(
            tiny_lm, lambda t: setattr(t.backend_tokenizer, "normalizer", lowercase())
        ),
    }
    found = {digests.model_digest(lm): name for name, lm in others.items()}
    assert len(found) == len(others), found


def lowercase():
    import tokenizers

    return tokenizers.normalizers.Lowercase()


def test_the_digest_is_of_what_a_model_is_and_not_of_where_it_lies(tiny_lm):
    mesh = t3jax.make_mesh((2, 2, 2))
    sharded = jax.device_put(tiny_lm.params, t3jax.sharding.param_shardings(mesh, tiny_lm.params))
    elsewhere = from_params(
        tiny_lm.config, sharded, tiny.make_tokenizer(), tiny_lm.eos_ids, "/another/folder", mesh
    )
    # Used before: a call sets how the tokenizer pads and truncates.
    elsewhere.tokenizer(["a", "bc"], padding=True, truncation=True, max_length=2)
    assert digests.params_digest(sharded) == digests.params_digest(tiny_lm.params)
    assert digests.model_digest(elsewhere) == digests.model_digest(tiny_lm)


def own_model(scale=1.0, table=None, inner=1.0):
    """A model of the user's own; `inner` is used by a function that `apply` calls."""

    @jax.jit
    def layer(hidden):
        return jnp.tanh(hidden * inner)

    def apply(params, tokens, positions, mask, cache):
        hidden = params["embed"][tokens] * scale
        return layer(hidden if table is None else hidden + table[None, None]), cache

    def unembed(params, hidden):
        return hidden @ params["embed"].T

    params = {"embed": jnp.arange(64.0).reshape(16, 4)}
    return t3jax.make_lm(apply, unembed, params, max_position=32)


def test_functions_of_the_user_s_own_are_told_apart_by_what_they_compute():
    rows = np.arange(4, dtype=np.float32)
    models = [
        own_model(),
        own_model(scale=2.0),
        own_model(inner=2.0),
        own_model(table=rows),
        own_model(table=rows + 1),
    ]
    found = [digests.model_digest(model) for model in models]
    assert len(set(found)) == len(models)
    assert digests.model_digest(own_model(table=rows)) == found[3]


def test_a_loaded_model_with_other_functions_is_another(tiny_lm):
    def halved(*args):
        hidden, cache = tiny_lm.apply(*args)
        return hidden * jnp.float32(0.5), cache

    other = dataclasses.replace(tiny_lm, apply=halved)
    assert digests.model_digest(other) != digests.model_digest(tiny_lm)


def test_a_single_number_changes_the_digest_of_weights():
    params = {"a": jnp.arange(600.0).reshape(20, 30), "b": jnp.ones(7, jnp.bfloat16)}
    found = {digests.params_digest(params)}
    for place in ((0, 0), (19, 29), (3, 7)):
        bits = jax.lax.bitcast_convert_type(params["a"], jnp.uint32)
        for bit in (0, 13, 31):
            flipped = bits.at[place].set(bits[place] ^ jnp.uint32(1 << bit))
            changed = jax.lax.bitcast_convert_type(flipped, jnp.float32)
            found.add(digests.params_digest({**params, "a": changed}))
    found.add(digests.params_digest({**params, "a": params["a"][::-1]}))
    found.add(digests.params_digest({**params, "b": params["b"].at[6].set(2)}))
    assert len(found) == 12


def test_code_is_all_that_is_imported():
    computes = {
        "t3jax.features": {"batching", "pooling", "lm.decoder", "lm.product", "lm.quantized"},
        "t3jax.evaluation.scoring": {"batching", "guidance", "head", "refinements", "lm.decoder"},
        "t3jax.sampling.sampler": {"sampling.loop", "sampling.next_token", "refinements", "head"},
        "t3jax.synthetic.writing": {"sampling.sampler", "synthetic.names", "data.chat"},
    }
    for module, needed in computes.items():
        reached = digests.imported_modules(module)
        assert {f"t3jax.{name}" for name in needed} <= set(reached), module
        assert not any(name.startswith(("t3jax.report", "t3jax.training")) for name in reached)


def test_a_change_of_code_changes_what_imports_it(tmp_path, monkeypatch):
    package = tmp_path / "t3jax"
    sources = {
        "a.py": "import numpy\nfrom t3jax import b\ndef f():\n    from t3jax.deep import name\n",
        "b.py": "from .deep.inner import x as y\n",
        "deep/__init__.py": "from t3jax.deep.other import name\n",
        "deep/inner.py": "import t3jax.c\n",
        "deep/other.py": "name = 1\n",
        "c.py": "",
        "d.py": "from t3jax import a\n",
    }
    for name, source in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    monkeypatch.setattr(digests, "_ROOT", package)

    def digest():
        digests._imports.cache_clear()
        digests.code_digest.cache_clear()
        return digests.code_digest("t3jax.a")

    reached = digests.imported_modules("t3jax.a")
    assert reached == ["t3jax." + n for n in ("a", "b", "c", "deep", "deep.inner", "deep.other")]
    before = digest()
    (package / "d.py").write_text("changed = 1\n")
    assert digest() == before
    for name in sources.keys() - {"d.py"}:
        text = (package / name).read_text()
        (package / name).write_text(text + "# changed\n")
        assert digest() != before, name
        (package / name).write_text(text)
    assert digest() == before
    digests._imports.cache_clear()
    digests.code_digest.cache_clear()


# Files.


def test_every_change_of_a_stored_file_is_noticed(tmp_path):
    content = [{"text": "naïve \n", "tokens": [1, 2]}, {"text": "", "tokens": []}]
    checked.write_json(tmp_path / "a" / "x.json", content)
    assert checked.read_json(tmp_path / "a" / "x.json") == content
    assert json.loads((tmp_path / "a" / "x.json").read_text("utf-8"))["content"] == content
    arrays = {"logprobs": np.arange(5, dtype=np.float32), "flags": np.array([True, False])}
    checked.write_arrays(tmp_path / "x.npz", arrays)
    for read in (checked.read_arrays, np.load):
        found = read(tmp_path / "x.npz")
        assert sorted(found) == sorted(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    for path, read in (
        (tmp_path / "a" / "x.json", checked.read_json),
        (tmp_path / "x.npz", checked.read_arrays),
    ):
        whole = path.read_bytes()
        for data in [*damaged(whole, len(whole)), b"", whole + b"\n", whole[::-1]]:
            path.write_bytes(data)
            with pytest.raises(checked.DamagedError, match=f"{path.name}: damaged"):
                read(path)
        assert [each.name for each in path.parent.glob("*x*")] == [path.name]


def test_the_checksum_of_a_file_reads_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checked, "_CHUNK", 64)
    path: pathlib.Path = tmp_path / "data"
    whole = np.random.default_rng(0).bytes(1000)
    path.write_bytes(whole)
    found = {checked.file_checksum(path)}
    for data in damaged(whole, 100):
        path.write_bytes(data)
        found.add(checked.file_checksum(path))
    assert len(found) == 102
    path.write_bytes(whole[64:128] + whole[:64] + whole[128:])  # two chunks in another order
    assert checked.file_checksum(path) not in found
