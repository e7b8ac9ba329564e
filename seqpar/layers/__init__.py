"""Layers, one file per token mixer: those that mix tokens are called with the cut, the others are not."""

from seqpar.layers.block import Block as Block
from seqpar.layers.gla import GLA as GLA
from seqpar.layers.lightning_attention import LightningAttention as LightningAttention
from seqpar.layers.lightning_attention import decay_slopes as decay_slopes
from seqpar.layers.linear_attention import LinearAttention as LinearAttention
from seqpar.layers.mlp import SwiGLU as SwiGLU
from seqpar.layers.norm import RMSNorm as RMSNorm
from seqpar.layers.retention import Retention as Retention
from seqpar.layers.rope import rotary as rotary
from seqpar.layers.softmax_attention import SoftmaxAttention as SoftmaxAttention
