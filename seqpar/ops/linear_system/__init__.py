"""Linear time-invariant systems on one device, in stages, so that a scan over ranks can travel while they work."""

from seqpar.ops.linear_system.stages import LinearSystem as LinearSystem
from seqpar.ops.linear_system.stages import check as check
