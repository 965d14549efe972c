"""Which mixture-of-experts models can be attached: those of the installed Transformers, and one on this disk."""
