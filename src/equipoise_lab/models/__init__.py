"""Which mixture-of-experts models ``attach`` can balance: Transformers' families, and one model on this disk."""
