"""Small decoders built from the layers: what examples, tests and benchmarks train."""

from seqpar.models.decoder import Decoder as Decoder
from seqpar.models.decoder import DecoderConfig as DecoderConfig
from seqpar.models.decoder import Frame as Frame
from seqpar.models.hybrid import HybridConfig as HybridConfig
from seqpar.models.hybrid import HybridLM as HybridLM
from seqpar.models.hybrid import build as build
