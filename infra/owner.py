"""Which process holds a lease, and whether it still lives."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

import psutil


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
    if other["host"] == own["host"]:
        try:
            return psutil.Process(int(other["pid"])).create_time() == float(other["started"])
        except psutil.NoSuchProcess:
            return False
    return time.time() - float(other["renewed"]) < expiry_seconds
