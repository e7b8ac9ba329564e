"""What a wrapped model returns, and what models return: tensors in tuples, dicts and dataclasses."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqpar.collectives.group import where
from seqpar.sharding.shard import Shard
from seqpar.training.rows import Rows

Rebuild = Callable[[Sequence[Any]], Any]


def opened(value: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of tuples, lists, dicts and dataclasses in each other, and what puts others in their places.

    Raises ``ValueError`` for an object that keeps tensors where nobody would find them.
    """
    leaves, spec = pytree.tree_flatten(value)
    parts = [_opened_dataclass(leaf) for leaf in leaves]
    sizes = [len(part) for part, _ in parts]

    def rebuild(others: Sequence[Any]) -> Any:
        given = iter(others)
        filled = [again([next(given) for _ in range(size)]) for size, (_, again) in zip(sizes, parts)]
        return pytree.tree_unflatten(filled, spec)

    return [leaf for part, _ in parts for leaf in part], rebuild


def _opened_dataclass(value: Any) -> tuple[list[Any], Rebuild]:
    if not is_dataclass(value) or isinstance(value, type):
        _refuse_hidden_tensors(value)
        return [value], lambda others: others[0]
    names = [each.name for each in fields(value) if hasattr(value, each.name)]
    inside, again = opened([getattr(value, name) for name in names])
    if not any(isinstance(each, Tensor) for each in inside):
        return [value], lambda others: others[0]

    def rebuild(others: Sequence[Any]) -> Any:
        twin = copy.copy(value)
        for name, other in zip(names, again(others)):
            object.__setattr__(twin, name, other)
        return twin

    return inside, rebuild


def _refuse_hidden_tensors(value: Any) -> None:
    kept = [] if isinstance(value, Tensor | torch.nn.Module) else vars(value) if hasattr(value, "__dict__") else []
    hidden = [name for name in kept if isinstance(getattr(value, name, None), Tensor)]
    if hidden:
        raise ValueError(
            f"a {type(value).__name__} keeps a tensor ({hidden[0]}) where it is not found: pass and return tensors, "
            "tuples, dicts or dataclasses of them"
        )


@dataclass(frozen=True)
class Output:
    """What a wrapped model returns.

    ``loss``: that of the whole batch, the same number on every rank: ``loss_sum / divisor``; None without targets.
    ``outputs``: what the model returned for my tokens (None where ``loss_tokens`` says that logits are never all
    there); :meth:`gather` gives everyone's. ``loss_sum``: summed over all targets; ``num_targets``: how many there are,
    or the sum of their weights. The two serve losses that go over several calls or replicas, as does ``divisor=``.
    ``auxiliary``: the sum of what layers added, which is in ``loss`` but not in ``loss_sum``. ``rows``: where batches
    come in rows with documents of their own, how they were put together.
    """

    loss: Tensor | None
    outputs: Any
    shard: Shard
    loss_sum: Tensor | None = None
    num_targets: Tensor | None = None
    auxiliary: Tensor | None = None
    rows: Rows | None = None
    token_dims: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def logits(self) -> Any:
        """Of my tokens, ``[b, t, vocabulary]``: what the model returned, or what is called so in it."""
        if isinstance(self.outputs, Mapping):
            return self.outputs.get("logits")
        return self.outputs if isinstance(self.outputs, Tensor) else getattr(self.outputs, "logits", None)

    def gather(self) -> Any:
        """What the model returned, with everyone's tokens wherever tokens are: the same on every rank.

        Tokens are in dim 1 of what is ``[b, my tokens, ...]`` on every rank, or where ``token_dims`` says by name;
        the rest comes as it is. Rows of documents of their own are rows again, zeros where they are padded. Sends what
        :meth:`seqpar.Shard.gather` sends, and one small message.
        """
        leaves, rebuild = opened(self.outputs)
        names = _names(self.outputs, leaves)
        dims = _token_dims(leaves, [self.token_dims.get(name, ...) for name in names], self.shard)
        return rebuild([each if dim is None else self._whole(each, dim) for each, dim in zip(leaves, dims)])

    def _whole(self, x: Tensor, dim: int) -> Tensor:
        whole = self.shard.gather(x, dim)
        return whole if self.rows is None or dim != 1 else self.rows.unpacked(whole)


def _names(outputs: Any, leaves: list[Any]) -> list[str]:
    """What each leaf is called: its key or field, or its number."""
    value: Any = outputs
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    paths = [path for path, _ in pytree.tree_flatten_with_path(value)[0]]
    if len(paths) != len(leaves):
        return [str(number) for number in range(len(leaves))]
    return [
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in p) for p in paths
    ]


def _token_dims(leaves: list[Any], said: list[Any], shard: Shard) -> list[int | None]:
    """In which dim each leaf holds tokens; None: in none. Ranks agree: all must be able to hold theirs there."""
    fits = [
        isinstance(each, Tensor) and each.dim() >= 2 and each.shape[1] == shard.num_local and each.shape[0] > 0
        for each in leaves
    ]
    if shard.size > 1 and fits:
        device = next((each.device for each in leaves if isinstance(each, Tensor)), torch.device("cpu"))
        mine = torch.tensor(fits, dtype=torch.int64, device=device)
        try:
            fits = [bool(each) for each in torch.stack(shard.group.all_gather(mine).wait()).all(0).tolist()]
        except RuntimeError as error:
            raise ValueError(f"{where(shard.group)}: ranks' outputs have different structures") from error
    return [1 if dim is ... and fit else None if dim is ... else dim for dim, fit in zip(said, fits)]


_TENSORS = ("loss", "outputs", "loss_sum", "num_targets", "auxiliary")
_REST = ("shard", "rows", "token_dims")

# Whoever looks for tensors in what a model returns (DistributedDataParallel, hooks of FSDP2) finds these.
pytree.register_pytree_node(
    Output,
    lambda output: ([getattr(output, name) for name in _TENSORS], [getattr(output, name) for name in _REST]),
    lambda values, rest: Output(**dict(zip(_TENSORS, values)), **dict(zip(_REST, rest))),
    serialized_type_name="seqpar.Output",
)
