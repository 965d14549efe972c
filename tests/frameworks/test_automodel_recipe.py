"""NeMo Automodel 0.7.0: its recipe, by its own path from a YAML file, balanced."""

import json
import runpy
import sys
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from frameworks.automodel_models import expected, gates_of, make_model, make_steps
from frameworks.automodel_on_cpu import Plain, changed_yaml, initial_model, model_with, trained
from frameworks.automodel_recipe_ranks import train_rank
from frameworks.float64 import errors
from nemo_automodel.cli import app
from nemo_automodel.cli.utils import resolve_recipe_name
from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.components.distributed.config import FSDP2Config, MegatronFSDPConfig
from nemo_automodel.components.launcher.interactive import resolve_recipe_cls
from nemo_automodel.recipes.llm.kd import KnowledgeDistillationRecipeForNextTokenPrediction
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.recipes.llm.train_seq_cls import TrainFinetuneRecipeForSequenceClassification
from pages import ROOT, blocks
from ranks import run_on_ranks

import equipoise
from equipoise import EquipoiseError, LoadBalancingLoss, UsageError
from equipoise.integrations.automodel import balanced
from equipoise.integrations.automodel import recipe as recipe_module

RATE = 0.02  # moves choices of this small model
BIAS = f"loss-free:rate={RATE},rule=sign,center=false"


# Sentences of 15 tokens and an end.
EVEN = ["--dataset.mean_len=100", "--dataset.std_len=0"]


def with_loss(scope):
    return f"{BIAS}+lbl:scope={scope},coefficient=10"


def is_router(name):
    return name.endswith("gate.weight")


