"""The options of ``train`` and ``compare`` in groups: those of ``--help`` and of a config file."""

from collections.abc import Mapping

__all__ = ["GROUPS", "in_groups"]

GROUPS: Mapping[str, tuple[str, ...]] = {
    "strategy": ("strategy", "strategies", "seed", "seeds", "then", "switch_at", "selection"),
    "folder": ("out", "resume", "save_model", "checkpoint_every", "json"),
    "text": ("data", "text_key", "tokenizer", "vocab_size", "sequence_length", "sequences", "shuffled"),
    "model": (
        "model", "arch", "score_function", "qk_norm", "layers", "width", "experts", "experts_per_token", "expert_width",
    ),
    "training": (
        "steps", "micro_batches", "balance_batch", "order", "learning_rate", "warmup", "decay_to", "weight_decay",
        "clip",
    ),
    "trackers": ("tracker", "tracker_layers"),
    "evaluation": ("evaluate_every", "evaluation_sequences"),
    "machine": ("workers", "dtype", "wrapper"),
}  # fmt: skip
OTHER = "other"  # options that no group names


def in_groups(names: list[str]) -> dict[str, list[str]]:
    """``names`` by group, in the order of the groups. No group is empty.

    >>> in_groups(["steps", "seed", "speed"])
    {'strategy': ['seed'], 'training': ['steps'], 'other': ['speed']}
    """
    groups = {group: [name for name in of_group if name in names] for group, of_group in GROUPS.items()}
    groups[OTHER] = [name for name in names if not any(name in of_group for of_group in groups.values())]
    return {group: of_group for group, of_group in groups.items() if of_group}
