"""Parameters that stay in fp32 when a model is turned into 16 bits: rates, step sizes and frequencies.

They become exponents of every token, so that rounding them to 8 bits moves outputs by several percent (S4D 5.6 %),
where rounding a projection moves them by a rounding. The published codes of Mamba, S4 and Griffin keep them so, too.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

NARROW = torch.bfloat16, torch.float16


class Fp32Parameters(nn.Module):
    """A module whose parameters named in ``fp32`` are fp32 at least under ``.bfloat16()``, ``.half()`` and ``.to()``.

    Their names in ``state_dict`` and everything else stay as they are. What copies parameters by other ways than the
    methods of ``nn.Module`` (FSDP's mixed precision) rounds them.
    """

    fp32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        mine = [self._parameters.get(name) for name in self.fp32]
        kept = {id(x) for p in mine if p is not None for x in (p, p.grad) if x is not None}

        def unless_narrowed(x: Tensor) -> Tensor:
            y = fn(x)
            narrowed = id(x) in kept and y.dtype in NARROW and x.dtype not in NARROW
            return x.to(y.device, torch.float32) if narrowed else y

        return super()._apply(unless_narrowed, recurse)
