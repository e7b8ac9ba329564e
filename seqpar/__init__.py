"""Long sequences, cut over many GPUs, trained to the same numbers as one device."""
# ruff: noqa: E402 - the check comes before the imports that a user's module of the same name would break

from seqpar.shadow import refuse_shadows

refuse_shadows(__file__)

from seqpar.attention import attention as attention
from seqpar.convolution import causal_conv as causal_conv
from seqpar.convolution import grid_conv as grid_conv
from seqpar.convolution import symmetric_conv as symmetric_conv
from seqpar.convolution import token_shift as token_shift
from seqpar.cut import Cut as Cut
from seqpar.execute import run_plan as run_plan
from seqpar.loss import next_token_loss as next_token_loss
from seqpar.plans import plan_ahead as plan_ahead
from seqpar.recurrences import delta_rule as delta_rule
from seqpar.recurrences import diagonal_scan as diagonal_scan
from seqpar.recurrences import linear_attention as linear_attention
from seqpar.recurrences import linear_system as linear_system
from seqpar.recurrences import selective_scan as selective_scan
from seqpar.shard import Shard as Shard
from seqpar.states import States as States
from seqpar.verify import verify as verify
from seqpar.wrap import sequence_parallel as sequence_parallel
