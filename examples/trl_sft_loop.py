"""Supervised fine-tuning with the SFTTrainer of TRL, without balancing and with it.

    python examples/trl_sft_loop.py
    python examples/trl_sft_loop.py --model FOLDER --strategy loss-free:rate=1e-3

Two lines balance: callbacks=[EquipoiseCallback(...)], and router_aux_loss_coef=0.0, which switches off the balancing
loss that TRL would add by itself. Rows are passages of uneven length, from the corpus that is packaged with equipoise.
The balancing loss of a micro-batch weighs by its labels, as TRL weighs its own loss. Without --model a small Qwen3-MoE
over bytes is trained from its random start. The table at the end is about held-out rows. Takes about three quarters of
a minute on one core of a CPU. Needs TRL: pip install trl.
"""

import argparse
import copy
import json
import lzma
import random
from pathlib import Path

import datasets
import transformers
import trl

import equipoise_lab
from equipoise import metrics
from equipoise.integrations import EquipoiseCallback

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
DOMAINS = ("bible_en", "code_py", "law_fr", "math_mm")
LONGEST, HELD_OUT = 160, 64  # characters of a passage; rows


def make_rows(number: int) -> datasets.Dataset:
    """Passages of 80 to 160 characters."""
    passages, lengths = [], random.Random(0)
    for domain in DOMAINS:
        with lzma.open(CORPUS / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
            text = "\n".join(json.loads(line)["text"] for line in lines)
        start = 0
        for _ in range(number // len(DOMAINS)):
            end = start + lengths.randint(LONGEST // 2, LONGEST)
            passages.append(text[start:end])
            start = end
    random.Random(0).shuffle(passages)
    return datasets.Dataset.from_list([{"text": passage} for passage in passages])


def train(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, steps: int, strategy: str
) -> tuple[trl.SFTTrainer, EquipoiseCallback]:
    rows = make_rows(HELD_OUT + 16 * steps)
    arguments = trl.SFTConfig(
        output_dir="runs/trl_sft",  # nothing is saved there
        router_aux_loss_coef=0.0,  # TRL's own balancing loss is off
        save_strategy="no",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        bf16=False,
        logging_steps=max(1, steps // 6),
        max_length=LONGEST + 8,
        disable_tqdm=True,
        report_to=[],
    )
    callback = EquipoiseCallback(strategy)
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=rows.select(range(HELD_OUT, len(rows))),
        eval_dataset=rows.select(range(HELD_OUT)),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # its lines are long
    trainer.train()
    for row in trainer.state.log_history:
        if "equipoise/maxvio_batch" in row:
            print(f"{strategy}: step {row['step']}: loss {row['loss']:.3f}, MaxVio {row['equipoise/maxvio_batch']:.2f}")
    return trainer, callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model of Transformers with its tokenizer (default: make one)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training (default: 60)")
    parser.add_argument("--strategy", default="lbl:scope=global_batch,coefficient=1e-2", help="compared with none")
    parser.add_argument("--smoke", action="store_true", help="4 steps, in a few seconds: does it run?")
    options = parser.parse_args()
    steps = 4 if options.smoke else options.steps

    datasets.disable_progress_bars()
    transformers.set_seed(0)
    if options.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    else:
        tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # a token is a byte
        sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
        heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2)
        model = transformers.AutoModelForCausalLM.from_config(config)

    table = []
    for strategy in ("none", options.strategy):
        trainer, callback = train(copy.deepcopy(model), tokenizer, steps, strategy)
        with callback.balance.measuring() as load:
            loss = trainer.evaluate()["eval_loss"]
        figures = metrics.max_violation(load), metrics.dead_experts(load), loss
        table.append("{:42} {:7.2f} {:13.0f} {:11.3f}".format(strategy, *figures))
    print(f"\n{'strategy':42} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}", *table, sep="\n")


if __name__ == "__main__":
    main()
