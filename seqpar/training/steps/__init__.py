"""What a training loop is made of, right on every rank: agreement, accumulation, clipping, rates, evaluation, log."""

from seqpar.training.steps.accumulate import accumulate as accumulate
from seqpar.training.steps.accumulate import evaluate as evaluate
from seqpar.training.steps.accumulate import total as total
from seqpar.training.steps.clipping import clip_gradients as clip_gradients
from seqpar.training.steps.log import Log as Log
from seqpar.training.steps.log import Progress as Progress
from seqpar.training.steps.log import memory_bytes as memory_bytes
from seqpar.training.steps.nonfinite import NonFinite as NonFinite
from seqpar.training.steps.nonfinite import first_nonfinite as first_nonfinite
from seqpar.training.steps.ranks import Ranks as Ranks
from seqpar.training.steps.ranks import split_ranks as split_ranks
from seqpar.training.steps.ranks import sum_over_replicas as sum_over_replicas
from seqpar.training.steps.schedule import cosine as cosine
from seqpar.training.steps.together import together as together
