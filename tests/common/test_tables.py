"""Tables on the terminal."""

from gcrm_fast.common.tables import columns, table


def test_values_of_records_give_the_terminal_no_orders() -> None:
    """Names and values are shown with escapes, which count for the width of their column."""
    assert table([("\x1b[31mred", "a\r"), ("x", "b")]) == "  \\x1b[31mred  a\\r\n  x            b"
    assert columns(["", "n"], [["\x1b[0m", "1"], ["é", "\n"]]) == "          n\n\\x1b[0m   1\né        \\n"
