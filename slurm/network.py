"""Where the ranks of an attempt meet: an address that needs no name service, and a port that is free."""

import socket

import psutil

from hpc.errors import SiteError


def own_address(interface: str | None, *, is_alone: bool) -> tuple[str, str]:
    """(IPv4 address, interface) that the other ranks reach this node by. Raises SiteError.

    Names of nodes are not used: they may not resolve, or lead to a slow network. A job on one node stays on loopback.
    """
    addresses = {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    if is_alone and interface is None:
        return "127.0.0.1", "lo"
    if interface is not None:
        if interface not in addresses:
            raise SiteError(
                f"network_interface {interface!r} has no IPv4 address on {socket.gethostname()}: it has "
                f"{', '.join(addresses)}"
            )
        return addresses[interface], interface
    is_up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, address in addresses.items():
        if name in is_up and not address.startswith("127."):
            return address, name
    return "127.0.0.1", "lo"


def free_port(address: str) -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
