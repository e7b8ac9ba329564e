"""Constructor arguments of layers, checked once."""

from collections.abc import Iterable


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """``value``, or a ``ValueError`` that lists what is known."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
    return value


def positive(**sizes: int) -> None:
    """Raise ``ValueError`` unless every size is at least 1."""
    for name, value in sizes.items():
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value % 1:
            raise ValueError(f"{name} must be a whole number, got {value}")


def head_dim(dim: int, heads: int, given: int | None, name: str = "key_dim") -> int:
    """The dim of one head: ``given``, or ``dim / heads``, which must then be a whole number."""
    positive(dim=dim, heads=heads)
    if given is not None:
        positive(**{name: given})
        return given
    if dim % heads:
        raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}: change one, or give {name}")
    return dim // heads
