"""``load`` and ``save``: a model of transformers as a :class:`Decoder` of our layers, and back."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.hf.converting.reading import Reading, weights_of
from seqpar.hf.converting.rules import Rule, back, out
from seqpar.hf.converting.table import FAMILIES
from seqpar.hf.exact import Exact
from seqpar.models.decoder import Decoder
from seqpar.sharding.cut import Cut

TOKENS, TOLERANCE = 17, 1e-6
# Fields that change no number of a forward pass: sizes that weights tell, starts, caches, loss terms that are off.
_IDLE = """
    max_position_embeddings n_positions n_ctx vocab_size chunk_size mamba_chunk_size
    initializer_range initializer_factor rescale_prenorm_residual
    use_cache use_mamba_kernels num_logits_to_keep experts_implementation ep_size pretraining_tp
    router_aux_loss_coef aux_loss_alpha seq_aux num_nextn_predict_layers
    pad_token_id bos_token_id eos_token_id sep_token_id tokenizer_class
    torch_dtype dtype transformers_version _name_or_path architectures model_type
    """


@dataclass(frozen=True)
class Origin:
    """Where a decoder comes from: the config, the rules, and the dtype of each of their weights."""

    config: Any
    rules: Sequence[Rule]
    dtypes: Mapping[str, torch.dtype]

    def back(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights, or gradients, of ours as those of transformers."""
        return back(self.rules, ours)


def load(source: Any) -> Decoder:
    """A decoder with the weights of a model of transformers: ``source`` is a path or name for ``from_pretrained``, a
    config (weights are drawn as transformers draws them), or a model, which stays as it is.

    Law: its logits are those of the model, each document alone; this is compared on a few tokens before it is returned.
    ``sequence_parallel``, ``step`` and all that takes a :class:`Decoder` take it. Raises ``ValueError`` for a
    ``model_type`` without rules, and for what its rules do not know: a weight, a field of the config, a dropout.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

    if isinstance(source, str | os.PathLike):
        source = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    elif isinstance(source, PreTrainedConfig):
        _family(source)
        source = AutoModelForCausalLM.from_config(source)
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"load takes a path, a config or a model of transformers, got {type(source).__name__}")
    return _converted(source)


def save(decoder: Decoder, path: str | os.PathLike[str]) -> None:
    """Write a decoder that :func:`load` made to a folder that ``from_pretrained`` of transformers reads: config and
    safetensors, sharded if they are large. Law: what was loaded and not trained is written bit by bit as it was."""
    from transformers import AutoModelForCausalLM

    origin: Origin | None = getattr(decoder, "origin", None)
    if origin is None:
        raise ValueError("save writes decoders that came from seqpar.hf.load; this one did not")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(origin.config)
    given = origin.back(decoder.state_dict())
    state = {name: each.to(origin.dtypes[name]).contiguous() for name, each in given.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(path)


def _family(config: Any) -> Any:
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type {config.model_type!r} has no rules to convert it: {known} have")
    return FAMILIES[config.model_type]


def _converted(model: Any) -> Decoder:
    reading = Reading(model)
    decoder: Decoder = _family(model.config)(reading)
    _check_fields(reading)
    ours = out(reading.rules, _all_of(reading, decoder))
    first = next(iter(reading.theirs.values()))
    decoder.to(device=first.device, dtype=first.dtype)
    with torch.no_grad():
        for name, each in weights_of(decoder).items():
            each.copy_(ours[name])
    decoder.origin = Origin(model.config, tuple(reading.rules), {n: each.dtype for n, each in reading.theirs.items()})  # type: ignore[assignment]
    decoder.train(model.training)
    _compare(model, decoder)
    return decoder


def _all_of(reading: Reading, decoder: nn.Module) -> dict[str, Tensor]:
    """Their weights, each of which has one rule, and gives all of ours; else ``ValueError``."""
    kind, used = reading.config.model_type, [name for rule in reading.rules for name in rule.theirs]
    made = {name for rule in reading.rules for name in rule.ours}
    left = sorted(set(reading.theirs) - set(used))
    if left:
        raise ValueError(f"{kind}: no rule for the weights {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}")
    missing, wanted = sorted(set(used) - set(reading.theirs)), set(weights_of(decoder))
    if missing or made != wanted:
        unlike = missing or sorted(made ^ wanted)
        raise ValueError(f"{kind}: its rules do not fit its weights: {', '.join(unlike[:5])}")
    return dict(reading.theirs)


def _check_fields(reading: Reading) -> None:
    """Raise ``ValueError`` for fields that no rule read, unless they are what every model of the type has."""
    config, plain = reading.config, type(reading.config)()
    idle = _base_fields() | set(_IDLE.split())
    for name, value in config.to_dict().items():
        known = name in reading.seen or name in idle or "drop" in name
        if "drop" in name and isinstance(value, float) and value > 0:
            raise ValueError(f"{config.model_type}: {name}={value}, but decoders have no dropout: set it to 0 first")
        if not known and value != getattr(plain, name, None):
            raise ValueError(f"{config.model_type}: its rules do not know what {name}={value!r} means")


def _base_fields() -> set[str]:
    from transformers import PreTrainedConfig

    return set(PreTrainedConfig().to_dict()) - {"layer_types"}


def _compare(model: Any, decoder: Decoder) -> None:
    """Raise ``ValueError`` unless both give the same logits for a few tokens, in fp64."""
    device = next(decoder.parameters()).device
    count = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS) or TOKENS)
    tokens = (torch.arange(count, device=device) * 7919 + 3) % model.config.vocab_size
    with torch.no_grad(), _plainly(model, decoder), Exact(weights=True):
        theirs = model(input_ids=tokens[None], use_cache=False).logits
        ours = decoder(tokens[None], Cut.whole([count]))
    error = float((ours - theirs).abs().amax() / theirs.abs().amax().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise ValueError(
            f"{model.config.model_type}: logits differ from those of transformers by {error:.1e}, relatively"
        )


@contextmanager
def _plainly(model: Any, decoder: Decoder) -> Iterator[None]:
    """Both as they are when nothing is trained, and experts one by one: other ways of them have no fp64."""
    training, way = model.training, model.config._experts_implementation
    try:
        model.config._experts_implementation = "eager"
        model.eval()
        decoder.eval()
        yield
    finally:
        model.config._experts_implementation = way
        model.train(training)
        decoder.train(training)
