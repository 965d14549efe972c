"""Invariants: named functions whose docstring says what must hold, and errors that say what came, with which input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["ConformanceError", "PassedOver", "case", "close", "fail", "require", "require_same", "run"]


class ConformanceError(AssertionError):
    """An invariant does not hold: the message says its name, what must hold, what came, and with which input."""


class PassedOver(Exception):
    """The invariant has no meaning for what is checked."""


class Broken(Exception):
    """What came, and the input it came with."""

    def __init__(self, came: str, given: Mapping[str, object]):
        super().__init__(came)
        self.came, self.given = came, given


def fail(came: str) -> None:
    raise Broken(came, {})


def require(holds: Any, came: str) -> None:
    if not bool(holds):
        fail(came)


@contextmanager
def case(**given: object) -> Iterator[None]:
    """Names the input of what is checked inside: an error that leaves it carries that along."""
    try:
        yield
    except PassedOver:
        raise
    except Broken as error:
        raise Broken(error.came, {**given, **error.given}) from error.__cause__
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}", given) from error


def run(
    invariants: Mapping[str, Callable[..., None]], only: str | None, inputs: Sequence[tuple[dict[str, object], Any]]
) -> tuple[str, ...]:
    """Checks ``only``, or all, on each input ``(what errors call it, arguments)``; returns the names of those that were
    not passed over."""
    if only is not None and only not in invariants:
        raise ValueError(f"only must be one of {', '.join(invariants)}: got {only!r}.")
    checked = []
    for name in invariants if only is None else (only,):
        for given, arguments in inputs:
            try:
                with case(**given):
                    invariants[name](*arguments)
            except PassedOver:
                continue
            except Broken as error:
                sentence = " ".join((invariants[name].__doc__ or "").split())
                what = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in error.given.items())
                came = error.came.rstrip(".") + (f"; with {what}." if what else ".")
                raise ConformanceError(f"{name}: {sentence} Got: {came}") from error.__cause__
            if name not in checked:
                checked.append(name)
    return tuple(checked)


def close(found: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    return found.shape == expected.shape and torch.allclose(found.double(), expected.double(), rtol=rtol, atol=atol)


def require_same(found: Tensor, expected: Tensor, what: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same dtype and bits, or close where a tolerance is given."""
    exact = rtol == atol == 0
    if not (
        found.dtype == expected.dtype and torch.equal(found, expected) if exact else close(found, expected, rtol, atol)
    ):
        fail(f"{what} {_differ(found.detach(), expected.detach())}")


def _differ(found: Tensor, expected: Tensor) -> str:
    """Where two tensors differ most, in words."""
    if found.shape != expected.shape:
        return f"of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    distance = (found.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    if not distance.any():
        return f"of {found.dtype}, not {expected.dtype}"
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), found.shape))
    return f"{found[index].item():.9g} where {expected[index].item():.9g} was expected, at index {index}"
