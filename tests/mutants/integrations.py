"""Mutants of the integrations."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "alerts: a resumed training repeats them",
        "            alerts.load_state_dict(alerts_state)\n",
        "            pass\n",
        "test_alerts -k resumes",
    ),
    # under the Trainer of Transformers
    Mutant(
        "10: under the Trainer the balancing loss is not weighted by label tokens",
        "total = loss + label_share(inputs, self._shifts_labels) * balancing_loss.to(loss.device)",
        "total = loss + balancing_loss.to(loss.device)",
        "test_trainer -k our_own_loop",
    ),
    Mutant(
        "10: under the Trainer the first label of a row counts, although the loss shifts it away",
        "labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels",
        "labels = labels",
        "test_trainer -k our_own_loop",
    ),
    Mutant(
        "10: under the Trainer shift_labels are ignored",
        'inputs.get("num_items_in_batch"), inputs.get("shift_labels")',
        'inputs.get("num_items_in_batch"), None',
        "test_trainer -k shift_labels",
    ),
    Mutant(
        "10: under the Trainer label tokens are multiplied by the number of ranks",
        "num_labels = labels.ne(IGNORED_LABEL).sum()",
        "num_labels = labels.ne(IGNORED_LABEL).sum() * (torch.distributed.is_initialized() + 1)",
        "test_trainer_ranks -k one_process",
    ),
    Mutant(
        "35: label smoothing of the Trainer drops the balancing loss without an error",
        "if args.label_smoothing_factor > 0:",
        "if False:",
        "test_trainer -k by_name",
    ),
    Mutant(
        "38: a compute_loss drops the balancing loss without an error",
        "    if not hook_calls:\n",
        "    if False:\n",
        "test_trainer -k by_name",
    ),
    Mutant(
        "38: a training forward without labels has no balancing loss and raises no error",
        "    if torch.is_grad_enabled():\n        raise UsageError(\n",
        "    if False:\n        raise UsageError(\n",
        "test_trainer -k by_name",
    ),
    Mutant(
        "11: under the Trainer the model's own balancing loss acts beside ours",
        'getattr(config, "output_router_logits", False) and not with_model_loss',
        'getattr(config, "output_router_logits", False) and False',
        "test_trainer -k models_own",
    ),
    Mutant(
        "81: under the Trainer a step that a scaler skipped moves the biases",
        "applied=False if was_skipped else was_applied",
        "applied=was_applied",
        "test_trainer -k skipped",
    ),
    Mutant(
        "81: under the Trainer a step that a fused optimizer skipped moves the biases",
        "        self._step_was_applied = step_was_applied(optimizer)",
        "        pass",
        "test_trainer -k torch_fused",
    ),
    Mutant(
        "the Trainer loads a checkpoint without the state of the balancing",
        "        load_state(checkpoint, self.balance, self._alerts, may_be_missing=self._fresh)\n",
        "",
        "test_trainer -k resuming",
    ),
    Mutant(
        "the Trainer resumes without the experts",
        "    if missing:\n        loaded = type(model)",
        "    if False:\n        loaded = type(model)",
        "test_trainer -k resuming",
    ),
    Mutant(
        "the Trainer's best model has the last biases",
        "            self._load(Path(state.best_model_checkpoint))\n",
        "            pass\n",
        "test_trainer -k best",
    ),
    Mutant(
        "a model saved under the Trainer loses the biases of a family without a slot",
        "            self.after_save(Path(save_directory))\n",
        "            pass\n",
        "test_trainer -k beside",
    ),
    Mutant(
        "metrics are added after the Trainer's reporters ran",
        "callbacks.insert(0, self)",
        "callbacks.append(self)",
        "test_trainer -k reporter",
    ),
    Mutant(
        "micro-batches that a stream leaves over join the next window under the Trainer",
        "            self.balance.step(applied=False)\n",
        "            pass\n",
        "test_trainer -k left_over",
    ),
    Mutant(
        "43: packed rows are one sequence under the Trainer",
        "self._balance.token_mask(token_mask, sequence_ids)",
        "self._balance.token_mask(token_mask)",
        "test_trainer -k packed",
    ),
    Mutant(
        "a second callback on the same model is not noticed",
        "hook.callback not in (None, callback)",
        "hook.callback is False",
        "test_trainer -k two_callbacks",
    ),
    Mutant(
        "a copy of a model reports to the callback of the original under the Trainer",
        "        return ForwardHook, ()\n",
        "        return ForwardHook, (self.callback, self.function)\n",
        "test_trainer -k copy_of",
    ),
    Mutant(
        "84: biases of a frozen base move under adapters",
        "any(_is_trained(router, model) for router in routers)",
        "True",
        "test_peft -k 'frozen_base or without_adapters'",
    ),
    Mutant(
        "a router is not trained by an adapter around it",
        'while isinstance(innermost._modules.get("base_layer"), nn.Module):',
        "while False:",
        "test_peft -k trained_routers",
    ),
    Mutant(
        "under the Trainer a state is saved within a step",
        "if self._is_training and not self.balance.has_open_window:",
        "if self._is_training:",
        "test_trainer -k within_a_step",
    ),
    Mutant(
        "84: biases that moved are not saved beside the adapter",
        "(lacks_slot or multiplies or saved_model is not inner)",
        "(lacks_slot or multiplies)",
        "test_peft -k saved_with_the_adapter",
    ),
    Mutant(
        "a router that an adapter replaced is expected to be called",
        "return copies[adapters[0]] if runs_copy else wrapper.original_module",
        "return wrapper.original_module",
        "test_peft -k trained_routers",
    ),
    Mutant(
        "experts with their own gating are computed as SwiGLU",
        "and not has_extras and not has_own_gating",
        "and not has_extras",
        "test_fast_experts -k 'every_kind'",
    ),
]
