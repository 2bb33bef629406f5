"""Training the head: equal to plain dense training, on any mesh; its files and its errors."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from t3jax import sharding
from t3jax.digests import params_digest
from t3jax.distillation import SoftTargets
from t3jax.features import Features
from t3jax.head import HeadConfig, classifier_loss, head_scores, init_head, target_scores
from t3jax.head_io import Head, load_head
from t3jax.training import (
    TrainConfig,
    batches,
    learning_rate_schedule,
    make_members,
    train_heads,
)
from t3jax.training import (
    heads as training_heads,
)
from t3jax.training import (
    trainer as training_trainer,
)

D, V = 6, 50
HEAD = HeadConfig(D, V, rank=4)
TRAIN = TrainConfig(epochs=6, warmup_ratio=1 / 3, batch_size=4, weight_decay=0.1)


def make_features(sequences: int, seed: int, shift: float = 0.0, vocabulary: int = 30) -> Features:
    """Ragged sequences of 1 to 7 answer tokens; only some of the vocabulary occurs."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *rng.integers(1, 8, sequences)])
    pooled = rng.normal(shift, 1.0, (starts[-1], D)).astype(np.float32)
    return Features(pooled, rng.integers(0, vocabulary, starts[-1]).astype(np.int32), starts)


RETAIN, FORGET = make_features(13, 0, 0.4), make_features(10, 1, -0.4)


def restated_batches(config: TrainConfig, seed: int):
    """Every batch of a run: features, targets, labels and mask, padded to one size."""
    size = config.batch_size * 2 * 7

    def rows(features, sequences):
        parts = [np.arange(features.starts[i], features.starts[i + 1]) for i in sequences]
        return np.concatenate(parts)

    for epoch in range(1, config.epochs + 1):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(FORGET.num_sequences)
        drawn = rng.integers(RETAIN.num_sequences, size=FORGET.num_sequences)
        for i in range(0, len(order), config.batch_size):
            batch = slice(i, i + config.batch_size)
            retain, forget = rows(RETAIN, drawn[batch]), rows(FORGET, order[batch])
            count = len(retain) + len(forget)
            pooled = np.zeros((size, D), np.float32)
            pooled[:count] = np.concatenate([RETAIN.pooled[retain], FORGET.pooled[forget]])
            targets = np.zeros(size, np.int32)
            targets[:count] = np.concatenate([RETAIN.targets[retain], FORGET.targets[forget]])
            yield pooled, targets, np.arange(size) < len(retain), np.arange(size) < count


def restated_rate(config: TrainConfig, step: int) -> float:
    """transformers' get_linear_schedule_with_warmup, from its documentation."""
    steps = -(-FORGET.num_sequences // config.batch_size)
    total = config.epochs * steps
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    return config.learning_rate * max(0.0, (total - step) / max(1, total - warmup))


def dense_training(head_config: HeadConfig, config: TrainConfig, seed: int, init=None):
    """Plain training with all rows of W2 and scores of all tokens."""
    params = init or init_head(jax.random.key(seed), head_config, config.zero_output)
    rates = jnp.asarray([restated_rate(config, step) for step in range(1000)], jnp.float32)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(lambda step: rates[step], weight_decay=config.weight_decay),
    )
    state = optimizer.init(params)

    def loss_fn(params, pooled, targets, retain, mask):
        every = head_scores(params, pooled, head_config.activation)
        return classifier_loss(every[np.arange(len(targets)), targets], retain, mask)

    @jax.jit
    def step(params, state, *batch):
        with jax.numpy_dtype_promotion("standard"):
            grads = jax.grad(loss_fn)(params, *batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    for batch in restated_batches(config, seed):
        params, state = step(params, state, *batch)
    return params


def assert_close(params, expected, relative=1e-6):
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.shape == other.shape
        np.testing.assert_allclose(leaf, other, rtol=0, atol=relative * np.abs(other).max())


@pytest.mark.parametrize(
    "head_config",
    [HEAD, dataclasses.replace(HEAD, activation="gelu", num_hidden_layers=2, bias=True)],
    ids=["paper", "deep"],
)
def test_equals_dense_training(head_config):
    heads = train_heads(RETAIN, FORGET, head_config, TRAIN, seeds=(7,))
    assert_close(heads[0].params, dense_training(head_config, TRAIN, 7))
    # And it did train: far from where it started, on both layers.
    start = init_head(jax.random.key(7), head_config)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), heads[0].params, start)
    assert min(jax.tree.leaves(moved)) > 0.01


