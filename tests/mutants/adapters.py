"""Mutants of adapters, and of choices that are seen and steered inside a forward."""

from mutants.mutant import Mutant

MUTANTS = [
    # adapters
    Mutant(
        "an adapter's logits are those of the call before",
        "    if logits is not None:\n        setattr(router, LOGITS, None)\n    return logits",
        "    return logits",
        "test_adapter -k 'detach_leaves or exact'",
    ),
    Mutant(
        "the mask of a call is not asked for",
        "        mask = mask if own_mask is None else own_mask\n",
        "",
        "test_adapter -k mask_of_the_call",
    ),
    Mutant(
        "the mask of a call outranks token_mask",
        "    if not isinstance(kind.gives, str) and not context.has_explicit_mask:\n",
        "    if not isinstance(kind.gives, str):\n",
        "test_adapter -k outranks",
    ),
    Mutant(
        "a sequence-first router is read as batch-first",
        "{n for n, layer in enumerate(layers) if layer.kind.adapter.is_sequence_first}",
        "set()",
        "test_adapter -k 'columns or mask_of_the_call'",
    ),
    Mutant(
        "an adapter that refuses is not asked",
        "(reason := adapter.refusal(router)) is not None:",
        "(reason := None) is not None:",
        "test_adapter -k wrong_adapter",
    ),
    Mutant(
        "the framework goes on moving the bias",
        "stops = [layer.own_balancing.stop for layer in recorder.layers] if steers else []",
        "stops = []",
        "test_adapter -k own_update",
    ),
    Mutant(
        "the framework's own update stays off after detach",
        "        for resume in self._resume_own_updates:\n            resume()\n",
        "",
        "test_adapter -k own_update",
    ),
    Mutant(
        "the framework's own update is off without a bias of ours",
        "for layer in recorder.layers] if steers else []",
        "for layer in recorder.layers]",
        "test_adapter -k goes_on",
    ),
    # a choice by a maximum
    Mutant(
        "a maximum is steered although it is no choice",
        "return choices == [0, self.runs]",
        "return choices[1] > choices[0]",
        "test_behaviour -k maxim",
    ),
    Mutant(
        "a copy of a router that chooses by a maximum is not steered",
        "steering = (self.multiplies, self.dimensions, self.chooses_by_max, self.num_experts)",
        "steering = (self.multiplies, self.dimensions, False, self.num_experts)",
        "test_behaviour -k maximum",
    ),
    # blocks that route by themselves
    Mutant(
        "blocks: noise is not noticed",
        "if not (torch.equal(logits, logits_2) and torch.equal(expert_ids, expert_ids_2)):",
        "if False:",
        "test_blocks -k refused",
    ),
    Mutant(
        "blocks: dropped tokens are not noticed",
        "if (weights.abs() < 1e-9).any() or error",
        "if error",
        "test_blocks -k refused",
    ),
    Mutant(
        "blocks: other experts than the chosen are not noticed",
        " or error.abs().max() > 1e-3 * added.abs().max():",
        ":",
        "test_blocks -k refused",
    ),
    Mutant(
        "blocks: weights that are not the values of the top-k are accepted",
        "        if torch.equal(output, disturbed):\n",
        "        if False:\n",
        "test_blocks -k refused",
    ),
    Mutant(
        "blocks: the top-k of a copy is counted",
        "        if tap.router is not block:  # detached, or a copy\n            return values\n",
        "",
        "test_blocks -k copies",
    ),
    Mutant(
        "blocks: a forward without its top-k is not noticed",
        '    if top_k.num_choices != 1:\n        raise EquipoiseError(\n            "a block',
        '    if False:\n        raise EquipoiseError(\n            "a block',
        "test_blocks -k stops_taking",
    ),
    Mutant(
        "blocks: the loss does not go through the values of the top-k",
        "        return values if self.on_choice is None else self.on_choice(values, ids)",
        "        if self.on_choice is not None:\n            self.on_choice(values, ids)\n        return values",
        "test_blocks -k exact",
    ),
    Mutant(
        "blocks: large experts are tried",
        "stand_in = make_stand_in(router, random, without=large | {self.adapter.experts})",
        "stand_in = make_stand_in(router, random)",
        "test_blocks -k no_stand_in",
    ),
    Mutant(
        "a choice by maxima ranks the scores without the bias again for each expert",
        "ranked = self._remaining[-1] if self._remaining else self._biased(argument)",
        "ranked = self._biased(argument)",
        "routers/test_hidden_choice -k two_maxima_give",
    ),
    Mutant(
        "among equal scores the second maximum is any",
        "torch.where(ranked.gather(-1, by_logit) == ranked.gather(-1, best), by_logit, best)",
        "best",
        "routers/test_hidden_choice -k rounded_to_zero",
    ),
    Mutant(
        "too few maxima for a choice count as one",
        "        if self._remaining:\n            return 0\n",
        "        if self._remaining:\n            return 1\n",
        "routers/test_hidden_choice -k no_whole_choice",
    ),
    Mutant(
        "the second maximum takes the first expert of a record",
        "self.recorded[..., number : number + 1]",
        "self.recorded[..., 0:1]",
        "routers/test_hidden_choice -k take_a_record",
    ),
    Mutant(
        "a choice that its output hides is not compared with the proven one",
        "len(seen.logits) != 1 or ids is None or ids.shape[-1] != tap.k",
        "ids is None",
        "routers/test_hidden_choice -k changes_after",
    ),
    Mutant(
        "a loss that a router returns acts unseen beside ours",
        "loss = self.own_loss[module](output) if torch.is_grad_enabled() and not is_traced() else None",
        "loss = None",
        "routers/test_hidden_choice -k named_once",
    ),
    Mutant(
        "a loss that a router returns is watched at the first router only",
        "self.by_router.pop(module).remove()",
        "[hook.remove() for hook in self.by_router.values()]",
        "routers/test_hidden_choice -k any_one_router",
    ),
    Mutant(
        "a loss that a router returns acts unseen in a compiled forward",
        "    @outside_graphs  # inside a graph it could not hook the loss\n",
        "",
        "routers/test_hidden_choice -k named_once",
    ),
    Mutant(
        "of two top-k over the experts the first is counted",
        "return self.top_k[0] if len(self.top_k) == 1 else None",
        "return self.top_k[0]",
        "routers/test_hidden_choice -k two_choices",
    ),
    Mutant(
        "a router that hides its choice is traced into a graph that breaks inside our mode",
        "        forward = outside_graphs(forward)\n",
        "        pass\n",
        "routers/test_hidden_choice -k before_dropping",
    ),
    Mutant(
        "a choice by maxima cannot be replayed",
        "trial.num_experts, has_groups=has_groups, num_maxima=trial.num_maxima)",
        "trial.num_experts, has_groups=has_groups)",
        "routers/test_hidden_choice -k replayed",
    ),
    Mutant(
        "a gate that chooses otherwise of another form of tokens is refused altogether",
        "if inputs and self.adapter is not None and self.adapter.choice_is_hidden:",
        "if False:",
        "routers/test_hidden_choice -k flat_tokens",
    ),
    Mutant(
        "the trial of a router gathers weights that ZeRO-3 has cut",
        "stand_in._forward_hooks, stand_in._forward_pre_hooks = OrderedDict(), OrderedDict()",
        "stand_in._forward_hooks = OrderedDict()",
        "integrations/test_deepspeed -k without_the_hooks",
    ),
    Mutant(
        "under DeepSpeed: routers that AutoEP replaced are balanced no more",
        "lost = [layer.name for layer in balance.layers if layer.router not in modules]",
        "lost: list[str] = []",
        "integrations/test_deepspeed -k without_the_routers",
    ),
]
