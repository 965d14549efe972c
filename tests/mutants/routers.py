"""Mutants of finding, proving and observing routers."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "expert groups that are chosen before the bias is added are attached",
        "if not is_best and is_blocked and not is_plain:",
        "if False:",
        "test_every_family -k groups_chosen_before",
    ),
    Mutant(
        "a forward that was stopped by hand stays counted",
        "            if self._forwards and not torch.compiler.is_compiling():",
        "            if False:",
        "library/balance -k keyboard_interrupt",
    ),
    Mutant(
        "what a tap gives out is kept for its backward",
        "            ctx.save_for_backward(logits, expert_ids, weights)\n        return weights.clone()",
        "            weights = weights.clone()\n"
        "            ctx.save_for_backward(logits, expert_ids, weights)\n        return weights",
        "library/balance -k may_write",
    ),
    Mutant(
        "a router with a forward on the instance is attached",
        '    if "forward" in vars(router):',
        "    if False:",
        "test_find -k on_the_instance",
    ),
    Mutant(
        "a proof runs what is inside the real router",
        "        if name not in _BOUND_TO_INSTANCE\n",
        "",
        "test_find -k forward_of_its_own",
    ),
    Mutant(
        "eager tap: a traced forward goes the plain way",
        "        torch.compiler.is_compiling()\n        or torch",
        "        torch",
        "library/counting",
    ),
    Mutant(
        "30, 78: the bias reaches the weights",
        "return torch.return_types.topk((scores.gather(-1, ids), ids))",
        "return torch.return_types.topk((choice.gather(-1, ids), ids))",
        "test_find -k weights",
    ),
    Mutant(
        "42: a mask that is added to scores is taken for padding",
        'return "it holds other numbers, as masks that are added to attention scores do"',
        "return None",
        "library/balance -k mask",
    ),
    Mutant(
        "42: a causal mask is taken for padding",
        'return "it is a causal attention mask, which says who may attend to whom"',
        "return None",
        "library/balance -k mask",
    ),
    Mutant(
        "42: a decoder is masked by its encoder's mask",
        "if module in self._ambiguous and isinstance(",
        "if False and isinstance(",
        "library/balance -k mask",
    ),
    Mutant(
        "42: a mask is cut where nothing came before its tokens",
        "    return any(value is not None and not isinstance(value, bool) for value in caches)",
        "    return True",
        "library/balance -k 'sequence_length or cached'",
    ),
    Mutant(
        "42: a mask that cannot be one is refused where nothing is counted",
        "                self.not_padding = self._why_not_padding(mask, rows, module, arguments)",
        "                self.not_padding = self._why_not_padding(mask, rows, module, arguments)\n                assert self.not_padding is None",
        "library/balance -k 'added_to_attention or wrapper_does_not'",
    ),
    Mutant(
        "42: what a wrapper wraps is not told its padding",
        '    while "attention_mask" not in _argument_names(inner):\n',
        "    while False:\n",
        "library/balance -k mask",
    ),
    Mutant(
        "45: the mask that a model with a cached prefix is called with is taken from its beginning",
        "self.mask = mask[:, mask.shape[1] - length :]",
        "self.mask = mask[:, :length]",
        "library/balance -k cached",
    ),
    # G. storage and dtype
    Mutant(
        "68: a cast rounds the bias",
        "            tap.observer.restore_bias(tap.layer)",
        "            pass",
        "test_find -k 'cast or meta'",
    ),
    Mutant(
        "71: a checkpoint that is loaded after attach loses its bias",
        "            tap.observer.adopt_bias(tap.layer)",
        "            tap.observer.restore_bias(tap.layer)",
        "test_find -k adopted",
    ),
    Mutant(
        "74: a copy of the model is counted",
        "        return Tap, (self.kind, self.k, -1, None, None, False, self.uses_topk_mode, self.multiplies)",
        "        return (lambda tap: tap), (self,)",
        "test_find -k copy",
    ),
    # and ours
    Mutant(
        "a third-party factor reaches the weights",
        "choice = plain * (1 + self.bias) if self.multiplies else plain + self.bias",
        "choice = plain + self.bias",
        "test_mechanisms -k product",
    ),
    # routers are known by what they do
    Mutant(
        "routers: any weights are taken for the gate's",
        "    if torch.allclose(factor, reference.expand_as(factor), rtol=1e-4):\n",
        "    if True:\n",
        "test_find -k found_out",
    ),
    Mutant(
        "routers: the best by other scores are good enough",
        "    if not is_best and not trial.has_groups:\n",
        "    if False:\n",
        "test_every_family -k 'gpt_oss or kolibri1'",
    ),
    Mutant(
        "routers: groups are limited before the bias",
        "is_blocked = trial.has_groups and (multiplies or kind.slot is None)",
        "is_blocked = trial.has_groups and multiplies",
        "test_every_family -k groups",
    ),
    Mutant(
        "routers: a factor multiplies logits below zero",
        'if multiplies and kind.selection == "logits":',
        "if False:",
        "test_every_family -k multiplicative_bias_on",
    ),
    Mutant(
        "routers: a slot in the block around is not looked for",
        "    return {name: tensors[name] for name in _arguments(router)[1:] if tensors.get(name) is not None}",
        "    return {}",
        "test_every_family -k 'afmoe or minimax_m2'",
    ),
    Mutant(
        "routers: the proof of one serves all of its class",
        "declared, multiplies, fingerprint(router), tensor_shapes(parent))",
        "declared, multiplies)",
        "test_find -k found_out",
    ),
    Mutant(
        "routers: a proof is taken over where a config says another k",
        "parts.append((path, base, base.forward, _value(attributes, seen), tensor_shapes(module)))",
        "parts.append((path, base, base.forward, tensor_shapes(module)))",
        "test_every_family -k another_k",
    ),
    Mutant(
        "routers: functions are alike",
        "return value.__code__, _value([cells, value.__defaults__, value.__kwdefaults__], seen)",
        "return FunctionType",
        "test_own_routers",
    ),
    Mutant(
        "routers: what a closure holds is not looked at",
        "cells = [cell.cell_contents for cell in value.__closure__ or ()]",
        "cells = []",
        "test_own_routers",
    ),
    Mutant(
        "routers: a wrapper is attached beside what it wraps",
        "return [layer for layer in layers if layer.router not in dropped]",
        "return layers",
        "test_own_routers",
    ),
    Mutant(
        "routers: a proof draws from the user's generator",
        "with torch.random.fork_rng(devices=[]):  # some",
        "if True:  # some",
        "test_own_routers",
    ),
    Mutant(
        "routers: a stand-in writes into the router's lists",
        "copy(value) if isinstance(value, list | dict | set | deque) else value",
        "value",
        "test_own_routers",
    ),
    Mutant(
        "routers: of fully_shard are made by its class",
        "stand_in = object.__new__(plain_class(router))",
        "stand_in = plain_class(router).__new__(plain_class(router))",
        "test_own_routers",
    ),
    Mutant(
        "routers: noise is not looked for",
        "    if trial.router.training:\n        runs",
        "    if False:\n        runs",
        "test_own_routers",
    ),
    Mutant(
        "routers: a block without one is left out without a word",
        "for name, module in _moe_blocks(model, candidates)]",
        "for name, module in ()]",
        "test_own_routers -k named_beside",
    ),
    Mutant(
        "routers: an address is taken for an object",
        "seen[id(value)] = len(seen), value",
        "seen[id(value)] = len(seen), None",
        "test_own_routers",
    ),
    Mutant(
        "routers: the inner one is attached, whichever chooses",
        "dropped.add(inner.router if outer_has_slot or declares else outer.router)",
        "dropped.add(outer.router)",
        "test_own_routers",
    ),
    Mutant(
        "routers: k is what an attribute says",
        "1 if trial.is_top_1 else int(expert_ids.shape[-1])",
        "getattr(router, 'top_k', None) or int(expert_ids.shape[-1])",
        "test_own_routers",
    ),
    Mutant(
        "routers: probabilities are taken for logits",
        "first = first.clamp_min(torch.finfo(first.dtype).tiny).log()",
        "first = first * 1",
        "test_every_family -k gemma4",
    ),
    Mutant(
        "routers: steered weights never reach dense scores",
        "return torch.zeros_like(dense).scatter(-1, expert_ids, weights), logits",
        "return dense, logits",
        "test_every_family -k 'tiny and llama4'",
    ),
    Mutant(
        "routers: hash layers are called unknown",
        "yield name, module, None if chooses_by_id(module) else reason_text",
        "yield name, module, reason_text",
        "test_every_family -k hash",
    ),
]
