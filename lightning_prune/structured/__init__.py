"""Channels: which are coupled, which go, and how they are cut out of a network."""
