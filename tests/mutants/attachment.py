"""Mutants of attach: reading what lies beside the weights."""

from mutants.mutant import Mutant

MUTANTS = [
    # biases beside the weights
    Mutant(
        "biases: those saved beside the weights are passed over",
        "    source = _beside_weights(model, layers, balancers, multiplies) if biases is None else biases",
        "    source = biases",
        "test_saved -k begins",
    ),
    Mutant(
        "biases: a promised file that is not there means zero",
        "    if path is None:\n        raise EquipoiseError(",
        "    if path is None:\n        return None\n        raise EquipoiseError(",
        "test_saved -k promised",
    ),
    Mutant(
        "a copy begins with the biases of the folder",
        "    if any(tap_of(layer.router) is not None for layer in layers):\n        return None",
        "    if False:\n        return None",
        "test_saved -k trained_on",
    ),
    # what is saved and found again
    Mutant(
        "saved: factors come back as numbers that are added",
        "    if are_factors != multiplies:",
        "    if False:",
        "test_saved -k factors",
    ),
]
