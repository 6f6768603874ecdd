"""Which process holds a lease, and whether it still lives."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

import psutil

_HUNG = 10  # times the expiry: a process of this machine that has not renewed its lease for so long is not at work


def new_owner() -> dict[str, str]:
    """What tells this process from all others, for the record of a lease."""
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "started": repr(psutil.Process().create_time()),
    }


def is_alive(other: Mapping[str, Any], own: Mapping[str, Any], expiry_seconds: float) -> bool:
    """Whether the holder of a lease, renewed at time `other["renewed"]`, still lives.

    On this machine it is looked for among the processes; elsewhere it has to renew its lease in time.
    """
    since = time.time() - float(other["renewed"])
    if other["host"] != own["host"]:
        return since < expiry_seconds
    try:
        process = psutil.Process(int(other["pid"]))
        gone = process.status() == psutil.STATUS_ZOMBIE  # killed, and nobody took note
        return not gone and process.create_time() == float(other["started"]) and since < _HUNG * expiry_seconds
    except psutil.NoSuchProcess:
        return False
