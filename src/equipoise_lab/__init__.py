"""The laboratory of equipoise: train small mixture-of-experts models under any strategy, and measure the effect.

Install it with ``pip install 'equipoise[lab]'``. Its command is ``equipoise``.
"""
