"""Mutants of attach: reading what lies beside the weights."""

from mutants.mutant import Mutant

MUTANTS = [
    # offsets beside the weights
    Mutant(
        "offsets: what lies beside the weights is passed over",
        "            offsets = _beside_weights(inner, layers, resolved, multiplies)\n",
        "            pass\n",
        "test_saved -k begins",
    ),
    Mutant(
        "offsets: a promised file that is not there means zero",
        "    if path is None:\n        raise EquipoiseError(",
        "    if path is None:\n        return None\n        raise EquipoiseError(",
        "test_saved -k promised",
    ),
    Mutant(
        "a copy begins with the offsets of the folder",
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
