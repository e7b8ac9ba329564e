"""How far attention lets a token see, read from what transformers makes its masks of.

transformers describes a mask as functions of places that are joined by "and" and "or", before anything is computed of
them. These functions are read here, by name; a part that is not known is an error, and no mask is ever made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PLAIN = ("causal_mask_function", "bidirectional_mask_function", "padding_mask_function.<locals>.inner_mask")
_JOINTS = ("and_masks.<locals>.and_mask", "remap_positions_for_packed_sequence.<locals>.inner_mask")
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_CHUNK = "chunked_overlay.<locals>.inner_mask"
_BOTH_WAYS = "sliding_window_bidirectional_overlay.<locals>.inner_mask"


@dataclass(frozen=True)
class Sight:
    """What a token sees of its document: all before it or of it (``causal``), the last ``window`` tokens, or those of
    its ``chunk``. ``both``: so many tokens each way."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    both: int | None = None

    def to(self, *_: Any) -> "Sight":
        """Itself: models move their masks about."""
        return self

    def _computed(self, *_: Any) -> Any:
        raise ValueError("the model computes with its attention mask by itself, so how it attends is not known")

    __add__ = __radd__ = __getitem__ = _computed
    dtype = shape = property(_computed)


def sight(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    dtype: Any = None,
    config: Any = None,
) -> Sight:
    """Called by transformers where a mask is to be made; ``ValueError`` for padding and for what is not known."""
    if q_length != kv_length or q_offset or kv_offset:
        raise ValueError("a cut model takes no cache: pass use_cache=False and no past keys and values")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("a cut model takes no padding: pack the documents one after the other, and pass their lengths")
    found = dict(_parts(mask_function))
    unknown = [name for name in found if name not in (*_PLAIN, _PACKED, _WINDOW, _CHUNK, _BOTH_WAYS)]
    if unknown:
        raise ValueError(f"attention looks where {unknown[0].split('.')[0]} says, which is not known when it is cut")
    return Sight(
        "bidirectional_mask_function" not in found and _BOTH_WAYS not in found,
        _held(found, _WINDOW, "sliding_window"),
        _held(found, _CHUNK, "chunk_size"),
        _held(found, _BOTH_WAYS, "sliding_window"),
    )


def _parts(function: Any) -> Iterator[tuple[str, Any]]:
    """The functions that a mask is made of, by qualified name; "or" is a part that is not known."""
    name = getattr(function, "__qualname__", repr(function))
    if name not in _JOINTS:
        yield name, function
        return
    for held in _closure(function).values():
        for each in held if isinstance(held, tuple | list) else (held,):
            if callable(each) and not isinstance(each, Tensor):
                yield from _parts(each)


def _closure(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _held(found: dict[str, Any], name: str, variable: str) -> int | None:
    return None if name not in found else int(_closure(found[name])[variable])
