"""The words around a table: the caption that says scale, dataset and hardware, the preset of a row, the footnotes."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from experiments.store.attempt_dir import Provenance
from experiments.store.suite_record import SuiteRecord
from mpformer.config.datasets import DATASETS
from mpformer.config.paper_settings import setting, setting_names
from mpformer.config.presets import BESIDES, PRESETS
from mpformer.config.schema import BACKBONE_CONFIGS, ModelConfig, effective_toggles
from reports.definitions import definitions
from reports.model import Table
from reports.runs import RunView


def preset(
    record: SuiteRecord, toggles: Mapping[str, Any], changes: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """Name of the preset that a row is, or an empty string.

    A preset is a method at its setting. What a row (or its launch) changes besides what the preset sets makes it
    something else, unless model, data and schedule are together a published setting.
    """
    name = preset_toggles(toggles, changes)
    changed = (
        key for key in (*changes, *record.overrides) if key.partition(".")[0] in ("dataset", "model", "schedule")
    )
    others = [key for key in changed if key not in BESIDES.get(name, {})]
    return name if not others or _is_published(config) else ""


def _is_published(config: Mapping[str, Any]) -> bool:
    """Whether a configuration's data, model and schedule are those of a setting of the paper."""
    return bool(config) and _setting_of(config) in _published_settings()


@cache
def _published_settings() -> tuple[dict[str, Any], ...]:
    return tuple(_setting_of(setting(name).model_dump(mode="json")) for name in setting_names())


def _setting_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a setting fixes; not where files lie, nor what a preset sets."""
    dataset = {key: config["dataset"].get(key) for key in ("name", "task", "augmentation")}
    # a stored run has no key that is younger than it
    stored = {**ModelConfig().model_dump(mode="json"), **config["model"]}
    model = {key: value for key, value in stored.items() if key not in ("init_weights", "init_checksum")}
    of_presets = {key.partition(".")[2] for known in BESIDES.values() for key in known}
    schedule = {key: value for key, value in config["schedule"].items() if key not in of_presets}
    return {"dataset": dataset, "model": model, "schedule": schedule}


def preset_toggles(toggles: Mapping[str, Any], changes: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Name of the preset by toggles and the other keys that it sets, or an empty string.

    Without piloting the other toggles do not count.
    """
    for name, known in PRESETS.items():
        besides: Mapping[str, Any] = BESIDES.get(name, {})
        same = effective_toggles(known.model_dump(mode="json")) == effective_toggles(toggles)
        if same and besides == {key: changes.get(key) for key in besides}:
            return name
    return ""


def caption(table: Table, views: Sequence[RunView], record: SuiteRecord) -> str:
    """Title, scale, data, model, schedule, hardware and seeds in a few sentences."""
    config = next((view.config for view in views if view.config), {})
    parts = [
        f"{table.title}.",
        _scale(table),
        *_setting(config),
        _overrides(record),
        _hardware(views),
        _seeds(table),
        _presets(table),
    ]
    return " ".join(part for part in parts if part)


def short(table: Table) -> str:
    """Title, scale and dataset in a line: for a table whose notes are elsewhere."""
    return (
        f"{table.title}, scale {table.scale} on {_dataset(table)}. Δ: difference to the baseline row, paired by seed."
    )


def _dataset(table: Table) -> str:
    return DATASETS[table.dataset].title if table.dataset in DATASETS else table.dataset


def _scale(table: Table) -> str:
    dataset = _dataset(table)
    if table.scale == "mini":
        return f"Scale mini on {dataset}: a narrow model trained for minutes, not the paper's setting."
    return f"Scale {table.scale} on {dataset}."


def _setting(config: Mapping[str, Any]) -> list[str]:
    if not config:
        return []
    model, schedule, task = config["model"], config["schedule"], config["dataset"]["task"]
    return [
        f"{task.capitalize()} training, {backbone(model['backbone'])}, {model['decoder_layers']} decoder layers, "
        f"{model['queries']} queries, {schedule['max_iter']:,} iterations at batch {schedule['batch_size']}.",
    ]


def backbone(config: Mapping[str, Any]) -> str:
    """``R50``, ``Swin-L`` …: the title of the stored configuration; a kind that is not known here is called by name."""
    kind = str(config.get("kind"))
    known = {known.model_fields["kind"].default: known for known in BACKBONE_CONFIGS}
    return known[kind].model_construct(**config).title if kind in known else kind


def _overrides(record: SuiteRecord) -> str:
    """What the launch changed in every row."""
    changed = [f"{key} = {json.dumps(value)}" for key, value in record.overrides.items()]
    return f"Changed in every row: {', '.join(changed)}." if changed else ""


def _hardware(views: Sequence[RunView]) -> str:
    named = [hardware(view.provenance) for view in views if view.standing.state == "DONE"]
    kinds = list(dict.fromkeys(name for name in named if name))
    return f"Trained on {'; '.join(kinds)}." if kinds else ""


def hardware(provenance: Provenance) -> str:
    """The device that trained a run, in a few words; empty if it is not recorded."""
    gpus = provenance.more.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]}"
    processor, threads = provenance.processor, provenance.threads
    return f"{processor}, {threads} thread{'' if threads == 1 else 's'} a run" if processor and threads else processor


def _seeds(table: Table) -> str:
    planned = max((cell.planned for row in table.rows for cell in row.cells), default=0)
    if planned == 1:
        return "n = 1, no significance."
    if planned == 2:
        return "Mean over n = 2 seeds: no deviation, no significance."
    return (
        f"Mean ± sample standard deviation (ddof = 1) over n seeds, {planned} planned; Δ is to the baseline row, "
        f"paired by seed."
    )


def _presets(table: Table) -> str:
    named = [f"{row.name} is {row.preset}" for row in table.rows if row.preset]
    return f"Presets: {', '.join(named)}." if named else ""


def footnotes(table: Table) -> list[str]:
    """The remarks below the table: definitions always, significance and mixed code where they apply."""
    notes = definitions(table.columns)
    notes += _not_applicable(table)
    notes.append(_significance(table))
    return [note for note in [*notes, *table.warnings, _commit(table)] if note]


def _not_applicable(table: Table) -> list[str]:
    """Why a whole column has no number, once."""
    reasons = [{row.cells[k].reason for row in table.rows if row.cells} for k in range(len(table.columns))]
    whole = zip(table.columns, reasons, strict=True)
    return [f"{column.label}: {next(iter(why))}." for column, why in whole if len(why) == 1 and "" not in why]


def _significance(table: Table) -> str:
    deltas = [cell.delta for row in table.rows for cell in row.cells if cell.delta is not None]
    if not deltas:
        return ""
    if max(delta.n for delta in deltas) < 3:
        return "Fewer than three paired seeds: differences are shown, no significance is claimed."
    return (
        f"* p < 0.05 after Holm over the rows of this table, paired t test over seeds on {table.primary} alone; other "
        "columns carry no verdict. Intervals and tests of percentages are t intervals and tests on the arcsine scale: "
        "they stay in what a percentage, or a difference of two, can be."
    )


def _commit(table: Table) -> str:
    return f"Code: {', '.join(table.commits)}." if table.commits else ""
