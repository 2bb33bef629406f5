"""Eight simulated devices: the same numbers as on one, where every array lives, and its share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.aot import collectives, dimensions
from t3jax import features, plan, sharding
from t3jax.data import PromptFormat, encode_records
from t3jax.head import head_scores
from t3jax.lm import ExpertsConfig, from_params
from t3jax.lm.cache import cache_shardings
from t3jax.pooling import causal_mean
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling import Controls, Sampler, truncation
from t3jax.sampling.cache import admit
from t3jax.sampling.loop import Program, Weights, decode_chunk, prefill, state_shardings
from t3jax.sharding import (
    batch_sharding,
    fit_sharding,
    make_mesh,
    param_shardings,
    place_abstract,
    row_shards,
)

BY_ROWS = sharding.ROWS
MESHES = [
    (data, fsdp, 8 // (data * fsdp))
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]
# All kinds of weights: an LM head of its own and every bias.
CONFIG = dataclasses.replace(tiny.CONFIG, tied=False, attention_bias=True, mlp_bias=True)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
# Rows, prompt slots, steps of a chunk and cache slots that the Sampler takes for the prompts below:
# what calls the loop itself then meets programs that are compiled already.
ROWS, LENGTH, STEPS = 8, 32, 16
PROMPTS = [[5, 9, 200, 31], [77], list(range(40, 65)), [3, 3, 3], [250, 1]]
DRAW = {"temperature": 1.0, "top_p": 0.9, "seed": 3}


def batch(vocab):
    """Tokens and mask of a batch padded on the left."""
    tokens = np.random.default_rng(0).integers(0, vocab, (ROWS, LENGTH)).astype(np.int32)
    return tokens, np.arange(LENGTH) >= np.arange(ROWS)[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(apply, unembed, params, head, tokens, mask):
    hidden, _ = apply(params, tokens, None, mask)
    pooled = causal_mean(hidden, mask)
    return hidden, pooled, unembed(params, hidden), head_scores(head, pooled)


def read(lm, head, tokens, mask):
    """Hidden states, features, logits and scores."""
    place = functools.partial(jax.device_put, device=batch_sharding(lm.mesh, tokens.shape))
    params = jax.device_put(head.params, param_shardings(lm.mesh, head.params))
    return forward(lm.apply, lm.unembed, lm.params, params, place(tokens), place(mask))


def outputs(config, mesh):
    """What is read at attended positions; greedy and drawn tokens."""
    lm = tiny.make_lm(config, mesh)
    head = tiny.make_head(lm)
    tokens, mask = batch(lm.vocab_size)
    arrays = [np.asarray(array)[mask] for array in read(lm, head, tokens, mask)]
    sampler = Sampler(lm, head, batch_size=ROWS, chunk=STEPS)
    greedy = sampler.generate(PROMPTS, max_new_tokens=12)
    drawn = sampler.generate(PROMPTS, max_new_tokens=12, **DRAW)
    return arrays, [s.tokens for s in greedy], [s.tokens for s in drawn]


@functools.cache
def on_one_device(config):
    return outputs(config, None)


def assert_equals_one_device(config, shape):
    arrays, greedy, drawn = outputs(config, make_mesh(shape))
    expected_arrays, expected_greedy, expected_drawn = on_one_device(config)
    for found, expected in zip(arrays, expected_arrays, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert greedy == expected_greedy
    assert drawn == expected_drawn
    assert drawn != greedy


@pytest.mark.parametrize("shape", MESHES)
def test_numbers_and_tokens_are_those_of_one_device(shape):
    assert_equals_one_device(CONFIG, shape)


def test_a_model_whose_widths_do_not_divide_works_too():
    assert_equals_one_device(tiny.ODD_CONFIG, (1, 2, 4))


def test_a_mixture_of_experts_works_too():
    assert_equals_one_device(tiny.MIXTURE, (2, 2, 2))
    experts = specs(tiny.make_lm(tiny.MIXTURE, make_mesh((2, 2, 2))).params["layers"][1]["experts"])
    assert experts["gate/weight"] == experts["up/weight"] == P("model", None, "fsdp")
    assert experts["down/weight"] == P("model", "fsdp")
    assert experts["router/weight"] == P()
    assert experts["shared/gate/weight"] == P("model", "fsdp")


def test_sinks_and_biases_of_experts_work_too():
    experts = ExpertsConfig(8, 2, 16, normed=True, bias=True, clamp=1.0)
    config = dataclasses.replace(CONFIG, attention_bias=True, sinks=True, experts=experts)
    params = tiny.make_params(config)
    params = jax.tree.map(
        lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 4, params
    )
    tokens, mask = batch(config.vocab_size)
    found = {}
    for shape in (None, (2, 2, 2)):
        mesh = None if shape is None else make_mesh(shape)
        placed = params if mesh is None else jax.device_put(params, param_shardings(mesh, params))
        lm = from_params(config, placed, None, (0,), "sinks", mesh)
        cache = lm.init_cache(len(tokens), tokens.shape[1] + 1)
        hidden, _, cache = tiny.read(lm.apply, lm.unembed, placed, tokens, mask, cache)
        _, logits, _ = tiny.read(lm.apply, lm.unembed, placed, tokens[:, :1], mask[:, -1:], cache)
        found[shape] = np.asarray(hidden)[mask], np.asarray(logits)
    for ours, alone in zip(found[2, 2, 2], found[None], strict=True):
        np.testing.assert_allclose(ours, alone, atol=2e-5 * np.abs(alone).max())
    assert specs(placed["layers"][0]["experts"])["down/bias"] == P("model")


def test_gated_delta_nets_work_too():
    assert_equals_one_device(tiny.DELTA, (2, 2, 2))
    lm = tiny.make_lm(tiny.DELTA, make_mesh((2, 2, 2)))
    delta = specs(lm.params["layers"][0]["delta"])
    assert delta["q/weight"] == delta["gate/weight"] == delta["fading/weight"] == P("model", "fsdp")
    assert delta["o/weight"] == P("fsdp", "model")
    assert delta["v_conv/weight"] == delta["log_rate"] == P("model")
    assert delta["norm/weight"] == P()
    memory = cache_shardings(lm.mesh, lm.init_cache(8, 8)).layers[0].memory
    assert memory.spec == P(BY_ROWS, "model")


def test_refined_text_is_that_of_one_device():
    """Heads of several shapes, gated, stop tokens protected: greedy text on 8 devices."""
    found = []
    for mesh in (None, make_mesh((2, 2, 2))):
        lm = tiny.make_lm(CONFIG, mesh)
        heads = [tiny.make_head(lm), tiny.make_head(lm, rank=3, seed=2)]
        refinements = Refinements(gated=True, protected=lm.eos_ids)
        sampler = Sampler(lm, heads, refinements=refinements, batch_size=ROWS, chunk=STEPS)
        found.append([s.tokens for s in sampler.generate(PROMPTS, max_new_tokens=12)])
    assert found[0] == found[1]
    assert found[0] != on_one_device(CONFIG)[1]


def test_rows_that_take_the_next_prompt_give_the_text_of_one_device():
    found = []
    for mesh in (None, make_mesh((1, 2, 4))):
        lm = dataclasses.replace(tiny.make_lm(ONE_LAYER, mesh), eos_ids=tuple(range(0, 264, 8)))
        sampler = Sampler(lm, tiny.make_head(lm), batch_size=4, chunk=4)
        samples = sampler.generate(PROMPTS * 2, max_new_tokens=12, **DRAW)
        found.append([sample.tokens for sample in samples])
    assert found[0] == found[1]
    assert len({len(tokens) for tokens in found[0]}) > 2


def specs(tree):
    """Path to PartitionSpec of every leaf."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


