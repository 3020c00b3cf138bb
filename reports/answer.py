"""A suite's answer in a terminal: its table, and one sentence on what it says."""

from collections.abc import Sequence

from reports import text
from reports.escape import one_line
from reports.model import Cell, Column, Delta, Kind, Table, TableRow


def lines(table: Table, width: int) -> list[str]:
    """Return the table as aligned lines of at most ``width`` characters; it names the columns that do not fit.

    A number that is not the mean over all planned seeds says so. The difference is that of the primary metric.
    """
    shown = list(range(len(table.columns)))
    while True:
        grid = [_head(table, shown), *(_line(table, row, shown) for row in table.rows)]
        widths = [max(map(len, cells)) for cells in zip(*grid, strict=True)]
        last = next((index for index in reversed(shown) if table.columns[index].key != table.primary), None)
        if sum(widths) + 2 * len(widths) - 2 <= width or last is None:
            break
        shown.remove(last)
    left_out = [column.label for index, column in enumerate(table.columns) if index not in shown]
    note = [f"too wide for this terminal: {', '.join(left_out)}"] if left_out else []
    return [*(_aligned(cells, widths) for cells in grid), *note]


def sentence(table: Table) -> str:
    """Return what the table says of its primary metric: differences that are clear after Holm, or why none is said."""
    index = next((i for i, column in enumerate(table.columns) if column.key == table.primary), None)
    if index is None:
        return f"No verdict: the table leaves out {table.primary}, which carries it."
    column = table.columns[index]
    compared = [(row, row.cells[index].delta) for row in table.rows if row.cells[index].delta is not None]
    found = [(row, delta) for row, delta in compared if delta is not None]
    if not found:
        done = f"{table.done} of {table.runs} runs are done"
        return one_line(f"No verdict yet: no row has {column.label} beside its baseline's ({done}).")
    clear = [(row, delta) for row, delta in found if text.significant(delta)]
    if clear:
        return one_line(f"Clear after Holm: {'; '.join(_told(row, delta, column) for row, delta in clear)}.")
    row, delta = max(found, key=lambda pair: pair[1].mean * (column.direction or 1))
    which = "" if len(found) == 1 else f" (the best of {len(found)} rows)"
    return one_line(f"{_told(row, delta, column)}{which}: {_unclear(delta)}.")


def _told(row: TableRow, delta: Delta, column: Column) -> str:
    """``MP-Former, +2.3 AP to its baseline (95 % interval …)``."""
    line = f"{row.label}, {text.signed(delta.mean, column.decimals)} {column.label} to its baseline"
    return line if delta.n < 3 else f"{line} ({text.interval(delta, column.decimals)})"


def _unclear(delta: Delta) -> str:
    if delta.n >= 3:
        return "not clear after Holm"
    seeds = "one seed" if delta.n == 1 else f"{delta.n} seeds"
    return f"no verdict from {seeds}, which takes three (--seeds 0-2)"


def _head(table: Table, shown: Sequence[int]) -> list[str]:
    cells = [""]
    for index in shown:
        column = table.columns[index]
        cells += [column.label, "Δ"] if column.key == table.primary else [column.label]
    return [*cells, "n"]


def _line(table: Table, row: TableRow, shown: Sequence[int]) -> list[str]:
    cells = [one_line(row.label)]
    for index in shown:
        column, cell = table.columns[index], row.cells[index]
        cells += [_number(cell, column)]
        cells += [text.delta(cell, column)] if column.key == table.primary else []
    return [*cells, text.seeds(row.cells)]


def _number(cell: Cell, column: Column) -> str:
    if not cell.has_number:
        return one_line(cell.short or "—")
    said = "" if cell.kind is Kind.VALUE else f"({one_line(cell.short)})" if cell.short else f"({cell.kind.value})"
    return " ".join(filter(None, (text.mean(cell, column), text.spread(cell, column), said)))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    label, *numbers = zip(cells, widths, strict=True)
    return "  ".join((label[0].ljust(label[1]), *(cell.rjust(width) for cell, width in numbers))).rstrip()
