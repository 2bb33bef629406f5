"""Plans the memory of each device before anything is loaded.

    t3jax plan --config=NAME --device=v5e --devices=8 [--FIELD=VALUE ...]

Flags of its own: `--device`, a kind of accelerator or the bytes of one; `--devices`, their number;
`--prompt_tokens`, `--text_tokens` and `--answer_tokens`, lengths; `--texts`, the number of texts.
See docs/planning.md.
"""

import re

from absl import flags

from t3jax import cli, plan, sharding
from t3jax.plan.job import make_job
from t3jax.plan.programs import simulate
from t3jax.settings import Settings


def run() -> None:
    """Reads the command line and prints the plan."""
    flags.DEFINE_string("device", "v5e", f"{', '.join(plan.DEVICES)}, or the bytes of a device")
    for name, default, meaning, low, high in (
        ("devices", 1, "number of devices", 1, 2**14),
        ("prompt_tokens", 128, "longest prompt", 1, 2**24),
        ("text_tokens", 1024, "longest text of features and fine-tuning", 2, 2**24),
        ("texts", 4000, "texts to forget and to retain together", 2, 2**31 - 1),
        ("answer_tokens", 40, "mean length of their answers", 1, 2**24),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=low, upper_bound=high)

    def script(config: Settings) -> None:
        values = flags.FLAGS
        if values.device not in plan.DEVICES and not re.fullmatch(
            "[1-9][0-9]{0,17}", values.device
        ):
            raise ValueError(
                f"device {values.device!r} is not known; known: {', '.join(plan.DEVICES)}, or a "
                "number of bytes"
            )
        simulate(values.devices)
        numbers = (
            values.prompt_tokens,
            values.text_tokens,
            values.texts,
            values.answer_tokens,
        )
        job = make_job(config, sharding.make_mesh(config.mesh), *numbers)
        print(plan.describe(job, plan.DEVICES.get(values.device) or int(values.device)))

    cli.run(script)
