"""Whether a server answers."""

import httpx

from deme_core.errors import InputError


def check_health(variable: str, address: str) -> None:
    """Raises InputError, within ten seconds, unless the server at ``address``, named by ``variable``, is healthy."""
    try:
        httpx.get(f"{address.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise InputError(f"{variable} {address} does not answer ({error}); start that server or unset it.") from error
