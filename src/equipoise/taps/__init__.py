"""Taps: where somebody's router is observed and steered. ``tap`` is the mechanism, ``families`` and ``discovery`` say
which routers, and ``forward`` what the model was called with."""
