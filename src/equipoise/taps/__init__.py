"""Taps: where somebody's router is observed and steered. ``tap`` is the mechanism, ``families`` says which routers."""