LAYER_SPECS = {
    "attention_norm/weight": P(),
    "attention/q/weight": P("model", "fsdp"),
    "attention/q/bias": P("model"),
    "attention/k/weight": P("model", "fsdp"),
    "attention/k/bias": P("model"),
    "attention/v/weight": P("model", "fsdp"),
    "attention/v/bias": P("model"),
    "attention/o/weight": P("fsdp", "model"),
    "attention/o/bias": P(),
    "mlp_norm/weight": P(),
    "mlp/gate/weight": P("model", "fsdp"),
    "mlp/gate/bias": P("model"),
    "mlp/up/weight": P("model", "fsdp"),
    "mlp/up/bias": P("model"),
    "mlp/down/weight": P("fsdp", "model"),
    "mlp/down/bias": P(),
}
PARAM_SPECS = {
    "embed/weight": P("model", "fsdp"),
    "lm_head/weight": P("model", "fsdp"),
    "final_norm/weight": P(),
    **{f"layers/{i}/{name}": spec for i in range(2) for name, spec in LAYER_SPECS.items()},
}


@pytest.mark.parametrize("shape", MESHES)
def test_specs_of_weights_and_head(shape):
    lm = tiny.make_lm(CONFIG, make_mesh(shape))
    assert specs(lm.params) == PARAM_SPECS
    head = param_shardings(lm.mesh, tiny.make_head(lm).params)
    assert head["output"].spec == P("model")
    assert head["hidden"][0]["weight"].spec == P()


