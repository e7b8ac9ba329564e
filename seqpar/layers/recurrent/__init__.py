"""Recurrent networks: a state travels from rank to rank, and no ways through it compose."""
