"""Fine-tuning: batches, the step, LoRA, runs that stop, eight devices."""

import dataclasses
import gc
import json
import multiprocessing
import pathlib
import shutil
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from damage import damaged
from jax.sharding import PartitionSpec as P

from configs import default
from t3jax import make_mesh, pipeline, sharding
from t3jax.data import Example
from t3jax.finetuning import FinetuneConfig, Trainer, finetune, init_lora, merge_lora
from t3jax.finetuning.batches import epoch_batches, make_batch
from t3jax.finetuning.recipe import learning_rate_schedule
from t3jax.lm import decoder, save_hf

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)
# Few rows, so that one program serves every batch.
RECIPE = FinetuneConfig(
    epochs=2, batch_size=8, learning_rate=1e-2, warmup_steps=2, seed=3, checkpoint_every=2
)
STEPS = 6


def examples(count=20, seed=0):
    """Random texts of 20 to 30 tokens."""
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(0, 264, n).astype(np.int32), answer_start=int(n) - 12)
        for n in rng.integers(20, 31, count)
    ]


def make_trainer(config=RECIPE, mesh=None):
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return Trainer(CONFIG, tiny.make_params(CONFIG), config, STEPS, mesh)


def train(trainer, steps=3):
    """Losses and gradient norms of some steps, and what was trained."""
    state, numbers = trainer.init(), []
    for step in range(steps):
        state, loss, norm = trainer.step(state, examples(8, seed=step))
        numbers.append((float(loss), float(norm)))
    return numbers, state[0]


