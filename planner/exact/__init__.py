"""The optimum of small problems: programs for solvers, and dynamic programs over sets."""
