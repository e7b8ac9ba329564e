"""What layers add to the loss of one forward pass: terms of the whole batch, such as the balance of experts."""

import torch
from torch import Tensor

from seqpar.sharding.exchanged import backward_pass


class Added:
    """The terms of one forward pass, by name, in the order in which layers added them."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self.terms: list[tuple[str, Tensor]] = []

    def add(self, term: Tensor, name: str) -> None:
        """Keep a term; not again where its layer is computed again in backward.

        Raises ``ValueError`` for what is no single number, and in a layer under reentrant checkpointing, whose forward
        pass has no graph: the term's gradient would be lost.
        """
        if backward_pass() is not None:
            return
        if not isinstance(term, Tensor) or term.dim() or not term.is_floating_point():
            shape = f"{term.dtype} {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise ValueError(f"add_loss takes one floating-point number, a tensor of no dims, got {shape}")
        if self._grad and not torch.is_grad_enabled():
            raise ValueError(
                f"add_loss({name!r}) in a layer that runs without a graph (a reentrant checkpoint, no_grad): its "
                "gradient would be lost; checkpoint with use_reentrant=False"
            )
        self.terms.append((name, term))
