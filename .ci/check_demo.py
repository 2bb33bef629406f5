"""Fails if the demo does not show what it should: python .ci/check_demo.py SUMMARY.json."""

import json
import pathlib
import sys


def main(path: str) -> int:
    """Prints what is wrong and returns the exit status."""
    summary = json.loads(pathlib.Path(path).read_text())
    base, unlearned, twin = (
        {name: value[model] for name, value in summary.items() if name.endswith("_recall")}
        for model in ("base", "unlearned", "retain_only")
    )
    expected = {
        "the base model recites the forget answers": base["forget_recall"] > 0.95,
        "unlearned, they are recited little more than by the retain-only model": (
            unlearned["forget_recall"] < twin["forget_recall"] + 0.1
        ),
        "reworded questions bring them back only in part": (
            unlearned["paraphrase_recall"] < twin["paraphrase_recall"] + 0.2
        ),
        "retain answers are kept": unlearned["retain_recall"] > 0.95,
        "so are those of authors the head never saw": unlearned["unseen_retain_recall"] > 0.9,
        "unlearned answers are fluent": summary["perplexity_ratio"] <= 1.5,
        "it takes under two minutes": summary["seconds"] < 120,
    }
    failed = [claim for claim, holds in expected.items() if not holds]
    print("\n".join(f"not so: {claim}" for claim in failed) or "the demo shows what it should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
