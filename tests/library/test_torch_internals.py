"""Every private name of torch that the library leans on exists, does what is needed, and is missed loudly."""

import ast
import gc
import operator
import sys
import types
from pathlib import Path

import models
import pytest
import torch
from models import VOCAB, tiny_lm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.pipelining import stage as pipeline_stage
from torch.utils.checkpoint import checkpoint

import equipoise
from equipoise import attach, torch_internals
from equipoise.errors import EquipoiseError
from equipoise.torch_internals import PRIVATE_NAMES, PRIVATE_NAMES_OF_RANKS

NAMES = PRIVATE_NAMES | PRIVATE_NAMES_OF_RANKS
OPTION = "skip_fwd_side_effects_in_bwd_under_checkpoint"
SRC = Path(equipoise.__file__).parent


def _ids(seed=0):
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(seed))


# ---- names that are gone ----


@pytest.mark.parametrize("name", NAMES)
def test_each_name_exists(name):
    assert operator.attrgetter(name)(torch) is not operator  # raises if not


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("ops.")])  # those are made when asked
def test_attach_names_what_is_gone(name, monkeypatch):
    model, (owner, _, attribute) = tiny_lm(), name.rpartition(".")
    monkeypatch.delattr(operator.attrgetter(owner)(torch) if owner else torch, attribute)
    with pytest.raises(EquipoiseError, match=rf"torch must have torch\.{name}, to .*: torch {torch.__version__[:4]}"):
        attach(model, "none")


def test_attach_names_an_operator_that_is_gone(monkeypatch):
    monkeypatch.setitem(PRIVATE_NAMES, "ops.aten._softmax_of_yesterday", "differentiate")
    with pytest.raises(EquipoiseError, match=r"torch\.ops\.aten\._softmax_of_yesterday, to differentiate"):
        attach(tiny_lm(), "none")


def test_a_forward_raises_where_shape_inference_has_another_name(monkeypatch):
    model = tiny_lm()
    attach(model, "none")
    model(_ids())
    monkeypatch.setattr(pipeline_stage, "PipelineStage", type("PipelineStage", (), {}))
    with pytest.raises(EquipoiseError, match="PipelineStage._forward_metadata_inference"):
        model(_ids())


@pytest.mark.parametrize("gone", ["_init_optim_state", "frame", "self"])
def test_a_step_raises_where_it_cannot_be_told_whose_it_is(gone, monkeypatch):
    """Never to step would be silent."""
    model = tiny_lm()
    balance, optimizer = attach(model, "loss-free"), torch.optim.SGD(model.parameters(), lr=0.1)
    balance.follow(optimizer)
    model(_ids()).backward()
    (hook,) = optimizer._optimizer_step_post_hooks.values()
    if gone == "_init_optim_state":
        monkeypatch.delattr(dcp_state_dict, gone)
        words, step = "_init_optim_state", optimizer.step
    else:
        words, step = "a frame of Optimizer.profile_hook_step with self", lambda: hook(optimizer, (), {})
    if gone == "self":
        wrapper = type("Optimizer", (), {"profile_hook_step": staticmethod(lambda call: lambda: call())})
        step = wrapper.profile_hook_step(step)
    with pytest.raises(EquipoiseError, match=words):
        step()
    assert balance.num_windows == 0


def test_an_optimizer_without_a_list_of_hooks_is_named(monkeypatch):
    model = tiny_lm()
    balance, optimizer = attach(model, "none"), torch.optim.SGD(model.parameters(), lr=0.1)
    del optimizer._optimizer_step_post_hooks
    with pytest.raises(EquipoiseError, match="Optimizer._optimizer_step_post_hooks"):
        balance.follow(optimizer)
    with pytest.raises(TypeError, match="must be one of torch"):
        balance.follow(object())


def test_attach_names_the_option_that_is_gone_where_it_is_needed(monkeypatch):
    gc.collect()  # other models may let go of the option
    monkeypatch.setattr(torch_internals, "_OPTION", "skip_of_yesterday")
    with pytest.raises(EquipoiseError, match="config.skip_of_yesterday, to compile a router without a slot"):
        attach(tiny_lm(), "loss-free")
    attach(tiny_lm(), "lbl")  # steers nothing


def test_a_new_group_that_does_not_ask_for_its_name_is_refused_before_anybody_waits(monkeypatch):
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_new_group_with_tag", lambda *args: None)
    with pytest.raises(EquipoiseError, match="new_group asking _process_group_name"):
        torch_internals.new_group_named("name", [0], None)


