"""Memory of Llama 3.1 on TPUs and GPUs: the table of docs/planning.md.

    python -m benchmarks planning

Prints a Markdown table. No weights are loaded and nothing is compiled: any CPU suffices.
"""

import dataclasses
import math

import jax

from benchmarks.side_by_side import make_parser
from configs import default
from t3jax import plan, sharding
from t3jax.plan.job import make_job
from t3jax.settings import Settings, from_config, replace

# Model, device, mesh.
CASES = [
    ("llama-3.1-8b", "v5e", (1, 1, 4)),
    ("llama-3.1-8b", "v5e", (1, 1, 8)),
    ("llama-3.1-8b", "v5p", (4, 1, 1)),
    ("llama-3.1-8b", "H100", (1, 1, 1)),
    ("llama-3.1-8b", "H200", (1, 1, 1)),
    ("llama-3.1-70b", "v5e", (1, 1, 16)),
    ("llama-3.1-70b", "v5e", (4, 1, 16)),
    ("llama-3.1-70b", "v5p", (1, 1, 4)),
    ("llama-3.1-70b", "v5p", (4, 1, 16)),
    ("llama-3.1-70b", "H100", (1, 1, 4)),
    ("llama-3.1-70b", "H200", (1, 1, 2)),
    ("llama-3.1-405b", "v5e", (1, 1, 64)),
    ("llama-3.1-405b", "v5p", (1, 1, 16)),
    ("llama-3.1-405b", "H100", (1, 1, 16)),
    ("llama-3.1-405b", "H200", (1, 1, 8)),
]


def main() -> None:
    """Prints the table."""
    make_parser(__doc__).parse_args()
    plan.simulate(max(math.prod(mesh) for *_, mesh in CASES))
    print(
        "| model | devices | weights | cache of 16 rows | rows that fit | feature pass, 16 rows a "
        "part | rows that fit | head training |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        print(row(*case), flush=True)


def row(model: str, device: str, mesh: tuple[int, int, int]) -> str:
    """One line of the table: GiB on each device, and rows."""
    config = replace(from_config(Settings, default.get_config()), model=model)
    job = make_job(config, sharding.make_mesh(mesh, jax.devices()[: math.prod(mesh)]))
    job = dataclasses.replace(job, rows=16 * job.row_shards)
    capacity = plan.DEVICES[device]
    decoding, features, training = plan.stages(job).values()
    most = {
        "rows": plan.largest_rows(plan.decoding, job, "rows", capacity),
        "text_rows": plan.largest_rows(plan.feature_pass, job, "text_rows", capacity),
    }
    gib = [
        f"{size / plan.GIB:.2f}"
        for size in (
            decoding.kept["weights"],
            decoding.kept["key-value cache"],
            features.total,
            training.total,
        )
    ]
    gib[2:] = [
        text if stage.total <= plan.USABLE * capacity else f"**{text}**"
        for text, stage in zip(gib[2:], (features, training), strict=True)
    ]
    cells = [model, f"{device} {mesh}", gib[0], gib[1], most["rows"], gib[2]]
    return "| " + " | ".join(map(str, [*cells, most["text_rows"], gib[3]])) + " |"
