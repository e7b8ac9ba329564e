"""What a family reads of a model of transformers; what it does not read, and could matter, is found out."""

from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from seqpar.hf.converting.rules import Rule
from seqpar.layers.parts.mlp import MLP
from seqpar.layers.parts.rope import Rope

ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
    }
)
FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")


class Reading:
    """One model being read: its config, the names of its weights, and the rules collected so far."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.theirs, self.seen, self.rules = weights_of(model), set[str](), list[Rule]()

    def __call__(self, name: str, default: Any = None) -> Any:
        """A field of the config, which from now on is known."""
        self.seen.add(name)
        return getattr(self.config, name, default)

    def know(self, *names: str) -> None:
        """Fields of the config that weights or other fields tell already."""
        self.seen.update(names)

    def has(self, name: str) -> bool:
        """Whether there is a weight of that name, or a ``.weight`` of it."""
        return name in self.theirs or f"{name}.weight" in self.theirs

    def same(self, theirs: str, ours: str) -> None:
        """A weight with another name."""
        self.rules.append(Rule((theirs,), (ours,)))

    def module(
        self, theirs: str, *ours: str, sizes: tuple[int, ...] = (), groups: int = 1, turned: bool = False
    ) -> None:
        """The weight and, where there is one, the bias of a linear map or a norm, split if it is several of ours."""
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in self.theirs:
                names = tuple(f"{name}.{part}" for name in ours)
                self.rules.append(
                    Rule((f"{theirs}.{part}",), names, sizes, groups, transposed=turned and part == "weight")
                )

    def stacked(self, theirs: str, ours: tuple[str, ...], sizes: tuple[int, ...]) -> None:
        """Weights of experts ``[experts, rows, ...]`` that are split by rows."""
        self.rules.append(Rule((theirs,), ours, sizes, dim=1))

    def joined(self, theirs: tuple[str, ...], ours: str, sizes: tuple[int, ...]) -> None:
        """Several weights that are one of ours."""
        self.rules.append(Rule(theirs, (ours,), sizes))

    def reshaped(self, theirs: str, ours: str, *, negated: bool = False, flat: bool = False) -> None:
        """A convolution's ``[d, 1, w]``, which is ``[d, w]``; ``flat``: a vector with dims of 1 around it."""
        shape = tuple(self.theirs[theirs].shape)
        own = (self.theirs[theirs].numel(),) if flat else tuple(n for i, n in enumerate(shape) if i != 1)
        self.rules.append(Rule((theirs,), (ours,), shape=own, their_shape=shape, negated=negated))

    def activation(self, name: str = "hidden_act") -> str:
        """Ours of the config's; raises ``ValueError`` for one that is not known."""
        asked = self(name)
        if asked not in ACTIVATIONS:
            raise ValueError(
                f"{self.config.model_type}: activation {asked!r} is not known: {', '.join(ACTIVATIONS)} are"
            )
        return ACTIVATIONS[asked]

    def mlp(self, theirs: str, ours: str, hidden: int, *, activation: str | None = None) -> MLP:
        """A gated feed-forward part by the usual names; gate and up may be one."""
        self.module(f"{theirs}.down_proj", f"{ours}.down")
        gated = self.has(f"{theirs}.gate_up_proj") or self.has(f"{theirs}.gate_proj")
        if self.has(f"{theirs}.gate_up_proj"):
            self.module(f"{theirs}.gate_up_proj", f"{ours}.gate", f"{ours}.up", sizes=(hidden, hidden))
        else:
            self.module(f"{theirs}.up_proj", f"{ours}.up")
            self.module(f"{theirs}.gate_proj", f"{ours}.gate")
        bias = f"{theirs}.down_proj.bias" in self.theirs
        activation = self.activation() if activation is None else activation
        return MLP(self("hidden_size"), hidden, activation=activation, gated=gated, bias=bias)

    def rope(self, kind: str = "", *, interleaved: bool = False) -> Rope:
        """The rotary angles of transformers itself, for layers of a ``kind`` where they differ by kind."""
        rotary: Any = next(each for name, each in self.model.named_modules() if name.endswith("rotary_emb"))
        self.seen.update(("rope_parameters", "rope_theta", "partial_rotary_factor", "rope_scaling"))
        asked = self.config.rope_parameters or {}
        asked = asked.get(kind, asked)
        if asked.get("rope_type", "default") not in FIXED_ROPES:
            raise ValueError(
                f"{self.config.model_type}: rotary positions of kind {asked['rope_type']!r} change with the length of "
                f"documents, which a decoder does not know: {', '.join(FIXED_ROPES)} are taken"
            )
        fresh: Any = type(rotary)(self.config)
        prefix = f"{kind}_" if hasattr(fresh, f"{kind}_inv_freq") else ""
        frequencies = getattr(fresh, f"{prefix}inv_freq").double().tolist()
        return Rope(tuple(frequencies), float(getattr(fresh, f"{prefix}attention_scaling")), interleaved)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights and the buffers that are saved, tied ones once."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, each in state.items():
        found.setdefault(id(each), name)
    return {name: state[name] for name in found.values()}
