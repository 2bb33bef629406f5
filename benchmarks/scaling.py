"""Weak scaling as counts: what one device has to do as devices and rows grow together.

    python -m benchmarks scaling

Nothing is timed and nothing runs: the feature pass and head training are compiled for 1, 2, 4 and 8
simulated devices along `data` and along `fsdp`, as many rows for each device every time, and the
compiler says what the program of one device is: floating-point operations, bytes read and written,
memory, bytes that collectives hand over. Loops count once: head training is one step of an epoch.
The model has SmolLM2-135M's widths and vocabulary and few layers.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.side_by_side import write
from t3jax import features, sharding
from t3jax.head import HeadConfig
from t3jax.lm import LMConfig, RopeConfig
from t3jax.lm.decoder import abstract_params
from t3jax.lm.model import pure_functions
from t3jax.training import TrainConfig, trainer
from t3jax.training.batches import Tokens

DEVICES = (1, 2, 4, 8)
MESHES = {"data": (-1, 1, 1), "fsdp": (1, -1, 1)}
_COLLECTIVE = re.compile(
    r" = (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def main() -> None:
    """Reads the command line, compiles, writes `out/benchmarks/scaling.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="texts for each device")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    config = LMConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=arguments.layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=2048,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        tied=True,
    )
    figures = {}
    for axis, shape in MESHES.items():
        meshes = [sharding.make_mesh(shape, jax.devices()[:n]) for n in DEVICES]
        passes = [
            counts(compile_features(mesh, config, arguments.rows, arguments.length))
            for mesh in meshes
        ]
        steps = [
            counts(compile_training(mesh, HeadConfig(576, 49152), arguments.rows * 64))
            for mesh in meshes
        ]
        figures[axis] = {"features": growth(passes), "head training": growth(steps)}
    write("scaling", figures, {"devices": DEVICES, **vars(arguments)})


def compile_features(mesh: Mesh, config: LMConfig, rows: int, length: int) -> Any:
    """The feature pass over so many texts for each device, compiled."""
    apply, _, _ = pure_functions(config, jnp.float32, mesh)
    params = abstract_params(config, jnp.float32)
    params = _placed(params, sharding.param_shardings(mesh, params))
    shape = (rows * sharding.row_shards(mesh), length)
    tokens, mask = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh, shape))
        for dtype in (jnp.int32, bool)
    )
    return features._pooled.lower(apply, params, tokens, mask).compile()


def compile_training(mesh: Mesh, config: HeadConfig, tokens: int, trained: int = 4096) -> Any:
    """An epoch of head training with so many tokens of a batch for each device, compiled.

    Args:
        mesh: Where to.
        config: The head's shape.
        tokens: Of a batch on each device; it has features of 64 times as many.
        trained: Tokens of the vocabulary that occur.

    Returns:
        The compiled epoch of one head.
    """
    shards, steps = sharding.row_shards(mesh), 8
    programs = trainer.compile_programs(
        HeadConfig(config.hidden_size, trained, config.rank), TrainConfig(), steps, 1, mesh
    )

    def array(spec: P, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.fitting(mesh, spec, shape))

    by_rows, held = P(sharding.ROWS), 64 * tokens
    data = Tokens(
        array(by_rows, (shards, held, config.hidden_size), jnp.float32),
        array(by_rows, (shards, held), jnp.int32),
        array(by_rows, (shards,), jnp.int32),
    )
    rows = array(P(None, None, sharding.ROWS), (1, steps, shards, tokens), jnp.int32)
    knobs = (array(P(), (1,), jnp.float32),) * 2
    return programs.epoch.lower(programs.abstract_state, data, rows, knobs).compile()


def counts(compiled: Any) -> dict[str, float]:
    """What a compiled program asks of one device; bytes but for the operations."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    exchanged = sum(
        np.prod(shape, dtype=int) * jnp.dtype(dtype).itemsize
        for _, dtype, shape in collectives(compiled.as_text())
    )
    return {
        "operations": cost["flops"],
        "accessed": cost["bytes accessed"],
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "exchanged": int(exchanged),
    }


def growth(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The counts by name, one for each number of devices."""
    return {name: [each[name] for each in found] for name in found[0]}


def collectives(text: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """The arrays that the collectives of a program result in: kind, dtype and shape on a device."""
    names = {"f32": "float32", "bf16": "bfloat16", "s32": "int32", "u32": "uint32", "pred": "bool"}
    return [
        (kind, names[dtype], tuple(int(n) for n in shape.split(",") if n))
        for results, kind in _COLLECTIVE.findall(text)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results)
    ]


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )


if __name__ == "__main__":
    main()
