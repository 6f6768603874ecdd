"""`ray start`, kept to the loopback interface: python infra/stack/ray_node.py --head --node-ip-address=127.0.0.1 …

On Linux `ray start` silently trades 127.0.0.1 for the machine's outward address, where anyone in the network could
knock. Only Ray's setting for Windows and macOS (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0) leaves the address as given, and
that one refuses worker nodes. So it is set for all that a node starts (jobs connect through it), and not for this
command itself. `ray start` would also open the port of the Ray client, which nobody uses here: it is left closed.
"""

from __future__ import annotations

import os

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray._private import ray_constants
from ray.scripts import scripts


def main() -> None:
    ray_constants.ENABLE_RAY_CLUSTER = True  # worker nodes too
    scripts.services.resolve_ip_for_localhost = lambda host: host
    scripts.get_ray_client_dependency_error = lambda: "not wanted"
    scripts.start()


if __name__ == "__main__":
    main()
