"""Breaks the source on purpose, one known defect at a time; the tests must notice every break: ``make mutants``.

Each mutant is one replacement in a copy of the source. A mutant that no test notices, or whose text is no longer in
the source, fails the run. The tests that a mutant names are enough to notice it; others may notice it too. Without the
mutant they pass: ``make test`` sees to that. A file here holds the mutants of one area; ``make mutants ONLY=quantile``
runs those with this word in their description.
"""

from mutants import (
    adapters,
    attachment,
    balancers,
    counting,
    integrations,
    kernels,
    lab_models,
    lab_results,
    lab_train,
    measures,
    nn,
    routers,
    torch_internals,
)
from mutants.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

_AREAS = (
    counting,
    balancers,
    routers,
    adapters,
    attachment,
    torch_internals,
    measures,
    nn,
    integrations,
    kernels,
    lab_train,
    lab_models,
    lab_results,
)

MUTANTS: list[Mutant] = [mutant for area in _AREAS for mutant in area.MUTANTS]
