"""Sources of rows as one line of text: files, splits of TOFU, slices and sums of them."""

import os
import pathlib
import re

from t3jax.data.records import Record, load_records

_TOFU_PREFIX = "tofu:"
_SLICE = re.compile(r"(?P<source>.+)\[(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?\]")


def load_dataset(
    source: str | os.PathLike[str], tofu_dir: str | os.PathLike[str] | None = None
) -> list[Record]:
    """Loads a set of rows from a file, a folder, TOFU, or slices and sums of these.

    Args:
        source: "tofu:SPLIT" (for example "tofu:forget05"), or a source as in `load_records`; a
            slice of one, as in "tofu:retain95[:400]" or "rows.jsonl[::4]"; or a sum of these, as in
            "tofu:retain95[:400]+more.jsonl" or "(a.jsonl+b.jsonl)[::2]".
        tofu_dir: folder with TOFU's files, named as on the Hugging Face hub. None: the hub.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: an unknown split, bad or empty files, or a slice without rows.
    """
    if source == "":  # as a path it would be the working directory
        raise ValueError("a source of rows is empty: expected a file, a folder or 'tofu:SPLIT'")
    if not isinstance(source, str) or pathlib.Path(source).exists():
        return load_records(source)
    if len(parts := _split_sum(source)) > 1:
        return [row for part in parts for row in load_dataset(part, tofu_dir)]
    if source.startswith("(") and source.endswith(")"):
        return load_dataset(source[1:-1], tofu_dir)
    if sliced := _SLICE.fullmatch(source):
        whole = load_dataset(sliced["source"], tofu_dir)
        start, stop, step = (int(part) if part else None for part in sliced.group(2, 3, 4))
        if step == 0 or not (rows := whole[start:stop:step]):
            raise ValueError(f"{source}: the slice has no row; {sliced['source']} has {len(whole)}")
        return rows
    if source.startswith(_TOFU_PREFIX):
        from t3jax.data import tofu  # tensorflow_datasets takes seconds, and only TOFU needs it

        return tofu.load_tofu(source.removeprefix(_TOFU_PREFIX), folder=tofu_dir)
    return load_records(source)


def _split_sum(source: str) -> list[str]:
    """The parts between plus signs outside of parentheses."""
    parts, depth = [""], 0
    for character in source:
        depth += (character == "(") - (character == ")")
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
