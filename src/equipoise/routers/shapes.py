"""The shapes of a model's tensors where its weights are not there."""

import torch
from torch import Tensor

__all__ = ["is_partitioned", "whole_shape"]


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a weight, also where ZeRO-3 of DeepSpeed keeps an empty one in its place."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 of DeepSpeed keeps only a part of a weight on this rank."""
    return hasattr(tensor, "ds_shape")
