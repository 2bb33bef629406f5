"""The planner: what is alive in a program, and plans against what a compiler says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from t3jax import abstract, plan, sharding
from t3jax.head import HeadConfig
from t3jax.liveness import peak_bytes

KIB = 1024
# Wide enough that arrays, not alignment, decide: 64 rows and texts of 128 tokens.
CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=128, intermediate_size=256, vocab_size=2048)
# How far the estimate of what lives for a moment may be from the compiler's number.
BOUND = 2.0


def job(shape=(2, 4), **changes):
    head = HeadConfig(CONFIG.hidden_size, CONFIG.vocab_size, rank=8)
    sizes = {"rows": 64, "prompt": 64, "new_tokens": 33, "text": 128, "text_rows": 64, "texts": 400}
    sizes |= {"answer": 20, **changes}
    return abstract.Job(CONFIG, jnp.float32, sharding.make_mesh(shape), (head,), **sizes)


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
    mesh = sharding.make_mesh((2, 4))
    tree = abstract.by_rows(mesh, jax.ShapeDtypeStruct((64, 3), jnp.bfloat16))
    assert plan.shard_bytes((tree, "static", 7)) == 64 // 2 * 3 * 2


@pytest.mark.parametrize("shape", [(2, 4)])
@pytest.mark.parametrize(
    "program",
    [abstract.prefill, abstract.decode, abstract.feature_pass, abstract.head_training],
    ids=lambda program: program.__name__,
)
def test_plan_is_near_what_the_compiler_takes(program, shape):
    """Arguments to the byte; the rest, results and temporaries, within `BOUND`."""
    planned = job(shape)
    step = program(planned)
    found = step.compile().memory_analysis()
    assert plan.shard_bytes(step.arguments) == found.argument_size_in_bytes
    taken = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    print(
        program.__name__,
        shape,
        plan.temporary_bytes(planned, program),
        taken,
        plan.temporary_bytes(planned, program) / taken,
    )
