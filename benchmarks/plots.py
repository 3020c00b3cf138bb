"""Pictures of the results: stages side by side, memory, growth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

MIB = 2**20
COLOURS = {"direct": "#b0b0b0", "product": "#1f6f8b", "product, own points": "#57a0b8", "transformers": "#c98b4a"}
GROUPS = {
    "backbone": "backbone, forward and backward",
    "pixel decoder": "pixel decoder, forward and backward",
    "decoder + matching\n+ losses": "decoder + matching + losses, forward and backward",
    "whole step": "whole step",
}


def draw_all(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every picture that the results allow; returns the files."""
    written = [_stages(results, folder), _memory(results, folder)] if results.get("training") else []
    if results.get("growth"):
        written.append(_growth(results["growth"], folder))
    return written


def _stages(results: Mapping[str, Any], folder: Path) -> Path:
    training = results["training"]
    figure, panels = _panels(len(training))
    for axis, (name, found) in zip(panels, training.items(), strict=True):
        paths = list(found["seconds"])
        for i, path in enumerate(paths):
            values = [found["cpu seconds"][path][stage] for stage in GROUPS.values()]
            places = [x + (i - (len(paths) - 1) / 2) * 0.8 / len(paths) for x in range(len(GROUPS))]
            axis.bar(places, values, 0.8 / len(paths), label=path, color=COLOURS[path])
        axis.set_xticks(range(len(GROUPS)), list(GROUPS), fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("CPU seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return _save(figure, folder / "stages.svg")


def _memory(results: Mapping[str, Any], folder: Path) -> Path:
    kinds = {
        "kept for backward": "bytes kept by decoder, matching, losses",
        "peak": "peak bytes of decoder, matching, losses",
    }
    training = results["training"]
    figure, panels = _panels(len(training))
    for axis, (name, found) in zip(panels, training.items(), strict=True):
        paths = list(found["seconds"])
        for i, path in enumerate(paths):
            values = [found[key][path] / MIB for key in kinds.values()]
            places = [x + (i - (len(paths) - 1) / 2) * 0.8 / len(paths) for x in range(len(kinds))]
            axis.bar(places, values, 0.8 / len(paths), label=path, color=COLOURS[path])
        axis.set_xticks(range(len(kinds)), list(kinds), fontsize=8)
        axis.set_title(f"{name}: decoder, matching, losses", fontsize=8)
        axis.set_ylabel("MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return _save(figure, folder / "memory.svg")


def _growth(found: Mapping[str, Any], folder: Path) -> Path:
    figure, axes = plt.subplots(2, len(found), figsize=(3.4 * len(found), 5), layout="constrained")
    for column, (axis_name, measured) in enumerate(found.items()):
        points = measured["points"]
        x = [point["value"] for point in points]
        for path in ("direct", "product"):
            for row, (key, scale) in enumerate((("seconds", 1), ("kept bytes", MIB))):
                values = [point[f"{path} {key}"] / scale for point in points]
                axes[row][column].plot(x, values, "o-", ms=3, color=COLOURS[path], label=path)
                axes[row][column].set_xlim(left=0)
                axes[row][column].set_ylim(bottom=0)
                axes[row][column].set_xlabel(axis_name)
                axes[row][column].xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes[row][column].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[0][column].set_ylabel("CPU seconds, one thread")
        axes[1][column].set_ylabel("MiB kept for backward")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.suptitle("decoder + matching + losses, forward and backward", fontsize=9)
    return _save(figure, folder / "growth.svg")


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels, two a row."""
    rows = (count + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(9, 2.5 * rows + 0.3), layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
