"""Decouple-then-Merge (arXiv 2410.06664): the method, without any orchestration."""
