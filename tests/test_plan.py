"""The planner: what is alive in a program, and plans against what a compiler says."""

import dataclasses
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import paper
from t3jax import plan, sharding
from t3jax.finetuning import FinetuneConfig
from t3jax.head import HeadConfig
from t3jax.lm import ExpertsConfig
from t3jax.lm.decoder import abstract_params
from t3jax.plan import memory, programs
from t3jax.plan.job import make_job
from t3jax.plan.liveness import peak_bytes

KIB = 1024
# Wide enough that arrays, not alignment, decide: 64 rows and texts of 128 tokens.
CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=128, intermediate_size=256, vocab_size=2048)
# A CPU's compiler fuses less than a TPU's: what it takes in all, by what was planned.
BOUND = 2.5


def job(mesh=(2, 1, 4), **changes):
    head = HeadConfig(CONFIG.hidden_size, CONFIG.vocab_size, rank=8)
    sizes = {"rows": 64, "prompt": 64, "new_tokens": 33, "text": 128, "text_rows": 64, "texts": 400}
    sizes |= {"answer": 20, **changes}
    return programs.Job(CONFIG, jnp.float32, sharding.make_mesh(mesh), (head,), **sizes)


def check_against_the_compiler(planned, program):
    """Arguments to the byte; all, with results and temporaries, within a factor of `BOUND`."""
    step = program(planned)
    found = step.compile().memory_analysis()
    kept = plan.shard_bytes(step.arguments)
    assert kept == found.argument_size_in_bytes
    taken = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    ratio = (kept + taken) / (kept + plan.temporary_bytes(planned, program))
    assert 1 / BOUND < ratio < BOUND


def peak(function, *shapes, donated=()):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return peak_bytes(jax.make_jaxpr(function)(*arrays).jaxpr, donated)


def test_what_is_alive_at_once():
    """In KiB: an array of [256] float32 is 1."""
    one = (256,)
    # Two products of which the first is needed to the end; sums in place of what dies.
    assert peak(lambda x: x * 2.0, one) == KIB
    assert peak(lambda x: jnp.sin(jnp.cos(x * 2.0)), one) == KIB
    assert peak(lambda x: (jnp.sin(x), jnp.cos(x)), one) == 2 * KIB
    # A donated argument's memory is used again.
    assert peak(lambda x: x * 2.0, one, donated=[True]) == 0
    # A product cannot overwrite its factors.
    assert peak(lambda x, y: (x @ y) @ y, (32, 8), (8, 8)) == 2 * KIB
    # What is broadcast, cast or reshaped takes nothing.
    assert peak(lambda x: jnp.sum(jnp.broadcast_to(x, (9, 256)).reshape(-1)), one) == 4


def test_what_is_alive_in_loops_and_branches():
    def scan(x, xs):
        return jax.lax.scan(lambda c, y: (c + jnp.sin(y), jnp.sum(c)), x, xs)

    # The carry's copy, since x is not donated; one sine in the body; eight sums, and one at work.
    assert peak(scan, (256,), (8, 256)) == 2 * KIB + 8 * 4 + 4

    def branch(x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: jnp.sin(x) + jnp.cos(x), lambda x: x, x)

    assert peak(branch, (256,)) == pytest.approx(2 * KIB, abs=16)


def test_bytes_of_shards():
    mesh = sharding.make_mesh((2, 1, 4))
    tree = programs.by_rows(mesh, jax.ShapeDtypeStruct((64, 3), jnp.bfloat16))
    assert plan.shard_bytes((tree, "static", 7)) == 64 // 2 * 3 * 2


@pytest.mark.parametrize(
    "program",
    [programs.prefill, programs.decode, programs.feature_pass, programs.head_training],
    ids=lambda program: program.__name__,
)
def test_plan_is_near_what_the_compiler_takes(program):
    check_against_the_compiler(job((1, 4, 2)), program)


MIXTURE = dataclasses.replace(
    CONFIG, model_type="qwen3_moe", experts=ExpertsConfig(8, 2, 128, dense=(True, False))
)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2048, "tied": True}
DELTA = dataclasses.replace(tiny.DELTA, **SIZES)
UNEQUAL = dataclasses.replace(tiny.UNEQUAL, **{**SIZES, "tied": tiny.UNEQUAL.tied})


@pytest.mark.parametrize(
    ("config", "program"),
    [
        (MIXTURE, programs.decode),
        (MIXTURE, programs.feature_pass),
        (DELTA, programs.decode),
        (DELTA, programs.feature_pass),
        (UNEQUAL, programs.decode),
        (UNEQUAL, programs.feature_pass),
    ],
)
def test_the_plan_of_other_layers_is_near_too(config, program):
    check_against_the_compiler(dataclasses.replace(job((4, 1, 2)), config=config), program)


def test_what_grows_with_a_batch_and_what_does_not():
    one, two = (plan.decoding(job(rows=rows)) for rows in (64, 128))
    assert one.kept["weights"] == two.kept["weights"]
    np.testing.assert_allclose(two.kept["key-value cache"] / one.kept["key-value cache"], 2, 1e-3)
    assert one.temporary < two.temporary <= 2 * one.temporary + KIB
    assert one.total == sum(one.kept.values()) + one.temporary


