"""A model whose activations leave the device: connects the layers with offload."""

from dataclasses import replace

from seqpar.offload.runtime.activations import Activations
from seqpar.sharding.cut import Cut
from seqpar.sharding.exchanged import Exchanged, Slot


class _Forgetful(Exchanged):
    """Keeps nothing of what crossed the cuts: it would hold the attention outputs of all layers on the device."""

    def slot(self, layer: object) -> Slot:
        return Slot()


def swapped_cut(cut: Cut, swap: Activations, *, checkpointed: bool = False) -> Cut:
    """The cut to run a model with inside of ``with swap``: its layers' token-wise parts can be computed again.

    Law: loss and gradients are those without swapping, bit for bit (where tokens are computed again: as far as the
    kernels give the same bits for some rows as for all). ``checkpointed``: some layer of the model runs again in
    backward, so what crossed the cuts is kept for it.
    """
    exchanged = cut.exchanged if checkpointed else _Forgetful()
    return replace(cut, token_wise=swap.token_wise, exchanged=exchanged)


def is_checkpointed(model: object) -> bool:
    """Whether any block of a model keeps only its input and computes the rest again."""
    modules = getattr(model, "modules", None)
    return modules is not None and any(getattr(module, "checkpoint", False) is True for module in modules())
