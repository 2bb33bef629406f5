"""The feature pass by t3jax and transformers' forward pass on PyTorch.

    python -m benchmarks features --model=FOLDER --tofu=FOLDER

The texts are those of forget05 and some of retain95 with their answers, and random ones of 256,
1,024 and 2,048 tokens. Our side is `load_or_compute_features` with an empty store: hidden states,
causal means, and the answers' rows on the disk. The peer computes hidden states and stores nothing,
with the fastest of several batch sizes and thread counts. A share of the ceiling is the operations
of the texts, without padding, over the operations of a large product in the same time.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import t3jax
from benchmarks.ceilings import forward_operations, measure_ceilings
from benchmarks.peer import Peer
from benchmarks.side_by_side import alternate, announce, make_parser, ratio, seconds, tune, write
from t3jax.batching import map_batches
from t3jax.data import Example, PromptFormat, encode_records, evenly_spread, load_dataset
from t3jax.features import load_or_compute_features
from t3jax.lm import load_config

LENGTHS = (256, 1024, 2048)
_TRIED = 2048  # tokens on which the peer's batch size and thread count are chosen


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/features.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--tofu", help="folder with TOFU's files; without it, the hub")
    parser.add_argument("--rows", type=int, default=64, help="of forget05 and of retain95, each")
    parser.add_argument("--tokens", type=int, default=8192, help="of the random texts of a length")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    ceilings = measure_ceilings()
    lm = t3jax.load_lm(arguments.model, "float32")
    config = load_config(arguments.model)
    sets = {"": tofu_texts(lm, arguments)}
    for length in LENGTHS:
        if length <= lm.max_position:
            sets[f"_{length}"] = random_texts(lm, arguments.tokens // length, length)
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {"ceilings": dataclasses.asdict(ceilings)}
    with (
        Peer("LanguageModel", arguments.model) as full,
        Peer("LanguageModel", arguments.model, "bfloat16") as half,
    ):
        for name, texts in sets.items():
            announce(f"texts{name}")
            times, details[f"texts{name}"] = compare(lm, texts, full, half, arguments.repeats)
            operations = sum(
                forward_operations(config, lm.params, len(text.tokens)) for text in texts
            )
            ideal = [operations / ceilings.arithmetic] * arguments.repeats
            figures |= {
                f"ceiling_share{name}": ratio(ideal, times["ours"]),
                f"peer_ceiling_share{name}": ratio(ideal, times["peer"]),
                f"speedup{name}": ratio(times["peer"], times["ours"]),
                f"speedup_over_bfloat16{name}": ratio(times["peer_bfloat16"], times["ours"]),
            }
        peaks = {"float32": full.peak_memory_gib, "bfloat16": half.peak_memory_gib}
    figures["padding_share"] = padding_share(lm, sets[""])
    details["peer_peak_memory_gib"] = peaks
    write("features", figures, {"arguments": vars(arguments), **details})


def compare(
    lm: t3jax.LM, texts: Sequence[Example], full: Peer, half: Peer, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Both sides in turn: their seconds, and details for the file."""
    tokens = [text.tokens for text in texts]
    longest = max(map(len, tokens))
    sizes = sorted({max(1, total // longest) for total in (512, _TRIED)})
    some = evenly_spread(tokens, -(-_TRIED // longest))
    chosen, tried = {}, {}
    for name, peer in (("peer", full), ("peer_bfloat16", half)):
        ways = {str(rows): functools.partial(peer, "forward", some, rows) for rows in sizes}
        chosen[name], tried[name] = tune(peer, ways)

    ours = functools.partial(compute_features, lm, texts)
    first = seconds(ours)
    works: dict[str, Callable[[int], Any]] = {
        "ours": ours,
        "peer": lambda _: full("forward", tokens, int(chosen["peer"])),
        "peer_bfloat16": lambda _: half("forward", tokens, int(chosen["peer_bfloat16"])),
    }
    times = alternate(works, repeats)
    return times, report(tokens, times, first, chosen, tried)


def compute_features(lm: t3jax.LM, texts: Sequence[Example], _: int = 0) -> None:
    """Our side: hidden states, causal means, and the answers' rows in an empty store."""
    with tempfile.TemporaryDirectory() as store:
        load_or_compute_features(lm, texts, store)


def report(
    tokens: Sequence[np.ndarray],
    times: Mapping[str, Sequence[float]],
    first: float,
    peer_rows: object,
    tried: object,
) -> dict[str, Any]:
    """Details of a set of texts, for the file."""
    total = sum(map(len, tokens))
    return {
        "texts": len(tokens),
        "tokens": total,
        "tokens_per_second": {name: total / float(np.median(t)) for name, t in times.items()},
        "seconds": times,
        "first_call_seconds_with_compilation": first,
        "peer_rows": peer_rows,
        "peer_tried_seconds": tried,
    }


def padding_share(lm: t3jax.LM, texts: Sequence[Example]) -> float:
    """The share of padding among the tokens that the model reads."""
    read: list[int] = []
    map_batches(
        lm,
        texts,
        lambda _, tokens, __: read.append(tokens.size),
        lambda *_: None,
        tokens_per_batch=None,
        progress=None,
    )
    return 1 - sum(len(text.tokens) for text in texts) / sum(read)


def tofu_texts(lm: t3jax.LM, arguments: argparse.Namespace) -> list[Example]:
    """Questions with their answers."""
    rows = [
        row
        for name in ("tofu:forget05", "tofu:retain95")
        for row in evenly_spread(load_dataset(name, arguments.tofu), arguments.rows)
    ]
    return encode_records(lm.tokenizer, rows, PromptFormat(), lm.max_position)


def random_texts(lm: t3jax.LM, count: int, length: int) -> list[Example]:
    """Texts of one length, the second half of each an answer."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(lm.vocab_size, size=(count, length), dtype=np.int32)
    return [Example(row, length // 2) for row in tokens]
