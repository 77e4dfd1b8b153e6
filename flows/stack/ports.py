"""Ports on loopback: free ones, and those a user asks for."""

import random
import socket
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from deme_core.errors import InputError
from flows.stack.processes import who_listens

# The usual ports of each service, tried first.
_USUAL = {"prefect": 4200, "mlflow": 5001, "s3": 8333}
# SeaweedFS adds this to each of its ports for gRPC.
_GRPC_OFFSET = 10_000
_SEAWEEDFS = ("s3", "s3_master", "s3_volume", "s3_filer", "s3_admin")
NAMES = ("prefect", "mlflow", *_SEAWEEDFS)


def choose_ports(
    given: Mapping[str, int],
    kept: Mapping[str, int],
    running: Iterable[str] = (),
    foreign: Mapping[int, str] = MappingProxyType({}),
) -> dict[str, int]:
    """Returns a port for every name: as given, else as it was before, else the usual one, else any that is free.

    Args:
        given: ports the user asks for.
        kept: ports of the last start.
        running: services that run already and keep their ports.
        foreign: ports that are not ours though nothing may listen there, and whose they are.

    Raises:
        InputError: a port that was asked for is taken by another program; says by which.
    """
    ports = {name: port for name, port in kept.items() if name.partition("_")[0] in set(running)}
    for name in NAMES:
        if name in ports:
            if given.get(name, ports[name]) != ports[name]:
                raise InputError(f"{name} runs already, on port {ports[name]}; `deme down` first to move it.")
            continue
        if name in given:
            if given[name] in foreign or not is_free(given[name], name):
                owner = foreign.get(given[name]) or _owner(given[name])
                raise InputError(f"Port {given[name]} for {name} is taken by {owner}; choose another.")
            ports[name] = given[name]
            continue
        preferred = [port for port in (kept.get(name), _USUAL.get(name)) if port]
        candidates = [*preferred, *random.SystemRandom().sample(range(11_000, 20_000), 200)]
        ports[name] = next(p for p in candidates if p not in {*ports.values(), *foreign} and is_free(p, name))
    return ports


def is_free(port: int, name: str) -> bool:
    """Whether nothing listens on a port, nor on the gRPC port that SeaweedFS derives from it."""
    return all(_can_bind(p) for p in ([port, port + _GRPC_OFFSET] if name in _SEAWEEDFS else [port]))


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: what merely lingers after a close does not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _owner(port: int) -> str:
    return who_listens(port) or "another program"
