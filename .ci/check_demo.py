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
    leaks = summary["leak_rate"]
    expected = {
        "the two cannot be told apart by truth ratios": summary["forget_quality"]["unlearned"]
        > 0.05,
        "drawn answers leak as seldom as the retain-only model's": all(
            leaks[sampling]["unlearned"] <= leaks[sampling]["retain_only"] + 0.05
            for sampling in ("greedy", "t0.7-p0.9", "t1")
        ),
        "drawn answers are fluent": (
            summary["perplexity"]["unlearned"] <= 1.3 * summary["perplexity"]["retain_only"]
        ),
        "the base model recites the forget answers": base["forget_recall"] > 0.95,
        "unlearned, they are recited little more than by the retain-only model": (
            unlearned["forget_recall"] < twin["forget_recall"] + 0.1
        ),
        "nor do reworded questions bring them back": (
            unlearned["paraphrase_recall"] < twin["paraphrase_recall"] + 0.1
        ),
        "retain answers are kept": unlearned["retain_recall"] > 0.97 * base["retain_recall"],
        "so are those of authors the head never saw": (
            unlearned["unseen_retain_recall"] > 0.97 * base["unseen_retain_recall"]
        ),
        "greedy answers are fluent": summary["perplexity_ratio"] <= 1.5,
        "it takes under six minutes": summary["seconds"] < 360,
    }
    failed = [claim for claim, holds in expected.items() if not holds]
    print("\n".join(f"not so: {claim}" for claim in failed) or "the demo shows what it should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
