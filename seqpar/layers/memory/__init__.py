"""Memories that learn while they read: their weights are the state that travels."""
