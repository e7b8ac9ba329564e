"""Elementwise linear recurrences on one device, in stages, so that a scan over ranks can travel while they work."""

from seqpar.ops.diagonal_scan.stages import DiagonalScan as DiagonalScan
from seqpar.ops.diagonal_scan.stages import SelectiveScan as SelectiveScan