def test_largest_batch_fits_and_twice_of_it_does_not():
    planned, capacity = job(), 4 * 2**20
    rows = plan.largest_rows(plan.decoding, planned, "rows", capacity)
    totals = [plan.decoding(dataclasses.replace(planned, rows=n)).total for n in (rows, 2 * rows)]
    assert rows > planned.row_shards
    assert totals[0] <= plan.USABLE * capacity < totals[1]
    assert plan.largest_rows(plan.decoding, planned, "rows", 1000) == 0


def test_what_is_split_along_fsdp_is_gathered():
    assert plan.gathered_bytes(job((8, 1, 1))) == plan.gathered_bytes(job((2, 1, 4))) == 0
    planned = job((1, 2, 4))
    layer = programs.abstract_lm(planned.config, planned.dtype, planned.mesh).params["layers"][0]
    matrices = sum(leaf.size for leaf in jax.tree.leaves(layer) if leaf.ndim > 1)
    table = planned.config.vocab_size * planned.config.hidden_size
    # Float32, a quarter of the widths.
    assert plan.gathered_bytes(planned) == max(2 * matrices, table) * 4 // 4
    data, fsdp = (plan.decoding(job(mesh)).kept for mesh in ((8, 1, 1), (1, 8, 1)))
    assert data["key-value cache"] == fsdp["key-value cache"]
    np.testing.assert_allclose(data["weights"] / fsdp["weights"], 8, rtol=0.01)


def test_fine_tuning_keeps_a_layer_s_activations_for_each_layer():
    stages = []
    for layers in (2, 4, 6):
        planned = job(finetuning=FinetuneConfig(batch_size=16))
        config = dataclasses.replace(planned.config, num_layers=layers)
        stages.append(plan.fine_tuning(dataclasses.replace(planned, config=config)))
    first, second, third = (stage.temporary for stage in stages)
    assert second - first == third - second > 0
    kept = stages[0].kept
    assert kept["weights"] == kept["trained"]
    assert kept["optimizer state"] == pytest.approx(2 * kept["trained"], abs=16)


def test_tasks_take_one_more_gradient_and_their_adapters(monkeypatch):
    monkeypatch.setattr(memory, "temporary_bytes", lambda *_: 0)
    recipe = FinetuneConfig(batch_size=16)
    alone, of_tasks = (
        plan.fine_tuning(job(finetuning=each)).kept
        for each in (recipe, dataclasses.replace(recipe, lora_rank=2, tasks=3))
    )
    step = programs.gradient(job(finetuning=dataclasses.replace(recipe, lora_rank=2, tasks=3)))
    assert set(jax.eval_shape(step.function, *step.arguments)[1]) == {"base", "lora"}
    assert alone["weights"] == of_tasks["weights"]
    assert alone["trained"] < of_tasks["trained"] < 1.5 * alone["trained"]
    assert of_tasks["gradient"] == 3 * of_tasks["trained"]  # the sum, of a microbatch, and its sum
    reptile = job(finetuning=dataclasses.replace(recipe, lora_rank=2, tasks=3, reptile=True))
    step = programs.gradient(reptile)
    assert set(jax.eval_shape(step.function, *step.arguments)[1]) == {"lora"}
    kept = plan.fine_tuning(reptile).kept
    assert kept["trained"] == of_tasks["trained"]
    assert kept["gradient"] == pytest.approx(kept["optimizer state"], abs=16)  # of adapters alone


def test_a_job_of_a_config():
    fields = {"model": "llama-3.1-8b", "head": "a,b", "seeds": (1, 2), "max_length": 512}
    settings = tiny.make_settings(paper, fields | {"sweep.ranks": (10, 50)})
    made = make_job(settings, sharding.make_mesh((2, 1, 4)))
    assert (len(made.heads), made.heads[0].rank, made.members) == (2, 50, 2)
    assert (made.text, made.text_rows, made.dtype) == (512, 64, jnp.bfloat16)
    text = plan.describe(job(), 4 * 2**20)
    assert "data 2" in text
    assert "would fit" in text
    with pytest.raises(FileNotFoundError, match=r"nowhere.*llama-3.1-70b"):
        plan.read_shape("nowhere")


@pytest.mark.parametrize(
    ("shape", "weights"), [("8b", 8.03e9), ("70b", 70.55e9), ("405b", 405.85e9)]
)
def test_shapes_have_the_published_number_of_weights(shape, weights):
    params = abstract_params(plan.read_shape(f"llama-3.1-{shape}"), jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(weights, rel=1e-3)


def test_the_command_on_its_page(repository):
    page = (repository / "docs" / "planning.md").read_text()
    command, output = page.split("    python ")[1], page.split("    8.03e9 weights")[1]
    arguments = shlex.split(command.split("\n\n")[0].replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=repository, capture_output=True, text=True, check=True
    )
    first, second, third = output.splitlines()[:3]
    assert done.stdout.startswith(f"8.03e9 weights{first}\n{second.strip()}\n{third.strip()}\n")
