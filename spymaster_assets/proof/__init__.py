"""Proof by replay: what is stored must not change when the future is cut off or altered."""