def assert_counts_and_biases(loads, all_biases, windows):
    assert len(loads) == len(windows)
    for load, biases, window in zip(loads, all_biases, windows, strict=True):
        for name, counts in window.loads.items():
            assert torch.equal(load[name], counts)
            torch.testing.assert_close(biases[name].double(), window.biases[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_accumulation_with_uneven_padding(scope, tmp_path):
    recipe, plain = (trained(tmp_path, f"--balance={strategy}") for strategy in (with_loss(scope), BIAS))
    windows = expected(initial_model(recipe), [recipe.steps], RATE, scope=scope, function="sigmoid")
    assert_counts_and_biases(recipe.loads, recipe.biases, windows)
    num_tokens = [[int(part.mask.sum()) for part in step] for step in recipe.steps]
    assert sum(first != second for first, second in num_tokens) >= 2, num_tokens
    assert [metrics["balance/tokens"] for metrics in recipe.metrics] == [sum(numbers) for numbers in num_tokens]
    for distances in errors(recipe.gradients, plain.gradients, windows, is_router):
        assert max(distances) < 1e-6


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_counts_once(kind, tmp_path):
    option = f"--distributed.activation_checkpointing={kind}"
    recipe, plain = (
        trained(tmp_path, option, f"--balance={strategy}") for strategy in (with_loss("global_batch"), BIAS)
    )
    assert any("_checkpoint_wrapped_module" in name for name, _ in recipe.model_parts[0].named_parameters())
    windows = expected(initial_model(recipe), [recipe.steps], RATE, scope="global_batch", function="sigmoid")
    assert_counts_and_biases(recipe.loads, recipe.biases, windows)
    assert max(errors(recipe.gradients, plain.gradients, windows, is_router)[0]) < 1e-6


# ---- checkpoints ----

SAVED = ["--checkpoint.enabled=true", "--step_scheduler.ckpt_every_steps=3", "--optimizer.lr=0.01"]
MOMENTUM = "loss-free:rate=0.02,rule=momentum+lbl:scope=global_batch,coefficient=0.1,pooling=previous"


def saved(folder, steps, *arguments, **options):
    return trained(folder, *SAVED, f"--step_scheduler.max_steps={steps}", *arguments, **options)


def assert_equal_bit_for_bit(ours, other):
    if isinstance(ours, dict):
        assert ours.keys() == other.keys()
        for name in ours:
            assert_equal_bit_for_bit(ours[name], other[name])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(other)
        for one, another in zip(ours, other, strict=True):
            assert_equal_bit_for_bit(one, another)
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == other.dtype and torch.equal(ours, other)
    else:
        assert ours == other


@pytest.mark.parametrize("factor", [1e-3, 0.0])
def test_a_resumed_run_is_the_run_itself(factor, tmp_path):
    """Weights, biases, momenta and the last load. A gate without a factor has no bias among its weights."""
    arguments = [f"--balance={MOMENTUM}", f"--model.moe_overrides.gate_bias_update_factor={factor}"]
    whole_run = saved(tmp_path / "whole", 6, *arguments)
    first = saved(tmp_path / "parts", 3, *arguments)
    rest = saved(tmp_path / "parts", 6, *arguments)
    assert [len(first.steps), len(rest.steps), rest.balance.num_windows] == [3, 3, 6]
    for name in ("loads", "biases", "gradients"):
        assert_equal_bit_for_bit(getattr(rest, name), getattr(whole_run, name)[3:])
    assert_equal_bit_for_bit(rest.balance.state_dict(), whole_run.balance.state_dict())
    assert_equal_bit_for_bit(rest.model_parts[0].state_dict(), whole_run.model_parts[0].state_dict())
    assert any(bias.any() for bias in rest.balance.biases.values())
    assert rest._see.__self__.num_seen == 6  # so that alerts know how many steps are left
    rest.load_checkpoint()  # a second time, into the same balance
    assert_equal_bit_for_bit(rest.balance.state_dict(), whole_run.balance.state_dict())


def test_a_checkpoint_of_a_plain_recipe_is_resumed_with_a_warning(tmp_path, caplog):
    plain = saved(tmp_path, 3, recipe_class=Plain)
    biases = {name: gate.e_score_correction_bias.clone() for name, gate in gates_of(plain.model_parts[0]).items()}
    recipe = saved(tmp_path, 6)
    assert "has none, so it was saved by a recipe that did not balance" in caplog.text
    assert [len(recipe.steps), recipe.balance.num_windows] == [3, 3]
    for name, bias in biases.items():
        multiples = (recipe.biases[0][name] - bias) / RATE  # its biases are the start
        assert bias.any()
        torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-5)
    assert saved(tmp_path, 7).balance.num_windows == 4  # its own checkpoints have the state


# ---- two ranks ----

TYPES = ("param_dtype", "reduce_dtype", "output_dtype")
FLOAT32 = [f"--distributed.mp_policy.{name}=float32" for name in TYPES]  # of FSDP2; Automodel's own is bfloat16
CASES = {
    "fsdp2": FLOAT32,
    "expert parallel, recomputed": [*FLOAT32, "--distributed.ep_size=2", "--distributed.activation_checkpointing=true"],
    "ddp": ["--distributed.strategy=ddp"],
}


def test_two_ranks_with_unequal_tokens(tmp_path):
    strategies = [with_loss("global_batch"), BIAS]
    saved = [*SAVED, "--step_scheduler.ckpt_every_steps=2", f"--balance={MOMENTUM}"]
    resumed = {"fsdp2": saved, "expert parallel": [*saved, "--distributed.ep_size=2"]}
    ranks = run_on_ranks(2, train_rank, str(tmp_path), CASES, strategies, resumed)
    for rank in ranks:
        assert not isinstance(rank, str), rank
        assert rank[1] == {
            "fsdp2": {("DTensor", "Tensor")},
            "expert parallel, recomputed": {("DTensor", "DTensor")},
            "ddp": {("Parameter", "Tensor")},
        }
        assert rank[2].keys() == resumed.keys()
        for whole_run, rest in rank[2].values():
            assert_equal_bit_for_bit(rest, whole_run)
    for case in CASES:
        results = [rank[0][case, strategies[0]] for rank in ranks]
        steps, model = [result["steps"] for result in results], model_with(results[0]["initial"])
        windows = expected(model, steps, RATE, scope="global_batch", function="sigmoid")
        num_tokens = [[sum(int(part.mask.sum()) for part in step) for step in of_rank] for of_rank in steps]
        assert num_tokens[0] != num_tokens[1]
        for rank, result in zip(ranks, results, strict=True):
            assert_counts_and_biases(result["loads"], result["biases"], windows)
            plain = rank[0][case, strategies[1]]
            distances = errors(result["gradients"], plain["gradients"], windows, is_router)[0]
            print(case, distances)
            assert max(distances) < 1e-6
            logged = [metrics["balance/tokens"] for metrics in result["metrics"]]
            assert logged == [sum(numbers) for numbers in zip(*num_tokens, strict=True)]


# ---- Automodel's own balancing ----


def test_its_own_update_moves_nothing_beside_a_bias_of_ours(tmp_path):
    recipe = trained(tmp_path)
    (model,) = recipe.model_parts
    for name, gate in gates_of(model).items():
        assert torch.equal(gate.e_score_correction_bias, recipe.biases[-1][name]) and gate.bias_update_factor == 0
    model.update_moe_gate_bias()
    for gate in gates_of(model).values():
        gate.update_bias()
    assert_equal_bit_for_bit(
        {name: gate.e_score_correction_bias for name, gate in gates_of(model).items()}, recipe.biases[-1]
    )
    recipe.balance.detach()
    assert all(gate.bias_update_factor == 1e-3 for gate in gates_of(model).values())


def test_none_counts_and_leaves_its_own_update(tmp_path):
    recipe, plain = trained(tmp_path, "--balance=none"), trained(tmp_path, recipe_class=Plain)
    bias_ours, bias_plain = (
        {name: gate.e_score_correction_bias for name, gate in gates_of(run.model_parts[0]).items()}
        for run in (recipe, plain)
    )
    assert all(bias.any() for bias in bias_ours.values())
    assert_equal_bit_for_bit(bias_ours, bias_plain)
    assert_equal_bit_for_bit(recipe.gradients[-1], plain.gradients[-1])


def test_the_loss_weighs_as_its_own_if_all_micro_batches_are_equal(tmp_path):
    """Its own is a mean over micro-batches, ours over tokens. Its softmax scores are ours."""
    gate = ["--model.moe_overrides.score_func=softmax", "--model.moe_overrides.softmax_before_topk=true"]
    gate += ["--model.moe_overrides.gate_bias_update_factor=0.0", "--step_scheduler.max_steps=2", *EVEN]
    ours = trained(tmp_path, *gate, "--balance=lbl:scope=micro_batch,coefficient=1")
    automodels = trained(tmp_path, *gate, "--model.moe_overrides.aux_loss_coeff=1.0", recipe_class=Plain)
    without = trained(tmp_path, *gate, recipe_class=Plain)
    for number in range(2):
        for name in without.gradients[number]:
            its_own = automodels.gradients[number][name] - without.gradients[number][name]
            difference = ours.gradients[number][name] - automodels.gradients[number][name]
            assert difference.norm() <= 1e-5 * its_own.norm() + 1e-7 * automodels.gradients[number][name].norm()
        assert (automodels.gradients[number]["model.layers.0.mlp.gate.weight"] != 0).any()


def test_its_own_loss_is_refused_beside_ours(tmp_path):
    arguments = ["--model.moe_overrides.aux_loss_coeff=0.01", "--balance=lbl"]
    with pytest.raises(EquipoiseError, match=r"nemo-automodel 0.7.0 adds its own .* \(aux_loss_coeff=0.01\)"):
        trained(tmp_path, *arguments)


# ---- evaluation, logs, the paths by which it is started ----

VALIDATION = {"_target_": "nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset", "num_sentences": 8}


def test_validation_is_not_counted(tmp_path):
    file = changed_yaml(tmp_path, validation_dataset={**VALIDATION, "vocab_size": 32, "max_sentence_len": 15})
    evaluated = trained(tmp_path, "--step_scheduler.val_every_steps=1", file=file)
    recipe = trained(tmp_path)
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 3
    for name in ("loads", "biases"):
        assert_equal_bit_for_bit(getattr(evaluated, name), getattr(recipe, name))
    assert evaluated.balance.num_windows == 3


def test_metrics_are_logged_beside_those_of_the_recipe(tmp_path):
    recipe = trained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line, load in zip(lines, recipe.loads, strict=True):
        violations = [float(counts.max() / counts.double().mean()) - 1 for counts in load.values()]
        assert line["balance/maxvio_batch"] == pytest.approx(sum(violations) / 2)
        assert line["loss"] > 0 and "balance/collectives" not in line


@pytest.mark.parametrize(("max_steps", "num_epochs", "num_steps"), [(3, 100, 3), (1_000_000, 1, 8)])
def test_a_rate_that_is_too_small_for_the_steps_is_said(max_steps, num_epochs, num_steps, tmp_path, caplog):
    length = [f"--step_scheduler.max_steps={max_steps}", f"--step_scheduler.num_epochs={num_epochs}"]
    recipe = trained(tmp_path, "--balance=loss-free:rate=1e-6", *length)
    assert len(recipe.steps) == num_steps
    assert f"In {num_steps} steps at rate 1e-06 a bias moves by at most" in caplog.text


def test_a_diverged_loss_is_said(tmp_path, caplog):
    trained(tmp_path, "--optimizer.lr=1e30")
    assert "equipoise" in {record.name for record in caplog.records if "nan: " in record.message}


def test_the_command_of_automodel_runs_it(tmp_path, monkeypatch):
    """As ``torchrun -m nemo_automodel.cli.app``; the command ``automodel`` itself counts GPUs before all else."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(sys, "argv", ["automodel", str(changed_yaml(tmp_path)), "--balance", "quantile"])
    app.main()
    (line, *_) = (tmp_path / "training.jsonl").read_text().splitlines()
    assert json.loads(line)["balance/tokens"] == 64


def test_the_file_of_the_recipe_is_a_program(tmp_path, monkeypatch):
    """Automodel starts it so on several devices."""
    monkeypatch.setattr(sys, "argv", [recipe_module.__file__, "-c", str(changed_yaml(tmp_path))])
    runpy.run_path(recipe_module.__file__, run_name="__main__")
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 3


def test_balanced_takes_a_recipe_class(tmp_path):
    recipe_class = balanced(TrainFinetuneRecipeForNextTokenPrediction, "quantile", LoadBalancingLoss(1e-2))
    config = parse_args_and_load_config(str(changed_yaml(tmp_path, balance=None)), argv=[])
    recipe = recipe_class(config)
    recipe.setup()
    recipe.run_train_validation_loop()
    assert recipe.balance.strategy.startswith("quantile+lbl") and recipe.balance.num_windows == 3
    config = parse_args_and_load_config(str(changed_yaml(tmp_path)), argv=["--balance", "none"])
    assert recipe_class(config).balancers == []


# ---- refusals ----


def test_what_is_not_supported_is_refused(tmp_path):
    recipe = Namespace(mesh_context=Namespace(cp_size=1, tp_size=1), pp_enabled=False, distributed_config=FSDP2Config())
    recipe_module._check_supported(recipe)
    for path, value, reason in [
        ("pp_enabled", True, "pp_size must be 1"),
        ("mesh_context", Namespace(cp_size=2, tp_size=1), "cp_size must be 1"),
        ("mesh_context", Namespace(cp_size=1, tp_size=2), "tp_size must be 1"),
        ("distributed_config", MegatronFSDPConfig(), "must be fsdp2 or ddp: got MegatronFSDPConfig"),
    ]:
        with pytest.raises(UsageError, match=reason):
            recipe_module._check_supported(Namespace(**{**vars(recipe), path: value}))


def test_mistakes_are_refused(tmp_path):
    plain_class = TrainFinetuneRecipeForNextTokenPrediction
    with pytest.raises(UsageError, match="no section balance"):
        trained(tmp_path, file=changed_yaml(tmp_path, balance=None))
    with pytest.raises(UsageError, match="did you mean|Did you mean"):
        trained(tmp_path, "--balance=lossfree")
    with pytest.raises(UsageError, match="balanced once: BalancedRecipe is already"):
        balanced(recipe_module.BalancedRecipe, "loss-free")
    with pytest.raises(UsageError, match="KnowledgeDistillation.* has its own _run_train_optim_step"):
        balanced(KnowledgeDistillationRecipeForNextTokenPrediction, "loss-free")
    for wrong in (TrainFinetuneRecipeForSequenceClassification, plain_class.__new__(plain_class), "recipe"):
        with pytest.raises(TypeError, match="must be TrainFinetuneRecipeForNextTokenPrediction or a subclass"):
            balanced(wrong, "loss-free")


def test_padding_that_a_batch_does_not_show_is_said(tmp_path, caplog, monkeypatch):
    """The weight of the loss would be too small, by the share of the padding."""
    monkeypatch.setattr(recipe_module, "_num_counted", lambda batch: batch["labels"].numel())
    trained(tmp_path, f"--balance={with_loss('micro_batch')}")
    said = [record.message for record in caplog.records if "the balancing loss weighs" in record.message.lower()]
    assert len(said) == 1


# ---- training ----


def test_the_load_evens_out_in_fifty_steps(tmp_path):
    sizes = {"local_batch_size": 16, "global_batch_size": 16, "max_steps": 50, "ckpt_every_steps": 50}
    data = {"_target_": "frameworks.automodel_on_cpu.rows_of_frequent_and_rare_tokens", "num_rows": 800}
    file = changed_yaml(tmp_path, step_scheduler=sizes, dataset=data)
    arguments = ["--optimizer.lr=3e-3", "--model.moe_overrides.gate_bias_update_factor=0"]  # else Automodel balances
    maxvio = {}
    for strategy in ("none", "loss-free:rate=0.02", "lbl:scope=global_batch,coefficient=0.1"):
        recipe = trained(tmp_path, f"--balance={strategy}", *arguments, file=file, spread=5)
        violations = [metrics["balance/maxvio_batch"] for metrics in recipe.metrics]
        losses = [metrics["loss"] for metrics in recipe.metrics]
        maxvio[strategy] = (sum(violations[:5]) / 5, sum(violations[-10:]) / 10)
        assert len(recipe.steps) == 50 and losses[-1] < 0.9 * losses[0]
    print(maxvio)
    none, *balanced_ones = (last for _, last in maxvio.values())
    assert max(balanced_ones) < 0.65 * none, maxvio


# ---- the page ----


def test_the_page_runs(tmp_path):
    page = ROOT / "docs/how-to/automodel.md"
    (section,) = [yaml.safe_load(block.code) for block in blocks(page) if block.language == "yaml"]
    assert resolve_recipe_cls(resolve_recipe_name(section["recipe"])) is recipe_module.BalancedRecipe
    assert section["balance"] == "loss-free:rate=1e-3"
    assert trained(tmp_path, file=changed_yaml(tmp_path, **section)).balance.rate == 1e-3
    model = make_model()
    parts = [part for step in make_steps([[[12, 5], [9, 2]], [[3, 12], [12, 7]]]) for part in step]
    micro_batches = [(part.ids, torch.where(part.mask, part.ids, -100), ~part.mask) for part in parts]
    namespace = {
        "cfg": parse_args_and_load_config(str(changed_yaml(tmp_path, balance=None)), argv=[]),
        "equipoise": equipoise,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "steps": [micro_batches[:2], micro_batches[2:]],
        "all_reduced": float,
        "num_ranks": 1,
        "F": torch.nn.functional,
        "ModelState": ModelState,
        "dcp": dcp,
        "folder": tmp_path / "saved",
    }
    codes = [block.code for block in blocks(page) if block.language == "py"]
    assert len(codes) == 3
    for code in codes:
        exec(code, namespace)
    assert namespace["recipe"].balance.num_windows == 3
    assert namespace["balance"].num_windows == 2 and namespace["balance"].metrics()["tokens"] == 34