@pytest.mark.parametrize("shape", MESHES)
def test_what_is_read_is_split_by_rows_and_vocabulary(shape):
    lm = tiny.make_lm(CONFIG, make_mesh(shape))
    arrays = read(lm, tiny.make_head(lm), *batch(lm.vocab_size))
    by_rows, by_both = P(BY_ROWS), P(BY_ROWS, None, "model")
    for array, spec in zip(arrays, (by_rows, by_rows, by_both, by_both), strict=True):
        assert array.sharding.is_equivalent_to(NamedSharding(lm.mesh, spec), 3), array.sharding


def decoding(shape, config=CONFIG, with_logprobs=False, refinements=PLAIN):
    """The loop's program, and the arguments of its prefill; then those of a chunk."""
    lm = tiny.make_lm(config, make_mesh(shape))
    head = tiny.make_head(lm)
    tokens, mask = batch(lm.vocab_size)
    place = functools.partial(jax.device_put, device=batch_sharding(lm.mesh, (ROWS,)))
    params = jax.device_put(head.params, param_shardings(lm.mesh, head.params))
    weights = Weights(lm.params, (params,), (jnp.float32(0),))
    program = Program(
        lm.apply,
        lm.unembed,
        lm.init_cache,
        (head.config,),
        "base",
        with_logprobs,
        lm.mesh,
        refinements,
    )
    ones, zeros = np.ones(ROWS, np.float32), np.zeros(ROWS, np.float32)
    controls = place(Controls(ones, ones, zeros, np.zeros(ROWS, np.int32), ones, zeros, ones))
    keys = place(jax.random.split(jax.random.key(0), ROWS))
    stop = jnp.asarray([263], jnp.int32)
    reading = (*place((tokens, mask)), keys, controls, LENGTH + 1 + STEPS, stop)
    return program, weights, reading, (place(zeros > 0), controls, stop, STEPS)


def decoding_state(shape):
    """The state of the loop after a prefill and a chunk, and the weights it reads."""
    program, weights, reading, writing = decoding(shape)
    state, _ = prefill(program, weights, *reading)
    before = specs(state.cache)
    state, emitted = decode_chunk(program, weights, state, *writing)
    assert specs(state.cache) == before
    assert emitted.tokens.sharding.is_fully_replicated  # every host reads it
    return state, weights, program.mesh


