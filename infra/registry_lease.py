"""One promotion at a time for a registered model, wherever it is typed: a lease that the registry itself holds.

Setting an alias in MLflow is last-write-wins, but creating a registered model of a name is not: one caller creates it,
all others are told that it exists. So a lease is a registered model NAME.lease-N. N is its fencing token and only
grows: the entity of the highest number stays, marked as released, and who finds a higher number than its own has lost
the lease, however long it slept.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from infra.errors import BadRequest, RunFailed
from infra.mlflow_store import open_client, patiently
from infra.owner import is_alive, new_owner
from infra.registry import LEASE

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
_MARGIN_SECONDS = 20.0  # before the expiry, from which on nothing is written any more
_RENEWED, _RELEASED = "renewed", "released"


class RegistryLease:
    """Held in a `with` block; renewed by a thread, and free again after EXPIRY_SECONDS without renewal.

    What a holder that was killed on this machine left behind is taken over at once.
    """

    def __init__(self, uri: str | None, name: str) -> None:
        self.uri, self.name, self.number = uri, name, 0
        self.owner = new_owner()
        self._renewed = 0.0  # by a clock that nobody sets
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> RegistryLease:
        """Raises BadRequest where another promotion of the model is going on."""
        client, deadline = open_client(self.uri), time.monotonic() + EXPIRY_SECONDS
        while not self._claim(client):
            if time.monotonic() > deadline:
                raise BadRequest(f"{self.name}: others promote it all the time; try again later")
            time.sleep(0.2)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        client = open_client(self.uri)
        try:
            patiently(client.set_registered_model_tag, self._entity(self.number), _RELEASED, "yes")
            for number in self._numbers(client):
                if number < self.number:
                    _delete(client, self._entity(number))
        except Exception as error:  # what ends the promotion matters more, and the lease ends by itself
            print(f"{self.name}: the lease could not be given back ({error})", file=sys.stderr)

    def check(self) -> None:
        """Raises RunFailed where another promotion has taken over, or soon may."""
        if time.monotonic() - self._renewed > EXPIRY_SECONDS - _MARGIN_SECONDS:
            raise RunFailed(f"the lease of {self.name} could not be renewed in time: promote again")
        if self._newest(open_client(self.uri)) != self.number:
            raise RunFailed(f"another promotion of {self.name} took over while this one was cut off")

    def write(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """`call(*args, **kwargs)` while the lease is held. Raises RunFailed, before it, where it is not."""
        self.check()
        return patiently(call, *args, **kwargs)

    def _claim(self, client: MlflowClient) -> bool:
        """Whether this promotion holds the lease now; False where somebody else was faster, to be looked at again."""
        newest = self._newest(client)
        held = self._holder(client, newest)
        if held is not None and _RELEASED not in held and is_alive(held, self.owner, EXPIRY_SECONDS):
            raise BadRequest(
                f"{self.name} is being promoted by process {held['pid']} on {held['host']}: wait for it, or stop it "
                f"and try again after {EXPIRY_SECONDS:.0f} s"
            )
        number, asked = newest + 1, time.monotonic()
        if not _create(client, self._entity(number), {**self.owner, _RENEWED: str(time.time())}):
            return False
        if self._newest(client) != number:  # what was read first was old: others came, and went, in between
            _delete(client, self._entity(number))
            return False
        self.number, self._renewed = number, asked
        return True

    def _entity(self, number: int) -> str:
        return f"{self.name}.lease-{number:08d}"

    def _numbers(self, client: MlflowClient) -> list[int]:
        """Of the leases that there are."""
        # LIKE takes _ for any character, and not every database heeds case.
        found = patiently(client.search_registered_models, f"name LIKE '{self.name}.lease-%'")
        own = (model.name for model in found if model.name.startswith(f"{self.name}.lease-"))
        return [int(match[1]) for name in own if (match := LEASE.search(name))]

    def _newest(self, client: MlflowClient) -> int:
        return max(self._numbers(client), default=0)

    def _holder(self, client: MlflowClient, number: int) -> dict[str, str] | None:
        from mlflow.exceptions import MlflowException

        if number == 0:
            return None
        try:
            return dict(patiently(client.get_registered_model, self._entity(number)).tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # a newer one has removed it: the claim will find that out

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            asked = time.monotonic()
            try:
                client = open_client(self.uri)
                patiently(client.set_registered_model_tag, self._entity(self.number), _RENEWED, str(time.time()))
                self._renewed = asked
            except Exception as error:  # of the server, which may answer again before the lease expires
                print(f"{self.name}: the lease could not be renewed ({error}); trying again", file=sys.stderr)


def _create(client: MlflowClient, entity: str, tags: dict[str, str]) -> bool:
    """Whether it was created by this call."""
    from mlflow.exceptions import MlflowException

    told = "No model: who promotes, and that one at a time does."
    try:
        patiently(client.create_registered_model, entity, tags=tags, description=told)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _delete(client: MlflowClient, entity: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        patiently(client.delete_registered_model, entity)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
