"""New checkpoints under a prefix, each found once: candidates → inspection → ledger, put together in `look`.

Nothing here imports torch before there is something new to read.
"""
