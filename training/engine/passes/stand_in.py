"""A module that stands in for another one, with its names and values, under another forward."""

from __future__ import annotations

from torch import nn


class StandIn(nn.Module):
    """Stand in for `original`, with its names and values, under another forward."""

    _original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not a child, whose name would stand before all others, but the same registries.
        object.__setattr__(self, "_original", original)
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self._non_persistent_buffers_set = original._non_persistent_buffers_set

    def train(self, mode: bool = True) -> StandIn:
        """See `nn.Module.train`."""
        self._original.train(mode)
        self.training = mode
        return self


def unwrapped(network: nn.Module) -> nn.Module:
    """Return what `network` stands in for, or `network` itself."""
    return network._original if isinstance(network, StandIn) else network
