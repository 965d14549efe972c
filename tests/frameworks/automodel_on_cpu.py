"""Automodel's recipe on a CPU with gloo: a tiny YAML file, and what has to be replaced for that.

Replaced are, where Automodel asks for a CUDA device without looking whether there is one:

- ``torch.compiler.set_stance("force_eager")
torch.cuda.reset_peak_memory_stats``, which torch for CPUs has not, and ``torch.cuda.current_device``;
- the device that the recipe, and ``NeMoAutoModelForCausalLM.from_config``, place batches, weights and buffers on;
- the device that DeepSeek-V3 makes its buffers on.

Small functions that Automodel compiles run uncompiled, which saves each process ten seconds. Under ``strategy: ddp``
the weights are initialised here: ``from_config`` of Automodel leaves them as the memory was.

All else is Automodel's own: config, data, model, FSDP2, steps, optimizer, checkpoints, logs.
"""

import dataclasses
from pathlib import Path
from typing import Any

import nemo_automodel._transformers.auto_model as auto_model
import nemo_automodel.recipes.llm.train_ft as train_ft
import torch
import yaml
from frameworks.automodel_models import BACKEND, gates_of, plain_name, whole
from frameworks.float64 import MicroBatch
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from torch.nn.parallel import DistributedDataParallel
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from equipoise.integrations.automodel.recipe import BalancedRecipe

YAML = Path(__file__).with_name("automodel_recipe.yaml")
CPU = torch.device("cpu")


def _with_cpu(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **{**kwargs, "device": CPU})


_initialize_weights, _initialize_distributed = DeepseekV3ForCausalLM.initialize_weights, train_ft.initialize_distributed
torch.compiler.set_stance("force_eager")
torch.cuda.reset_peak_memory_stats, torch.cuda.current_device = lambda: None, lambda: 0
auto_model.instantiate_infrastructure = _with_cpu(auto_model.instantiate_infrastructure)
auto_model.apply_model_infrastructure = _with_cpu(auto_model.apply_model_infrastructure)
train_ft.initialize_distributed = lambda *args, **kwargs: dataclasses.replace(
    _initialize_distributed(*args, **kwargs), device=CPU
)
DeepseekV3ForCausalLM.initialize_weights = lambda self, buffer_device=None, dtype=torch.bfloat16: _initialize_weights(
    self, CPU, dtype
)


# ---- a run of the recipe ----


class _Watched:
    """Notes by step what a recipe trained on, and what came out.

    ``spread``: a factor on the weights of the gates, so that the scores of experts differ from the beginning.
    """

    spread = 20.0

    def load_checkpoint(self, restore_from=None):
        (model,) = self.model_parts
        if isinstance(model, DistributedDataParallel):
            torch.manual_seed(0)
            model.module.initialize_weights(CPU, torch.float32)
        for gate in gates_of(model).values():
            with torch.no_grad():
                gate.weight.mul_(self.spread)
        self.initial = {name_of(name): whole(value).clone() for name, value in model.state_dict().items()}
        self.steps, self.gradients, self.loads, self.biases, self.metrics = [], [], [], [], []
        self.optimizer[-1].register_step_pre_hook(self._note_gradients)
        super().load_checkpoint(restore_from)

    def _note_gradients(self, *_):
        parameters = self.model_parts[0].named_parameters()
        self.gradients.append({name_of(name): whole(p.grad).clone() for name, p in parameters if p.grad is not None})

    def _run_train_optim_step(self, batches, max_grad_norm=None):
        self.steps.append([micro_batch_of(batch) for batch in batches])
        sample = super()._run_train_optim_step(batches, max_grad_norm)
        self.metrics.append(sample.metrics)
        if hasattr(self, "balance"):
            self.loads.append({name_of(name): load for name, load in self.balance.load.items()})
            self.biases.append({name_of(name): bias for name, bias in self.balance.biases.items()})
        return sample


class Balanced(_Watched, BalancedRecipe):
    """By ``balance`` of the YAML file."""


class Plain(_Watched, TrainFinetuneRecipeForNextTokenPrediction):
    """Automodel's own, without equipoise."""


def name_of(name):
    """Of a parameter or layer in the plain model."""
    return plain_name(name).removeprefix("module.")


def micro_batch_of(batch):
    ids, mask = batch["input_ids"].clone(), ~batch["padding_mask"]
    return MicroBatch(ids, mask, torch.arange(len(ids))[:, None].expand_as(ids))


def trained(folder, *arguments, recipe_class=Balanced, file=YAML, **attributes):
    """A recipe that ran by its own path from the YAML file and these arguments of the command line."""
    config = parse_args_and_load_config(str(file), argv=["--checkpoint.checkpoint_dir", str(folder), *arguments])
    recipe = type(recipe_class.__name__, (recipe_class,), attributes)(config)
    recipe.setup()
    recipe.run_train_validation_loop()
    return recipe


def changed_yaml(folder, **sections):
    """A YAML file like ours, with these sections; None leaves one out."""
    config = yaml.safe_load(YAML.read_text(encoding="utf-8"))
    config["checkpoint"]["checkpoint_dir"] = str(folder)
    config = {name: section for name, section in (config | sections).items() if section is not None}
    file = Path(folder) / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def initial_model(recipe):
    """Its model before the first step, on this rank and not attached."""
    return model_with(recipe.initial)


def model_with(weights):
    sizes = yaml.safe_load(YAML.read_text(encoding="utf-8"))["model"]["config"]
    config = DeepseekV3Config(**{name: value for name, value in sizes.items() if name != "_target_"})
    model = DeepseekV3ForCausalLM(config, backend=BackendConfig(**BACKEND, enable_hf_state_dict_adapter=False))
    model.initialize_weights(CPU, torch.float32)
    model.load_state_dict(weights)
    return model.train()


def rows_of_frequent_and_rare_tokens(num_rows, length=12, vocabulary=32):
    """Rows without padding; labels stand one token ahead, as Automodel's own data sets have them."""
    shares = (1 / torch.arange(1, vocabulary + 1)).expand(num_rows, -1)
    rows = torch.multinomial(shares, length + 1, True, generator=torch.Generator().manual_seed(5)).tolist()
    return [{"input_ids": row[:-1], "labels": row[1:], "attention_mask": [1] * length} for row in rows]