def assert_close(found, expected, atol=2e-4):
    """Numbers of steps, and trained leaves: where a gradient is near 0, Adam magnifies rounding."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.fixture(scope="module")
def plain():
    return train(make_trainer())


# Batches.


def test_an_epoch_reads_each_row_once_and_texts_of_like_length_together():
    lengths = np.random.default_rng(0).integers(10, 100, 50)
    first, again, other = (epoch_batches(lengths, 8, 1, epoch) for epoch in (0, 0, 1))
    assert sorted(np.concatenate(first)) == list(range(50))
    assert sorted(map(len, first)) == [2, 8, 8, 8, 8, 8, 8]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))
    assert max(np.ptp(lengths[batch]) for batch in first) < 40


@pytest.mark.parametrize(("shape", "prompt_weight"), [((1, 8, 1), 0.0), ((2, 4, 2), 0.1)])
def test_a_batch_holds_every_scored_token_and_where_it_is_predicted(shape, prompt_weight):
    rows = examples(7)
    batch = make_batch(rows, shape, 256, prompt_weight)
    microbatches, height, shards = shape
    assert batch.tokens.shape == (microbatches, height, 32)
    blocks = batch.tokens.reshape(microbatches, shards, -1)
    found = []
    for m in range(microbatches):
        for s in range(shards):
            for place, label, weight in zip(
                batch.places[m, s], batch.labels[m, s], batch.weights[m, s], strict=True
            ):
                if weight:
                    assert blocks[m, s, place + 1] == label
                    found.append((int(blocks[m, s, place]), int(label), round(float(weight), 6)))
    expected = [
        (int(row.tokens[t - 1]), int(row.tokens[t]), 1.0 if t >= row.answer_start else 0.1)
        for row in rows
        for t in range(1 if prompt_weight else row.answer_start, len(row.tokens))
    ]
    assert sorted(found) == sorted(expected)


def test_padding_never_passes_the_models_context():
    assert make_batch(examples(2), (1, 2, 1), longest=30).tokens.shape[-1] == 30


# The step.


def test_loss_is_the_mean_over_answer_tokens():
    trainer = make_trainer()
    rows = examples(8)
    _, loss, _ = trainer.step(trainer.init(), rows)
    params, losses = tiny.make_params(CONFIG), []
    read = jax.jit(
        lambda tokens: decoder.unembed(CONFIG, params, decoder.apply(CONFIG, params, tokens)[0])
    )
    for row in rows:
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(row.tokens)] = row.tokens
        logprobs = jax.nn.log_softmax(read(tokens)[0])
        losses += [
            -logprobs[t - 1, row.tokens[t]] for t in range(row.answer_start, len(row.tokens))
        ]
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(trainer.loss(trainer.init()[0], rows), np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("change", [{"microbatches": 3}, {"remat": True}])
def test_microbatches_and_remat_take_the_same_steps(plain, change):
    assert_close(train(make_trainer(dataclasses.replace(RECIPE, **change))), plain)


def test_bfloat16_is_near_and_weights_stay_float32(plain):
    numbers, trained = train(make_trainer(dataclasses.replace(RECIPE, dtype="bfloat16")))
    np.testing.assert_allclose(numbers, plain[0], rtol=0.02)
    assert numbers != plain[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype("float32")}


def test_rate_rises_and_falls():
    rates = [float(learning_rate_schedule(RECIPE, STEPS)(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates[:3], [0.0, 0.005, 0.01], rtol=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    np.testing.assert_allclose(rates[-1], 2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, r"epochs = 0: expected a whole number in \[1"),
        ({"learning_rate": 0.0}, r"learning_rate = 0.0: expected a number in \(0"),
        ({"lora_rank": -1}, r"lora_rank = -1: expected a whole number in \[0"),
        ({"microbatches": 9}, "cannot be cut into 9 microbatches"),
        ({"dtype": "int8"}, "dtype = 'int8': expected one of float32, bfloat16"),
    ],
)
def test_a_bad_recipe_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)


# LoRA.

LORA = dataclasses.replace(RECIPE, lora_rank=4, lora_layers=("q", "o", "down"))


@pytest.fixture(scope="module")
def lora_run():
    return train(make_trainer(LORA))


def test_lora_starts_at_the_base_model_and_trains_its_factors_alone(plain, lora_run):
    numbers, trained = lora_run
    np.testing.assert_allclose(numbers[0][0], plain[0][0][0], rtol=1e-6)
    assert set(trained) == {
        f"layers/0/{name}" for name in ("attention/q", "attention/o", "mlp/down")
    }
    assert trained["layers/0/mlp/down"]["a"].shape == (4, 64)
    assert trained["layers/0/mlp/down"]["b"].shape == (32, 4)
    assert all(np.abs(factors["b"]).max() > 1e-3 for factors in trained.values())


def test_merged_weights_are_the_updated_model(lora_run):
    params = tiny.make_params(CONFIG)
    merged = merge_lora(params, lora_run[1], LORA.lora_scale)
    tokens = jnp.arange(40).reshape(2, 20)
    scaled = jax.tree.map_with_path(
        lambda path, x: x * LORA.lora_scale if path[-1].key == "b" else x, lora_run[1]
    )
    beside, _ = decoder.apply(CONFIG, params, tokens, lora=scaled)
    inside, _ = decoder.apply(CONFIG, merged, tokens)
    base, _ = decoder.apply(CONFIG, params, tokens)
    np.testing.assert_allclose(inside, beside, atol=1e-5)
    assert np.abs(inside - base).max() > 1e-2
    untouched = [tree["layers"][0]["attention"]["k"]["weight"] for tree in (merged, params)]
    assert untouched[0] is untouched[1]


def test_lora_refuses_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"no linear layer named \['gateway'\]"):
        init_lora(tiny.make_params(CONFIG), 2, ("q", "gateway"), jax.random.key(0))


# Eight devices.


@pytest.mark.parametrize(("recipe", "run"), [(RECIPE, "plain"), (LORA, "lora_run")])
def test_eight_devices_take_the_steps_of_one(recipe, run, request):
    trainer = make_trainer(recipe, make_mesh((2, 2, 2)))
    assert_close(train(trainer), request.getfixturevalue(run))


@pytest.mark.parametrize("recipe", [RECIPE, LORA])
def test_weights_and_moments_are_split_over_the_mesh(recipe):
    trainer = make_trainer(recipe, make_mesh((2, 2, 2)))
    trained, opt_state = trainer.init()
    moments = optax.tree.get(opt_state, "mu"), optax.tree.get(opt_state, "nu")
    for tree in (trained, *moments):
        specs = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        if recipe is LORA:
            assert specs["layers/0/attention/q/a"] == P(None, sharding.FSDP)
            assert specs["layers/0/attention/q/b"] == P(sharding.MODEL)
            assert specs["layers/0/mlp/down/a"] == P(None, sharding.MODEL)
            assert specs["layers/0/mlp/down/b"] == P(sharding.FSDP)
        else:
            assert specs["embed/weight"] == P(sharding.MODEL, sharding.FSDP)
            assert specs["layers/0/mlp/down/weight"] == P(sharding.FSDP, sharding.MODEL)
            assert specs["final_norm/weight"] == P()


# Runs.


def run(folder, recipe=RECIPE, **options):
    return finetune(
        CONFIG,
        tiny.make_params(CONFIG),
        examples(),
        recipe,
        validation=examples(4, seed=9),
        workdir=folder,
        **options,
    )


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_bits(found, expected):
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuning") / "whole"
    return run(folder), metrics(folder), folder


def test_a_run_learns_and_logs_every_step(uninterrupted):
    trained, lines, _ = uninterrupted
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    expected = make_trainer().loss(trained, examples(4, seed=9))
    np.testing.assert_allclose(lines[-1]["validation_loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("recipe", [RECIPE, LORA], ids=["all weights", "lora"])
def test_an_interrupted_run_ends_with_the_same_bits(recipe, uninterrupted, tmp_path, monkeypatch):
    expected = uninterrupted
    if recipe is LORA:
        expected = run(tmp_path / "whole", recipe), metrics(tmp_path / "whole")
    step = Trainer.step
    calls = []

    def stop(self, state, rows):
        calls.append(rows)
        if len(calls) in (4, 7):  # after a checkpoint and a step, and then right after one
            raise KeyboardInterrupt
        return step(self, state, rows)

    monkeypatch.setattr(Trainer, "step", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", recipe)
    assert len(metrics(tmp_path / "stopped")) == 4
    assert_same_bits(run(tmp_path / "stopped", recipe), expected[0])
    assert metrics(tmp_path / "stopped") == expected[1]
    # Once more: nothing is left to do.
    monkeypatch.setattr(Trainer, "step", None)
    assert_same_bits(run(tmp_path / "stopped", recipe), expected[0])


def killed(folder: pathlib.Path) -> None:
    """Fine-tunes in a process of its own, set up as the tests are."""
    import conftest  # noqa: F401

    run(folder)


def test_a_killed_run_ends_with_the_same_bits(uninterrupted, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert_same_bits(run(tmp_path), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


# Orbax leaves reads alone that are under way when one fails; they are collected at the end of the
# test, where the warnings are ignored.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_damaged_checkpoint_gives_way_to_the_one_before(uninterrupted, tmp_path, monkeypatch):
    """To the bit the same in the end; without one before it, a refusal."""
    step, calls = Trainer.step, []

    def stop(self, state, rows):
        calls.append(rows)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, state, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    newest = tmp_path / "stopped" / "checkpoints" / "4"
    arrays = {path: path.read_bytes() for path in newest.rglob("d/*") if path.is_file()}
    assert arrays
    for i, length in enumerate((1.0, 0.5)):  # whole with other bytes in the middle; cut short
        for path, data in arrays.items():
            quarter = len(data) // 4
            middle = bytes(255 - byte for byte in data[quarter : -quarter or None])
            changed = data[:quarter] + middle + data[len(data) - quarter :]
            path.write_bytes(changed[: int(length * len(data))])
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "stopped", folder)
        with pytest.warns(UserWarning, match=r"goes on from step 2.*damaged:\n.*checkpoints/4: "):
            assert_same_bits(run(folder), uninterrupted[0])
        assert metrics(folder) == uninterrupted[1]
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"no checkpoint is as it was saved:\n.*checkpoints/4"):
        run(tmp_path / "stopped")
    gc.collect()
    assert newest.is_dir()


def test_a_changed_log_is_noticed(uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[2], folder)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace('"step": 5', '"step": 7')
    path.write_text("".join(lines))
    with pytest.warns(
        UserWarning, match=r"goes on from step 4.*\n.*metrics.jsonl is not as it was"
    ):
        assert_same_bits(run(folder), uninterrupted[0])
    assert metrics(folder) == uninterrupted[1]


# The folder of a fine-tuned model.


@pytest.fixture
def to_finetune(tmp_path, monkeypatch):
    """A config of a model to be fine-tuned, and the shapes of those that were."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "Who?", "answer": "Ada."}) + "\n")
    fields = {"model": str(tmp_path / "base"), "finetune.workdir": str(tmp_path / "run")}
    config = tiny.make_settings(default, fields | {"finetune.data": (str(rows),)})
    write_model(tmp_path / "base")
    trained = []

    def fake(lm_config, params, *_, **__):
        trained.append(lm_config)
        return params

    monkeypatch.setattr(pipeline.models, "train_weights", fake)
    return config, trained


