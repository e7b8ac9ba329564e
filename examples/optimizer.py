"""AdamW for a model of any dtype."""

import torch
from torch import nn


class ExactAdamW:
    """AdamW on fp32 copies of the parameters, so that small updates are not rounded away in bfloat16.

    The copies of fp32 parameters are the parameters themselves. ``step()`` clips the gradient to norm 1, and leaves
    none behind.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self._parameters = list(model.parameters())
        self._exact = [parameter.detach().float() for parameter in self._parameters]
        self._adamw = torch.optim.AdamW(self._exact, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

    @torch.no_grad()
    def step(self) -> None:
        for exact, parameter in zip(self._exact, self._parameters):
            exact.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._exact, 1.0)
        self._adamw.step()
        for exact, parameter in zip(self._exact, self._parameters):
            parameter.copy_(exact)
