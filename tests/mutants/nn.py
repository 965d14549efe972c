"""Mutants of the router and the layer of one's own."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "22: what the capacity drops is added up over recomputations",
        "self.num_dropped.copy_(dropped.sum())",
        "self.num_dropped.add_(dropped.sum())",
        "test_nn -k 'capacity or drop'",
    ),
    Mutant(
        "experts: outputs are collected in the order of the sorting",
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
        "integrations/test_experts -k 'of_transformers'",
    ),
    Mutant(
        "experts: what fills rows up weighs something",
        "    if filled:  # what",
        "    if False:  # what",
        "test_nn -k narrow_products",
    ),
    Mutant(
        "experts: rows are filled up with another expert's tokens",
        "first = order[assignments.begins.clamp_max(order.numel() - 1)]",
        "first = order[assignments.begins * 0]",
        "test_nn -k no_number",
    ),
    Mutant(
        "experts: rows are not filled up",
        'narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)',
        "narrow = False",
        "test_nn -k narrow_products",
    ),
]
