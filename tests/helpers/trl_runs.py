"""Small trainings under the trainers of TRL, and the gradient of their balancing loss in float64, by plain autograd."""

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from models import family
from torch import Tensor, nn
from transformers import TrainerCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

datasets.disable_progress_bars()

COEFFICIENT, ACCUMULATED, BATCH = 0.5, 2, 2
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(a + b for a in "abcdefghij" for b in "aeiou")]


def tokenizer() -> Any:
    by_word = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    by_word.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=by_word, **special)


def text(number: int, length: int) -> str:
    return " ".join(WORDS[4 + (7 * number + 3 * i + i * i) % 50] for i in range(length))


def rows(kind: str, number: int) -> Any:
    """A dataset for a trainer. Texts have 3 to 11 words, so every batch is padded."""
    lengths = [3 + (5 * index) % 9 for index in range(number)]
    texts = [text(index, length) for index, length in enumerate(lengths)]
    others = [text(index + 50, 2 + (3 * index) % 7) for index in range(number)]
    prompts = [text(index + 90, 2 + index % 4) for index in range(number)]
    if kind == "sft":
        data = [{"text": one} for one in texts]
    elif kind in ("grpo", "rloo"):
        data = [{"prompt": one} for one in prompts]
    else:
        data = [
            {"prompt": prompt + " ", "chosen": one, "rejected": other}
            for prompt, one, other in zip(prompts, texts, others, strict=True)
        ]
        if kind == "kto":
            data = [
                {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}
                for index, row in enumerate(data)
            ]
        if kind == "reward":
            data = [
                {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in data
            ]
    return datasets.Dataset.from_list(data)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(completion.split())) + 0.1 * index for index, completion in enumerate(completions)]


ROLLOUTS = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6)
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, dict(max_length=16)),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, dict(max_length=16)),
    "kto": (trl.KTOTrainer, trl.KTOConfig, dict(max_length=16)),
    "reward": (trl.RewardTrainer, trl.RewardConfig, dict(max_length=16)),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, ROLLOUTS),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, ROLLOUTS),
}


def model_for(kind: str, **options: Any) -> nn.Module:
    model = _model_for(kind, **options)
    model.config._experts_implementation = "eager"  # the others have no float64
    return model


def _model_for(kind: str, name: str = "qwen3_moe", **options: Any) -> nn.Module:
    if kind != "reward":
        return family(name, **options)
    config = family(name, num_labels=1, **options).config
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).train()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.3)
    return model


def make_trainer(
    kind: str, model: nn.Module, callbacks: Sequence[Any], folder: Any, *, number: int = 16, **options: Any
) -> Any:
    trainer, config, own = TRAINERS[kind]
    more = {
        key: options.pop(key)
        for key in ("eval_dataset", "peft_config", "ref_model", "compute_loss_func")
        if key in options
    }
    standard: dict[str, Any] = dict(
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        max_steps=2,
        seed=0,
    )
    if kind != "reward":
        standard["router_aux_loss_coef"] = 0.0
    args = config(str(folder), **(standard | own | options))
    if kind in ("grpo", "rloo"):
        more["reward_funcs"] = reward
    is_adapted = hasattr(type(model), "get_base_model") or "peft_config" in more  # it is its own reference
    if kind in ("dpo", "kto") and not is_adapted:
        more.setdefault("ref_model", copy.deepcopy(model).eval())
    if kind == "grpo" and args.beta and not is_adapted:  # it loads its reference
        model.config._name_or_path = f"{folder}/reference"
        copy.deepcopy(model).save_pretrained(model.config._name_or_path)
    return trainer(
        model=model,
        args=args,
        train_dataset=rows(kind, number),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **more,
    )


def train(
    kind: str, model: nn.Module, callbacks: Sequence[Any], folder: Any = None, *, resume: Any = None, **options: Any
) -> Any:
    """Trains, and returns the trainer."""
    with (
        tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as output_dir,
        warnings.catch_warnings(),
        open(os.devnull, "w") as sink,
        contextlib.redirect_stdout(sink),
    ):
        warnings.simplefilter("ignore")
        trainer = make_trainer(kind, model, callbacks, output_dir, **options)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