def test_training_starts_at_a_given_head(tmp_path):
    params = init_head(jax.random.key(99), HEAD)
    init = Head(HEAD, params, 1.0, 1.0, "")
    (head,) = train_heads(RETAIN, FORGET, HEAD, TRAIN, (7,), init=init, workdir=tmp_path)
    assert_close(head.params, dense_training(HEAD, TRAIN, 7, params))
    assert head.record["init"] == params_digest(params)
    with pytest.raises(ValueError, match=r"init: \w+ there, None asked for"):
        train_heads(RETAIN, FORGET, HEAD, TRAIN, (7,), workdir=tmp_path)
    other = dataclasses.replace(HEAD, rank=5, activation="gelu")
    with pytest.raises(ValueError, match=r"rank 4 where 5 is and activation 'identity' where 'g"):
        train_heads(RETAIN, FORGET, other, TRAIN, init=init)


def test_seeds_trained_together_equal_seeds_trained_alone():
    together = train_heads(RETAIN, FORGET, HEAD, TRAIN, seeds=(3, 0))
    for head, seed in zip(together, (3, 0), strict=True):
        (alone,) = train_heads(RETAIN, FORGET, HEAD, TRAIN, seeds=(seed,))
        assert_close(head.params, alone.params)
        assert head.record["final"]["seed"] == seed
    assert np.abs(together[0].params["output"] - together[1].params["output"]).max() > 0.1


def test_recipes_trained_together_equal_recipes_trained_alone(tmp_path):
    configs = [
        dataclasses.replace(TRAIN, learning_rate=rate, weight_decay=decay)
        for rate, decay in ((0.1, 0.0), (0.01, 0.5))
    ]
    together = train_heads(RETAIN, FORGET, HEAD, configs, (3, 0), workdir=tmp_path)
    members = make_members(configs, (3, 0))
    assert members[3].name == "head-lr0.01-wd0.5-seed0"
    for head, member in zip(together, members, strict=True):
        (alone,) = train_heads(RETAIN, FORGET, HEAD, member.config, (member.seed,))
        assert_close(head.params, alone.params)
        assert head.record["training"] == {**dataclasses.asdict(member.config), "seed": member.seed}
        loaded = load_head(tmp_path / member.name)
        chex.assert_trees_all_equal(loaded.params, head.params)
    assert np.abs(together[0].params["output"] - together[2].params["output"]).max() > 0.1
    longer = dataclasses.replace(TRAIN, epochs=9)
    for wrong in ([TRAIN, longer], [TRAIN, TRAIN], []):
        with pytest.raises(ValueError, match="recipes"):
            train_heads(RETAIN, FORGET, HEAD, wrong)


