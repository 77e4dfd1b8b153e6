"""Measurements that need a GPU for numbers worth keeping, in pieces of minutes."""
