"""Tests of the training example."""
