"""Layers as plain loops over tokens, in fp64."""
