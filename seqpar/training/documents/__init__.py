"""Documents from files, packed into the sequences of training steps: see :class:`Documents`."""

from seqpar.training.documents.once import read_once as read_once
from seqpar.training.documents.opening import open_source as open_source
from seqpar.training.documents.packing import PACKINGS as PACKINGS
from seqpar.training.documents.packing import Packing as Packing
from seqpar.training.documents.packing import Piece as Piece
from seqpar.training.documents.packing import Place as Place
from seqpar.training.documents.source import Source as Source
from seqpar.training.documents.stream import Batch as Batch
from seqpar.training.documents.stream import Documents as Documents
from seqpar.training.documents.stream import Step as Step
from seqpar.training.documents.token_file import write_tokens as write_tokens
from seqpar.training.documents.words import Tokenizer as Tokenizer
from seqpar.training.documents.words import open_tokenizer as open_tokenizer
