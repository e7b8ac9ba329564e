"""Tests of the bundled layers."""
