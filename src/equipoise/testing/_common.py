"""How invariants are run. Each is a function; the first sentence of its docstring says what must hold."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["ConformanceError", "NotApplicable", "case", "fail", "is_close", "require", "require_same", "run_invariants"]


class ConformanceError(AssertionError):
    """An invariant does not hold. The message has its name, what must hold, what came, and the input.

    It is an ``AssertionError``.
    """


class NotApplicable(Exception):
    """The invariant has no meaning for what is checked."""


class Violation(Exception):
    """What came in place of what must hold, and the input it came with."""

    def __init__(self, came: str, inputs: Mapping[str, object]):
        super().__init__(came)
        self.came, self.inputs = came, inputs


def fail(came: str) -> None:
    raise Violation(came, {})


def require(condition: Any, came: str) -> None:
    """``came`` completes the sentence "Got: ..."."""
    if not bool(condition):
        fail(came)


@contextmanager
def case(**inputs: object) -> Iterator[None]:
    """Names the input of what is checked inside, for the message of an error."""
    try:
        yield
    except NotApplicable:
        raise
    except Violation as violation:
        raise Violation(violation.came, {**inputs, **violation.inputs}) from violation.__cause__
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {error}", inputs) from error


def run_invariants(
    invariants: Mapping[str, Callable[..., None]],
    only: str | None,
    argument_sets: Sequence[tuple[dict[str, object], Any]],
) -> tuple[str, ...]:
    """Checks ``only``, or all, with each set of arguments. Returns the names of those that apply.

    ``argument_sets``: pairs of (inputs for the message of an error, arguments of the invariant).
    """
    if only is not None and only not in invariants:
        raise ValueError(f"only must be one of {', '.join(invariants)}: got {only!r}.")
    checked = []
    for name in invariants if only is None else (only,):
        for inputs, arguments in argument_sets:
            try:
                with case(**inputs):
                    invariants[name](*arguments)
            except NotApplicable:
                continue
            except Violation as violation:
                raise ConformanceError(_message(name, invariants[name], violation)) from violation.__cause__
            if name not in checked:
                checked.append(name)
    return tuple(checked)


def _message(name: str, invariant: Callable[..., None], violation: Violation) -> str:
    must_hold = " ".join((invariant.__doc__ or "").split())
    inputs = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in violation.inputs.items())
    return f"{name}: {must_hold} Got: {violation.came.rstrip('.')}" + (f"; with {inputs}." if inputs else ".")


def is_close(value: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    return value.shape == expected.shape and torch.allclose(value.double(), expected.double(), rtol=rtol, atol=atol)


def require_same(value: Tensor, expected: Tensor, subject: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same dtype and bits, or close where there is a tolerance."""
    if rtol == atol == 0:
        is_same = value.dtype == expected.dtype and torch.equal(value, expected)
    else:
        is_same = is_close(value, expected, rtol, atol)
    if not is_same:
        fail(f"{subject} {_describe_difference(value.detach(), expected.detach())}")


def _describe_difference(value: Tensor, expected: Tensor) -> str:
    """The shapes, the dtypes, or the place where two tensors differ most."""
    if value.shape != expected.shape:
        return f"of shape {tuple(value.shape)}, not {tuple(expected.shape)}"
    distance = (value.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    if not distance.any():
        return f"of {value.dtype}, not {expected.dtype}"
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), value.shape))
    return f"{value[index].item():.9g} where {expected[index].item():.9g} was expected, at index {index}"
