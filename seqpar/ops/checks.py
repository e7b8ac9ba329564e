"""The self-check of every op that has kernels, by the name of the op."""

from collections.abc import Mapping
from types import MappingProxyType

from seqpar.ops import decayed_linear_attention, delta_rule, recurrent_cell
from seqpar.ops.choice import Check
from seqpar.ops.diagonal_scan import stages as diagonal_scan
from seqpar.ops.softmax_block import selfcheck as softmax_block

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "softmax_block": softmax_block.check,
        "decayed_linear_attention": decayed_linear_attention.check,
        "delta_rule": delta_rule.check,
        "diagonal_scan": diagonal_scan.check,
        "recurrent_cell": recurrent_cell.check,
    }
)
