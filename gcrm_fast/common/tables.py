"""Tables as text for a terminal: what it would obey, in values of a record for example, as escapes."""

from collections.abc import Sequence

from gcrm_fast.common.errors import printable


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    shown = [(printable(name), printable(value)) for name, value in rows]
    width = max(len(name) for name, _ in shown)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown)


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, the first column aligned to the left, the others to the right."""
    cells = [[printable(cell) for cell in line] for line in [head, *lines]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    first = [line[0].ljust(widths[0]) for line in cells]
    return "\n".join("  ".join([name, *cells[1:]]).rstrip() for name, cells in zip(first, aligned, strict=True))


def number(value: float, digits: int = 3) -> str:
    return "-" if value != value else f"{value:.{digits}f}"