@pytest.mark.parametrize(
    ("shape", "refined"), [((2, 1, 4), False), ((1, 1, 8), True), ((2, 2, 2), True)]
)
def test_no_step_of_decoding_exchanges_anything_as_long_as_the_vocabulary(
    monkeypatch, shape, refined
):
    """Greedy and drawn (one program): each device sees its part of logits, noise and support."""
    monkeypatch.setattr(truncation, "FEW", 8)  # less than a part of this small vocabulary
    refinements = Refinements(gated=True, protected=(263,)) if refined else PLAIN
    program, weights, reading, writing = decoding(shape, ONE_LAYER, refined, refinements)
    state, _ = jax.eval_shape(lambda: prefill(program, weights, *reading))
    state = place_abstract(state, state_shardings(program.mesh, state))
    text = decode_chunk.lower(program, weights, state, *writing).compile().as_text()
    part, slots = 264 // shape[2], state.cache.positions.shape[1]
    exchanged = [(each.shape, dimensions(each.shape)) for each in collectives(text)]
    # What is gathered along `fsdp` are the rows of a weight.
    found = {name for name, sizes in exchanged if {264, part} & set(sizes)}
    assert found == ({f"f32[{part},32]"} if shape[1] > 1 else set())
    assert part in dimensions(text)
    assert 264 not in dimensions(text)
    # No keys and values: where their width is split, sums of scores for each slot.
    scores = {"f32[8,4,2,1,49]"} if shape[2] == 8 else set()
    assert {name for name, sizes in exchanged if slots in sizes} == scores


@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 2, 2)])
def test_rows_that_take_new_prompts_exchange_the_new_ones_alone(shape):
    program, weights, reading, _ = decoding(shape, ONE_LAYER)
    state, _ = jax.eval_shape(lambda: prefill(program, weights, *reading))
    few = row_shards(program.mesh)
    new = jax.tree.map(lambda x: x[:few] if x.ndim else x, reading[:4])
    new, _ = jax.eval_shape(lambda: prefill(program, weights, *new, LENGTH, reading[-1]))
    state, new = (place_abstract(x, state_shardings(program.mesh, x)) for x in (state, new))
    rows, start = (jax.ShapeDtypeStruct(n, jnp.int32) for n in ((few,), ()))
    compiled = admit.lower(program, state, new, rows, start).compile()
    found = compiled.output_shardings
    places = state_shardings(program.mesh, state)
    same = jax.tree.map(lambda x, s, p: s.is_equivalent_to(p, x.ndim), state, found, places)
    assert all(jax.tree.leaves(same))
    text = compiled.as_text()
    assert all(264 not in dimensions(each.shape) for each in collectives(text))
    assert (
        sum(each.size * each.count for each in collectives(text)) <= 2 * plan.shard_bytes(new) * few
    )


