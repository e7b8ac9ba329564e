"""Layers that look at neighbours, grids, projections or pools."""
