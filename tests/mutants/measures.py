"""Mutants of routing, loads, metrics, alerts, saved biases, recipes."""

from mutants.mutant import Mutant

MUTANTS = [
    # alerts
    Mutant(
        "alerts: every window is judged alone",
        "if stretch.num_windows >= PATIENCE:",
        "if stretch.num_windows >= 1:",
        "test_alerts -k does_not_last",
    ),
    Mutant(
        "alerts: small windows have dead experts",
        "judged = mean >= MIN_SHARE",
        "judged = mean > 0",
        "test_alerts -k chance_raises",
    ),
    Mutant(
        "alerts: one token revives a dead expert",
        "dead = (counts == 0) | (stretch.dead & (counts < REVIVED_SHARE * mean[:, None]))",
        "dead = counts == 0",
        "test_alerts -k now_and_then",
    ),
    Mutant(
        "alerts: only the first dead expert of a layer is reported",
        'by_expert = kind == "dead experts"',
        "by_expert = False",
        "test_alerts -k each_expert",
    ),
    Mutant(
        "alerts: a collapse starts and ends at the same bound",
        "SPREAD_ABOVE * num_experts",
        "COLLAPSE_BELOW * num_experts",
        "test_alerts -k bound",
    ),
    Mutant(
        "alerts: an expert that was below the mean is still pushed down",
        "self.pushed.to(device) * (last_end == 0) + in_row",
        "self.pushed.to(device) + (windows > mean).sum(0)",
        "test_alerts -k one_window",
    ),
    Mutant(
        "alerts: a rate that is in time counts as slow",
        "steps_needed > (-1 if steps_left is None else steps_left)",
        "steps_needed > 0",
        "test_alerts -k in_time",
    ),
    Mutant(
        "alerts: a rate counts as slow where chance makes an expert busy",
        "torch.maximum(3 * floor, torch.full_like(floor, BUSY_VIOLATION))",
        "torch.full_like(floor, BUSY_VIOLATION)",
        "test_alerts -k three_times",
    ),
    Mutant(
        "alerts: every window waits for a GPU",
        "if not ends and (not is_on_cpu or not bool(bad.any())):",
        "if not ends and not bool(bad.any()):",
        "test_no_synchronisation -k alerts",
    ),
    # B. wrong inputs to the loss
    Mutant(
        "18: the score function is applied twice",
        '        return logits.softmax(-1)\n    if score_function == "sigmoid"',
        '        return logits.softmax(-1).softmax(-1)\n    if score_function == "sigmoid"',
        "test_routing -k score",
    ),
    Mutant(
        "28: scores in bfloat16",
        "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))\n    if score_function",
        "logits = logits + 0\n    if score_function",
        "test_routing",
    ),
    Mutant(
        "78: the bias reaches the weights of route",
        "weights = scores.gather(-1, expert_ids)\n    if renorm",
        "weights = choice.gather(-1, expert_ids)\n    if renorm",
        "test_routing -k weights",
    ),
    # D. masks, packing, context
    Mutant(
        "42, 44: padding is counted",
        "load.scatter_add_(0, ids, mask.assignments(expert_ids.shape[-1]))",
        "load.scatter_add_(0, ids, torch.ones_like(ids))",
        "library/balance -k padding",
    ),
    Mutant(
        "93: shares are accepted as counts",
        'if load.is_floating_point():\n        raise ValueError(f"load must hold counts, integers: got {load.dtype}. Shar',
        'if False:\n        raise ValueError(f"Shar',
        "test_metrics -k domains",
    ),
    Mutant(
        "69: counts in float32",
        "load = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)\n    return load.scatter_add_(0, "
        "expert_ids.reshape(-1).long(), _ones(expert_ids, mask))",
        "load = torch.zeros(num_experts, device=expert_ids.device)\n    return load.scatter_add_(0, "
        "expert_ids.reshape(-1).long(), _ones(expert_ids, mask).float())",
        "test_load",
    ),
    # K. expert groups
    Mutant(
        "91: masked expert groups are 0 and win against negative scores",
        'float("-inf")).flatten(-2)',
        "0.0).flatten(-2)",
        "test_routing -k group",
    ),
    # L. metrics
    Mutant(
        "94: MaxVio is max over mean",
        "c.amax(-1) / c.mean(-1) - 1",
        "c.amax(-1) / c.mean(-1)",
        "test_metrics",
    ),
    Mutant(
        "109: the floor takes counts as independent although they sum to N k",
        "math.sqrt(of_sum * (1 - p) / (num_tokens * p))",
        "math.sqrt((1 - p) / (num_tokens * p))",
        "test_metrics -k sampling_floor",
    ),
    Mutant(
        "92: layers are pooled before the metric",
        "return torch.stack([_by_layer(metric, layer) for layer in load.values()]).mean(0)",
        "return _by_layer(metric, torch.stack(list(load.values())).sum(0))",
        "test_metrics",
    ),
    Mutant(
        "93: domains weigh by their tokens",
        "weight = used / used.sum(-1, keepdim=True)",
        "weight = n / n.sum(-1, keepdim=True)",
        "test_metrics",
    ),
    # the lab
    Mutant(
        "lab: the largest share is taken from all domains together",
        "share.amax((0, -1))",
        "share.mean(0).amax(-1)",
        "test_metrics -k domain_share",
    ),
    Mutant(
        "saved: the file does not record that its biases multiply",
        '{MULTIPLIES: "true"} if multiplies else None',
        "None",
        "test_saved -k factors",
    ),
    Mutant(
        "alerts: a rate is slow where no bias moves",
        "& self.steers & self._have_biases_moved(stretch).cpu()",
        "& self.steers",
        "test_alerts -k do_not_move",
    ),
]
