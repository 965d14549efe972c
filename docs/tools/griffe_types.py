"""Annotations of the reference as a reader wants them: an extension of griffe, which ``zensical.toml`` names.

- An alias of the package is written out: ``Rule | None`` becomes ``Literal["sign", ...] | None``.
- A shape has no blank at its beginning: ``Float[Tensor, " experts"]`` becomes ``Float[Tensor, "experts"]``. The blank
  is there for linters, which would take one word for a forward reference.
- A ``NamedTuple`` has the signature by which it is made.
"""

import ast
import dataclasses
from typing import Any

import griffe

__all__ = ["ReadableTypes"]

SHAPED = ("Bool", "Float", "Int")  # of jaxtyping


class ReadableTypes(griffe.Extension):
    """Rewrites the annotations of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _rewrite(pkg, pkg)


def _rewrite(scope: griffe.Module | griffe.Class, package: griffe.Module) -> None:
    for member in scope.members.values():
        if isinstance(member, griffe.Module | griffe.Class):
            _rewrite(member, package)
        elif isinstance(member, griffe.Attribute):
            member.annotation = _readable(member.annotation, package)
        elif isinstance(member, griffe.Function):
            member.returns = _readable(member.returns, package)
            for parameter in member.parameters:
                parameter.annotation = _readable(parameter.annotation, package)
    if isinstance(scope, griffe.Class) and "NamedTuple" in map(str, scope.bases):
        scope.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*_fields(scope))))


def _readable(value: Any, package: griffe.Module) -> Any:
    """An annotation, or a part of one, with aliases written out."""
    if isinstance(value, griffe.ExprName):
        alias = _alias(value, package)
        return value if alias is None else _readable(alias, package)
    if isinstance(value, griffe.ExprSubscript) and value.canonical_name in SHAPED:
        return dataclasses.replace(value, slice=_without_blank(value.slice))
    if isinstance(value, list):
        return [_readable(item, package) for item in value]
    if not isinstance(value, griffe.Expr):
        return value
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: _readable(part, package) for name, part in parts.items()})


def _alias(name: griffe.ExprName, package: griffe.Module) -> griffe.Expr | None:
    """What a name of the package stands for, if it is an alias of a type."""
    path = name.canonical_path
    if not path.startswith(f"{package.name}."):
        return None
    found = package[path.removeprefix(f"{package.name}.")]
    is_alias = isinstance(found, griffe.Attribute) and isinstance(found.value, griffe.ExprSubscript | griffe.ExprBinOp)
    return found.value if is_alias else None


def _without_blank(tensor_and_shape: Any) -> Any:
    tensor, shape = tensor_and_shape.elements
    return dataclasses.replace(tensor_and_shape, elements=[tensor, f'"{ast.literal_eval(shape).strip()}"'])


def _fields(scope: griffe.Class) -> list[griffe.Parameter]:
    fields = [
        member
        for member in scope.members.values()
        if isinstance(member, griffe.Attribute) and "property" not in member.labels and member.annotation is not None
    ]
    kind = griffe.ParameterKind.positional_or_keyword
    return [
        griffe.Parameter(name, annotation=annotation, kind=kind, default=default)
        for name, annotation, default in [("self", None, None), *((f.name, f.annotation, f.value) for f in fields)]
    ]
