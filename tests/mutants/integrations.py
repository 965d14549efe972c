"""Mutants of the integrations."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "alerts: a training that resumes says them again",
        "                self._alerts.load_state_dict(alerts)\n",
        "                pass\n",
        "test_alerts -k resumes",
    ),
    # under the Trainer of Transformers
    Mutant(
        "10: under the Trainer the balancing loss is not weighed by label tokens",
        "total = loss + _share(named, self._shifts) * ticket.to(loss.device)",
        "total = loss + ticket.to(loss.device)",
        "test_trainer -k our_own_loop",
    ),
    Mutant(
        "10: under the Trainer the first label of a row counts, which the loss shifts away",
        "labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels",
        "labels = labels",
        "test_trainer -k our_own_loop",
    ),
    Mutant(
        "10: under the Trainer labels that came shifted are counted as they were",
        'named.get("num_items_in_batch"), named.get("shift_labels")',
        'named.get("num_items_in_batch"), None',
        "test_trainer -k given_shift",
    ),
    Mutant(
        "10: under the Trainer a rank weighs by its own label tokens of those of all",
        "number = labels.ne(IGNORED).sum()",
        "number = labels.ne(IGNORED).sum() * (torch.distributed.is_initialized() + 1)",
        "test_trainer_ranks -k one_process",
    ),
    Mutant(
        "35: a loss of the Trainer's own drops the balancing loss",
        "if args.label_smoothing_factor > 0:",
        "if False:",
        "test_trainer -k by_name",
    ),
    Mutant(
        "38: a compute_loss drops the balancing loss, and nothing says so",
        "    if not served:\n",
        "    if False:\n",
        "test_trainer -k by_name",
    ),
    Mutant(
        "38: a forward of the Trainer without labels has no balancing loss, and nothing says so",
        "            if torch.is_grad_enabled():\n",
        "            if False:\n",
        "test_trainer -k by_name",
    ),
    Mutant(
        "11: the model's own loss stands beside ours under the Trainer",
        'getattr(config, "output_router_logits", False) and not self._with_model_loss',
        'getattr(config, "output_router_logits", False) and False',
        "test_trainer -k beside_ours",
    ),
    Mutant(
        "81: a step that a scaler skipped moves the biases under the Trainer",
        'applied=False if getattr(optimizer, "step_was_skipped", False) else applied',
        "applied=applied",
        "test_trainer -k skipped",
    ),
    Mutant(
        "81: a step that a fused optimizer skipped moves the biases under the Trainer",
        "        self._applied = step_was_applied(optimizer)",
        "        pass",
        "test_trainer -k fused",
    ),
    Mutant(
        "the Trainer resumes without the state of the balancing",
        "            _load_what_was_left_out(saved, folder)\n            self._load(folder)\n",
        "            _load_what_was_left_out(saved, folder)\n",
        "test_trainer -k resuming",
    ),
    Mutant(
        "the Trainer resumes without the experts",
        "    if left_out:\n",
        "    if False:\n",
        "test_trainer -k resuming",
    ),
    Mutant(
        "the best model of a Trainer has the last biases",
        "            self._load(Path(state.best_model_checkpoint))\n",
        "",
        "test_trainer -k best",
    ),
    Mutant(
        "a model saved under the Trainer loses the biases of a family without a slot",
        "            self.callback._save(Path(save_directory))\n",
        "            pass\n",
        "test_trainer -k beside",
    ),
    Mutant(
        "metrics come after the reporters of the Trainer",
        "callbacks.insert(0, self)",
        "callbacks.append(self)",
        "test_trainer -k reporter",
    ),
    Mutant(
        "micro-batches that a stream left over under the Trainer are in the next window",
        "            self.balance.step(applied=False)\n",
        "            pass\n",
        "test_trainer -k leaves_over",
    ),
    Mutant(
        "43: packed rows are one sequence under the Trainer",
        "self.balance.token_mask(given, positions - place)",
        "self.balance.token_mask(given)",
        "test_trainer -k packed",
    ),
    Mutant(
        "two callbacks on one model are not told from one",
        "hook.callback not in (None, self)",
        "hook.callback is False",
        "test_trainer -k two_callbacks",
    ),
    Mutant(
        "a copy of a model reports to the callback of the original, under the Trainer",
        "getattr(self.callback, self.method)(*args)\n\n    def __reduce__(self) -> tuple[Any, ...]:\n        return _Hook, ()\n",
        "getattr(self.callback, self.method)(*args)\n\n    def __reduce__(self) -> tuple[Any, ...]:\n        return _Hook, (self.callback, self.method)\n",
        "test_trainer -k copy_of",
    ),
    Mutant(
        "84: biases of a frozen base move under adapters",
        "any(_is_trained(router, model) for router in routers)",
        "True",
        "test_peft -k 'frozen_base or without_adapters'",
    ),
    Mutant(
        "an adapter around a router does not train it",
        'while isinstance(inside._modules.get("base_layer"), nn.Module):',
        "while False:",
        "test_peft -k that_are_trained",
    ),
    Mutant(
        "under the Trainer a state is saved within a step",
        "if self._training and not self._has_open_window():",
        "if self._training:",
        "test_trainer -k within_a_step",
    ),
    Mutant(
        "84: biases that moved are not saved beside the adapter",
        "(without_slot or multiplies or saved is not inner)",
        "(without_slot or multiplies)",
        "test_peft -k travel",
    ),
    Mutant(
        "the router that an adapter replaced is waited for",
        "return _IDLE not in name and (where is None or where(name, router))",
        "return where is None or where(name, router)",
        "test_peft -k that_are_trained",
    ),
    Mutant(
        "experts: those with a gate of their own are computed as SwiGLU",
        "and not other and not own_gate",
        "and not other",
        "integrations/test_experts -k 'every_kind'",
    ),
]
