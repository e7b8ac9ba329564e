"""Swap plans: the fate of every saved tensor, what it is predicted to cost, and an independent checker."""
