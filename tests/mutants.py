"""Breaks the core on purpose, one demon a time, and runs the tests that must see it: ``make mutants``.

Each break is one replacement in a copy of the source. A break that no test sees, or whose text is no longer there,
fails the run. The tests named here are enough to see a break; they are not the only ones that do. Without a break they
pass: that is what ``make test`` is for.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WORKERS = int(os.environ.get("WORKERS", 2))


class Mutant(NamedTuple):
    what: str  # the demon, by its number in docs/demons.md
    file: str  # below src/equipoise
    old: str
    new: str
    tests: str  # what pytest is asked to run


BALANCE, COUNTS, LOSS = "tests/test_balance.py", "tests/test_counting.py", "tests/balancers/test_load_balancing.py"
STATE, WINDOW = "tests/distributed/test_state.py", "tests/distributed/test_window.py"
GROUPS, PIPELINE = "tests/distributed/test_groups.py", "tests/distributed/test_pipeline.py"
RULES, MECHANISMS, FAMILIES = (
    "tests/balancers/test_loss_free.py",
    "tests/test_mechanisms.py",
    "tests/taps/test_families.py",
)
EVERY, COMMAND = "tests/taps/test_every_family.py", "tests/test_families_command.py"
QUANTILE = "tests/balancers/test_quantile.py"
SPECIALISATION = "tests/analysis/test_specialisation.py"
CLAIMS = "tests/reproduce/test_frontier.py"
SELECTION, COMPARED = "tests/lab/test_selection.py", "tests/lab/test_balancers.py"
ESTIMATES, VERDICTS, POWER = (f"tests/analysis/test_{name}.py" for name in ("statistics", "verdicts", "power"))

PAGE = "tests/report/test_report.py"
TRAINER, PEFT = "tests/integrations/test_trainer.py", "tests/integrations/test_peft.py"

MUTANTS = [
    # the report, tables and figures
    Mutant(
        "report: significance is judged comparison by comparison",
        "report/words.py",
        "family, balance = judge_family(nats), judge_family(maxvio)",
        "family, balance = nats, maxvio",
        f"{PAGE} -k family",
    ),
    Mutant(
        "report: strategies are compared on seeds of their own",
        "report/words.py",
        "    sound = _on(sound, seeds, runs)\n",
        "",
        f"{PAGE} -k not_all_have",
    ),
    Mutant(
        "report: typical tokens of another text",
        "analysis/reading.py",
        "if audited.domains == domains and all(map(np.array_equal, audited.load, load)):",
        "if audited.domains == domains:",
        f"{PAGE} -k typical_tokens",
    ),
    Mutant(
        "report: bars are not widened for the means that were taken out",
        "analysis/figures.py",
        "return kept, math.sqrt(len(values) / (len(values) - 1))",
        "return kept, 1.000001",
        "tests/analysis/test_figures.py -k seeds_do_not_share",
    ),
    Mutant(
        "tables: what is left over of the last window is dropped",
        "analysis/tables.py",
        "    if total is not None:\n        yield last, steps, total\n",
        "",
        "tests/analysis/test_tables.py -k loads_are",
    ),
    Mutant(
        "tables: a frequency is of assignments",
        "analysis/tables.py",
        "tokens = np.repeat(load.sum(-1) // model.k, experts)",
        "tokens = np.repeat(load.sum(-1), experts)",
        "tests/analysis/test_tables.py -k experts_hold",
    ),
    Mutant(
        "cost: the mean rank instead of the busiest",
        "analysis/specialisation.py",
        "return float(by_rank.max() / by_rank.mean())",
        "return float(np.median(by_rank) / by_rank.mean())",
        "tests/analysis/test_figures.py -k busiest_rank",
    ),
    Mutant(
        "levels: a group of domains weighs as much as one domain",
        "analysis/specialisation.py",
        "within = sum(len(rows) * entropy(np.array(rows)) for rows in groups.values()) / len(n)",
        "within = sum(entropy(np.array(rows)) for rows in groups.values()) / len(groups)",
        f"{SPECIALISATION} -k by_level",
    ),
    Mutant(
        "levels: what a level adds is not told from what those before it know",
        "analysis/specialisation.py",
        "        return np.diff(found)\n",
        "        return np.array(found[1:])\n",
        f"{SPECIALISATION} -k by_level",
    ),
    # alerts
    Mutant(
        "alerts: a window is judged by itself",
        "alerts.py",
        "if group.num_windows >= PATIENCE:",
        "if group.num_windows >= 1:",
        "tests/test_alerts.py -k does_not_last",
    ),
    Mutant(
        "alerts: small windows have dead experts",
        "alerts.py",
        "judged = mean >= ENOUGH",
        "judged = mean > 0",
        "tests/test_alerts.py -k chance_raises",
    ),
    Mutant(
        "alerts: an expert is back with one token",
        "alerts.py",
        "dead = (counts == 0) | (group.dead & (counts < ALIVE * mean[:, None]))",
        "dead = counts == 0",
        "tests/test_alerts.py -k now_and_then",
    ),
    Mutant(
        "alerts: of a layer's dead experts the first is said",
        "alerts.py",
        'by_expert = kind == "dead experts"',
        "by_expert = False",
        "tests/test_alerts.py -k each_expert",
    ),
    Mutant(
        "alerts: a collapse is over and begins at the same bound",
        "alerts.py",
        "SPREAD * num_experts",
        "COLLAPSED * num_experts",
        "tests/test_alerts.py -k bound",
    ),
    Mutant(
        "alerts: an expert that was below the mean is still pushed down",
        "alerts.py",
        "self.pushed = (self.pushed + 1) * above",
        "self.pushed = self.pushed + above",
        "tests/test_alerts.py -k one_window",
    ),
    Mutant(
        "alerts: a rate that is in time is slow",
        "alerts.py",
        "(more > (-1 if left is None else left))",
        "(more > 0)",
        "tests/test_alerts.py -k in_time",
    ),
    Mutant(
        "alerts: a run that goes on says them again",
        "lab/run_folder.py",
        '            self._see(row["step"], row["load"])\n\n    def _see',
        "            pass\n\n    def _see",
        "tests/test_alerts.py -k went_on",
    ),
    Mutant(
        "alerts: a rate that a schedule took to zero is slow",
        "lab/switch.py",
        "one.rate_at(window) > 0",
        "True",
        "tests/test_alerts.py -k rate_of_the_step",
    ),
    Mutant(
        "alerts: a training that resumes says them again",
        "integrations/trainer.py",
        "                self._alerts.load_state_dict(alerts)\n",
        "                pass\n",
        "tests/test_alerts.py -k resumes",
    ),
    Mutant(
        "alerts: a GPU is waited for at every window",
        "alerts.py",
        'if not ends and (bad.device.type != "cpu" or not bool(bad.any())):',
        "if not ends and not bool(bad.any()):",
        "tests/test_no_synchronisation.py -k alerts",
    ),
    # offsets beside the weights
    Mutant(
        "offsets: what lies beside the weights is passed over",
        "attachment.py",
        "            offsets = _beside_weights(inner, layers, resolved, multiplies)\n",
        "            pass\n",
        "tests/test_saved.py -k begins",
    ),
    Mutant(
        "offsets: a promised file that is not there means zero",
        "attachment.py",
        "    if path is None:\n        raise EquipoiseError(",
        "    if path is None:\n        return None\n        raise EquipoiseError(",
        "tests/test_saved.py -k promised",
    ),
    Mutant(
        "a forgotten step() is said at every micro-batch",
        "window.py",
        "if len(self.micro_batches) == MANY:",
        "if len(self.micro_batches) >= MANY:",
        "tests/test_saved.py -k never_called",
    ),
    Mutant(
        "groups before an offset are attached",
        "taps/discovery.py",
        "if (not grouped or in_the_way) and",
        "if not grouped and",
        f"{EVERY} -k groups_before",
    ),
    # under the Trainer of Transformers
    Mutant(
        "10: under the Trainer the balancing loss is not weighed by label tokens",
        "integrations/trainer.py",
        "total = loss + _share(named, self._shifts) * ticket.to(loss.device)",
        "total = loss + ticket.to(loss.device)",
        f"{TRAINER} -k our_own_loop",
    ),
    Mutant(
        "10: under the Trainer the first label of a row counts, which the loss shifts away",
        "integrations/trainer.py",
        "labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels",
        "labels = labels",
        f"{TRAINER} -k our_own_loop",
    ),
    Mutant(
        "10: under the Trainer labels that came shifted are counted as they were",
        "integrations/trainer.py",
        'named.get("num_items_in_batch"), named.get("shift_labels")',
        'named.get("num_items_in_batch"), None',
        f"{TRAINER} -k given_shift",
    ),
    Mutant(
        "10: under the Trainer a rank weighs by its own label tokens of those of all",
        "integrations/trainer.py",
        "number = labels.ne(IGNORED).sum()",
        "number = labels.ne(IGNORED).sum() * (torch.distributed.is_initialized() + 1)",
        "tests/integrations/test_trainer_ranks.py -k one_process",
    ),
    Mutant(
        "35: a loss of the Trainer's own drops the balancing loss",
        "integrations/trainer.py",
        "if args.label_smoothing_factor > 0:",
        "if False:",
        f"{TRAINER} -k by_name",
    ),
    Mutant(
        "38: a compute_loss drops the balancing loss, and nothing says so",
        "integrations/trainer.py",
        "    if not served:\n",
        "    if False:\n",
        f"{TRAINER} -k by_name",
    ),
    Mutant(
        "38: a forward of the Trainer without labels has no balancing loss, and nothing says so",
        "integrations/trainer.py",
        "            if torch.is_grad_enabled():\n",
        "            if False:\n",
        f"{TRAINER} -k by_name",
    ),
    Mutant(
        "11: the model's own loss stands beside ours under the Trainer",
        "integrations/trainer.py",
        'getattr(config, "output_router_logits", False) and not self._with_model_loss',
        'getattr(config, "output_router_logits", False) and False',
        f"{TRAINER} -k beside_ours",
    ),
    Mutant(
        "81: a step that a scaler skipped moves the offsets under the Trainer",
        "integrations/trainer.py",
        'applied=not getattr(optimizer, "step_was_skipped", False)',
        "applied=True",
        f"{TRAINER} -k skipped",
    ),
    Mutant(
        "the Trainer resumes without the state of the balancing",
        "integrations/trainer.py",
        "            _load_what_was_left_out(saved, folder)\n            self._load(folder)\n",
        "            _load_what_was_left_out(saved, folder)\n",
        f"{TRAINER} -k resuming",
    ),
    Mutant(
        "the Trainer resumes without the experts",
        "integrations/trainer.py",
        "    if left_out:\n",
        "    if False:\n",
        f"{TRAINER} -k resuming",
    ),
    Mutant(
        "the best model of a Trainer has the last offsets",
        "integrations/trainer.py",
        "            self._load(Path(state.best_model_checkpoint))\n",
        "",
        f"{TRAINER} -k best",
    ),
    Mutant(
        "a model saved under the Trainer loses the offsets of a family without a slot",
        "integrations/trainer.py",
        "            self.callback._save(Path(save_directory))\n",
        "            pass\n",
        f"{TRAINER} -k beside",
    ),
    Mutant(
        "metrics come after the reporters of the Trainer",
        "integrations/trainer.py",
        "callbacks.insert(0, self)",
        "callbacks.append(self)",
        f"{TRAINER} -k reporter",
    ),
    Mutant(
        "micro-batches that a stream left over under the Trainer are in the next window",
        "integrations/trainer.py",
        "            self.balance.step(applied=False)\n",
        "            pass\n",
        f"{TRAINER} -k leaves_over",
    ),
    Mutant(
        "43: packed rows are one sequence under the Trainer",
        "integrations/trainer.py",
        "self.balance.token_mask(given, positions - offset)",
        "self.balance.token_mask(given)",
        f"{TRAINER} -k packed",
    ),
    Mutant(
        "two callbacks on one model are not told from one",
        "integrations/trainer.py",
        "hook.callback not in (None, self)",
        "hook.callback is False",
        f"{TRAINER} -k two_callbacks",
    ),
    Mutant(
        "a copy of a model reports to the callback of the original, under the Trainer",
        "integrations/trainer.py",
        "        return _Hook, ()\n",
        "        return _Hook, (self.callback, self.method)\n",
        f"{TRAINER} -k copy_of",
    ),
    Mutant(
        "84: offsets of a frozen base move under adapters",
        "integrations/trainer.py",
        "any(_is_trained(router, model) for router in routers)",
        "True",
        f"{PEFT} -k 'frozen_base or without_adapters'",
    ),
    Mutant(
        "an adapter around a router does not train it",
        "integrations/trainer.py",
        'while isinstance(inside._modules.get("base_layer"), nn.Module):',
        "while False:",
        f"{PEFT} -k that_are_trained",
    ),
    Mutant(
        "84: offsets that moved are not saved beside the adapter",
        "integrations/trainer.py",
        "(without_slot or multiplies or saved is not inner)",
        "(without_slot or multiplies)",
        f"{PEFT} -k travel",
    ),
    Mutant(
        "the router that an adapter replaced is waited for",
        "integrations/trainer.py",
        "return _IDLE not in name and (where is None or where(name, router))",
        "return where is None or where(name, router)",
        f"{PEFT} -k that_are_trained",
    ),
    # A. scale and normalisation
    Mutant(
        "1: the global loss is weaker by the number of micro-batches",
        "recorder.py",
        "torch.ones_like(total) * factor",
        "torch.ones_like(total) * factor / len(self.window.micro_batches)",
        f"{BALANCE} -k 'factor or uneven'",
    ),
    Mutant(
        "2: counts are divided by the tokens of this micro-batch",
        "balancers/load_balancing.py",
        "by_count = factor / load.sum(-1, keepdim=True).clamp_min(1).to(scores.dtype)",
        "by_count = torch.as_tensor(factor / (_num_tokens(routing) * routing.expert_ids.shape[-1]))",
        f"{BALANCE} -k uneven",
    ),
    Mutant(
        "8: the coefficient is never applied",
        "recorder.py",
        "total = total + balancer.coefficient * balancer.loss(routing, load)",
        "total = total + balancer.loss(routing, load)",
        f"{BALANCE} -k uneven",
    ),
    Mutant(
        "9: the factor that the loss was given is ignored",
        "recorder.py",
        "torch.ones_like(total) * factor",
        "torch.ones_like(total)",
        f"{BALANCE} -k factor",
    ),
    Mutant(
        "13: a loss k times as large",
        "balancers/load_balancing.py",
        "torch.dot(load.to(mass.dtype), mass) * scale",
        "torch.dot(load.to(mass.dtype), mass) * scale * routing.expert_ids.shape[-1]",
        LOSS,
    ),
    Mutant(
        "14: the layers' counts are one",
        "recorder.py",
        "if pooled is None else self.layout.load(pooled, layer)",
        "if pooled is None else sum(self.layout.load(pooled, i) for i in (0, 1))",
        "tests/test_grid.py -k 'eager and float32 and one_process'",
    ),
    # B. wrong inputs to the loss
    Mutant(
        "18: the gate is applied twice",
        "routing.py",
        '        return logits.softmax(-1)\n    if gate == "sigmoid"',
        '        return logits.softmax(-1).softmax(-1)\n    if gate == "sigmoid"',
        "tests/test_routing.py -k score",
    ),
    Mutant(
        "20: a shape makes the loss blind to the load",
        "balancers/load_balancing.py",
        "torch.dot(load.to(mass.dtype), mass) * scale",
        "(load.to(mass.dtype)[:, None] * mass).sum() / _num_tokens(routing)",
        LOSS,
    ),
    Mutant(
        "22: what the capacity drops is added up over recomputations",
        "nn.py",
        "self.num_dropped.copy_(dropped.sum())",
        "self.num_dropped.add_(dropped.sum())",
        "tests/test_nn.py -k 'capacity or drop'",
    ),
    Mutant(
        "closed form: the gradient forgets that scores are normalised",
        "balancers/load_balancing.py",
        "return (slope - mean.div_(total)).div_(total)",
        "return (slope - mean).div_(total)",
        LOSS,
    ),
    Mutant(
        "closed form: under autocast it is rounded",
        "recorder.py",
        "with without_autocast(logits.device):",
        "if True:",
        f"{BALANCE} -k under_autocast_gives",
    ),
    Mutant(
        "closed form: a second call of a layer has the whole gradient",
        "recorder.py",
        "factor = factor * call.num_tokens / micro_batch.vector[self.layout.tokens][layer].clamp_min(1)",
        "pass",
        COUNTS,
    ),
    Mutant(
        "closed form: losses that have one push out those that have none",
        "recorder.py",
        "gradient = found if gradient is None else gradient + found",
        "gradient = found if gradient is None else gradient",
        "tests/test_mechanisms.py -k add_up",
    ),
    Mutant(
        "eager tap: a traced forward goes the plain way",
        "taps/tap.py",
        "        torch.compiler.is_compiling()\n        or torch",
        "        torch",
        COUNTS,
    ),
    Mutant(
        "experts: outputs are collected in the order of the sorting",
        "grouped.py",
        "torch.embedding_bag(y, inverse, starts)",
        "torch.embedding_bag(y, order, starts)",
        "tests/test_nn.py -k 'loop'",
    ),
    Mutant(
        "experts: the gradient of the activations is not weighted",
        "grouped.py",
        "gradient = gradient * weights.to(gate_up.dtype)",
        "gradient = gradient.clone()",
        "tests/test_nn.py -k 'loop'",
    ),
    Mutant(
        "experts: the weights get the gradient of the weighted activations",
        "grouped.py",
        "(activated * up).mul_(gradient)",
        "(activated * up * weights.to(up.dtype)).mul_(gradient)",
        "tests/integrations/test_experts.py -k 'of_transformers'",
    ),
    Mutant(
        "experts: what fills rows up weighs something",
        "grouped.py",
        "    if filled:  # what",
        "    if False:  # what",
        "tests/test_nn.py -k narrow_products",
    ),
    Mutant(
        "experts: rows are filled up with another expert's tokens",
        "grouped.py",
        "first = order[assignments.begins.clamp_max(order.numel() - 1)]",
        "first = order[assignments.begins * 0]",
        "tests/test_nn.py -k no_number",
    ),
    Mutant(
        "experts: rows are not filled up",
        "grouped.py",
        'narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)',
        "narrow = False",
        "tests/test_nn.py -k narrow_products",
    ),
    Mutant(
        "experts: those with a gate of their own are computed as SwiGLU",
        "integrations/experts.py",
        "and not other and not own_gate",
        "and not other",
        "tests/integrations/test_experts.py -k 'every_kind'",
    ),
    Mutant(
        "24: sigmoid scores are not normalised",
        "balancers/load_balancing.py",
        "p = routing.scores / total if normalise else routing.scores",
        "p = routing.scores",
        LOSS,
    ),
    Mutant(
        "28: scores in bfloat16",
        "routing.py",
        "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "logits = logits + 0",
        "tests/test_routing.py",
    ),
    Mutant(
        "30, 78: the offset reaches the weights",
        "taps/tap.py",
        "return torch.return_types.topk((scores.gather(-1, ids), ids))",
        "return torch.return_types.topk((choice.gather(-1, ids), ids))",
        f"{FAMILIES} -k weights",
    ),
    Mutant(
        "78: the offset reaches the weights of route",
        "routing.py",
        "weights = scores.gather(-1, expert_ids)",
        "weights = choice.gather(-1, expert_ids)",
        "tests/test_routing.py -k weights",
    ),
    # C. silent no-op
    Mutant(
        "31, 38: a loss that is not added goes unnoticed",
        "recorder.py",
        "        if call is None or factor is None:\n            raise",
        "        factor = 0.0 if factor is None else factor\n        if call is None:\n            raise",
        f"{BALANCE} -k 'ticket or taken'",
    ),
    Mutant(
        "40: the model's slot is not moved",
        "balance.py",
        "                self._recorder.restore_offsets(group, slots)",
        "                pass",
        f"{BALANCE} {FAMILIES} -k 'evens or resume or factors or slot'",
    ),
    # D. masks, packing, context
    Mutant(
        "42, 44: padding is counted",
        "load.py",
        "            unmasked = mask.long()",
        "            unmasked = torch.ones_like(mask).long()",
        f"{BALANCE} -k padding",
    ),
    Mutant(
        "42: padding is in the loss",
        "balancers/load_balancing.py",
        "return p if routing.mask is None else p * routing.mask.to(p.dtype)[:, None]",
        "return p",
        LOSS,
    ),
    Mutant(
        "43: packed sequences are one",
        "window.py",
        "    if sequence_ids is not None:\n        ids",
        "    if False:\n        ids",
        f"{BALANCE} -k pack",
    ),
    Mutant(
        "45: the mask of a cached prefix is taken from its beginning",
        "window.py",
        "mask = mask[:, -(num_tokens // mask.shape[0]) :]",
        "mask = mask[:, : num_tokens // mask.shape[0]]",
        f"{BALANCE} -k cached",
    ),
    Mutant(
        "49: an empty micro-batch divides by nothing",
        "balancers/load_balancing.py",
        "return routing.mask.sum().clamp_min(1).to(routing.scores.dtype)",
        "return routing.mask.sum().to(routing.scores.dtype)",
        LOSS,
    ),
    # E. ranks
    Mutant(
        "93: statistics stay on their rank",
        "exchange.py",
        "            value.copy_(total.view_as(value))",
        "            pass",
        f"{MECHANISMS} -k two_ranks",
    ),
    # F. recomputation, evaluation
    Mutant(
        "59, 60: a recomputation is counted",
        "recorder.py",
        "recomputing = torch._C._current_graph_task_id() != -1",
        "recomputing = False",
        f"{FAMILIES} {MECHANISMS} -k 'checkpointing or recomputation'",
    ),
    Mutant(
        "62: f is what was known when the micro-batch closed",
        "recorder.py",
        "                pooled = self.window.load_pooled()",
        "                pooled = self.window.micro_batches[0].vector",
        "tests/test_grid.py -k 'eager and float32 and one_process'",
    ),
    Mutant(
        "64: evaluation is counted",
        "recorder.py",
        "if self.paused or (not self.measuring and not training):",
        "if self.paused:",
        f"{BALANCE} -k evaluat",
    ),
    Mutant(
        "65: what is paused is counted",
        "recorder.py",
        "if self.paused or (not self.measuring and not training):",
        "if not self.measuring and not training:",
        f"{BALANCE} -k pause",
    ),
    Mutant(
        "64: a measurement is counted in the window too",
        "recorder.py",
        "            self.layout.count(self.measured, layer, expert_ids, mask)\n            return UNCOUNTED",
        "            self.layout.count(self.measured, layer, expert_ids, mask)",
        f"{BALANCE} -k measuring",
    ),
    # G. storage and dtype
    Mutant(
        "68: a cast rounds the offset",
        "taps/tap.py",
        "        base._apply(self, fn, recurse)\n        self._equipoise.restore()",
        "        base._apply(self, fn, recurse)",
        f"{FAMILIES} -k 'cast or meta'",
    ),
    Mutant(
        "69: counts in float32",
        "load.py",
        "load = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)\n    return load.scatter_add_(0, "
        "expert_ids.reshape(-1).long(), _ones(expert_ids, mask))",
        "load = torch.zeros(num_experts, device=expert_ids.device)\n    return load.scatter_add_(0, "
        "expert_ids.reshape(-1).long(), _ones(expert_ids, mask).float())",
        "tests/test_load.py",
    ),
    Mutant(
        "71: a resumed run begins with other offsets",
        "balance.py",
        '                group.steering.offset()[row].copy_(state["offsets"][layer.name])',
        "                pass",
        f"{BALANCE} {MECHANISMS} -k never_stopped",
    ),
    Mutant(
        "71: a momentum is not saved",
        "balancers/loss_free.py",
        'return {} if self._momentum is None else {"momentum": self._momentum}',
        "return {}",
        f"{MECHANISMS} -k never_stopped",
    ),
    Mutant(
        "71: a checkpoint that is loaded after attach loses its bias",
        "taps/tap.py",
        "        self._equipoise.adopt()",
        "        self._equipoise.restore()",
        f"{FAMILIES} -k adopted",
    ),
    Mutant(
        "74: a copy of the model is counted",
        "taps/tap.py",
        "        return _inert_tap, (self.kind, self.k, self.steers, self.multiplies)",
        "        return (lambda tap: tap), (self,)",
        f"{FAMILIES} -k copy",
    ),
    # H. update rule
    Mutant(
        "the offset moves with the load, not against it",
        "balancers/loss_free.py",
        "return torch.sub(load.sum(-1, keepdim=True), load, alpha=load.shape[-1])",
        "return load.shape[-1] * load - load.sum(-1, keepdim=True)",
        RULES,
    ),
    Mutant(
        "76, 77: the step is not centred",
        "balancers/loss_free.py",
        "            step = step - step.mean(-1, keepdim=True)",
        "            step = step - 0",
        f"{RULES} -k 'hand or reference'",
    ),
    Mutant(
        "the proportional error is in tokens",
        "balancers/loss_free.py",
        "relative = error.double() / load.sum(-1, keepdim=True).clamp_min(1)",
        "relative = error.double() / load.shape[-1]",
        f"{RULES} -k 'hand or reference'",
    ),
    Mutant(
        "79: the rate falls to zero a window late",
        "balancers/loss_free.py",
        "return self.rate if window < self.zero_from else 0.0",
        "return self.rate if window <= self.zero_from else 0.0",
        f"{RULES} -k schedules",
    ),
    Mutant(
        "81: a skipped step moves the offset",
        "balance.py",
        "        if applied is False:\n            return",
        "        if applied is None:\n            return",
        f"{BALANCE} {MECHANISMS} -k skipped",
    ),
    Mutant(
        "81: a verdict on the device is not heeded",
        "balance.py",
        "state[name].copy_(torch.where(applied.to(value.device).bool(), state[name], value))",
        "state[name].copy_(state[name])",
        f"{BALANCE} {MECHANISMS} -k skipped",
    ),
    Mutant(
        "82: signs of micro-batches are summed",
        "balancers/loss_free.py",
        "return (pooled[:, :-1].double() / pooled[:, -1:].clamp_min(1)).to(dtype)",
        "return pooled[:, :-1].to(dtype)",
        f"{RULES} -k micro_batch",
    ),
    Mutant(
        "82: an empty micro-batch has a say",
        "balancers/loss_free.py",
        "has_tokens = load.sum(-1, keepdim=True) > 0",
        "has_tokens = load.sum(-1, keepdim=True) >= 0",
        f"{RULES} -k micro_batch",
    ),
    Mutant(
        "80: the quantile of the other tail",
        "balancers/quantile.py",
        "wanted = (num_tokens * k).double() / histogram.shape[-2]",
        "wanted = (num_tokens * (histogram.shape[-2] - k)).double() / histogram.shape[-2]",
        f"{QUANTILE} -k 'reference or even'",
    ),
    Mutant(
        "80: a prefix instead of a random subset",
        "balancers/quantile.py",
        "            drawn = _draw(routing.logits, self.fraction)",
        "            drawn = torch.arange(margins.shape[0]) < self.fraction * margins.shape[0]",
        f"{QUANTILE} -k 'fraction or dealt'",
    ),
    Mutant(
        "47, 80: padding is in the quantile",
        "balancers/quantile.py",
        "counted = None if routing.mask is None else routing.mask != 0",
        "counted = None",
        f"{QUANTILE} -k 'reference or nothing'",
    ),
    # I, J. frozen, coverage
    Mutant(
        "84: a frozen offset moves",
        "balancers/loss_free.py",
        '    name = "frozen"\n',
        '    name = "frozen"\n\n    def update(self, load, statistic=None, window=0):\n        self._offset += 1\n',
        f"{RULES} -k frozen",
    ),
    Mutant(
        "88: the second kind of layer is never updated",
        "balance.py",
        "        for group in self._groups:\n            slots = self._recorder.adopt_writes(group)",
        "        for group in self._groups[:1]:\n            slots = self._recorder.adopt_writes(group)",
        f"{BALANCE} -k rules_of_the_gates",
    ),
    Mutant(
        "88, 89: a router that was not called goes unnoticed",
        "balance.py",
        "        if len(called) < len(self._layers):",
        "        if not called:",
        f"{BALANCE} -k not_called",
    ),
    Mutant(
        "89: a state is saved in the middle of a window",
        "balance.py",
        '        if self._window.micro_batches:\n            raise EquipoiseError(\n                "state_dict()',
        '        if False:\n            raise EquipoiseError(\n                "state_dict()',
        f"{BALANCE} -k legal",
    ),
    # K. groups
    Mutant(
        "91: masked groups are 0 and win against negative scores",
        "routing.py",
        'float("-inf")).flatten(-2)',
        "0.0).flatten(-2)",
        "tests/test_routing.py -k group",
    ),
    # L. metrics
    Mutant(
        "94: MaxVio is max over mean",
        "metrics.py",
        "c.amax(-1) / c.mean(-1) - 1",
        "c.amax(-1) / c.mean(-1)",
        "tests/test_metrics.py",
    ),
    Mutant(
        "92: layers are pooled before the metric",
        "metrics.py",
        "return torch.stack([_by_layer(metric, layer) for layer in load.values()]).mean(0)",
        "return _by_layer(metric, torch.stack(list(load.values())).sum(0))",
        "tests/test_metrics.py",
    ),
    Mutant(
        "93: domains weigh by their tokens",
        "metrics.py",
        "weight = used / used.sum(-1, keepdim=True)",
        "weight = n / n.sum(-1, keepdim=True)",
        "tests/test_metrics.py",
    ),
    # the lab
    Mutant(
        "lab: the largest share of a domain is that of all domains together",
        "metrics.py",
        "share.amax((0, -1))",
        "share.mean(0).amax(-1)",
        "tests/test_metrics.py -k domain_share",
    ),
    Mutant(
        "lab: the score sum is of the highest scores, not of the chosen experts",
        "experts/watch.py",
        "p.gather(-1, expert_ids)",
        "p.topk(expert_ids.shape[-1]).values",
        "tests/experts/test_watch.py -k reference",
    ),
    Mutant(
        "lab: what is forwarded together is dealt to the ranks before it is put together",
        "lab/batches.py",
        "together[self.rank :: self.num_ranks]",
        "batches[self.rank :: self.num_ranks].reshape(-1, *together.shape[1:])",
        "tests/lab/test_data.py -k any_number_of_ranks",
    ),
    Mutant(
        "lab: offsets outlive the strategy that held them",
        "lab/switch.py",
        "router.slot.tensor.zero_()",
        "pass",
        "tests/lab/test_switch.py -k end_where",
    ),
    Mutant(
        "lab: a schedule begins anew when a strategy takes over",
        "lab/switch.py",
        "after.load_state_dict(before |",
        "after.load_state_dict(after.state_dict() |",
        "tests/lab/test_switch.py -k acts_the_same",
    ),
    Mutant(
        "lab: a checkpoint after the switch is read with the strategy before it",
        "lab/train.py",
        "        if strategy != self.strategy:\n            self.balance.detach()",
        "        if False:\n            self.balance.detach()",
        "tests/lab/test_switch.py -k before_at_or_after",
    ),
    # and ours
    Mutant(
        "a third-party factor reaches the weights",
        "taps/tap.py",
        "choice = plain * (1 + self.offset) if self.multiplies else plain + self.offset",
        "choice = plain + self.offset",
        f"{MECHANISMS} -k product",
    ),
    # many ranks
    Mutant(
        "55: every rank moves its offsets by its own counts",
        "pool.py",
        "        return dist.all_reduce(vector, group=self.group, async_op=True)",
        "        return dist.all_reduce(vector.clone(), group=self.group, async_op=True)",
        f"{GROUPS} -k one_process",
    ),
    Mutant(
        "50, 51: the ranks of a mesh are the world",
        "pool.py",
        "group.mesh.flatten().tolist()",
        "list(range(dist.get_world_size()))",
        f"{GROUPS} -k one_process",
    ),
    Mutant(
        "81: one rank's skipped step holds nobody else back",
        "exchange.py",
        "            closing[0] += MARK\n",
        "            pass\n",
        f"{WINDOW} -k skips",
    ),
    Mutant(
        "81: a skipped step stays in the counts",
        "exchange.py",
        "        closing[0] &= MARK - 1\n",
        "",
        f"{WINDOW} -k 'skips or short'",
    ),
    Mutant(
        "90: a rank that cannot close its window tells nobody",
        "exchange.py",
        "            vector[self._last] = -(2**62 // self.pool.size)\n",
        "",
        f"{WINDOW} -k 'without_a_forward'",
    ),
    Mutant(
        "unequal numbers of micro-batches are not noticed",
        "exchange.py",
        "        if 0 < closings < size:",
        "        if False:",
        f"{WINDOW} -k unequal",
    ),
    Mutant(
        "an evaluation on one rank pairs with a step on another",
        "exchange.py",
        "        vector[self._second] += MARK\n",
        "        vector[self._second] += 0\n",
        f"{WINDOW} -k 'measur or evaluation'",
    ),
    Mutant(
        "a window that a rank could not close is gone on with",
        "window.py",
        "        except EquipoiseError:\n            self._open()\n            raise",
        "        except EquipoiseError:\n            raise",
        f"{WINDOW} -k next_ones",
    ),
    Mutant(
        "75: what is written into a slot in place is written over",
        "recorder.py",
        "        offset.copy_(torch.where(same, offset, held))\n",
        "",
        f"{BALANCE} -k in_place",
    ),
    Mutant(
        "97: a forward that finds out shapes is counted",
        "recorder.py",
        "            self.inferring = _infers_shapes()",
        "            self.inferring = False",
        PIPELINE,
    ),
    Mutant(
        "97: what is recomputed in the backward of such a forward is taken for a micro-batch",
        "recorder.py",
        "        if self.inferring:\n            return UNCOUNTED\n        if recomputing:",
        "        if self.inferring and not recomputing:\n            return UNCOUNTED\n        if recomputing:",
        PIPELINE,
    ),
    Mutant(
        "an error on one rank is not told to the others",
        "pool.py",
        "            if theirs is not None:\n",
        "            if False:\n",
        f"{GROUPS} -k same_error",
    ),
    Mutant(
        "one rank loads an older state than the others",
        "balance.py",
        "            if theirs != states[0]:",
        "            if False:",
        f"{STATE} -k refused",
    ),
    Mutant(
        "a run that is resumed forgets the share of its last window",
        "balance.py",
        'self._layout.load(self._recorder.last, index).copy_(state["load"][layer.name])',
        "pass",
        f"{STATE} -k one_process",
    ),
    # the lab's selections
    Mutant(
        "selection: experts take what suits them least",
        "lab/selection.py",
        "places = by_expert.topk(capacity, dim=-1).indices",
        "places = by_expert.topk(capacity, dim=-1, largest=False).indices",
        f"{SELECTION} -k 'hand or reference'",
    ),
    Mutant(
        "selection: chunks forget where they begin",
        "lab/selection.py",
        "order[(places + begins).reshape(-1)]",
        "order[places.reshape(-1)]",
        f"{SELECTION} -k 'hand or reference'",
    ),
    Mutant(
        "selection: shuffled scores are given to the tokens in order",
        "lab/selection.py",
        "return order[(places + begins).reshape(-1)], experts",
        "return (places + begins).reshape(-1), experts",
        f"{SELECTION} -k reference",
    ),
    Mutant(
        "selection: weights are not shared out among a token's experts",
        "lab/selection.py",
        "return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)",
        "return kept",
        f"{SELECTION} -k weighted_sum",
    ),
    Mutant(
        "selection: the experts compute the tokens in order",
        "lab/selection.py",
        "layer.token_ids = choice.token_ids",
        "layer.token_ids = None",
        f"{SELECTION} -k weighted_sum",
    ),
    Mutant(
        "selection: an evaluation leaks",
        "lab/selection.py",
        "not (self.training or layer.selection.in_evaluation)",
        "False",
        f"{SELECTION} -k 'later or plain'",
    ),
    Mutant(
        "selection: it acts while a router is proven",
        "lab/selection.py",
        "        self.input_ids = None\n\n\nclass _Layer",
        "        pass\n\n\nclass _Layer",
        f"{SELECTION} -k 'by_itself'",
    ),
    Mutant(
        "selection: one hash for all layers",
        "lab/selection.py",
        "generator=_generator(layer)",
        "generator=_generator(0)",
        f"{SELECTION} -k hash_is",
    ),
    Mutant(
        "selection: Sinkhorn's columns sum to 1",
        "lab/selection.py",
        "columns = num_tokens / num_experts / (rows @ matrix)",
        "columns = 1 / (rows @ matrix)",
        f"{SELECTION} -k sinkhorn_is",
    ),
    Mutant(
        "selection: an offset that no choice obeys is accepted",
        "lab/selection.py",
        "if not all(isinstance(balancer, ZLoss) for",
        "if not any(isinstance(balancer, ZLoss) for",
        f"{SELECTION} -k refused",
    ),
    Mutant(
        "selection: the softmax gate begins with weights of its own",
        "lab/models.py",
        "        router.weight = old.weight\n",
        "",
        f"{SELECTION} -k seed_differ",
    ),
    # the lab's balancers
    Mutant(
        "compared: tokens are drawn with replacement",
        "lab/balancers.py",
        "torch.randperm(pooled.shape[0], generator",
        "torch.randint(pooled.shape[0], (pooled.shape[0],), generator",
        f"{COMPARED} -k 'twice or variance'",
    ),
    Mutant(
        "compared: the shuffle control draws from its own micro-batch",
        "lab/balancers.py",
        "pooled = torch.cat(self._choices[self._rows.find(routing)])",
        "pooled = routing.expert_ids",
        f"{COMPARED} -k 'twice or variance'",
    ),
    Mutant(
        "compared: every micro-batch draws the same tokens",
        "lab/balancers.py",
        'int.from_bytes(_hash(routing.expert_ids, pooled.shape[0], size=7), "big")',
        "pooled.shape[0]",
        f"{COMPARED} -k twice",
    ),
    Mutant(
        "compared: padding is drawn",
        "lab/balancers.py",
        "return routing.expert_ids if routing.mask is None else routing.expert_ids[routing.mask != 0]",
        "return routing.expert_ids",
        f"{COMPARED} -k masked_tokens",
    ),
    Mutant(
        "compared: choices of the last window are drawn",
        "lab/balancers.py",
        "        self._rows.clear()\n        self._choices = [[] for _ in self._choices]\n",
        "        pass\n",
        f"{COMPARED} -k told_apart",
    ),
    Mutant(
        "compared: phi remembers the other way round",
        "lab/balancers.py",
        "self.memory * self._excess + (1 - self.memory) * excess",
        "(1 - self.memory) * self._excess + self.memory * excess",
        f"{COMPARED} -k 'phi_by_hand or reference_over'",
    ),
    Mutant(
        "compared: phi's average forgets padding",
        "lab/balancers.py",
        "else (routing.mask != 0).sum()\n        return torch.cat",
        "else p.new_tensor(p.shape[0])\n        return torch.cat",
        f"{COMPARED} -k reference_over",
    ),
    Mutant(
        "compared: phi's average moves without tokens",
        "lab/balancers.py",
        "torch.where(tokens > 0, moved, self._excess)",
        "moved",
        f"{COMPARED} -k without_tokens",
    ),
    Mutant(
        "compared: a state without an offset is not saved",
        "balance.py",
        "            for name, value in group.states().items():\n                state.setdefault",
        "            for name, value in (group.steering.state() if group.steering else {}).items():\n"
        "                state.setdefault",
        f"{COMPARED} -k 'apart or bit_for_bit'",
    ),
    Mutant(
        "compared: two states of a name are one",
        "recorder.py",
        'place = kind if kinds.count(kind) == 1 else f"{kind}.{kinds.count(kind)}"',
        "place = kind",
        f"{COMPARED} -k apart",
    ),
    Mutant(
        "compared: a switch drops phi's average",
        "lab/switch.py",
        'state = begin["state"] | apart',
        'state = begin["state"]',
        f"{COMPARED} -k handed_over",
    ),
    Mutant(
        "compared: Shinka's threshold is that of one expert",
        "lab/balancers.py",
        "(0.064 / num_experts - share)",
        "(0.064 - share)",
        f"{COMPARED} -k 'shinka_by_hand or shinka_is'",
    ),
    Mutant(
        "compared: Shinka's strength has no gradient",
        "lab/balancers.py",
        "entropy = -(p * p.clamp_min",
        "entropy = -(p.detach() * p.detach().clamp_min",
        f"{COMPARED} -k 'shinka'",
    ),
    Mutant(
        "compared: the shuffle control on many ranks",
        "lab/balancers.py",
        "        if num_ranks > 1:\n",
        "        if False:\n",
        f"{COMPARED} -k refused",
    ),
    # routers are known by what they do
    Mutant(
        "routers: any weights are taken for the gate's",
        "taps/discovery.py",
        "if not torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-4):",
        "if False:",
        f"{FAMILIES} -k found_out",
    ),
    Mutant(
        "routers: the best by other scores are good enough",
        "taps/discovery.py",
        "if (not grouped or in_the_way) and (expert_ids.sort().values != best.sort().values).any():",
        "if False:",
        f"{EVERY} -k 'gpt_oss or kolibri1'",
    ),
    Mutant(
        "routers: groups are limited before the offset",
        "taps/discovery.py",
        "in_the_way = grouped and (multiplies or kind.slot is None)",
        "in_the_way = grouped and multiplies",
        f"{EVERY} -k groups",
    ),
    Mutant(
        "routers: a factor multiplies logits below zero",
        "taps/discovery.py",
        'if multiplies and kind.selection == "logits":',
        "if False:",
        f"{EVERY} -k factor_of",
    ),
    Mutant(
        "routers: a slot in the block around is not looked for",
        "taps/discovery.py",
        "argument = None if parent is None else _slot_argument(router)",
        "argument = None",
        f"{EVERY} -k 'afmoe or minimax_m2'",
    ),
    Mutant(
        "routers: the proof of one serves all of its class",
        "taps/families.py",
        "declared, multiplies, _made_of(router), _tensors(parent))",
        "declared, multiplies)",
        f"{FAMILIES} -k found_out",
    ),
    Mutant(
        "routers: a proof is taken over where a config says another k",
        "taps/families.py",
        "for held in (vars(module), config) for pair",
        "for held in (vars(module),) for pair",
        f"{EVERY} -k another_k",
    ),
    Mutant(
        "routers: probabilities are taken for logits",
        "taps/tap.py",
        "first = first.clamp_min(torch.finfo(first.dtype).tiny).log()",
        "first = first * 1",
        f"{EVERY} -k gemma4",
    ),
    Mutant(
        "routers: steered weights never reach dense scores",
        "taps/tap.py",
        "return torch.zeros_like(dense).scatter(-1, expert_ids, weights), logits",
        "return dense, logits",
        f"{EVERY} -k 'tiny and llama4'",
    ),
    Mutant(
        "routers: hash layers are called unknown",
        "taps/families.py",
        "yield name, module, None if chooses_by_id(module) else why",
        "yield name, module, why",
        f"{EVERY} -k hash",
    ),
    Mutant(
        "routers: a matrix in a module inside has no device",
        "balance.py",
        "return next(self._layers[0].router.parameters()).device",
        "return self._layers[0].router.weight.device",
        f"{EVERY} -k longcat",
    ),
    Mutant(
        "families: what was tested on another version is called tested",
        "catalogue/installed.py",
        'return content["routers"] if same else {}',
        'return content["routers"]',
        f"{EVERY} -k another",
    ),
    Mutant(
        "families: gates of something else are listed",
        "catalogue/installed.py",
        'if "expert" not in inspect.getsource(cls):',
        "if False:",
        f"{EVERY} -k listing",
    ),
    Mutant(
        "families: the slot is always in the router",
        "catalogue/installed.py",
        'held_by = "block"',
        'held_by = "router"',
        f"{EVERY} -k listing",
    ),
    Mutant(
        "families: code of a model's own is passed over",
        "catalogue/model.py",
        'if content.get("auto_map"):',
        "if False:",
        f"{COMMAND} -k cannot_be",
    ),
    Mutant(
        "families: integers are taken for weights",
        "catalogue/model.py",
        "and dtype not in _FLOATS:",
        "and False:",
        f"{COMMAND} -k integers",
    ),
    Mutant(
        "families: saved weights are not read",
        "catalogue/model.py",
        "    elif saved:\n",
        "    elif False:\n",
        f"{COMMAND} -k saved_weights",
    ),
    # analysis
    Mutant(
        "statistics: an interval of n degrees of freedom",
        "analysis/statistics.py",
        "stats.t.isf((1 - level) / 2, n - 1)",
        "stats.t.isf((1 - level) / 2, n)",
        f"{ESTIMATES} -k 'hand or reference'",
    ),
    Mutant(
        "statistics: an interval whose level is one-sided",
        "analysis/statistics.py",
        "stats.t.isf((1 - level) / 2, n - 1)",
        "stats.t.isf(1 - level, n - 1)",
        f"{ESTIMATES} -k 'hand or reference or covers'",
    ),
    Mutant(
        "statistics: the standard deviation of a population",
        "analysis/statistics.py",
        "/ math.sqrt(n - 1) if n > 1",
        "/ math.sqrt(n) if n > 1",
        f"{ESTIMATES} -k 'hand or reference'",
    ),
    Mutant(
        "statistics: arms are paired by their order",
        "analysis/statistics.py",
        "paired(arm, baseline, intersect)), level=level)",
        "zip(arm.values(), baseline.values(), strict=True)), level=level)",
        f"{ESTIMATES} -k 'hand or order'",
    ),
    Mutant(
        "statistics: a slope on the factor itself",
        "analysis/statistics.py",
        "x = [math.log2(factor) for factor in arms]",
        "x = [float(factor) for factor in arms]",
        f"{ESTIMATES} -k slope",
    ),
    Mutant(
        "statistics: equal where the interval and the margin overlap",
        "analysis/verdicts.py",
        "inside, outside = -margin < low and high < margin,",
        "inside, outside = -margin < high and low < margin,",
        f"{VERDICTS} -k hand",
    ),
    Mutant(
        "statistics: one of the two one-sided tests is enough",
        "analysis/verdicts.py",
        "p_claim = max(estimate.p_lower(margin), estimate.p_higher(-margin))",
        "p_claim = min(estimate.p_lower(margin), estimate.p_higher(-margin))",
        f"{VERDICTS} -k 'hand or alike'",
    ),
    Mutant(
        "statistics: lower and higher are one claim",
        "analysis/verdicts.py",
        'if hypothesis.direction == "higher":',
        "if False:",
        f"{VERDICTS} -k hand",
    ),
    Mutant(
        "statistics: Holm forgets the claims that are decided",
        "analysis/verdicts.py",
        "least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))",
        "least = min(1.0, (len(p_values) - rank) * p_values[name])",
        f"{VERDICTS} -k holm",
    ),
    Mutant(
        "statistics: Holm's p is shown and not used",
        "analysis/verdicts.py",
        'verdict=judgement.verdict if adjusted[name] < 1 - judgement.estimate.level else "undecided",',
        "verdict=judgement.verdict,",
        f"{VERDICTS} -k 'survive or family'",
    ),
    Mutant(
        "statistics: power without the spread of the standard deviation",
        "analysis/power.py",
        "stats.nct.sf(t_quantile(n, level), n - 1, noncentrality)",
        "stats.norm.sf(t_quantile(n, level) - noncentrality)",
        f"{POWER} -k 'reference or tables'",
    ),
    Mutant(
        "statistics: power of equality by one margin alone",
        "analysis/power.py",
        "- special.ndtr(t * u - margin - centre)",
        "",
        f"{POWER} -k reference",
    ),
    Mutant(
        "statistics: one seed too many",
        "analysis/power.py",
        "while n - below > 1:",
        "while n - below > 2:",
        f"{POWER} -k 'tables or first'",
    ),
    Mutant(
        "statistics: seeds for an effect on the wrong side",
        "analysis/power.py",
        "    if not _on_its_side(hypothesis, mean):\n        return None\n",
        "",
        f"{POWER} -k wrong",
    ),
    Mutant(
        "statistics: the noise of an arm is taken for that of the difference",
        "analysis/power.py",
        "detectable_effect(difference, n,",
        "detectable_effect(estimate(firsts).sd, n,",
        f"{POWER} -k noise",
    ),
    Mutant(
        "claims: what is out of balance is chosen on a frontier",
        "reproduce/frontier.py",
        "if maxvio <= self.most_maxvio else (1.0, maxvio)",
        "if True else (1.0, maxvio)",
        f"{CLAIMS} -k balance",
    ),
    Mutant(
        "claims: a frontier is chosen on before it is whole",
        "reproduce/frontier.py",
        "if len(points) == len(grid) else None",
        "if points else None",
        f"{CLAIMS} -k missing",
    ),
    Mutant(
        "claims: a grid does not grow below its lower edge",
        "reproduce/frontier.py",
        "grid = [_neighbour(grid[0], -1), *grid]",
        "pass",
        f"{CLAIMS} -k grows",
    ),
    Mutant(
        "claims: a value is chosen on the test text",
        "reproduce/frontier.py",
        'point.mean("selection_nats")) if',
        'point.mean("val_nats")) if',
        f"{CLAIMS} -k chosen",
    ),
    Mutant(
        "claims: a claim runs with a value that is not chosen yet",
        "reproduce/claim.py",
        "return [] if self.frontiers else self.planned()",
        "return self.planned()",
        f"{CLAIMS} -k takes",
    ),
    Mutant(
        "claims: a hundredth is the whole",
        "reproduce/claim.py",
        "float(there) / int(divisor)",
        "float(there)",
        f"{CLAIMS} -k takes",
    ),
    Mutant(
        "claims: the margin of equality is all of the difference of the scopes",
        "reproduce/verdict.py",
        "return -seen.mean / 3",
        "return -seen.mean",
        f"{CLAIMS} -k third",
    ),
    Mutant(
        "claims: a difference of two statistics is the first of them",
        "reproduce/verdict.py",
        "values[0] - sum(values[1:])",
        "values[0]",
        f"{CLAIMS} -k difference_of_two",
    ),
    Mutant(
        "claims: verdicts are not those of their family",
        "reproduce/verdict.py",
        "replace(first, judgement=family[claim.name])",
        "first",
        "tests/reproduce/test_reproduce.py -k family",
    ),
    Mutant(
        "claims: a run is begun that does not fit into the budget",
        "reproduce/runs.py",
        "time.monotonic() - began + (expected(todo[0]) or 0.0) > 60 * minutes",
        "time.monotonic() - began > 60 * minutes",
        "tests/reproduce/test_reproduce.py -k budget",
    ),
    Mutant(
        "claims: an error in a worker is lost",
        "reproduce/runs.py",
        "            failures.append(error)\n\n    def work_off",
        "            pass\n\n    def work_off",
        "tests/reproduce/test_reproduce.py -k reaches",
    ),
    Mutant(
        "claims: a run that diverged is a failure",
        "reproduce/runs.py",
        "_diverged(Run(folder)) is not None):",
        "False):",
        "tests/reproduce/test_reproduce.py -k diverges",
    ),
    Mutant(
        "claims: a run that is there by now is made again",
        "reproduce/runs.py",
        "while todo and results.get(todo[0]) is not None:",
        "while False:",
        "tests/reproduce/test_reproduce.py -k meanwhile",
    ),
    Mutant(
        "claims: a margin is of a difference that may be none",
        "reproduce/verdict.py",
        "seen.interval[1] < 0",
        "seen.mean < 0",
        "tests/reproduce/test_reproduce.py -k margin",
    ),
    Mutant(
        "claims: a verdict does not say that seeds are missing",
        "reproduce/page.py",
        'so_far = " so far" if estimate.n',
        'so_far = "" if estimate.n',
        "tests/reproduce/test_reproduce.py -k before_the_last",
    ),
    Mutant(
        "claims: a value at which a run diverged is chosen by the others",
        "reproduce/frontier.py",
        "return math.inf if None in values else",
        "values = [value for value in values if value is not None]\n        return",
        f"{CLAIMS} -k diverges",
    ),
    Mutant(
        "claims: a result of another precision is taken",
        "reproduce/runs.py",
        "        job = self.asked(job)\n        for folder",
        "        for folder",
        "tests/reproduce/test_reproduce.py -k precision",
    ),
    Mutant(
        "claims: a claim's own precision is not asked for",
        "reproduce/claim.py",
        "own | dict(self.arms[arm])",
        "dict(self.arms[arm])",
        "tests/reproduce/test_claims.py -k precision",
    ),
    Mutant(
        "73: a bias in 16 bits is taken for one that was kept",
        "export.py",
        'verdict = "rounded"',
        'verdict = "kept"',
        "tests/test_export.py -k 16_bits",
    ),
    Mutant(
        "73: rerouting is counted with the bias as it is",
        "export.py",
        "for offset in (bias, other))",
        "for offset in (bias, bias))",
        "tests/test_export.py -k few_values",
    ),
    Mutant(
        "72: a bias that is not there is not missed",
        "export.py",
        'return LayerCheck(router.name, "lost"',
        'return LayerCheck(router.name, "zero"',
        "tests/test_export.py -k left_out",
    ),
    Mutant(
        "specialisation: a co-activation is a share of the other expert's tokens",
        "analysis/specialisation.py",
        "return counts / np.diag(counts)[:, None].astype(float)",
        "return counts / np.diag(counts)[None].astype(float)",
        f"{SPECIALISATION} -k coactivation",
    ),
    Mutant(
        "specialisation: a distance is the divergence itself",
        "analysis/specialisation.py",
        "return np.sqrt(np.clip((divergence(first, middle) + divergence(second, middle)) / 2, 0, 1))",
        "return np.clip((divergence(first, middle) + divergence(second, middle)) / 2, 0, 1)",
        f"{SPECIALISATION} -k metric",
    ),
    Mutant(
        "specialisation: the bound at chance is the median",
        "analysis/specialisation.py",
        "np.quantile(drawn, 0.95, axis=0)",
        "np.quantile(drawn, 0.5, axis=0)",
        f"{SPECIALISATION} -k hundred_samples",
    ),
    Mutant(
        "specialisation: information is not corrected for the size of the sample",
        "analysis/specialisation.py",
        " + (len(seen) - 1) / (2 * (len(rows) ** 2 / (1 / n[rows]).sum()))",
        "",
        f"{SPECIALISATION} -k 'metrics or nothing'",
    ),
    Mutant(
        "specialisation: the same experts in another order are others",
        "analysis/specialisation.py",
        "(first[:, :, None] == second[:, None, :]).sum((1, 2))",
        "(first == second).sum(1)",
        f"{SPECIALISATION} -k saturation",
    ),
    Mutant(
        "specialisation: a token that every expert gets alike is typical of one",
        "analysis/specialisation.py",
        "(counts[:, expert] > average * seen)",
        "(counts[:, expert] > 0)",
        f"{SPECIALISATION} -k typical",
    ),
    Mutant(
        "specialisation: a rare token is typical",
        "analysis/specialisation.py",
        "(seen >= fewest) & ",
        "",
        f"{SPECIALISATION} -k typical",
    ),
    Mutant(
        "audit: padding is counted",
        "experts/watch.py",
        "one = counted[:, None].expand_as(expert_ids)",
        "one = torch.ones_like(expert_ids)",
        "tests/experts/test_watch.py -k loop",
    ),
    Mutant(
        "audit: tokens of another id are counted for the next one in the vocabulary",
        "experts/watch.py",
        "(vocabulary[places] == forward.input_ids).long() * counted",
        "counted",
        "tests/experts/test_watch.py -k loop",
    ),
    Mutant(
        "audit: a domain's share is read again and again",
        "audit/run.py",
        "rows = islice(_rows(documents, encode, end, length), share)",
        "rows = _rows(documents, encode, end, length)",
        "tests/audit/test_run.py -k share",
    ),
    Mutant(
        "experts: under autocast counts are rounded to bfloat16",
        "experts/watch.py",
        ', torch.autocast("cpu", enabled=False):',
        ":",
        "tests/experts/test_watch.py -k autocast",
    ),
    Mutant(
        "experts: a forward that breaks off is counted in part",
        "experts/watch.py",
        "            forward.layers[layer.name] =",
        "            layer.load[watched.domain, 0] += 1\n            forward.layers[layer.name] =",
        "tests/experts/test_watch.py -k breaks_off",
    ),
    Mutant(
        "experts: Ctrl-C leaves half of a forward's counts",
        "experts/watch.py",
        "with _whole(), torch",
        "with torch",
        "tests/experts/test_watch.py -k ctrl_c",
    ),
    Mutant(
        "experts: the forward of an idle rank is counted",
        "lab/evaluate.py",
        "watched.domain = None",
        "pass",
        "tests/distributed/test_lab.py -k experts_do",
    ),
    Mutant(
        "experts: ranks write what they counted themselves",
        "lab/evaluate.py",
        "    ranks.add_up(watched.sums())",
        "    ranks.add_up([layer.score_sum for layer in watched.layers])",
        "tests/distributed/test_lab.py -k experts_do",
    ),
    Mutant(
        "experts: what experts choose is written as if tokens chose",
        "lab/run_folder.py",
        "if not evaluates_by_token(config.selection):",
        "if False:",
        "tests/lab/test_evaluate.py -k nothing_is_written",
    ),
    Mutant(
        "experts: a run that goes on keeps the audit of other weights",
        "records.py",
        'for name in ("audit.json", "result.json"):',
        'for name in ("result.json",):',
        "tests/lab/test_evaluate.py -k same_audit",
    ),
    Mutant(
        "audit: hooks are left in the model",
        "experts/watch.py",
        "            handle.remove()",
        "            pass",
        "tests/experts/test_watch.py -k left_as",
    ),
    Mutant(
        "audit: ranks take every other expert",
        "analysis/specialisation.py",
        "counts.reshape(ranks, -1).sum(1)",
        "counts.reshape(-1, ranks).sum(0)",
        "tests/experts/test_result.py -k hand",
    ),
    Mutant(
        "audit: a checkpoint that lacks a router is audited with a random one",
        "catalogue/model.py",
        "            if whole:",
        "            if False:",
        "tests/audit/test_command.py -k 'not_whole and drop_tensor'",
    ),
    Mutant(
        "audit: an index beside a whole file is believed",
        "catalogue/model.py",
        "if found is None or found in weights:",
        "if found is None or not (found := folder / 'model.safetensors.index.json').is_file():",
        "tests/audit/test_command.py -k not_looked_at",
    ),
    Mutant(
        "audit: what was counted before an error is thrown away",
        "audit/command.py",
        "        write(cut.audited)\n",
        "",
        "tests/audit/test_command.py -k midst",
    ),
    Mutant(
        "audit: half a text is called complete",
        "audit/run.py",
        "tuple(notes), False, samples)",
        "tuple(notes), True, samples)",
        "tests/audit/test_run.py -k before_an_end",
    ),
    Mutant(
        "audit: a batch that gave nan is counted",
        "audit/run.py",
        "if not math.isfinite(nats):",
        "if False:",
        "tests/audit/test_run.py -k nan",
    ),
    Mutant(
        "audit: the words of Ctrl-C are those of a training run",
        "cli.py",
        "{str(stop) or 'Go on with the same command and --resume.'}",
        "Go on with the same command and --resume.",
        "tests/audit/test_command.py -k before_the_first_batch",
    ),
    Mutant(
        "audit: a model is audited without the offsets that it was trained with",
        "audit/command.py",
        "if (folder / OFFSETS_FILE).exists():",
        "if False:",
        "tests/audit/test_command.py -k offsets",
    ),
]


def _copy(folder: Path) -> None:
    for name in ("src", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile", "constraints.txt", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder / name)


def _pytest(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider {tests}"
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def judge(mutant: Mutant) -> str:
    """``seen``, or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder)
        path = folder / "src" / "equipoise" / mutant.file
        source = path.read_text()
        if source.count(mutant.old) != 1:
            return f"its text is there {source.count(mutant.old)} times in {mutant.file}"
        path.write_text(source.replace(mutant.old, mutant.new))
        done = _pytest(folder, mutant.tests)
    if done.returncode == 1:
        return "seen"
    if done.returncode == 0:
        return f"NOT SEEN by {mutant.tests}"
    return f"pytest could not run: {(done.stdout + done.stderr)[-300:]}"


def main() -> None:
    asked = sys.argv[1:]  # words of the breaks that are wanted, default all
    chosen = [mutant for mutant in MUTANTS if not asked or any(word in mutant.what for word in asked)]
    started, missed = time.time(), 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for mutant, verdict in zip(chosen, pool.map(judge, chosen), strict=True):
            missed += verdict != "seen"
            print(f"{verdict:8} {mutant.what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} breaks seen, {time.time() - started:.0f} s")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
