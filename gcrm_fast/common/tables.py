"""Tables as text."""

from collections.abc import Sequence


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, *lines]]
    first = [line[0].ljust(widths[0]) for line in [head, *lines]]
    return "\n".join("  ".join([name, *cells[1:]]).rstrip() for name, cells in zip(first, aligned, strict=True))


def number(value: float, digits: int = 3) -> str:
    return "-" if value != value else f"{value:.{digits}f}"
