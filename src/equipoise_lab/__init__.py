"""The laboratory of equipoise: train small mixture-of-experts models under any strategy, and measure the effect.

Install it with ``pip install -e '.[lab]'`` in a clone. Its command is ``equipoise``.
"""
