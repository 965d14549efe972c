"""Does what finetune_trainer.py does, in a loop of your own: python examples/finetune_loop.py MODEL TEXT.txt [STEPS]"""

import sys
from pathlib import Path

import torch
import transformers

import equipoise

if len(sys.argv) < 3:
    sys.exit(__doc__)
folder, text, steps = sys.argv[1], Path(sys.argv[2]), int((sys.argv[3:] or ["60"])[0])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
balance = equipoise.attach(model, "loss-free:rate=1e-3+lbl:scope=global_batch,coefficient=1e-3")
print(*balance.notes(steps), sep="\n")

ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
if len(rows) < 16:
    sys.exit(f"The text must fill 16 rows of 128 tokens: {text} fills {len(rows)}. Give more text.")
for step in range(steps):
    losses = [model(input_ids=x, labels=x).loss + balance.loss() for x in rows[torch.randint(len(rows), (4, 8))]]
    (sum(losses) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()
    balance.step()
    print(f"step {step + 1}: loss {sum(losses).item() / 4:.3f}, MaxVio {balance.metrics()['maxvio_batch']:.2f}")

tokenizer.save_pretrained("runs/tuned")
model.save_pretrained("runs/tuned")  # a family with a slot saves its biases here, in float32
balance.save_biases("runs/tuned")  # other families save them beside the weights; attach finds them again
