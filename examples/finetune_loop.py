"""Fine-tunes a mixture-of-experts model of Transformers in a loop of your own, without balancing and with it.

    python examples/finetune_loop.py
    python examples/finetune_loop.py --model FOLDER --text TEXT.txt

Without --model a small Qwen3-MoE over bytes is pretrained first, with balancing, on the corpus that is packaged with
equipoise, but for its Python code. Without --text the model is fine-tuned on that code. The table at the end is about
held-out rows of the new text: without balancing their load becomes more uneven. Takes about half a minute on one core
of a CPU.

A model that brings a bias keeps it: its strategy begins with frozen+. docs/which_strategy.md says why.
"""

import argparse
import copy
import json
import lzma
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import equipoise
import equipoise_lab
from equipoise import metrics

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
OLD_DOMAINS = ("bible_en", "law_fr", "law_zh", "math_mm", "speech_en", "speech_tr", "verse_zh")
LENGTH, ROWS, MICRO_BATCHES, HELD_OUT = 128, 8, 2, 64


def corpus_text(domain: str, characters: int) -> str:
    with lzma.open(CORPUS / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line in lines)[:characters]


def to_rows(text: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Tensor:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(rows) < 2 * HELD_OUT:
        raise SystemExit(f"The text must fill {2 * HELD_OUT} rows of {LENGTH} tokens: it fills {len(rows)}.")
    return rows[torch.randperm(len(rows))]


def choose_strategy(model: nn.Module) -> str:
    """A loss over the global batch; a model that brings a bias keeps it where it is."""
    balance = equipoise.attach(model, "frozen")
    has_bias = any(bias.any() for bias in balance.biases.values())
    balance.detach()
    return ("frozen+" if has_bias else "") + "lbl:scope=global_batch,coefficient=1e-2"


def train(model: nn.Module, rows: Tensor, steps: int, strategy: str, learning_rate: float) -> equipoise.Balance:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate)
    balance = equipoise.attach(model, strategy)
    for step in range(1, steps + 1):
        micro_batches = rows[torch.randint(HELD_OUT, len(rows), (MICRO_BATCHES, ROWS))]
        losses = [model(input_ids=ids, labels=ids).loss + balance.loss() for ids in micro_batches]
        (sum(losses) / MICRO_BATCHES).backward()  # after all forwards: the counts of the global batch are exact
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        if step % max(1, steps // 4) == 0:
            loss, max_violation = losses[-1].item(), balance.metrics()["maxvio_batch"]
            print(f"{strategy}: step {step}: loss {loss:.3f}, MaxVio {max_violation:.2f}")
    return balance


def measure(model: nn.Module, balance: equipoise.Balance, rows: Tensor) -> str:
    with torch.no_grad(), balance.measuring() as load:
        loss = model(input_ids=rows[:HELD_OUT], labels=rows[:HELD_OUT]).loss
    return f"{metrics.max_violation(load):7.2f} {metrics.dead_experts(load):13.0f} {loss:11.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model of Transformers with its tokenizer (default: make one)")
    parser.add_argument("--text", type=Path, help="text file to tune on (default: the code of the corpus)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each fine-tuning (default: 80)")
    parser.add_argument("--strategy", help="compared with none (default: lbl, after frozen+ if the model has a bias)")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"), help="saves the tuned model (runs/tuned)")
    parser.add_argument("--smoke", action="store_true", help="2 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps, characters = (2, 20_000) if options.smoke else (options.steps, 100_000)

    torch.manual_seed(0)
    if options.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    else:
        tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # a token is a byte
        sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
        heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2)
        model = transformers.AutoModelForCausalLM.from_config(config)
        old_rows = to_rows("".join(corpus_text(domain, characters) for domain in OLD_DOMAINS), tokenizer)
        train(model, old_rows, 2 if options.smoke else 120, "lbl:scope=global_batch,coefficient=1e-2", 3e-3).detach()
    new_text = options.text.read_text("utf-8") if options.text else corpus_text("code_py", 3 * characters)
    rows = to_rows(new_text, tokenizer)

    balance = equipoise.attach(model)  # without a strategy it counts
    table = {"before": measure(model, balance, rows)}
    balance.detach()
    for strategy in ("none", options.strategy or choose_strategy(model)):
        torch.manual_seed(1)  # the same order of text for every strategy
        tuned = copy.deepcopy(model)
        balance = train(tuned, rows, steps, strategy, 1e-3)
        table[strategy] = measure(tuned, balance, rows)
    tokenizer.save_pretrained(options.out)
    tuned.save_pretrained(options.out)  # a family with a slot saves its biases here, in float32
    balance.save_biases(options.out)  # other families save theirs beside the weights; attach finds them again

    print(f"\n{'strategy':42} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
    for strategy, figures in table.items():
        print(f"{strategy:42} {figures}")


if __name__ == "__main__":
    main()