def write_model(folder, config=CONFIG, eos_ids=None, template=tiny.CHATML):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    eos_ids = [tokenizer.eos_token_id] if eos_ids is None else eos_ids
    save_hf(folder, config, tiny.make_params(CONFIG), eos_ids, jnp.float32)
    tokenizer.save_pretrained(folder)


def test_a_changed_model_is_fine_tuned_anew_and_the_same_one_is_not(to_finetune, tmp_path):
    config, trained = to_finetune
    mesh = make_mesh(devices=jax.devices()[:1])
    rope = dataclasses.replace(CONFIG.rope, theta=500000.0)
    base = tmp_path / "base"
    pipeline.finetune_once(config, mesh)
    for change in (
        {"config": dataclasses.replace(CONFIG, rope=rope)},
        {"eos_ids": [1, 2]},
        {"template": tiny.CHATML + "{# of another version #}"},
    ):
        before = len(trained)
        write_model(base, **change)
        folder = pipeline.finetune_once(config, mesh)
        assert len(trained) == before + 1, change
        # The same model in another place is the same.
        moved = shutil.copytree(base, tmp_path / f"moved-{before}")
        config = dataclasses.replace(config, model=str(moved))
        assert pipeline.finetune_once(config, mesh) == folder
        assert len(trained) == before + 1, change
        config = dataclasses.replace(config, model=str(base))


