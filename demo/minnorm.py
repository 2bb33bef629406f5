"""MinNorm-OG on the demo's model, scored as the demo scores T3.

    python -m demo.minnorm --epochs=4 --share=0.02

It trains on the retain rows alone and projects before the steps of the first epochs. It writes a
Hugging Face folder, `out/minnorm/demo/model`, and prints the rows of the demo's table, for that
model and the retain-only one, and the seconds of the unlearning.
"""

import argparse
import json
import time

import t3jax
from configs import demo as demo_config
from demo import run_demo
from t3jax import cli, pipeline
from t3jax.evaluation.settings import BASE
from t3jax.settings import Settings, from_config


def main() -> None:
    """Unlearns, evaluates and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--last_epochs", type=int, default=2, help="without projections")
    parser.add_argument("--share", type=float, default=0.02, help="0: plain fine-tuning")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rows", default="", help='of the retain rows, such as "[:480]"')
    parser.add_argument("--eval_rows", type=int, default=160)
    parser.add_argument("--out", default="out/minnorm/demo")
    args = parser.parse_args()
    cli.enable_compilation_cache()
    config = demo_config.get_config()
    config.finetune.data = (config.retain + args.rows,)
    config.finetune.workdir = args.out
    config.finetune.epochs = args.epochs
    config.finetune.learning_rate = args.learning_rate
    config.minnorm.share = args.share
    config.minnorm.last_epochs = args.last_epochs
    config.eval.rows = args.eval_rows
    config.eval.dir = f"{args.out}/evaluation"
    settings = from_config(Settings, config)
    start = time.perf_counter()
    folder = pipeline.finetune_once(settings, t3jax.make_mesh())
    seconds = time.perf_counter() - start
    print(f"unlearned in {seconds:.0f} s: {folder}", flush=True)
    examined = pipeline.examine(settings, t3jax.load_lm(str(folder)), [])
    logs, retain_log = pipeline.score(settings, examined, [BASE])
    evaluation = pipeline.Evaluation(examined, [BASE], logs, {}, retain_log, None)
    summary = run_demo.compare(settings, {}, evaluation).summary
    # `compare` names a model without a head "base".
    print(json.dumps(summary, indent=2).replace('"base"', '"minnorm"'))


if __name__ == "__main__":
    main()
