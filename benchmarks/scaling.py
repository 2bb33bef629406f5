"""Weak scaling as counts: what one device has to do as devices and rows grow together.

    python -m benchmarks scaling

Nothing is timed and nothing runs: the feature pass, an epoch of head training and a chunk of
decoding are compiled for 1, 2, 4 and 8 simulated devices along `data` and along `fsdp`, as many
rows for each device every time, and the compiler says what the program of one device is:
floating-point operations, bytes read and written, memory, bytes that collectives hand over. Loops
count once: one step of an epoch, one token of each answer. The model has few layers.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.aot import collectives
from benchmarks.side_by_side import write
from t3jax import plan, sharding
from t3jax.head import HeadConfig
from t3jax.lm import LMConfig
from t3jax.plan import programs
from t3jax.training import TrainConfig

DEVICES = (1, 2, 4, 8)
MESHES = {"data": (-1, 1, 1), "fsdp": (1, -1, 1)}
PROGRAMS = {
    "features": programs.feature_pass,
    "head training": programs.head_training,
    "decoding": programs.decode,
}


def main() -> None:
    """Reads the command line, compiles, writes `out/benchmarks/scaling.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", help=", ".join(plan.SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="texts for each device")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    arguments = parser.parse_args()
    plan.simulate(max(DEVICES))
    config = dataclasses.replace(plan.read_shape(arguments.model), num_layers=arguments.layers)
    figures: dict[str, Any] = {}
    for axis, shape in MESHES.items():
        jobs = [
            make_job(
                config,
                sharding.make_mesh(shape, jax.devices()[:n]),
                arguments.rows,
                arguments.length,
            )
            for n in DEVICES
        ]
        figures[axis] = {
            name: growth([counts(program(job).compile()) for job in jobs])
            for name, program in PROGRAMS.items()
        }
    write("scaling", figures, {"devices": DEVICES, **vars(arguments)})


def make_job(config: LMConfig, mesh: Mesh, rows: int, length: int) -> programs.Job:
    """A job that grows with the mesh.

    Args:
        config: The model's shape.
        mesh: Where to.
        rows: Rows of a batch on each part of the mesh, in every program.
        length: Tokens of a text and of a prompt.

    Returns:
        The job. Head training reads 64 batches of answers of 32 tokens.
    """
    parts = sharding.row_shards(mesh)
    return programs.Job(
        config,
        jnp.float32,
        mesh,
        (HeadConfig(config.hidden_size, config.vocab_size),),
        rows=rows * parts,
        prompt=length,
        new_tokens=17,
        text=length,
        text_rows=rows * parts,
        texts=128 * rows * parts,
        answer=32,
        recipe=TrainConfig(batch_size=rows * parts),
    )


def counts(compiled: Any) -> dict[str, float]:
    """What a compiled program asks of one device; bytes but for the operations."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "operations": cost["flops"],
        "accessed": cost["bytes accessed"],
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "exchanged": sum(each.size * each.count for each in collectives(compiled.as_text())),
    }


def growth(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The counts by name, one for each number of devices."""
    return {name: [each[name] for each in found] for name in found[0]}


if __name__ == "__main__":
    main()
