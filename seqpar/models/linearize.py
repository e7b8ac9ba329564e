"""A trained softmax decoder turned into a linear one that keeps its weights (Liger, arXiv 2503.01496)."""

from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.linear.liger import Liger
from seqpar.models.decoder import Decoder


def linearize(model: Decoder, *, window: int = 64, temperature: float = 16.0) -> Decoder:
    """Put a :class:`seqpar.layers.Liger` in the place of every softmax attention of ``model``; returns ``model``.

    Law: no number of the weights changes and none is added: the projections are the same modules with the same
    parameters under the same names (``blocks.3.mixer.q.weight``), so optimizers, state dicts and frozen weights stay as
    they are. For documents of at most ``window`` tokens, the softmax half of each layer gives what the layer gave.

    The outputs change all the same, so train on: all weights, or, as in the paper, low-rank additions (LoRA, arXiv
    2106.09685) to the projections q, k and v with everything else frozen. These are plain ``nn.Linear`` modules: any
    LoRA library wraps them by name (``target_modules=["q", "k", "v"]``), before or after this call. Layers that are not
    softmax attention stay.

    Raises ``ValueError`` if the model has no softmax attention, or one that is not causal, before it changes anything.
    """
    found = [(block, block.mixer) for block in model.blocks if isinstance(block.mixer, SoftmaxAttention)]
    if not found:
        raise ValueError("linearize needs a model with softmax attention; this one has none (left)")
    made = [Liger.of(attention, window=window, temperature=temperature) for _, attention in found]
    for (block, _), liger in zip(found, made):
        block.mixer = liger
    return model
