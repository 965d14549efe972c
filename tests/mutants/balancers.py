"""Mutants of the balancers."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "2: counts are divided by the tokens of this micro-batch",
        "            return group.load(self.pooled)",
        "            return group.load(self.pooled) + group.load(self.own)",
        "library/balance -k uneven",
    ),
    Mutant(
        "13: a loss k times as large",
        "torch.dot(load.to(mass.dtype), mass) * scale",
        "torch.dot(load.to(mass.dtype), mass) * scale * routing.expert_ids.shape[-1]",
        "test_load_balancing",
    ),
    Mutant(
        "20: a shape makes the loss blind to the load",
        "torch.dot(load.to(mass.dtype), mass) * scale",
        "(load.to(mass.dtype)[:, None] * mass).sum() / _num_tokens(routing)",
        "test_load_balancing",
    ),
    Mutant(
        "closed form: the gradient forgets that scores are normalised",
        "return (slope - mean.div_(total)).div_(total)",
        "return (slope - mean).div_(total)",
        "library/counting/test_ways_of_gradients",
    ),
    Mutant(
        "24: sigmoid scores are not normalised",
        "p = routing.scores / total if normalise else routing.scores",
        "p = routing.scores",
        "test_load_balancing",
    ),
    Mutant(
        "42: padding is in the loss",
        "return p if routing.mask is None else p.masked_fill((routing.mask == 0)[:, None], 0)",
        "return p",
        "test_load_balancing",
    ),
    Mutant(
        "42: padding gets the gradient of the loss",
        "return gradient.masked_fill(call.mask.masked, 0)",
        "return gradient",
        "library/counting/test_ways_of_gradients",
    ),
    Mutant(
        "42: padding that is not finite spoils the z-loss",
        "logits.masked_fill(masked[:, None], 0).logsumexp(-1)",
        "logits.logsumexp(-1)",
        "test_z_loss",
    ),
    Mutant(
        "49: an empty micro-batch divides by zero",
        "return (routing.mask != 0).sum().clamp_min(1).to(routing.scores.dtype)",
        "return (routing.mask != 0).sum().to(routing.scores.dtype)",
        "test_load_balancing",
    ),
    Mutant(
        "71: the momentum is not saved",
        'return {} if self._momentum is None else {"momentum": self._momentum}',
        "return {}",
        "test_mechanisms -k never_stopped",
    ),
    # H. update rule
    Mutant(
        "the bias moves with the load, not against it",
        "return torch.sub(load.sum(-1, keepdim=True), load, alpha=load.shape[-1])",
        "return load.shape[-1] * load - load.sum(-1, keepdim=True)",
        "test_loss_free",
    ),
    Mutant(
        "76, 77: the step is not centred",
        "            step.sub_(step.mean(-1, keepdim=True))",
        "            step.sub_(0)",
        "test_loss_free -k 'hand or reference'",
    ),
    Mutant(
        "the proportional error is in tokens",
        "return _error(load).to(widest_float(load.device)) / load.sum(-1, keepdim=True).clamp_min(1)",
        "return _error(load).to(widest_float(load.device)) / load.shape[-1]",
        "test_loss_free -k 'hand or reference'",
    ),
    Mutant(
        "79: the rate falls to zero a window late",
        "return self.rate if window < self.zero_from else 0.0",
        "return self.rate if window <= self.zero_from else 0.0",
        "test_loss_free -k schedules",
    ),
    Mutant(
        "the multiplicative rule adds its step",
        "_Rule(sign_step, is_bounded=True, multiplies=True)",
        "_Rule(sign_step, is_bounded=True)",
        "test_loss_free -k multiplicative",
    ),
    Mutant(
        "the default sharpness of the momentum rule is another",
        "sharpness: float = 2.0",
        "sharpness: float = 1.0",
        "test_loss_free -k momentum",
    ),
    Mutant(
        "82: signs of micro-batches are summed",
        "return (signs[:, :-1].to(widest_float(signs.device)) / signs[:, -1:].clamp_min(1)).to(self._bias.dtype)",
        "return signs[:, :-1].to(self._bias.dtype)",
        "test_loss_free -k micro_batch",
    ),
    Mutant(
        "82: an empty micro-batch takes part in the mean",
        "has_tokens = load.sum(-1, keepdim=True) > 0",
        "has_tokens = load.sum(-1, keepdim=True) >= 0",
        "test_loss_free -k micro_batch",
    ),
    Mutant(
        "80: the quantile is taken from the other tail",
        "place = num_chosen + wanted * num_tokens",
        "place = num_tokens - num_chosen + wanted * num_tokens",
        "test_quantile -k 'reference or even'",
    ),
    Mutant(
        "108: quantile moves biases on counts that are chance",
        "torch.maximum(of_layer, 1 - SIGNIFICANT_EXPERT**2 * variance / squares.clamp_min(1e-9)).clamp_min(0)",
        "torch.ones_like(squares)",
        "test_quantile -k 'gain or hardly_ever or stays_even'",
    ),
    Mutant(
        "108: quantile overlooks a single dead expert of many",
        "torch.maximum(of_layer, 1 - SIGNIFICANT_EXPERT**2 * variance / squares.clamp_min(1e-9)).clamp_min(0)",
        "of_layer.clamp_min(0).expand_as(squares)",
        "test_quantile -k single_dead",
    ),
    Mutant(
        "124: quantile moves by the tokens whose threshold an expert passes",
        "wanted = gain * (1 / num_experts - share) * self._k",
        "wanted = gain * (self._k / num_experts - (torch.stack(list(statistic))[:, : self.bins // 2].sum(-2) / load.sum(-1, keepdim=True) * self._k if not self.gathers else share * self._k))",
        "test_quantile -k becomes_even",
    ),
    Mutant(
        "124: quantile takes the choice for the k best where expert groups limit it",
        "if not (first_other > last).any():",
        "if True:",
        "test_quantile -k k_best_of_all",
    ),
    Mutant(
        "108: the threshold of quantile is the first score that was not chosen",
        "torch.lerp(last, first_other, 0.5) - biased",
        "first_other - biased",
        "test_quantile -k 'reference or skewed_peaked'",
    ),
    Mutant(
        "108: quantile steps across the bin next to zero",
        "margin.masked_fill((index == bins // 2) | (index == bins // 2 - 1), 0)",
        "margin",
        "test_quantile -k next_to_zero",
    ),
    Mutant(
        "108: a large bias takes resolution from the others",
        "median = target.sort(-1).values[..., (num_experts - 1) // 2, None]",
        "median = target.mean(-1, keepdim=True)",
        "test_quantile -k large_bias",
    ),
    Mutant(
        "80: the first tokens are taken instead of a random subset",
        "            drawn = _draw(routing.logits, self.fraction)",
        "            drawn = torch.arange(margins.shape[0]) < self.fraction * margins.shape[0]",
        "test_quantile -k 'fraction or dealt'",
    ),
    Mutant(
        "47, 80: padding is in the quantile",
        "        mask: Tensor | None = routing.mask\n",
        "        mask: Tensor | None = None\n",
        "test_quantile -k 'reference or nothing'",
    ),
    # I, J. frozen
    Mutant(
        "84: a frozen bias moves",
        '    name = "frozen"\n',
        '    name = "frozen"\n\n    def update(self, load, statistic=None, window=0):\n        self._bias += 1\n',
        "test_loss_free -k frozen",
    ),
    Mutant(
        "a balancer gets the window's own load",
        "            load = group.load(vector).clone()",
        "            load = group.load(vector)",
        "library/test_mechanisms -k writes_into_its_load",
    ),
]
