"""Tokens and labels that a model has no row for, found before the first message and on every rank alike."""

from torch import Tensor, nn

from seqpar.sharding.called import readable

EMBEDDINGS = ("embedding", "embed", "embeddings", "embed_tokens", "tok_embeddings", "wte")
HEADS = ("head", "lm_head", "output", "unembed")
NOTHING = -100  # the label where there is nothing to predict


def check_vocabulary(module: nn.Module, tokens: Tensor, labels: Tensor | None, who: str) -> None:
    """Raise ``ValueError`` for tokens that ``module`` does not embed and labels that its head does not predict.

    A model's vocabulary is known if it has an ``nn.Embedding`` and an ``nn.Linear`` by one of the usual names. Values
    are looked at on the CPU only: elsewhere that would wait for the device in every call, and torch's own check of
    indices ends the process there.
    """
    embedded = next(
        (m.num_embeddings for name in EMBEDDINGS if isinstance(m := _child(module, name), nn.Embedding)), None
    )
    predicted = next((m.out_features for name in HEADS if isinstance(m := _child(module, name), nn.Linear)), None)
    _check("tokens", tokens, embedded, None, who)
    if labels is not None:
        _check("labels", labels, predicted, NOTHING, who)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    named = {EMBEDDINGS[0]: "get_input_embeddings", HEADS[0]: "get_output_embeddings"}.get(name, "")
    asked = getattr(module, named, None)  # models of transformers say it themselves
    return module._modules.get(name) if asked is None else asked()


def _check(what: str, values: Tensor, limit: int | None, but: int | None, who: str) -> None:
    if not values.numel() or not readable(values):
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 and (but is None or low != but or bool(((values < 0) & (values != but)).any())):
        also = "" if but is None else f", or {but} where there is nothing to predict"
        raise ValueError(f"{who}: {what} must not be negative{also}, got {low}")
    if limit is not None and high >= limit:
        raise ValueError(f"{who}: {what} must be below the model's vocabulary of {limit}, got {high}")
