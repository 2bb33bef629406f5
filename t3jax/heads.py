"""Lists the heads below folders: request, shape, settings and verdict of each.

python -m t3jax.heads FOLDER...

It reads descriptions, cards and the headers of the weights, and no weights.
"""

import argparse
import io
import os
import pathlib
import sys
import unicodedata
from collections.abc import Iterator, Sequence

import safetensors

from t3jax.head_io import read_own
from t3jax.json_files import check_regular, parse_json, read_bytes, read_json
from t3jax.reference_head import REFERENCE, read_reference, reference_files

_LARGEST_CARD = 1 << 20  # bytes
_COLUMNS = ("folder", "request", "date", "rank", "features", "T", "s", "model", "verdict")
_LONGEST = 40  # characters of a request or verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each head and returns the exit status.

    The status is 0; 1 if a head is damaged; 2 if there is no head, or a folder is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m t3jax.heads", description="Lists the heads at or below folders."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="where to look")
    starts = [pathlib.Path(folder) for folder in parser.parse_args(argv).folders]
    if missing := [str(folder) for folder in starts if not folder.is_dir()]:
        print(f"{parser.prog}: no such folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    folders: dict[pathlib.Path, pathlib.Path] = {}
    for folder in (folder for start in starts for folder in _find(start)):
        folders.setdefault(folder.resolve(), folder)
    if not folders:
        print(
            f"{parser.prog}: no head at or below {', '.join(map(str, starts))}; a head's folder "
            f"has head.json, or a config.json of model_type {REFERENCE}",
            file=sys.stderr,
        )
        return 2
    lines: list[tuple[str, ...]] = [_COLUMNS]
    status = 0
    for folder in folders.values():
        try:
            lines.append((str(folder), *_describe(folder)))
        except (OSError, ValueError) as error:
            message = str(error).removeprefix(f"{folder}{os.sep}")
            lines.append((str(folder), f"damaged: {message}"))
            status = 1
    print(_align([tuple(map(_plain, line)) for line in lines]))
    return status


def _find(start: pathlib.Path) -> Iterator[pathlib.Path]:
    """The head folders at or below a folder, in order; hidden folders are temporary."""
    for name, below, names in os.walk(start):
        below[:] = sorted(child for child in below if not child.startswith("."))
        folder = pathlib.Path(name)
        if "head.json" in names or ("config.json" in names and _is_reference(folder)):
            yield folder


def _is_reference(folder: pathlib.Path) -> bool:
    path = folder / "config.json"
    try:
        content = read_json(path)
    except OSError:
        return False
    except ValueError:  # damaged; a head's if it names the reference's model type
        return path.is_file() and REFERENCE.encode() in read_bytes(path)
    return isinstance(content, dict) and content.get("model_type") == REFERENCE


def _describe(folder: pathlib.Path) -> tuple[str, ...]:
    """All columns but the folder's; a ValueError or OSError if the head is damaged."""
    model: str | None
    if (folder / "head.json").exists():
        description = read_own(folder)
        features, rank, model = description.features, description.rank, description.model
        temperature, scale = description.base_temperature, description.guidance_scale
        weights, output = folder / "head.safetensors", "output.weight"
    else:
        reference = read_reference(folder)
        features, rank = "mean", reference.guidance.hidden_size
        model = reference.base_config_dict.name if reference.base_config_dict else None
        temperature, scale = reference.base_temp, reference.guidance_scale
        output = f"guidance_head.proj.{2 * reference.guidance.num_hidden_layers}.weight"
        places = reference_files(folder)
        if not isinstance(places, pathlib.Path):
            if output not in places:
                raise ValueError(f"model.safetensors.index.json: {output} is in no file")
            places = places[output]
        weights = places
    _check_weights(weights, output, rank)
    card = _read_card(folder / "README.md")
    return (
        _shorten(card.get("request", "")) or "-",
        card.get("date", "-"),
        str(rank),
        features,
        f"{temperature:g}",
        f"{scale:g}",
        model or "-",
        _shorten(card.get("verdict", "no card")),
    )


def _check_weights(path: pathlib.Path, output: str, rank: int) -> None:
    """Reads the header of a file of weights, which has the length of the file."""
    check_regular(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shape = file.get_slice(output).get_shape()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if shape[1:] != [rank]:
        raise ValueError(f"{path.name}: {output} has shape {shape}, but the rank is {rank}")


def _read_card(path: pathlib.Path) -> dict[str, str]:
    """The one-line fields of a card's front matter; empty without a card."""
    fields: dict[str, str] = {}
    if not path.exists():
        return fields
    lines = read_bytes(path, _LARGEST_CARD).decode("utf-8", "replace").splitlines()
    if lines[:1] != ["---"]:
        return fields
    for line in lines[1:]:
        if line == "---":
            break
        name, colon, scalar = line.partition(": ")
        if colon:
            try:
                value = parse_json(scalar, name)
            except ValueError:  # edited by hand, without quotes
                value = scalar
            fields[name] = value if isinstance(value, str) else scalar
    return fields


def _plain(text: str) -> str:
    """Text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _shorten(text: str) -> str:
    """The first words of a text."""
    text = _plain(text)
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Aligns columns; a line with fewer columns than the first ends with a text of any length."""
    complete = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(_width, column)) for column in zip(*complete, strict=True)]
    widths[0] = max(_width(line[0]) for line in lines)
    return "\n".join(
        "  ".join(
            text + " " * (width - _width(text)) for text, width in zip(line, widths, strict=False)
        ).rstrip()
        for line in lines
    )


def _width(text: str) -> int:
    """Width of a text on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape characters that the locale lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
