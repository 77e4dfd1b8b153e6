"""Whether a server answers."""

import time

import httpx

from deme_core.errors import InputError

_POLL_SECONDS = 0.2


def check_api_address(api_url: str) -> None:
    """Raises InputError if the URL of Prefect's server holds a password, which would get into messages and logs."""
    if "@" in api_url:
        raise InputError("PREFECT_API_URL must hold no password; use PREFECT_API_AUTH_STRING.")


def check_health(variable: str, address: str, *, patience: float = 0.0) -> str:
    """Returns once the server at ``address`` is healthy.

    So is one that wants a log-in, which is not given here, or knows no such page, as hosted ones.

    Args:
        variable: what names the server.
        address: its URL.
        patience: seconds to wait for a server that is starting.

    Returns:
        What its page of health says; nothing if it wants a log-in or has no such page.

    Raises:
        InputError: it is not healthy, said within ten seconds and ``patience``.
    """
    deadline = time.monotonic() + patience
    with httpx.Client(timeout=10) as client:
        while True:
            try:
                answer = client.get(f"{address.rstrip('/')}/health")
                if answer.is_client_error:
                    return ""
                return answer.raise_for_status().text
            except httpx.HTTPError as error:
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"{variable} {address} does not answer ({error}); start that server (deme up starts the local "
                        "stack's) or unset the variable."
                    ) from error
            time.sleep(_POLL_SECONDS)
