"""Tables of the reports, as Markdown has them."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end.

    Args:
        head: a title for each column.
        rows: the cells of each row, as many as there are titles.
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
