"""Mutants of what leans on private names of torch, on stack frames, and on the device."""

from mutants.mutant import Mutant

MUTANTS = [
    # process groups
    Mutant(
        "private: torch names our process group, by what each rank did before",
        "        c10d._process_group_name = lambda *_, **__: name  #",
        "        pass  #",
        "distributed/test_names -k attach_again",
    ),
    Mutant(
        "private: the first rank of each dimension names the group of a mesh",
        "        name = min(names)",
        "        name = names[0]",
        "test_groups -k shuffled",
    ),
    Mutant(
        "private: our group is split off the world where a device is bound",
        "            world.bound_device_id = None\n        group = dist.new_group",
        "            pass\n        group = dist.new_group",
        "distributed/test_names -k bound",
    ),
    Mutant(
        "private: our group has torch's timeout",
        "timeout=_timeout(like), backend=backend",
        "backend=backend",
        "test_window -k never_comes",
    ),
    # ranks that leave
    Mutant(
        "private: a rank alone may not leave its DDP",
        "if self.size > 1 and is_joined_ddp_running():",
        "if is_joined_ddp_running():",
        "test_join -k nobody",
    ),
    Mutant(
        "private: a join that stops all ranks is refused",
        "ddp._join_config.enable and not ddp._join_config.throw_on_early_termination",
        "ddp._join_config.enable",
        "test_join",
    ),
    Mutant(
        "private: a join is not noticed",
        "            self.exchange.pool.check_no_rank_leaves()\n",
        "",
        "test_join -k first_forward",
    ),
    # names that are gone
    Mutant(
        "private: a name that is gone is not said",
        '            raise _is_gone(f"torch.{name}", purpose) from None',
        "            pass",
        "test_torch_internals -k gone",
    ),
    Mutant(
        "private: a step that is not seen on the stack is none",
        "    if depth == 0:  # somebody",
        "    if False:  # somebody",
        "test_torch_internals -k whose_it_is",
    ),
    Mutant(
        "private: shape inference by another name is counted",
        "    if not any(hasattr(module.PipelineStage, name) for name in _SHAPE_INFERENCE):",
        "    if False:",
        "test_torch_internals -k shape_inference",
    ),
    Mutant(
        "private: a Trainer that does not say where it begins begins anew",
        '    if trainer is not None:\n        raise EquipoiseError(\n            f"Trainer.train()',
        '    if False:\n        raise EquipoiseError(\n            f"Trainer.train()',
        "test_stack",
    ),
    # Dynamo
    Mutant(
        "private: Dynamo's option stays after detach",
        "    if _num_owners == 0 and getattr(torch._dynamo.config, _OPTION):",
        "    if False:",
        "test_torch_internals -k option",
    ),
    Mutant(
        "private: Dynamo's option ends with the first of two models",
        "    if _num_owners == 0 and getattr(torch._dynamo.config, _OPTION):",
        "    if getattr(torch._dynamo.config, _OPTION):",
        "test_torch_internals -k option",
    ),
    Mutant(
        "private: the second model takes our value of Dynamo's option for the user's",
        "    if _num_owners == 0:\n        _users_value",
        "    if True:\n        _users_value",
        "test_torch_internals -k option",
    ),
    # devices
    Mutant(
        "private: a CUDA graph is captured around counting",
        "    if can_capture and of_device.is_current_stream_capturing():",
        "    if False:",
        "test_no_synchronisation -k said",
    ),
    Mutant(
        "private: a CUDA graph may hold the operator that counts",
        '-> (Tensor, Tensor)",\n    tags=(torch.Tag.cudagraph_unsafe,),\n',
        '-> (Tensor, Tensor)",\n',
        "test_torch_internals -k cuda_graph",
    ),
    Mutant(
        "private: what steers a router is where FSDP2 keeps its weights",
        'if mesh is None or weight.device.type in (mesh.device_type, "meta"):',
        "if True:",
        "test_no_synchronisation -k offloaded",
    ),
    Mutant(
        "private: float64 on a device that has none",
        "    return torch.float32 if lacks_float64 else torch.float64",
        "    return torch.float64",
        "test_no_synchronisation -k 'ask_nothing and float64'",
    ),
]