class Watch(TrainerCallback):
    """Records by step: the gradient, the biases, the load, and with what the model was called to be trained."""

    def __init__(self, callback: Any = None):
        self.callback = callback
        self.gradients: list[dict[str, Tensor]] = []
        self.biases: list[dict[str, Tensor]] = []
        self.load: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []  # before the step
        self.batches: list[list[dict[str, Any]]] = [[]]
        self.calls: list[tuple[bool, bool]] = []  # of the base model: in training mode, with gradients

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        base = model.get_base_model() if hasattr(type(model), "get_base_model") else model

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.calls.append((module.training, torch.is_grad_enabled()))
            if module.training and torch.is_grad_enabled():
                self.batches[-1].append({k: v for k, v in kwargs.items() if isinstance(v, Tensor)})

        base.register_forward_pre_hook(note, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.state_dict().items()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches.append([])
        if self.callback is not None and self.callback.balance is not None:
            self.biases.append(self.callback.balance.biases)
            self.load.append(self.callback.balance.load)


# ---- the reference: plain autograd over the whole model in float64, and plain loops ----


def route(model: nn.Module, batch: dict[str, Tensor], biases: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """By layer of a Qwen3-MoE: the probabilities of the unmasked tokens with their graph, and the counts."""
    routers = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    logits: dict[str, Tensor] = {}

    def note_and_steer(name: str, router: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits[name] = output[0]
        if biases is None:
            return None
        scores = output[0].softmax(-1)  # later layers see what the biased choice computes
        ids = (scores + biases[name]).topk(router.top_k).indices
        weights = scores.gather(-1, ids)
        return output[0], weights / weights.sum(-1, keepdim=True) if router.norm_topk_prob else weights, ids

    hooks = [
        router.register_forward_hook(lambda m, a, out, name=name: note_and_steer(name, m, out))
        for name, router in routers.items()
    ]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1) == 1
    routed = {}
    for name, router in routers.items():
        probabilities = logits[name].reshape(mask.numel(), -1).double().softmax(-1)[mask]
        chosen_by = probabilities if biases is None else probabilities + biases[name].double()
        counts = [0] * probabilities.shape[-1]
        for token in chosen_by.tolist():
            for expert in sorted(range(len(token)), key=lambda e: -token[e])[: router.top_k]:
                counts[expert] += 1
        routed[name] = probabilities, counts
    return routed


def by_sign(counts: dict[str, list[int]], biases: dict[str, Tensor], rate: float = 1e-2) -> dict[str, list[float]]:
    """The rule of Loss-Free Balancing by plain loops: signs, less their mean."""
    moved = {}
    for name, load in counts.items():
        mean = sum(load) / len(load)
        signs = [(mean > number) - (mean < number) for number in load]
        moved[name] = [
            float(b) + rate * (s - sum(signs) / len(signs)) for b, s in zip(biases[name], signs, strict=True)
        ]
    return moved


def balancing_gradient(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], weights: Sequence[float], coefficient: float = COEFFICIENT
) -> dict[str, Tensor]:
    """The gradient of ``sum_m weight_m coefficient sum_layers E sum_e f_e P_e``; f is counted up to micro-batch m."""
    total: Any = 0.0
    so_far: dict[str, list[int]] = {}
    for batch, weight in zip(batches, weights, strict=True):
        for name, (probabilities, counts) in route(model, batch).items():
            before = so_far.get(name, [0] * len(counts))
            so_far[name] = [one + other for one, other in zip(before, counts, strict=True)]
            share = torch.tensor(so_far[name], dtype=torch.float64) / sum(so_far[name])
            total = total + weight * coefficient * len(counts) * (share * probabilities.mean(0)).sum()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


def label_tokens(batch: dict[str, Tensor]) -> int:
    """The labels of a causal language model, which shifts them. Without labels: every token is one."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return sum(label != -100 for row in labels.tolist() for label in row[1:])


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name].double() - other[name].double() for name in one}
