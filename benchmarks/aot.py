"""Compiles the programs of a large model for TPUs that are not here, and checks the programs.

    pip install -e '.[aot]'
    python -m benchmarks aot --model=llama-3.1-8b --topology=v5e:2x4

Prefill, a chunk of decoding with guidance, the feature pass and an epoch of head training are built
by libtpu, which needs neither a TPU nor the weights. For each program it prints the memory by the
compiler and by `t3jax.plan`, and the collectives: kind, shape on a device, bytes, number in the
program (a loop counts once). It fails if a collective is larger than the model needs (the hidden
states of a batch in float32, scores where the width of keys is split, gathered weights that are
split along `fsdp`), or has a dimension of the whole vocabulary while that is split.

libtpu serves one process at a time. `--layers` compiles fewer: time grows with the layers.
"""

import collections
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.side_by_side import make_parser, write
from t3jax import HeadConfig, plan, sharding
from t3jax.lm.model import read_dtype
from t3jax.plan import Job, Step, programs

MIB = 2**20
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)
ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


PROGRAMS: dict[str, Callable[..., Step]] = {
    "prefill": programs.prefill,
    "decode": programs.decode,
    "features": programs.feature_pass,
    "head": programs.head_training,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices.

    Attributes:
        kind: XLA's name.
        shape: Shape of the result on a device, dtype first.
        size: Bytes of the result.
        count: Number of such collectives in the program.
    """

    kind: str
    shape: str
    size: int
    count: int


def main() -> None:
    """Reads the command line, compiles, writes `out/benchmarks/aot_MODEL_TOPOLOGY.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", help=", ".join(plan.SHAPES))
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:8x8 or v5p:4x4x4")
    parser.add_argument("--mesh", default="1,1,-1", help="as config.mesh")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, or int8")
    parser.add_argument("--layers", type=int, help="of the model; all, if not given")
    parser.add_argument("--rows", type=int, default=16, help="answers decoded together")
    parser.add_argument("--text", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--only", help="one of the programs, such as features")
    arguments = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    quantized, dtype = read_dtype(arguments.dtype, "bfloat16")
    config = dataclasses.replace(plan.read_shape(arguments.model), quantized=quantized)
    if arguments.layers:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    head = HeadConfig(config.hidden_size, config.vocab_size)
    mesh = tpu_mesh(arguments.topology, tuple(map(int, arguments.mesh.split(","))))
    job = Job(config, dtype, mesh, (head,), rows=arguments.rows, text=arguments.text)
    figures: dict[str, Any] = {}
    state = None
    for name, program in PROGRAMS.items():
        if arguments.only not in (None, name):
            continue
        step = program(job) if state is None else program(job, state)
        compiled, figures[name] = measure(job, program, step)
        state = compiled.output_shardings[0] if name == "prefill" else None
        print(f"{name}: {json.dumps(figures[name], indent=1)}", flush=True)
    details = {"arguments": vars(arguments), "libtpu": importlib.metadata.version("libtpu")}
    write(f"aot_{arguments.model}_{arguments.topology.replace(':', '_')}", figures, details)
    if wrong := [f"{name}: {item}" for name in figures for item in figures[name]["too_large"]]:
        sys.exit("larger than expected:\n  " + "\n  ".join(wrong))


def tpu_mesh(topology: str, shape: Sequence[int]) -> jax.sharding.Mesh:
    """A mesh over the devices of a TPU topology that need not be here."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server exists here
    description = topologies.get_topology_desc(topology, platform="tpu")
    return sharding.make_mesh(shape, description.devices)


def measure(
    job: Job, program: Callable[..., Step], step: Step
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compiles a step; the program, and its memory on a device in MiB, measured and planned."""
    start = time.perf_counter()
    compiled = step.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    reads_model = program is not programs.head_training
    gathered = plan.gathered_bytes(job) if reads_model else 0
    if program is programs.prefill:
        gathered += plan.gathered_cache_bytes(job)
    sizes = {
        "planned_arguments": plan.shard_bytes(step.arguments),
        "arguments": memory.argument_size_in_bytes,
        "planned_temporary": plan.temporary_bytes(job, program) + gathered,
        "temporary": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    exchanges = collectives(compiled.as_text())
    limit = largest_expected(job, program) + gathered
    # A dimension of this size is a vocabulary that is not split.
    whole = job.config.vocab_size
    split = programs.on_one_device(job, [0]).config.vocab_size < whole
    return compiled, {
        "seconds": round(seconds, 1),
        "mib": {name: round(size / MIB, 1) for name, size in sizes.items()},
        "collectives": [dataclasses.asdict(exchange) for exchange in exchanges],
        "largest_expected_bytes": limit,
        "too_large": [
            f"{exchange.kind} of {exchange.shape}"
            for exchange in exchanges
            if exchange.size > limit or (split and whole in dimensions(exchange.shape))
        ],
    }


def largest_expected(job: Job, program: Callable[..., Step]) -> int:
    """Bytes of the largest exchange that the model needs, besides gathered weights."""
    if program is programs.head_training:  # gradients, and rows of W2 that are gathered
        (params, _), _, rows, _ = programs.head_training(job).arguments
        looked_up = rows.shape[-1] * job.heads[0].rank * 4
        return max(looked_up, *map(plan.shard_bytes, jax.tree.leaves(params)))
    rows, tokens = {
        programs.prefill: (job.rows, job.prompt),
        programs.decode: (job.rows, 1),
        programs.feature_pass: (job.text_rows, job.text),
    }[program]
    rows //= job.row_shards
    hidden = rows * tokens * job.config.hidden_size * 4  # float32
    # Where the width of keys is split, a step of decoding sums the scores of all slots.
    by_width = program is programs.decode and plan.gathered_cache_bytes(job) > 0
    return max(hidden, rows * job.config.num_heads * job.slots[-1] * 4 if by_width else 0)


def collectives(program: str) -> list[Collective]:
    """The collectives in the text of a compiled program, the largest first."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for result, kind in COLLECTIVE.findall(program):
        arrays = [f"{dtype}[{shape}]" for dtype, shape in ARRAY.findall(result)]
        # An all-reduce may have many results; the start of a gather also has its operand.
        arrays = arrays if kind == "all-reduce" else [max(arrays, key=array_bytes)]
        counts[kind, " + ".join(arrays)] += 1
    exchanges = [
        Collective(kind, shape, sum(map(array_bytes, shape.split(" + "))), count)
        for (kind, shape), count in counts.items()
    ]
    return sorted(exchanges, key=lambda exchange: -exchange.size)


def dimensions(shape: str) -> list[int]:
    """All dimensions of one or several arrays as XLA writes them."""
    return [int(n) for _, dims in ARRAY.findall(shape) for n in dims.split(",") if n]


def array_bytes(shape: str) -> int:
    """Bytes of an array such as "bf16[16,4096]"."""
    bits = re.match(r"[a-z]+(\d+)", shape)
    return math.prod(dimensions(shape)) * (int(bits[1]) // 8 if bits else 1)
