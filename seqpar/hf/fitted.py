"""A model of transformers as the decorator wants one: ``forward(tokens, cut)`` gives the logits of my tokens."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.hf.attend import KEYWORD
from seqpar.hf.families.positions import COUNT
from seqpar.hf.guard import guard
from seqpar.hf.standing import cutting
from seqpar.hf.whole import base_of, parts_of, plain, takes, takes_any
from seqpar.sharding.cut import Cut

_FIRST = "original_max_position_embeddings"


class Fitted(nn.Module):
    """Runs a model of transformers cut, and leaves it as it is; made by :func:`seqpar.hf.adapt.adapted`.

    Law: the logits are those that the model itself gives each document alone. The first call makes sure of that, with
    a few tokens (:func:`seqpar.hf.guard.guard`).
    """

    def __init__(self, model: nn.Module, guarded: bool = True) -> None:
        super().__init__()
        self.model = model
        self.guarded = guarded

    def forward(
        self,
        tokens: Tensor | None = None,
        cut: Cut | None = None,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: Any = None,
    ) -> Tensor:
        """My tokens ``[b, t]``; the logits ``[b, t, vocabulary]``. ``ValueError`` for what only transformers takes."""
        assert cut is not None
        others = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        others |= {"past_key_values": past_key_values, "cache": cache, "use_cache": use_cache or None}
        given = [name for name, value in others.items() if value is not None]
        if tokens is None or given:
            what, kind = ", ".join(given) or "call without tokens", type(base_of(self.model)).__name__
            raise ValueError(
                f"{where(cut.group)}: {kind} is cut, and takes tokens, labels and lengths (seqpar.hf.packed(**batch) "
                f"gives them), but no {what}: which tokens see which follows from lengths, and there is no cache"
            )
        self.check(cut)
        if self.guarded and not tokens.is_meta:
            guard(self.model, run, cut, tokens.device)
            self.guarded = False
        return run(self.model, tokens, cut)

    def get_input_embeddings(self) -> Any:
        """The embedding, by transformers' name for it."""
        return base_of(self.model).get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The head, by transformers' name for it."""
        return base_of(self.model).get_output_embeddings()

    def check(self, cut: Cut) -> None:
        """Raise ``ValueError``, the same on every rank, for what a model of transformers does not run with."""
        who = where(cut.group)
        if min(cut.shard.counts) == 0:
            raise ValueError(
                f"{who}: {cut.shard.num_tokens} tokens on {cut.shard.size} ranks leave one without any, and models of "
                "transformers take at least one: use longer batches or fewer ranks"
            )
        if cut.states is not None:
            raise ValueError(f"{who}: a model of transformers keeps no states from one call to the next")
        parts = parts_of(self.model)
        check_modes(self.model, parts, who)
        check_lengths(parts, max(cut.shard.lengths), who)


def check_lengths(parts: Sequence[nn.Module], longest: int, who: str) -> None:
    """Raise ``ValueError`` for documents so long that transformers computes them by how many tokens it is given."""
    for config in {id(c): c for part in parts if (c := part.__dict__.get("config")) is not None}.values():
        for rope in ropes(config):
            limit = rope.get(_FIRST) or getattr(config, _FIRST, None) or getattr(config, "max_position_embeddings", 0)
            if rope.get("rope_type") in ("dynamic", "longrope") and longest > (limit or 0):
                raise ValueError(
                    f"{who}: a document of {longest} tokens, and rotary embeddings ({rope['rope_type']}) that change "
                    f"with the length of a batch beyond {limit}: use shorter documents, or yarn or llama3"
                )
        scale = getattr(config, "attn_temperature_tuning", None) and getattr(config, "floor_scale", None)
        if scale and longest >= scale:
            raise ValueError(
                f"{who}: a document of {longest} tokens, and queries that are scaled by place beyond {scale:.0f}, "
                "which transformers counts in the batch: use shorter documents, or set attn_temperature_tuning=False"
            )


def ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a config; there may be one for each kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return []
    return [found, *(each for each in found.values() if isinstance(each, dict))]


def check_modes(model: nn.Module, parts: Sequence[nn.Module], who: str) -> None:
    """Raise ``ValueError`` for options that change what is computed in ways that are not cut."""
    config: Any = base_of(model).config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError(f"{who}: the balance loss of experts is not summed over ranks: set output_router_logits=False")
    if not model.training or not any(part.training and _drops(part) for part in parts):
        return
    name, part = next((name, part) for name, part in model.named_modules() if part.training and _drops(part))
    raise ValueError(
        f"{who}: {name or 'the model'} ({type(part).__name__}) has {_drops(part)} > 0, and would draw numbers that "
        "depend on how the sequence is cut: set it to 0"
    )


def _drops(part: nn.Module) -> str | None:
    """The name of what makes a module drop values at random, if it does."""
    own = part.__dict__
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return "p" if part.p > 0 else None
    names = _random(tuple(own))
    return next((name for name in names if isinstance(own[name], float) and own[name] > 0), None)


@lru_cache(maxsize=4096)
def _random(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that say how much is left to chance; looked for in every call, and mostly the same ones."""
    return tuple(name for name in names if "drop" in name or "jitter" in name)


def run(model: nn.Module, tokens: Tensor, cut: Cut, call: Callable[..., Any] | None = None) -> Tensor:
    """The model's own ``forward`` of my tokens, cut. ``call``: what is called in its place, such as a wrapper of it."""
    given, parts = plain(model, tokens), parts_of(model)
    if takes(model, "position_ids") and not any(hasattr(type(part), COUNT) for part in parts):
        given["position_ids"] = cut.positions.to(tokens.device)[None].expand(tokens.shape[0], -1)
    if takes_any(model):
        given[KEYWORD] = cut
    with cutting(parts, cut):
        logits: Tensor = (call or model)(**given).logits
    return logits