def test_eight_devices_equal_one():
    # 8 does not divide the tokens of the sets.
    config = dataclasses.replace(TRAIN, holdout_fraction=0.2)
    head_config = dataclasses.replace(HEAD, vocab_size=56)
    (one,) = train_heads(RETAIN, FORGET, head_config, config)
    for shape in ((8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
        (head,) = train_heads(RETAIN, FORGET, head_config, config, mesh=sharding.make_mesh(shape))
        assert_close(head.params, one.params, relative=2e-6)
        np.testing.assert_allclose(
            list(head.record["final"].values()), list(one.record["final"].values()), rtol=1e-5
        )
        output = head.params["output"]
        assert output.sharding.spec == P("model")
        assert {s.data.shape[0] for s in output.addressable_shards} == {56 // shape[2]}


def test_placement_of_training_arrays():
    mesh = sharding.make_mesh((2, 2, 2))
    data = batches.Data.build([RETAIN], FORGET, HEAD, TRAIN, mesh)
    assert data.train.pooled.sharding.spec == P(sharding.ROWS)
    tokens = RETAIN.num_tokens + FORGET.num_tokens
    share = (1, -(-tokens // 4), RETAIN.pooled.shape[1])
    assert {s.data.shape for s in data.train.pooled.addressable_shards} == {share}
    # Filled up with tokens that never occur, so that 2 devices divide the rows.
    assert len(data.vocabulary) % 2 == 0
    members = make_members([TRAIN], (1, 2))
    planner = batches.Planner(data, members, mesh)
    rows, _ = planner.epoch(1)
    assert rows.sharding.spec == P(None, None, sharding.ROWS)
    trainer = training_trainer.Trainer(data, HEAD, members, planner.steps, mesh)
    state = trainer.init()
    for _ in range(2):
        state, _, _ = trainer.train_epoch(state, rows)
        leaves = jax.tree.leaves_with_path(state)
        outputs = [leaf for path, leaf in leaves if "output" in jax.tree_util.keystr(path)]
        assert len(outputs) == 3  # the weights and AdamW's two means
        assert all(leaf.sharding.spec == P(None, "model") for leaf in outputs)


def test_one_trace_for_all_epochs_and_runs(monkeypatch):
    traces = []

    def counted(*args, **kwargs):
        traces.append(args)
        return classifier_loss(*args, **kwargs)

    monkeypatch.setattr(training_trainer, "classifier_loss", counted)
    training_trainer.compile_programs.cache_clear()
    train_heads(RETAIN, FORGET, HEAD, TRAIN, seeds=(1, 2))
    other = dataclasses.replace(TRAIN, learning_rate=0.02, weight_decay=0.0)
    train_heads(RETAIN, FORGET, HEAD, other, seeds=(3, 4))
    assert len(traces) == 1
    training_trainer.compile_programs.cache_clear()


def test_bfloat16_features_train_in_float32():
    half = [
        dataclasses.replace(f, pooled=f.pooled.astype(ml_dtypes.bfloat16)) for f in (RETAIN, FORGET)
    ]
    full = [dataclasses.replace(f, pooled=f.pooled.astype(np.float32)) for f in half]
    (head,) = train_heads(*half, HEAD, TRAIN)
    (expected,) = train_heads(*full, HEAD, TRAIN)
    assert head.params["output"].dtype == jnp.float32
    assert_close(head.params, expected.params)


def test_zero_output_leaves_unseen_tokens_untilted():
    config = dataclasses.replace(TRAIN, zero_output=True)
    (head,) = train_heads(RETAIN, FORGET, HEAD, config)
    seen = np.union1d(RETAIN.targets, FORGET.targets)
    output = np.asarray(head.params["output"])
    assert np.all(np.any(output[seen] != 0, axis=1))
    assert not np.any(np.delete(output, seen, axis=0))


@pytest.mark.parametrize("warmup_ratio", [0.0, 1 / 3, 0.5, 1.0])
def test_schedule(warmup_ratio):
    config = dataclasses.replace(TRAIN, warmup_ratio=warmup_ratio)
    schedule = learning_rate_schedule(config, steps_per_epoch=3)
    rates = [float(schedule(step)) for step in range(19)]
    expected = [restated_rate(config, step) for step in range(19)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parity
def test_equals_pytorch():
    """AdamW, clipping and schedule of PyTorch and transformers from the same first weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    start = init_head(jax.random.key(5), HEAD)
    model = torch.nn.Sequential(
        torch.nn.Linear(D, HEAD.rank, bias=False),
        torch.nn.Identity(),
        torch.nn.Linear(HEAD.rank, V, bias=False),
    )
    first, last = start["hidden"][0]["weight"], start["output"]
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(np.array(first)))
        model[2].weight.copy_(torch.from_numpy(np.array(last)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TRAIN.learning_rate, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay
    )
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2 * 3, 6 * 3)
    for pooled, targets, retain, mask in restated_batches(TRAIN, 5):
        every = model(torch.from_numpy(pooled[mask]))
        scores = every[torch.arange(mask.sum()), targets[mask].tolist()]
        labels = torch.from_numpy(retain[mask].astype(np.float32))
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(scores, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip_norm)
        optimizer.step()
        scheduler.step()
    (head,) = train_heads(RETAIN, FORGET, HEAD, TRAIN, seeds=(5,))
    expected = {
        "hidden": ({"weight": model[0].weight.detach().numpy()},),
        "output": model[2].weight.detach().numpy(),
    }
    assert_close(head.params, expected, relative=1e-5)


def test_held_out_sequences_are_stratified_and_the_same_for_all_seeds():
    kept, held = map(FORGET.select, batches.split(FORGET, 0.3, "forget", 1))
    assert (kept.num_sequences, held.num_sequences) == (7, 3)
    tokens = lambda f: {bytes(row) for row in f.pooled}  # noqa: E731
    assert tokens(kept) | tokens(held) == tokens(FORGET)
    assert not tokens(kept) & tokens(held)
    assert tokens(FORGET.select(batches.split(FORGET, 0.3, "forget", 1)[1])) == tokens(held)


def test_held_out_metrics_and_that_held_out_sequences_are_not_trained_on():
    config = dataclasses.replace(TRAIN, holdout_fraction=0.3)
    heads = train_heads(RETAIN, FORGET, HEAD, config, seeds=(1, 2))
    retain, held_retain = map(RETAIN.select, batches.split(RETAIN, 0.3, "retain", 0))
    forget, held_forget = map(FORGET.select, batches.split(FORGET, 0.3, "forget", 1))
    (without,) = train_heads(retain, forget, HEAD, TRAIN, seeds=(2,))
    seen = np.union1d(retain.targets, forget.targets)
    assert_close(heads[1].params["output"][seen], without.params["output"][seen])

    for head in heads:
        final, losses = head.record["final"], []
        for name, features, sign in (("retain", held_retain, 1), ("forget", held_forget, -1)):
            scores = target_scores(
                head.params, jnp.asarray(features.pooled), jnp.asarray(features.targets)
            )
            signed = sign * np.asarray(scores, np.float64)
            losses += list(np.log1p(np.exp(-signed)))
            loss = np.mean(losses[-len(signed) :])
            np.testing.assert_allclose(final[f"held_out_{name}_loss"], loss, rtol=1e-5)
            assert final[f"held_out_{name}_token_accuracy"] == np.mean(signed > 0)
            right = [
                np.mean(signed[features.starts[i] : features.starts[i + 1]]) > 0
                for i in range(features.num_sequences)
            ]
            assert final[f"held_out_{name}_sequence_accuracy"] == np.mean(right)
        np.testing.assert_allclose(final["held_out_loss"], np.mean(losses), rtol=1e-5)


def make_soft(features: Features, seed: int, target: float) -> Features:
    """Targets over 5 candidates and 2 tokens of the rest; the first candidate's probability."""
    rng = np.random.default_rng(seed)
    n = features.num_tokens
    tokens = np.stack([rng.permutation(V)[:7] for _ in range(n)]).astype(np.int32)
    tokens[:, 0] = features.targets
    logprobs = np.log(np.tile([0.6, 0.1, 0.1, 0.1, 0.05, 0.01, 0.01], (n, 1)))
    log_weights = np.tile([0.0] * 5 + [np.log(2.5)] * 2, (n, 1))
    probs = np.tile([target, *[(1 - target) / 5] * 5], (n, 1))
    arrays = (x.astype(np.float32) for x in (logprobs, log_weights, probs))
    return dataclasses.replace(features, soft=SoftTargets(tokens, *arrays))


DISTIL = dataclasses.replace(TRAIN, loss="distillation", learning_rate=3e-2)


def test_distillation_equals_a_plain_statement_of_its_step():
    """The loss of the first batch, and that the loss falls."""
    retain, forget = make_soft(RETAIN, 2, 0.6), make_soft(FORGET, 3, 0.02)
    config = dataclasses.replace(DISTIL, epochs=60, warmup_ratio=1 / 12, batch_size=16)
    (head,) = train_heads([retain], forget, HEAD, config)
    (first,) = train_heads([retain], forget, HEAD, dataclasses.replace(config, epochs=1))
    drawn = np.random.default_rng((1, 1))
    drawn.permutation(FORGET.num_sequences)
    pairs = drawn.integers(RETAIN.num_sequences, size=FORGET.num_sequences)
    params = init_head(jax.random.key(1), HEAD)
    total = count = 0.0
    for features, weight in ((forget, 1.0), (retain.select(pairs), config.retain_weight)):
        scores = np.asarray(head_scores(params, jnp.asarray(features.pooled)))
        soft = features.soft
        g = np.take_along_axis(scores, soft.tokens, axis=-1)
        mass = np.exp(soft.logprobs + soft.log_weights) / (1 + np.exp(-g))
        mass /= mass.sum(axis=-1, keepdims=True)
        served = np.concatenate([mass[:, :5], mass[:, 5:].sum(axis=-1, keepdims=True)], axis=-1)
        total += weight * np.sum(soft.probs * np.log(soft.probs / served))
        count += features.num_tokens
    assert first.record["final"]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert head.record["final"]["loss"] < 0.6 * first.record["final"]["loss"]


def test_distillation_on_eight_devices_equals_one():
    retain, forget = make_soft(RETAIN, 2, 0.6), make_soft(FORGET, 3, 0.02)
    config = dataclasses.replace(DISTIL, holdout_fraction=0.2)
    (one,) = train_heads([retain], forget, HEAD, config)
    (eight,) = train_heads([retain], forget, HEAD, config, mesh=sharding.make_mesh((2, 2, 2)))
    assert_close(eight.params, one.params, relative=2e-6)
    assert one.record["final"]["held_out_forget_loss"] > 0


def test_retain_sources_are_drawn_from_equally_often():
    """A source of one sequence among a large one is read in every second pair."""
    single = RETAIN.select([0])
    mesh = sharding.make_mesh((8, 1, 1))
    data = batches.Data.build([RETAIN, single], FORGET, HEAD, TRAIN, mesh)
    planner = batches.Planner(data, make_members([TRAIN], (1,)), mesh)
    drawn = np.concatenate([planner._draw_pairs(1, epoch)[1] for epoch in range(1, 21)])
    assert np.mean(drawn == RETAIN.num_sequences) == 0.5
    assert set(drawn) == set(range(RETAIN.num_sequences + 1))


def test_training_stops_at_the_best_evaluation_and_resumes_to_it(tmp_path):
    """Held-out loss rises from some epoch on: noise is learned by heart."""
    config = dataclasses.replace(
        TRAIN, epochs=40, holdout_fraction=0.3, eval_every=2, patience=3, checkpoint_every=1
    )
    (head,) = train_heads(RETAIN, FORGET, HEAD, config, workdir=tmp_path / "whole")
    lines = [line for line in read_metrics(tmp_path / "whole") if "held_out_loss" in line]
    losses = {line["epoch"]: line["held_out_loss"] for line in lines}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 3 * config.eval_every < config.epochs
    assert head.record["final"]["epoch"] == best
    # A run that starts again has them from the disk.
    again = train_heads(RETAIN, FORGET, HEAD, config, workdir=tmp_path / "whole")[0]
    assert_close(again.params, head.params, relative=0.0)
    with pytest.raises(ValueError, match="patience"):
        TrainConfig(patience=2)


def test_it_learns():
    config = TrainConfig(epochs=40, warmup_ratio=1 / 8, batch_size=8, holdout_fraction=0.2)
    retain, forget = make_features(60, 2, 1.0), make_features(40, 3, -1.0)
    (head,) = train_heads(retain, forget, HEAD, config)
    final = head.record["final"]
    assert final["loss"] < 0.2
    assert final["held_out_retain_sequence_accuracy"] >= 0.9
    assert final["held_out_forget_sequence_accuracy"] >= 0.8


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_files(tmp_path):
    config = dataclasses.replace(TRAIN, holdout_fraction=0.2, eval_every=4, checkpoint_every=2)
    lines = []
    fields = {"model": "models/base", "base_temperature": 3.0, "guidance_scale": 2.0}
    heads = train_heads(
        RETAIN, FORGET, HEAD, config, (1, 2), workdir=tmp_path, report=lines.append, **fields
    )
    metrics = read_metrics(tmp_path)
    assert [(m["epoch"], m["seed"]) for m in metrics] == [
        (e, s) for e in range(1, 7) for s in (1, 2)
    ]
    assert [m["epoch"] for m in metrics if "held_out_loss" in m] == [4, 4, 6, 6]
    assert len(lines) == len(metrics)
    assert "epoch 6/6  head-seed2" in lines[-1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert all(any((tmp_path / "tensorboard" / s).iterdir()) for s in ("head-seed1", "head-seed2"))
    for head, seed in zip(heads, (1, 2), strict=True):
        loaded = load_head(tmp_path / f"head-seed{seed}")
        chex.assert_trees_all_equal(loaded.params, head.params)
        assert loaded.record == json.loads(json.dumps(head.record))
        for field, value in fields.items():
            assert getattr(loaded, field) == value
        record = loaded.record
        assert record["training"]["seed"] == seed
        assert record["training"]["learning_rate"] == config.learning_rate
        assert record["tokens"] == {"retain": RETAIN.num_tokens, "forget": FORGET.num_tokens}
        assert record["versions"]["jax"] == jax.__version__
        assert record["seconds"] > 0

    # Called again, it has nothing left to do but to write the heads, with another T if asked.
    before = (tmp_path / "head-seed1" / "head.safetensors").read_bytes()
    train_heads(RETAIN, FORGET, HEAD, config, (1, 2), workdir=tmp_path, base_temperature=1.0)
    assert (tmp_path / "head-seed1" / "head.safetensors").read_bytes() == before
    assert read_metrics(tmp_path) == metrics
    assert load_head(tmp_path / "head-seed1").base_temperature == 1.0


def test_one_seed_writes_a_folder_named_head(tmp_path):
    config = dataclasses.replace(TRAIN, epochs=2)
    train_heads(RETAIN, FORGET, HEAD, config, workdir=tmp_path)
    assert load_head(tmp_path / "head").config == HEAD


def test_another_run_in_the_workdir_is_refused_by_name(tmp_path):
    config = dataclasses.replace(TRAIN, epochs=2)
    train_heads(RETAIN, FORGET, HEAD, config, workdir=tmp_path)
    before = (tmp_path / "head" / "head.safetensors").read_bytes()
    other = dataclasses.replace(config, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"training.learning_rate: 0.01 there, 0.5 asked for"):
        train_heads(RETAIN, FORGET, HEAD, other, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"head.rank: 4 there, 5 asked for"):
        train_heads(RETAIN, FORGET, dataclasses.replace(HEAD, rank=5), config, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"seeds: \[1\] there, \[1, 2\] asked for"):
        train_heads(RETAIN, FORGET, HEAD, config, (1, 2), workdir=tmp_path)
    changed = FORGET.pooled.copy()
    changed[0, 0] += 1
    changed = dataclasses.replace(FORGET, pooled=changed)
    with pytest.raises(ValueError, match=r"features.forget: (?s:.*)give another workdir"):
        train_heads(RETAIN, changed, HEAD, config, workdir=tmp_path)
    assert (tmp_path / "head" / "head.safetensors").read_bytes() == before


def test_features_are_told_apart_by_key_or_bytes():
    keyed = [dataclasses.replace(FORGET, key=key) for key in "ab"]
    digests = {training_heads._digest(features) for features in (FORGET, RETAIN, *keyed)}
    assert len(digests) == 4
    part = dataclasses.replace(FORGET, key="a").select(range(5))
    assert training_heads._digest(part) not in digests


def test_non_finite_loss_names_epoch_seed_and_rate(tmp_path):
    good = dataclasses.replace(TRAIN, epochs=2)
    train_heads(RETAIN, FORGET, HEAD, good, (5, 6), workdir=tmp_path / "good")
    config = dataclasses.replace(TRAIN, checkpoint_every=1)
    object.__setattr__(config, "learning_rate", 1e38)  # beyond what a recipe takes
    with pytest.raises(
        FloatingPointError, match=r"epoch 1, seed 5: .*1e\+38.*smaller learning_rate"
    ):
        train_heads(RETAIN, FORGET, HEAD, config, (5, 6), workdir=tmp_path / "bad")
    assert not (tmp_path / "bad" / "head-seed5").exists()
    assert not any((tmp_path / "bad" / "checkpoints").iterdir())
    assert read_metrics(tmp_path / "bad") == []


def test_non_finite_features_are_what_the_error_blames():
    pooled = FORGET.pooled.copy()
    pooled[3] = np.nan
    bad = dataclasses.replace(FORGET, pooled=pooled)
    with pytest.raises(FloatingPointError, match="the features hold values that are not finite"):
        train_heads(RETAIN, bad, HEAD, TRAIN)


def test_data_refused_by_name(tmp_path):
    empty = FORGET.select([])
    wide = dataclasses.replace(FORGET, pooled=np.zeros((FORGET.num_tokens, 9), np.float32))
    other_model = dataclasses.replace(FORGET, targets=FORGET.targets + V)
    half = dataclasses.replace(FORGET, pooled=FORGET.pooled.astype(ml_dtypes.bfloat16))
    hollow = dataclasses.replace(FORGET, starts=np.insert(FORGET.starts, 1, 0))
    for retain, forget, message in (
        (RETAIN, empty, "the forget set is empty"),
        (empty, FORGET, "the retain set is empty"),
        (RETAIN, hollow, "sequence 0 of the forget set has no answer tokens"),
        (RETAIN, wide, "forget set have width 9, but the head has hidden_size 6"),
        (RETAIN, other_model, "forget set has token ids from .* vocab_size 50"),
        (RETAIN, half, "retain set are float32, those of the forget set bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            train_heads(retain, forget, HEAD, TRAIN, workdir=tmp_path / "run")
    for seeds in ((), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="seeds must be different"):
            train_heads(RETAIN, FORGET, HEAD, TRAIN, seeds)
    config = dataclasses.replace(TRAIN, holdout_fraction=0.5)
    with pytest.raises(ValueError, match=r"the forget set has 1 sequences, .* leaves none"):
        train_heads(RETAIN, FORGET.select([2]), HEAD, config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_ratio", 1.5),
        ("weight_decay", -1.0),
        ("holdout_fraction", 1.0),
    ],
)
def test_recipe_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TRAIN, **{field: value})
