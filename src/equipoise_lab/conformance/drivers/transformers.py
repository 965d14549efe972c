"""Transformers: a tiny Qwen3 MoE under its Trainer for the loss; a tiny DeepSeek-V3 where there is a bias."""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult
from equipoise_lab.conformance.drivers.transformers_models import VOCABULARY, model_of


class Transformers(Driver):
    PACKAGE = "transformers"
    INTENDED_USE = {
        "router_aux_loss_coef, output_router_logits": "docs, model_doc/qwen3_moe: Qwen3MoeConfig, and forward's loss",
        "Trainer": "docs, main_classes/trainer: the loss is that of the model; trainer.py, compute_loss, training_step",
        "from_pretrained(dtype=...)": "docs, models: data type; modeling_deepseek_v3.py, _keep_in_fp32_modules_strict",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.capacity or layer.loss in ("sequence", "global_batch"):
            raise NotOffered("a capacity" if layer.capacity else "a loss over sequences or the global batch")
        if layer.loss and (layer.score_function == "sigmoid" or layer.groups):
            raise NotOffered("a loss for sigmoid routers")
        self.layer, self.value_at_balance = layer, layer.k / layer.number  # it is a mean over layers
        self.output: Any = None
        self.hidden, self.chosen = torch.empty(0), torch.empty(0)
        self.model = model_of(layer)
        self._add_hooks()

    def _add_hooks(self) -> None:
        """Gates get the logits of the micro-batch as hidden states."""
        self.gates = [block.mlp.gate for block in self.model.model.layers]
        self.model.register_forward_pre_hook(lambda *_: setattr(self, "hidden", self.to_run.pop(0).logits))
        self.model.register_forward_hook(lambda model, inputs, output: setattr(self, "output", output))
        for number, gate in enumerate(self.gates):
            gate.register_forward_pre_hook(lambda gate, x, n=number: (self.hidden[n].flatten(0, 1).to(x[0]),))
            gate.register_forward_hook(lambda gate, inputs, output: setattr(self, "chosen", output[2]))

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        rows, length = batch.logits.shape[1:3]
        ids = torch.arange(rows * length).reshape(rows, length) % (VOCABULARY - 1) + 1
        mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask
        labels = mask if batch.labels is None else mask & batch.labels
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~labels, -100)}

    def _trainer(self, batches: Sequence[Batch], **options: Any) -> transformers.Trainer:
        self.to_run, data = list(batches), iter(batches)
        arguments = transformers.TrainingArguments(
            tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=1, max_steps=1, learning_rate=0.0,
            max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            gradient_accumulation_steps=len(batches), **options,
        )  # fmt: skip
        places = list(range(len(batches) * arguments.world_size))  # the collator gives this rank's micro-batches
        return transformers.Trainer(self.model, arguments, lambda _: self._inputs(next(data)), places, places[:1])

    def train_step(
        self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
        has_finite_gradients: bool = True,
    ) -> StepResult:  # fmt: skip
        if self.layer.bias_rate:
            raise NotOffered("an update of the bias: a model that has one keeps it as it was loaded")
        kwargs = {} if recompute in (None, "own") else {"use_reentrant": recompute == "reentrant"}
        trainer = self._trainer(batches, gradient_checkpointing=bool(recompute), gradient_checkpointing_kwargs=kwargs)
        gradients: list[Tensor] = []
        trainer.create_optimizer().register_step_pre_hook(
            lambda *_: gradients.extend(gate.weight.grad / self.value_at_balance for gate in self.gates)
        )
        trainer.train()
        aux_loss = self.output.aux_loss
        return StepResult(None if aux_loss is None else float(aux_loss.detach()) / self.value_at_balance, gradients)

    def biases(self) -> list[Tensor]:
        return [gate.e_score_correction_bias for gate in self.gates]

    def choose(self, batch: Batch) -> Tensor:
        self.to_run = [batch]
        self.model.eval()(**self._inputs(batch))
        return self.chosen

    def evaluation_loss(self, batch: Batch) -> float:
        reported = self._trainer([batch]).evaluate()["eval_loss"]
        self.to_run = [batch]
        cross_entropy = self.model(**self._inputs(batch), output_router_logits=False).loss
        return (reported - float(cross_entropy.detach())) / self.value_at_balance

    def cast(self, dtype: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._add_hooks()
