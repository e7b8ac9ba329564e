"""Long sequences, cut over many GPUs, trained to the same numbers as one device."""

from seqpar.attention import attention as attention
from seqpar.cut import Cut as Cut
from seqpar.loss import next_token_loss as next_token_loss
from seqpar.recurrence import linear_attention as linear_attention
from seqpar.shard import Shard as Shard
from seqpar.wrap import sequence_parallel as sequence_parallel