@pytest.mark.parametrize("shape", MESHES)
def test_specs_and_bytes_per_device_while_decoding(shape):
    """Weights, cache and W2 take at most 1.2 × total / shards of each device's memory."""
    state, weights, mesh = decoding_state(shape)
    # 4 key heads: 8 devices split their width instead.
    by_width = P(BY_ROWS, None, "model"), P(BY_ROWS, None, None, "model")
    specs = by_width if shape[2] == 8 else (P(BY_ROWS, "model"),) * 2
    # An axis of one device is no split: its name may be left out.
    for layer in state.cache.layers:
        for array, spec in zip(layer, specs, strict=True):
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), array.sharding
    rows = NamedSharding(mesh, P(BY_ROWS))
    assert state.seen.sharding.is_equivalent_to(NamedSharding(mesh, P(BY_ROWS, "model")), 2)
    assert state.cache.positions.sharding.is_equivalent_to(rows, 2)
    _, fsdp, model = shape
    for name, tree, shards in (
        ("weights", weights.params, fsdp * model),
        ("cache", state.cache, 8),
        ("W2", weights.heads[0]["output"], model),
    ):
        leaves = jax.tree.leaves(tree)
        total = sum(leaf.nbytes for leaf in leaves)
        for device in mesh.devices.flat:
            here = sum(
                shard.data.nbytes
                for leaf in leaves
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            assert here <= 1.2 * total / shards, f"{name}: {here} of {total} bytes on {device}"


def test_batches_and_caches_are_split_by_rows():
    mesh = make_mesh((2, 2, 2))
    assert row_shards(mesh) == 4
    assert batch_sharding(mesh, (8, 16)).spec == P(BY_ROWS)
    assert batch_sharding(mesh, (6, 16)).spec == P()  # 4 does not divide 6
    cache = jax.eval_shape(lambda: tiny.make_lm().init_cache(8, 24))
    shardings = cache_shardings(mesh, cache)
    assert shardings.layers[0].keys.spec == P(BY_ROWS, "model")
    assert shardings.positions.spec == P(BY_ROWS)
    assert shardings.cursor.spec == P()


def test_a_dimension_that_does_not_divide_is_kept_whole():
    mesh = make_mesh((2, 1, 4))
    assert fit_sharding(make_mesh((2, 2, 2)), P(BY_ROWS, "model"), (2, 4)).spec == P(None, "model")
    assert fit_sharding(mesh, P("data", "model"), (4, 8)).spec == P("data", "model")
    assert fit_sharding(mesh, P("data", "model"), (3, 8)).spec == P(None, "model")
    assert fit_sharding(mesh, P("data", "model"), (4, 6)).spec == P("data")
    assert fit_sharding(mesh, P("model"), (6,)).spec == P()
    assert fit_sharding(mesh, P("data"), ()).spec == P()


def test_features_are_those_of_one_device(tmp_path):
    rows = [{"question": f"Who wrote {'x' * i}?", "answer": f"{i} wrote it."} for i in range(5)]
    found = []
    for mesh in (None, make_mesh((2, 2, 2))):
        lm = tiny.make_lm(CONFIG, mesh)
        examples = encode_records(lm.tokenizer, rows, PromptFormat())
        found.append(features.load_or_compute_features(lm, examples, tmp_path / str(mesh)))
    assert found[0].key == found[1].key  # a digest of the weights, wherever they are
    np.testing.assert_allclose(found[0].pooled, found[1].pooled, atol=1e-5)
    np.testing.assert_array_equal(found[0].targets, found[1].targets)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, 1, -1), (2, 1, 4)), ((1, -1, 2), (1, 4, 2))],
)
def test_mesh_shapes(shape, expected):
    assert tuple(make_mesh(shape).shape.values()) == expected
    assert make_mesh().shape[sharding.DATA] == 8
    assert make_mesh(devices=jax.devices()[3:4]).size == 1


@dataclasses.dataclass(eq=False)
class Chip:
    """A TPU, as far as a mesh looks at it."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v5"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 8, 1), (1, 2, -1)])
def test_a_mesh_may_split_the_axes_of_the_network(shape):
    chips = [Chip(i, (i // 16, i // 4 % 4, i % 4)) for i in range(64)]
    mesh = make_mesh(shape, chips)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(64))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 1), r"\(2, 2, 1\) does not fit 8 devices"),
        ((3, -1, 1), r"\(3, -1, 1\) does not fit 8 devices"),
        ((16, 1, 1), r"\(16, 1, 1\) does not fit 8 devices"),
        ((-1, 1, 16), r"\(-1, 1, 16\) does not fit 8 devices"),
        ((-1, -1, 1), "one may be -1"),
        ((0, 1, 8), "positive"),
        ((-2, 1, 4), "positive"),
        ((2, 4), r"mesh \(2, 4\): expected \(data, fsdp, model\).* is \(2, 1, 4\)"),
        ((2, 2, 2, 1), r"expected \(data, fsdp, model\)"),
    ],
)
def test_a_mesh_that_does_not_use_every_device_once_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)
