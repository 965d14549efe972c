"""Mutants of the Triton kernels, and of when they are taken."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "kernels: a masked token is in the load of its sequence",
        "            is_token = is_token & (tl.load(is_counted + token, mask=is_token, other=0) != 0)\n",
        "            is_token = is_token\n",
        "library/test_kernels -k loads_of_sequences",
    ),
    Mutant(
        "kernels: a call with sequences is not in the load of its layer",
        "            tl.atomic_add(load + expert, one, mask=is_assignment)",
        "            pass",
        "library/test_kernels -k loads_of_sequences",
    ),
    Mutant(
        "kernels: the gradient at divided scores lacks its mean",
        "slope = (slope - tl.sum(p * slope, 1)[:, None] / total) / total",
        "slope = slope / total",
        "library/test_kernels -k gradient_at_the_scores",
    ),
    Mutant(
        "kernels: padding has a gradient",
        "        slope = tl.where(does_count, slope, 0.0)\n",
        "",
        "library/test_kernels -k gradient_at_the_scores",
    ),
    Mutant(
        "kernels: margins below 0 are in the bins above",
        "        bin = tl.where(is_below, half - 1 - bin, half + bin)\n",
        "        bin = half + bin\n",
        "library/test_kernels -k histogram",
    ),
    Mutant(
        "kernels: the threshold is the k-th largest",
        "threshold = first_other - (first_other - last) * 0.5",
        "threshold = last",
        "library/test_kernels -k histogram",
    ),
    Mutant(
        "kernels: a sample is all tokens",
        "            does_count = does_count & (((mixed >> 33) & 0xFFFFFF) < drawn_below)[:, None]",
        "            pass",
        "library/test_kernels -k sample",
    ),
    Mutant(
        "kernels: they are taken while a derivative is recorded",
        " and not torch.is_grad_enabled()",
        "",
        "library/test_kernels -k second_derivative",
    ),
    Mutant(
        "kernels: they take any loss within sequences for the one that they know",
        "self.fused = fused and all(isinstance(b, LoadBalancingLoss) for b in in_sequences)",
        "self.fused = fused",
        "library/test_kernels -k another_loss",
    ),
    Mutant(
        "kernels: what arrives at the scores is lost",
        "            slope += tl.load(onto + place, mask=is_number, other=0).to(dtype)",
        "            pass",
        "library/test_kernels -k gradient_at_the_scores",
    ),
    Mutant(
        "a statistic that was returned before is added to itself",
        "        if _address(value) in self._held:",
        "        if False:",
        "library/test_mechanisms -k returned_before",
    ),
]