def test_a_damaged_fine_tuned_folder_is_never_taken_for_whole(to_finetune):
    config, trained = to_finetune
    mesh = make_mesh(devices=jax.devices()[:1])
    folder = pipeline.finetune_once(config, mesh)
    for name in ("model.safetensors", "config.json"):
        path = folder / name
        whole = path.read_bytes()
        for data in damaged(whole, 3):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=f"{name} is not the file that fine-tuning wrote"):
                pipeline.finetune_once(config, mesh)
        path.write_bytes(whole)
    record = folder / "finetuning.json"
    flipped, *_ = damaged(record.read_bytes(), 3)
    record.write_bytes(flipped)
    with pytest.warns(UserWarning, match=r"finetuning.json: damaged"):
        pipeline.finetune_once(config, mesh)
    assert len(trained) == 2
    pipeline.finetune_once(config, mesh)
    assert len(trained) == 2


def test_another_recipe_in_the_same_folder_is_refused(uninterrupted):
    folder = uninterrupted[2]
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 there, 0\.02 asked for"):
        run(folder, dataclasses.replace(RECIPE, learning_rate=0.02))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    params = tiny.make_params(CONFIG)
    params["final_norm"]["weight"] = params["final_norm"]["weight"] * jnp.float32(jnp.inf)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        finetune(CONFIG, params, examples(), RECIPE, workdir=tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no examples"),
        ([Example(np.zeros(300, np.int32), 5)], "has 300 tokens, more than the 256"),
        ([Example(np.array([1, 300], np.int32), 1)], "token id 300, but the model has 264 tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        finetune(CONFIG, tiny.make_params(CONFIG), rows, RECIPE)
