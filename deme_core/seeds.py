"""Random seeds derived from names and counts, so that nothing depends on what was drawn before."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh generator on ``device``, seeded with ``derive_seed(*parts)``."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
