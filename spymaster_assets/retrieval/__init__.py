"""Exact nearest-neighbour retrieval of past events."""
