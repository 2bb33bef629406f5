"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that hold Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
