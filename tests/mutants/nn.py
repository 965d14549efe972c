"""Mutants of ``equipoise.nn``: the router and the MoE layer."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "22: recomputations add to the number of dropped assignments",
        "self.num_dropped.copy_(dropped.sum())",
        "self.num_dropped.add_(dropped.sum())",
        "test_nn -k 'capacity or drop'",
    ),
    Mutant(
        "experts: outputs are collected in sorted order",
        "torch.embedding_bag(y, inverse, starts)",
        "torch.embedding_bag(y, order, starts)",
        "test_nn -k 'loop'",
    ),
    Mutant(
        "experts: the gradient of the activations is not weighted",
        "gradient = gradient * weights.to(gate_up.dtype)",
        "gradient = gradient.clone()",
        "test_nn -k 'loop'",
    ),
    Mutant(
        "experts: the weights get the gradient of the weighted activations",
        "(activated * up).mul_(gradient)",
        "(activated * up * weights.to(up.dtype)).mul_(gradient)",
        "test_fast_experts -k 'of_transformers'",
    ),
    Mutant(
        "experts: padding rows have a weight",
        "    if pads:  # padding",
        "    if False:  # padding",
        "test_nn -k narrow_products",
    ),
    Mutant(
        "experts: rows are padded with another expert's tokens",
        "first = order[assignments.begins.clamp_max(order.numel() - 1)]",
        "first = order[assignments.begins * 0]",
        "test_nn -k not_finite",
    ),
    Mutant(
        "experts: rows are not padded",
        'narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)',
        "narrow = False",
        "test_nn -k narrow_products",
    ),
]
