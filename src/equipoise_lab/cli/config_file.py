"""The file of ``--config``: options of train or compare in YAML, which become defaults of the command line.

It is read as text, so that a value means what it means on the command line: ``1e-3`` is a number and ``off`` a word,
which are a text and false in YAML 1.1. Imports no torch.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from equipoise.errors import UsageError, suggest
from equipoise_lab.paths import suggest_paths
from equipoise_lab.records import OPTIONS_OF_COMPARISON, OPTIONS_OF_RUN
from equipoise_lab.train.config import Compare, Train

if TYPE_CHECKING:
    import yaml

__all__ = ["ConfigFile", "config_path", "read_config_file"]

FLAG = "--config"
COMMANDS: Mapping[str, type[Train] | type[Compare]] = {"train": Train, "compare": Compare}
WRITTEN = {"train": OPTIONS_OF_RUN, "compare": OPTIONS_OF_COMPARISON}
IN_PLACE_OF = {"strategies": "strategy", "seeds": "seed", "strategy": "strategies", "seed": "seeds"}
LONGEST = 60  # characters of a value that an error quotes
KINDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "a text"}


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The options that a file sets, by name, and the line of each."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def says(self, message: str, arguments: Sequence[str]) -> str:
        """The end of an error message about an option: which line sets it. "" if the command line does."""
        words = {word.strip(".,:;") for word in message.split()}
        if words & {one.partition("=")[0].replace("_", "-") for one in arguments if one.startswith("--")}:
            return ""
        lines = [
            f"{name.replace('_', '-')} in line {self.lines[name]}"
            for name, value in self.values.items()
            if f"--{name.replace('_', '-')}" in words or any(repr(one) in message for one in _texts(value))
        ]
        return f" {self.path} sets {' and '.join(lines)}." if lines else ""


def _texts(value: Any) -> Sequence[str]:
    """The texts that ``value`` consists of, as a message may quote them."""
    return [value] if isinstance(value, str) else value if isinstance(value, tuple) else []


def config_path(arguments: Sequence[str]) -> Path | None:
    """The file that ``--config`` names. Without a value or a command that takes it, None: the parser says so."""
    if not arguments or arguments[0] not in COMMANDS:
        return None
    named = [after for one, after in pairwise(arguments) if one == FLAG]
    named += [one.partition("=")[2] for one in arguments if one.startswith(f"{FLAG}=")]
    if len(named) > 1:
        raise UsageError(f"{FLAG} must be given once: got {' and '.join(named)}. Put all options into one file.")
    return Path(named[0]) if named and named[0] and not named[0].startswith("-") else None


def read_config_file(path: Path, command: str) -> ConfigFile:
    """Raises ``UsageError`` unless ``path`` holds options of ``command``, which is train or compare."""
    import yaml

    node = _mapping(path, command)
    types_of = get_type_hints(COMMANDS[command])
    values, lines = dict[str, Any](), dict[str, int]()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{path}, line {line}, must begin with the name of an option: got {_shape(key)}.")
        name = key.value.replace("-", "_")
        if name not in types_of:
            raise UsageError(_unknown(key.value, line, path, command))
        if name in lines:
            raise UsageError(
                f"{path} must have each option once: got {key.value} in lines {lines[name]} and {line}. Remove one."
            )
        lines[name] = line
        values[name] = _value(value, types_of[name], f"{key.value} in {path}, line {line},")
    return ConfigFile(path, values, lines)


def _mapping(path: Path, command: str) -> "yaml.MappingNode":
    import yaml

    example = f"Write a line each, such as steps: 200; folders of `equipoise {command}` have {WRITTEN[command]}"
    if path.is_dir():
        names = [name for name in WRITTEN.values() if (path / name).is_file()]
        near = f" Did you mean {path / names[0]}?" if names else " Give the file."
        raise UsageError(f"{FLAG} must be a file: {path} is a folder.{near}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = suggest_paths(path) or " Check the path."
        raise UsageError(f"{FLAG} must be a file of options: {path} does not exist.{near}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} must be a text of options: it is no text in UTF-8. {example}.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path} must be YAML{where}: {_problem(error.problem)}.") from None
    except (yaml.YAMLError, RecursionError):
        raise UsageError(f"{path} must be YAML: it has characters or depths that YAML does not allow.") from None
    if node is None:
        raise UsageError(f"{path} must hold options: it holds none. {example}.")
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path} must hold options: got {_shape(node)}. {example}.")
    return node


def _problem(problem: str | None) -> str:
    """What PyYAML finds, in our words where it happens often."""
    if problem and "'\\t'" in problem:
        return "got a tab. Write spaces in its place"
    if problem and "mapping values are not allowed" in problem:
        return "got a second colon, or an indented line. Put a value with a colon and a space into quotes"
    if problem and ("could not find expected ':'" in problem or "<block end>" in problem):
        return "each line must be name: value, with a space after the colon"
    return f"{problem or 'it cannot be read'}. Correct that line"


def _unknown(key: str, line: int, path: Path, command: str) -> str:
    name, other = key.lstrip("-").replace("-", "_"), next(one for one in COMMANDS if one != command)
    known, of_other = get_type_hints(COMMANDS[command]), get_type_hints(COMMANDS[other])
    if name in of_other and name not in known:
        instead = f", or write {IN_PLACE_OF[name]} in its place" if name in IN_PLACE_OF else ", or remove the line"
        return (
            f"{path} must hold options of `equipoise {command}`: {key} in line {line} is one of `equipoise {other}`. "
            f"Use `equipoise {other} {FLAG} {path}`{instead}."
        )
    positive = name.removeprefix("no_")
    if positive != name and known.get(positive) is bool:
        hint = f" Write {positive.replace('_', '-')}: false."
    elif path.suffix == ".json" and (path.parent / WRITTEN[command]).is_file():
        hint = f" Did you mean {path.parent / WRITTEN[command]}?"
    else:
        near = get_close_matches(name.replace("_", "-"), [one.replace("_", "-") for one in known], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
    hint = hint or f" `equipoise {command} --help` lists them."
    return f"an option must be one of `equipoise {command}`: got {key} in {path}, line {line}.{hint}"


def _value(node: "yaml.Node", kind: Any, where: str) -> Any:
    import yaml

    if get_origin(kind) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            example = node.value if isinstance(node, yaml.ScalarNode) and node.value else "none"
            raise UsageError(f"{where} must be a list: got {_shape(node)}. Write each in a line after it: - {example}")
        return tuple(_item(item, node, where) for item in node.value)
    is_optional = get_origin(kind) in (Union, types.UnionType)
    if is_optional:
        (kind,) = (one for one in get_args(kind) if one is not types.NoneType)
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        if is_optional:
            return None
        none = " The strategy without balancing is none." if kind is str else ""
        raise UsageError(f"{where} must have a value: got {node.value or 'none'}. Write one, or remove the line.{none}")
    return _plain(node, kind, where)


def _item(node: "yaml.Node", items: "yaml.SequenceNode", where: str) -> str:
    if items.flow_style and "=" in node.value and ":" not in node.value:
        raise UsageError(
            f"{where} must be a list: in [ ], a comma ends a strategy, so {node.value!r} stands alone. Put the "
            "strategy into quotes, or write each in a line after it: - none"
        )
    return _value(node, str, where)


def _plain(node: "yaml.Node", kind: Any, where: str) -> Any:
    import yaml

    choices = get_args(kind) if get_origin(kind) is Literal else ()
    words = f"one of {', '.join(choices)}" if choices else KINDS[kind]
    if not isinstance(node, yaml.ScalarNode):
        raise UsageError(f"{where} must be {words}: got {_shape(node)}.")
    if node.value == "":
        raise UsageError(f"{where} must have a value: got an empty one. Write one, or remove the line.")
    try:
        # As the command line reads a number: pydantic would take 4.0 for a whole one.
        value = kind(node.value) if kind in (int, float) else TypeAdapter(kind).validate_strings(node.value)
    except ValueError:  # pydantic's is one too
        raise UsageError(f"{where} must be {words}: got {_cut(node.value)!r}.{suggest(node.value, choices)}") from None
    return value.expanduser() if isinstance(value, Path) else value


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _shape(node: "yaml.Node") -> str:
    return {"scalar": repr(node.value), "sequence": "a list", "mapping": "names with values of their own"}[node.id]
