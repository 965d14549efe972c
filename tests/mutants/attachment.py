"""Mutants of attach: reading what lies beside the weights."""

from mutants.mutant import Mutant

MUTANTS = [
    # biases beside the weights
    Mutant(
        "biases: what lies beside the weights is passed over",
        "            biases = _beside_weights(inner, layers, resolved, multiplies)\n",
        "            pass\n",
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
        '    if any("_equipoise" in layer.router.__dict__ for layer in layers):\n        return None',
        "    if False:\n        return None",
        "test_saved -k trained_on",
    ),
    # what is saved and found again
    Mutant(
        "saved: factors come back as numbers that are added",
        "    if theirs != multiplies:",
        "    if False:",
        "test_saved -k factors",
    ),
]