def test_a_ddp_that_does_not_say_whether_it_is_joined_is_named(monkeypatch):
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", types.SimpleNamespace())
    with pytest.raises(EquipoiseError, match="_join_config"):
        torch_internals.is_joined_ddp_running()


# ---- names that mean what they should ----


def test_a_backward_is_told_from_a_forward():
    seen = []

    def note(x):
        seen.append(torch_internals.is_backward_running())
        return x * x

    x = torch.ones(1, requires_grad=True)
    for use_reentrant in (False, True):
        checkpoint(note, x, use_reentrant=use_reentrant).sum().backward()
    x.mul(2).register_hook(lambda _: seen.append(torch_internals.is_backward_running()))
    assert seen == [False, True] * 2 and not torch_internals.is_backward_running()


def test_what_is_traced_or_transformed_is_told():
    seen = {}

    def note(name):
        def function(x):
            seen[name] = torch_internals.is_traced(), torch_internals.has_no_numbers(x)
            return x.sum()

        return function

    note("plain")(torch.ones(2))
    torch.func.grad(note("grad"))(torch.ones(2))
    torch.func.vmap(note("vmap"))(torch.ones(2, 3))
    with FakeTensorMode():
        note("fake")(torch.ones(2))
    torch.fx.experimental.proxy_tensor.make_fx(note("make_fx"))(torch.ones(2))
    assert seen["plain"] == (False, False)
    assert seen["grad"] == seen["vmap"] == (True, True)
    assert seen["fake"] == seen["make_fx"] == (True, False)


def test_wrappers_name_their_module_as_we_leave_it_out():
    block = nn.Linear(2, 2)
    assert torch_internals.without_compile(torch.compile(block)) is block
    assert torch_internals.without_compile(block) is block
    wrapped = nn.Sequential(torch.compile(checkpoint_wrapper.checkpoint_wrapper(block)))
    (name,) = [name for name, module in wrapped.named_modules() if module is block]
    assert [part for part in name.split(".") if part not in torch_internals.WRAPPED] == ["0"]
    assert torch.distributed.fsdp._common_utils.FSDP_WRAPPED_MODULE in torch_internals.WRAPPED


def test_operations_without_a_public_name_do_what_they_say():
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.arange(15.0, dtype=torch.float64).view(3, 5)
    scores = logits.softmax(-1)
    (expected,) = torch.autograd.grad(scores, logits, gradient)
    torch.testing.assert_close(torch_internals.softmax_backward(gradient, scores.detach()), expected)
    targets, sources = [torch.zeros(2), torch.zeros(3)], (torch.ones(2), torch.full((3,), 2.0))
    torch_internals.copy_each(targets, sources)
    assert [target.tolist() for target in targets] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    view = torch_internals.view_without_base(logits * 1, (5, 3))
    assert view.shape == (5, 3) and not view._is_view() and torch.equal(view.flatten(), logits.flatten())


# ---- nothing private elsewhere ----

OURS = {"_equipoise", "_equipoise_base", "_equipoise_held"}
OF_EVERYBODY = {  # the tables of a module, methods that a subclass overrides, those of a namedtuple
    *(
        "_buffers",
        "_parameters",
        "_modules",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_apply",
        "_load_from_state_dict",
        "_replace",
    )
}


def _private_attributes_of_torch(source):
    """Attributes with a leading underscore, but those that the source gives to its own objects."""
    tree = ast.parse(source)
    ours = {
        node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"))
    }
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    return {name for name in found - ours - OURS - OF_EVERYBODY if not name.startswith("__")}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_private_names_and_stack_frames_stand_in_one_module(path):
    allowed = {
        "torch_internals.py": None,
        "integrations/trainer/stack.py": {"_getframe"},
        # of one tested version of a framework; its own tests notice if they are gone
        "integrations/automodel/recipe.py": {"_dp_allreduce", "_get_dp_group_size"},
        "integrations/automodel/routers.py": {"_cumulative_expert_load"},
        "integrations/torchtitan/config.py": {"_owner"},
    }
    allowed = allowed.get(str(path.relative_to(SRC)), set())
    if allowed is not None:
        assert _private_attributes_of_torch(path.read_text(encoding="utf-8")) <= allowed


def test_the_check_of_private_names_can_fail():
    source = "class A:\n def _f(self): self._x = torch._C._y; return self._f(), router._buffers, torch.x._world"
    assert _private_attributes_of_torch(source) == {"_C", "_y", "_world"}


