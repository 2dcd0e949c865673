"""Write the option pages docs/COMMAND.md from the option classes.

    python docs/write_options.py

tests/test_docs.py compares the pages with what this gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pipeline.ask import AskConfig
from pipeline.caption import CaptionConfig
from pipeline.classify import ClassifyConfig
from pipeline.cli import flag_of, options_of
from pipeline.convert import ConvertConfig
from pipeline.evaluate.config import EvaluateConfig
from pipeline.export import ExportConfig
from pipeline.extract import ExtractConfig
from pipeline.sweep import SweepConfig
from pipeline.train import describe_preset
from pipeline.training.config import PRESETS, TrainConfig

FOLDER = Path(__file__).parent
COMMANDS = {
    "extract": (ExtractConfig, "Stage one: photographs to a cache of region features."),
    "convert": (ConvertConfig, "Features of other programs to a cache."),
    "train": (TrainConfig, "Stage two: train a decoder over a cache."),
    "evaluate": (EvaluateConfig, "Score a checkpoint over a cache, or a file of captions."),
    "caption": (CaptionConfig, "Caption photographs with a checkpoint."),
    "ask": (AskConfig, "Answer questions about photographs with a checkpoint."),
    "classify": (ClassifyConfig, "Label photographs with texts with a checkpoint."),
    "export": (ExportConfig, "Write a checkpoint as graphs of ONNX or torch.export."),
    "sweep": (SweepConfig, "Train and score the runs of a TOML file, and compare them."),
}


def page(name: str) -> str:
    """The page of a command, as Markdown."""
    config, purpose = COMMANDS[name]
    lines = [
        f"# python -m pipeline.{name}",
        "",
        f"{purpose} `--config FILE` sets any option, from TOML or an earlier run's",
        "config.json; options on the command line win over it. This page is written by",
        "`docs/write_options.py`.",
    ]
    for item in fields(config):
        if item.name != "extensions" and item.metadata["name"]:
            lines += ["", "| argument | what it is |", "|---|---|"]
            lines.append(f"| `{item.metadata['name']}` | {item.metadata['help']} |")
    groups: dict[str, list[Any]] = {}
    for item in fields(config):
        if item.name != "extensions" and not item.metadata["name"]:
            groups.setdefault(item.metadata["group"], []).append(item)
    for group, items in sorted(groups.items(), key=lambda pair: pair[0] == ""):
        lines += ["", f"## {group.capitalize() + ' options' if group else 'Other options'}", ""]
        lines += table(items)
    for item in fields(config):
        for entry in item.metadata.get("registry") or ():
            if options := options_of(item, entry):
                lines += ["", f"## With `{flag_of(item.name)} {entry}`", "", *table(options)]
    if config is TrainConfig:
        lines += ["", "## Presets", "", "| `--preset` | sets |", "|---|---|"]
        lines += [
            f"| `{preset}` | {describe_preset(values)} |" for preset, values in PRESETS.items()
        ]
    return "\n".join(lines) + "\n"


def table(items: Iterable[Any]) -> list[str]:
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for item in items:
        text, _, default = item.metadata["help"].partition("  [")
        default = default.removesuffix("]")
        if not default and item.default not in (None, (), "", MISSING):
            named = {True: "on", False: "off"} if isinstance(item.default, bool) else {}
            default = named.get(item.default, str(item.default))
        choices = item.metadata.get("choices") or item.metadata.get("registry") or ()
        if choices:
            text += f": {', '.join(f'`{choice}`' for choice in choices)}"
        cells = [f"`{flag_of(item.name)}`", default, text]
        rows.append(
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            + " |"
        )
    return rows


if __name__ == "__main__":
    for name in COMMANDS:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")
