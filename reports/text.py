"""Numbers as people read them; the same text in every format, up to that format's markup."""

from collections.abc import Sequence

from reports.model import Cell, Column, Delta, Kind

MINUS = "−"


def number(value: float, decimals: int) -> str:
    """``12.3``; a true minus sign, and no negative zero."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """``+1.2``, ``−0.3`` or ``±0.0``."""
    text = number(value, decimals)
    if float(f"{value:.{decimals}f}") == 0:
        return f"±{text}"
    return text if text.startswith(MINUS) else f"+{text}"


def mean(cell: Cell, column: Column) -> str:
    """The cell's number alone, or a dash. Of several values that are no results there is no mean, but their range."""
    if cell.mean is not None or not cell.values:
        return "—" if cell.mean is None else number(cell.mean, column.decimals)
    values = [value.value for value in cell.values]
    ends = list(dict.fromkeys(number(end, column.decimals) for end in (min(values), max(values))))
    return " … ".join(ends)


def spread(cell: Cell, column: Column) -> str:
    """``± 0.4``, or nothing where n < 3."""
    return "" if cell.std is None else f"± {number(cell.std, column.decimals)}"


def delta(cell: Cell, column: Column) -> str:
    """``+1.2``, with a star where it is significant after Holm and the pairs where they are fewer than the cell's
    seeds; nothing where there is no pair.
    """
    if cell.delta is None:
        return ""
    fewer = "" if cell.delta.n == cell.n else f", {cell.delta.n} pair{'' if cell.delta.n == 1 else 's'}"
    return signed(cell.delta.mean, column.decimals) + ("*" if significant(cell.delta) else "") + fewer


def significant(difference: Delta) -> bool:
    """Whether the difference passed Holm at 0.05; never without at least three pairs."""
    return difference.p_holm is not None and difference.p_holm < 0.05 and difference.n >= 3


def change(cell: Cell, column: Column) -> str:
    """``better``, ``worse`` or ``same``: the sign of the printed delta, by the metric's direction."""
    if cell.delta is None or not column.direction:
        return "same"
    shown = round(cell.delta.mean, column.decimals) * column.direction
    return "better" if shown > 0 else "worse" if shown < 0 else "same"


def remark(cell: Cell, cells: Sequence[Cell]) -> str:
    """The cell's reason in a word or two; nothing for a plain value, and nothing where the n of its row (``cells``)
    already says how many seeds it has.
    """
    said = cell.kind is Kind.VALUE or (cell.n > 0 and cell.n == max(other.n for other in cells))
    return "" if said else cell.short


def flags(cell: Cell) -> str:
    """Marks such as † that a footnote explains."""
    return "".join(cell.flags)


def seeds(cells: Sequence[Cell]) -> str:
    """The n of a row: ``3``, or ``2 of 3`` where seeds are missing."""
    planned = max((cell.planned for cell in cells), default=0)
    n = max((cell.n for cell in cells), default=0)
    return str(n) if n == planned else f"{n} of {planned}"


def mean_interval(cell: Cell, column: Column) -> str:
    """``95 % interval 40.1 … 41.0`` of the mean, or nothing where n < 3."""
    if cell.low is None or cell.high is None:
        return ""
    return f"95 % interval {number(cell.low, column.decimals)} … {number(cell.high, column.decimals)}"


def interval(difference: Delta, decimals: int) -> str:
    """``95 % interval +0.1 … +2.0, p = 0.012, Holm 0.024``; says why where n does not allow it."""
    if difference.low is None or difference.high is None or difference.p is None:
        return f"n = {difference.n} pair{'' if difference.n == 1 else 's'}, no significance"
    text = (
        f"95 % interval {signed(difference.low, decimals)} … {signed(difference.high, decimals)}, p = "
        f"{difference.p:.3g}"
    )
    return (
        text
        + (f", after Holm {difference.p_holm:.3g}" if difference.p_holm is not None else "")
        + f", n = {difference.n}"
    )
