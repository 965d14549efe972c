"""The laboratory of equipoise: train small mixture-of-experts models under any strategy, and see what balancing did.

Install it with ``pip install 'equipoise[lab]'``. The command is ``equipoise``.
"""
