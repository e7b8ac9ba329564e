"""AdamW for a model of any dtype."""

import torch
from torch import nn

from seqpar.training.extras import adamw


class ExactAdamW:
    """AdamW on fp32 copies of the parameters, so that small updates are not rounded away in bfloat16.

    fp32 and fp64 parameters are their own copies. The learning rate rises over the first ``warm_up`` steps; ``step()``
    clips the gradient to norm 1, and leaves none behind.
    """

    def __init__(self, model: nn.Module, learning_rate: float, warm_up: int) -> None:
        self._parameters = list(model.parameters())
        self._exact = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in self._parameters]
        self._adamw = adamw(self._exact, learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        self._rate = torch.optim.lr_scheduler.LambdaLR(self._adamw, lambda step: min(1.0, (step + 1) / max(1, warm_up)))

    @torch.no_grad()
    def step(self) -> None:
        for exact, parameter in zip(self._exact, self._parameters):
            exact.grad = None if parameter.grad is None else parameter.grad.to(exact.dtype)
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._exact, 1.0)
        self._adamw.step()
        self._rate.step()
        for exact, parameter in zip(self._exact, self._parameters):
            parameter.copy_(exact)
