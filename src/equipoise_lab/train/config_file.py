"""Writes the options of a run or a comparison as a YAML file, for ``--config``.

It is a copy for people: the lab reads config.json and compare.json, and this file only where ``--config`` names it.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from equipoise import __version__
from equipoise_lab.records import OPTIONS_OF_COMPARISON, OPTIONS_OF_RUN, write_parts
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.location import PACKAGED, hub_name, local_path
from equipoise_lab.train.option_groups import in_groups

__all__ = ["write_config_file"]

OF_ONE_CALL = ("out", "resume", "json", "tracker", "tracker_layers")  # say nothing about the numbers: not written


def write_config_file(config: Train | Compare) -> None:
    """Writes ``run.yaml`` or ``compare.yaml`` into the folder of ``config``."""
    file = OPTIONS_OF_RUN if isinstance(config, Train) else OPTIONS_OF_COMPARISON
    write_parts(config.out / file, [_yaml(config, file).encode()])


def _yaml(config: Train | Compare, file: str) -> str:
    """All options but ``OF_ONE_CALL`` and those without a value: another version may have other defaults."""
    import yaml

    command = type(config).__name__.lower()
    values = {field.name: _plain(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)}
    written = [name for name, value in values.items() if value is not None and name not in OF_ONE_CALL]
    parts = [
        f"# The options of `equipoise {command}`, version {__version__}. To train the same again:\n"
        f"# equipoise {command} --config {file} --out NEW_FOLDER\n"
    ]
    for group, names in in_groups(written).items():
        of_group = {name.replace("_", "-"): values[name] for name in names}
        text = yaml.safe_dump(of_group, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**6)
        parts.append(f"\n# {group}\n{text}")
    return "".join(parts)


def _plain(name: str, value: Any) -> Any:
    """An option as YAML has it. Paths are absolute, so that the file means the same in every folder."""
    if name == "data" and value != PACKAGED and hub_name(value) is None:
        value = local_path(value)
    if isinstance(value, Path):
        return os.path.abspath(value.expanduser())
    return list(value) if isinstance(value, tuple) else value
