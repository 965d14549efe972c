"""Compiles every kernel of ``equipoise.kernels`` for a GPU of NVIDIA and one of AMD. Needs no GPU.

python tests/library/compiled_kernels.py    # prints each kernel with the kind of code that was made
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equipoise import kernels

TARGETS = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)  # H100, MI300
SIZES = {"num_tokens": "i32", "num_experts": "i32"}
SCORES = {"scores": "*fp32", "counts": "*i1", **SIZES}
SEQUENCES = {"sequence_ids": "*i64", "by_sequence": "*i32"}
CONSTANTS = {"is_divided": True, "tiny": 1e-38, "ROWS": 32, "COLUMNS": 128}
BINS = {"k": 8, "half": 64, "shift": 23, "first_exponent": 66, "drawn_below": 1 << 20, "ROWS": 32, "COLUMNS": 128}
KERNELS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "_count_by_sequence": (
        {"expert_ids": "*i64", "counts": "*i1", "load": "*i64", "k": "i32", **SEQUENCES, **SIZES},
        {"ROWS": 512, "COLUMNS": 8},
    ),
    "_margin_histogram": (
        {"values": "*fp32", "bias": "*fp32", "counts": "*fp32", "drawn_by": "*fp32", "histogram": "*i64", **SIZES},
        BINS,
    ),
    "_masses": ({**SCORES, "parts": "*fp32"}, CONSTANTS),
    "_score_gradient": (
        {**SCORES, **SEQUENCES, "onto": "*fp32", "slopes": "*fp32", "scale": "*fp64", "gradient": "*fp32"},
        CONSTANTS,
    ),
    "_values_in_sequences": ({**SCORES, **SEQUENCES, "parts": "*fp64"}, CONSTANTS),
}


def main() -> None:
    for target in TARGETS:
        for name, (types, constants) in KERNELS.items():
            kernel = getattr(kernels, name)
            signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
            compiled = triton.compile(ASTSource(kernel, signature=signature, constexprs=constants), target=target)
            print(f"{name}:{list(compiled.asm)[-1]}")


if __name__ == "__main__":
    main()
