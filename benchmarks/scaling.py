"""Weak scaling as counts: the work of one device as devices and rows grow together.

    python -m benchmarks scaling

Nothing is timed and nothing runs: the feature pass, an epoch of head training and a chunk of
decoding are compiled for 1, 2, 4 and 8 simulated devices along `data` and along `fsdp`, with the
same number of rows for each device. The compiler counts for the program of one device:
floating-point operations, bytes read and written, memory, bytes of collectives. Loops count once:
one step of an epoch, one token of each answer. The model has few layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.aot import collectives
from benchmarks.side_by_side import make_parser, write
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
    parser = make_parser(__doc__)
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
            name: collect_counts([count(program(job).compile()) for job in jobs])
            for name, program in PROGRAMS.items()
        }
    write("scaling", figures, {"devices": DEVICES, **vars(arguments)})


def make_job(config: LMConfig, mesh: Mesh, rows: int, length: int) -> programs.Job:
    """A job that grows with the mesh.

    Every program has batches of `rows` rows on each part of the mesh; `length` is of texts and
    prompts, in tokens. Head training reads 64 batches of answers of 32 tokens.
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


def count(compiled: Any) -> dict[str, float]:
    """The work of a compiled program on one device: operations, and bytes."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "operations": cost["flops"],
        "accessed": cost["bytes accessed"],
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "exchanged": sum(x.size * x.count for x in collectives(compiled.as_text())),
    }


def collect_counts(counts: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The counts by name, one for each number of devices."""
    return {name: [of_devices[name] for of_devices in counts] for name in counts[0]}
