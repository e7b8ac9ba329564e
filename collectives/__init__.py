"""How information crosses the cuts of a sequence: groups of ranks, and the algorithms on top of them."""

from collectives.c10d import connect as connect
from collectives.c10d import disconnect as disconnect
from collectives.c10d import group_of as group_of
from collectives.group import Alone as Alone
from collectives.group import Group as Group
from collectives.group import GroupError as GroupError
from collectives.group import PeerFailed as PeerFailed
from collectives.group import Pending as Pending
from collectives.group import alone as alone
from collectives.halo import Span as Span
from collectives.halo import halo as halo
from collectives.ledger import Ledger as Ledger
from collectives.ring import ring as ring
from collectives.scan import Summary as Summary
from collectives.scan import exclusive_scan as exclusive_scan
from collectives.threads import run_ranks as run_ranks
from collectives.transition import Transition as Transition
