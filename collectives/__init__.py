"""How information crosses the cuts of a sequence: groups of ranks, and the algorithms on top of them."""

if __name__ != "seqpar.collectives":
    raise ImportError("import it as seqpar.collectives: under two names there would be two of everything in it")

from seqpar.collectives.c10d import Ranks as Ranks
from seqpar.collectives.c10d import connect as connect
from seqpar.collectives.c10d import disconnect as disconnect
from seqpar.collectives.c10d import group_of as group_of
from seqpar.collectives.group import Alone as Alone
from seqpar.collectives.group import Group as Group
from seqpar.collectives.group import GroupError as GroupError
from seqpar.collectives.group import PeerFailed as PeerFailed
from seqpar.collectives.group import Pending as Pending
from seqpar.collectives.group import alone as alone
from seqpar.collectives.halo import Span as Span
from seqpar.collectives.halo import halo as halo
from seqpar.collectives.ledger import Ledger as Ledger
from seqpar.collectives.ring import ring as ring
from seqpar.collectives.scan import Summary as Summary
from seqpar.collectives.scan import exclusive_scan as exclusive_scan
from seqpar.collectives.threads import run_ranks as run_ranks
from seqpar.collectives.transition import Transition as Transition
