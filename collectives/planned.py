"""Numbers that are planned once and read in every call: as tensors, on any device, in any mode."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


@dataclass(frozen=True, eq=False)
class Planned:
    """An array that is a tensor on each device where it is read; there it is made once.

    Under a mode that looks at every operation (fake tensors, traces) it is made anew: a tensor that such a mode made is
    of no use outside of it, and the operations are the same in every step.
    """

    array: NDArray[Any]
    _on: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.array)

    def on(self, device: torch.device) -> Tensor:
        """The tensor; not to be written to."""
        if _get_current_dispatch_mode() is not None:
            return torch.tensor(self.array, device=device)
        if device not in self._on:
            with torch.inference_mode(False):  # a tensor made inside could not be saved for backward
                self._on[device] = torch.tensor(self.array, device=device)
        return self._on[device]


def rows(values: Any) -> Planned:
    """Row numbers."""
    return Planned(np.asarray(values, np.int64))
