"""Lines of metrics.jsonl as an attempt's log has them, for ``mpformer logs -f``."""

from collections.abc import Mapping
from typing import Any

from experiments.status.tables import duration

_SCORES = ("AP", "PQ", "mIoU", "mIoU-L", "Util")


def line_of(line: Mapping[str, Any], max_iter: int, eta_seconds: float | None) -> str:
    """Return one line: iteration, losses, rate, pace and time to go of training; scores of a probe or of the end."""
    at = f"iteration {line.get('iteration', '?')}/{max_iter}"
    if line.get("kind") != "train":
        metrics = line.get("metrics") or {}
        which = "scores of all images" if line.get("final") else "probe on a few images"
        shown = [name for name in _SCORES if isinstance(metrics.get(name), int | float)]
        return f"{at}  {which}: {', '.join(f'{name} {metrics[name]:.1f}' for name in shown) or 'none'}"
    losses = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
    each = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
    parts = [at, f"loss {_number(line.get('loss'))}" + (f" ({each})" if each else "")]
    parts += [f"lr {line['lr']:.3g}"] if "lr" in line else []
    parts += [f"{line['seconds']:.3g} s/it"] if "seconds" in line else []
    return "  ".join([*parts, *([f"ETA {duration(eta_seconds)}"] if eta_seconds is not None else [])])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "?"