# ---- Dynamo: nothing is thrown away, nothing stays ----


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


@pytest.fixture
def no_owner(monkeypatch):
    """As if no model of another test were attached."""
    gc.collect()
    monkeypatch.setattr(torch_internals, "_num_owners", 0)
    with torch._dynamo.config.patch({OPTION: False}):
        yield


def _option():
    return getattr(torch._dynamo.config, OPTION)


def test_the_option_of_dynamo_is_on_while_a_model_is_steered_by_the_mode(no_owner):
    first, second = attach(tiny_lm(), "loss-free"), attach(tiny_lm(), "frozen")
    assert _option() is True
    first.detach()
    first.detach()
    assert _option() is True, "the other is attached still"
    second.detach()
    assert _option() is False
    slots = models.family("glm4_moe", layers=1)
    balance = attach(slots, "loss-free")
    assert _option() is False, "steered by slots"
    balance.detach()


def test_the_option_ends_with_a_model_that_nobody_detaches(no_owner):
    model = tiny_lm()
    attach(model, "frozen")  # the model alone holds what steers it
    gc.collect()
    assert _option() is True
    del model
    gc.collect()
    assert _option() is False


@pytest.mark.parametrize("value", [True, False])
def test_the_option_of_the_user_is_as_it_was(value, no_owner):
    with torch._dynamo.config.patch({OPTION: value}):
        attach(tiny_lm(), "loss-free").detach()
        assert _option() is value
        balance = attach(tiny_lm(), "loss-free")
        setattr(torch._dynamo.config, OPTION, False)  # since attach
        balance.detach()
        assert _option() is False


class _Around(nn.Module):
    def __init__(self, model, breaks):
        super().__init__()
        self.model, self.breaks = model, breaks

    def forward(self, ids, mask):
        if self.breaks:
            torch._dynamo.graph_break()
        return self.model(ids, mask) * 1


def _compiled(form, model):
    """What is called, and what is attached."""
    if form == "blocks":
        for block in model.blocks:
            block.compile(backend="aot_eager")
        return model, model
    if form == "in place":
        model.compile(backend="aot_eager")
        return model, model
    if form == "a function":
        return torch.compile(lambda ids, mask: model(ids, mask) * 1, backend="aot_eager"), model
    wrapped = {"the model": model, "around": _Around(model, False), "around, broken": _Around(model, True)}[form]
    compiled = torch.compile(wrapped, backend="aot_eager")
    return compiled, compiled


@pytest.mark.parametrize("form", ["the model", "in place", "blocks", "a function", "around", "around, broken"])
def test_graphs_from_before_attach_and_after_detach_are_not_run_on(form, fresh_dynamo):
    """Dynamo guards a router's class. So no graph is thrown away, and most are taken up when it is attached again."""
    model, mask = tiny_lm(), torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    call, attached = _compiled(form, model)
    before = call(_ids(), mask)
    is_guarded_by_hooks = form in ("a function", "around", "around, broken")  # ours are in the graph
    for attempt in range(3):
        balance = attach(attached, "loss-free:rate=0.5,rule=sign+lbl")
        for _ in range(2):
            torch._dynamo.config.error_on_recompile = attempt > 0 and not is_guarded_by_hooks
            (call(_ids(), mask) + balance.loss()).backward()
            balance.step()
            assert [int(load.sum()) for load in balance.load.values()] == [2 * 11] * 2
        balance.detach()
        model.blocks[0].gate.e_score_correction_bias.zero_()
        assert torch.equal(call(_ids(), mask), before)


def test_graphs_of_others_are_kept(fresh_dynamo):
    other = torch.compile(nn.Linear(3, 3), backend="aot_eager")
    other(torch.ones(1, 3))
    model = torch.compile(tiny_lm(), backend="aot_eager")
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    attach(model, "loss-free")  # compiled and never called
    model(_ids())
    attach(tiny_lm(), "loss-free")
    torch._dynamo.config.error_on_recompile = True
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    other(torch.ones(1, 3))
    model(_ids())
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames


def test_attach_without_a_mode_does_not_load_dynamo():
    import subprocess

    code = (
        "import sys, torch; from equipoise.nn import MoE; import equipoise\n"
        "equipoise.attach(torch.nn.Sequential(MoE(4, 4, 4, 2)), 'loss-free+lbl')\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# ---- CUDA graphs ----


@pytest.mark.parametrize("name", ["tap", "tap_backward"])
def test_no_cuda_graph_may_hold_an_operator_of_ours(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.equipoise, name).default.tags
