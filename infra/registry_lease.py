"""One promotion at a time for a registered model, wherever it is typed: a lease that the registry itself holds.

Setting an alias in MLflow is last-write-wins, but creating a registered model of a name is not: one caller creates it,
all others are told that it exists. So a lease is a registered model NAME.lease-N, and N, which only grows, is its
fencing token: who finds a higher number than its own has lost the lease, however long it slept. N of the last lease
that was given back is the tag `lease` of the model itself.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from infra.errors import BadRequest, RunFailed
from infra.mlflow_store import open_client, patiently
from infra.owner import is_alive, new_owner
from infra.registry import LEASE

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
_GIVEN_BACK = "lease"  # tag of the model: number of the last lease that ended in order
_RENEWED = "renewed"


class RegistryLease:
    """Held in a `with` block; renewed by a thread, and free again after EXPIRY_SECONDS without renewal.

    What a holder that was killed on this machine left behind is taken over at once.
    """

    def __init__(self, uri: str | None, name: str) -> None:
        self.uri, self.name, self.number = uri, name, 0
        self.owner = new_owner()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> RegistryLease:
        """Raises BadRequest where another promotion of the model is going on."""
        client = open_client(self.uri)
        while not self._claim(client):
            pass
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        client = open_client(self.uri)
        try:
            if self._newest(client) == self.number:
                # The number first: who claims meanwhile must find it taken, in one way or the other.
                patiently(client.set_registered_model_tag, self.name, _GIVEN_BACK, str(self.number))
                for number in self._numbers(client):
                    if number <= self.number:
                        _delete(client, self._entity(number))
        except Exception as error:  # what ends the promotion matters more, and the lease ends by itself
            print(f"{self.name}: the lease could not be given back ({error})", file=sys.stderr)

    def check(self) -> None:
        """Raises RunFailed where another promotion has taken over."""
        client = open_client(self.uri)
        if self.number not in self._numbers(client) or self._newest(client) != self.number:
            raise RunFailed(f"another promotion of {self.name} took over while this one was cut off: nothing was moved")

    def _claim(self, client: MlflowClient) -> bool:
        """Whether this promotion holds the lease now; False where somebody else was faster, to be looked at again."""
        newest = self._newest(client)
        held = self._holder(client, newest)
        if held is not None and is_alive(held, self.owner, EXPIRY_SECONDS):
            raise BadRequest(
                f"{self.name} is being promoted by process {held['pid']} on {held['host']}: wait for it, or stop it "
                f"and try again after {EXPIRY_SECONDS:.0f} s"
            )
        number = newest + 1
        if not _create(client, self._entity(number), {**self.owner, _RENEWED: str(time.time())}):
            return False
        if self._newest(client) != number:  # what was read first was old
            _delete(client, self._entity(number))
            return False
        self.number = number
        return True

    def _entity(self, number: int) -> str:
        return f"{self.name}.lease-{number:08d}"

    def _numbers(self, client: MlflowClient) -> list[int]:
        """Of the leases that there are."""
        found = patiently(client.search_registered_models, f"name LIKE '{self.name}.lease-%'")
        return [int(match[1]) for model in found if (match := LEASE.search(model.name))]

    def _newest(self, client: MlflowClient) -> int:
        """The highest number that there is or was."""
        given_back = patiently(client.get_registered_model, self.name).tags.get(_GIVEN_BACK, "0")
        return max([int(given_back), *self._numbers(client)])

    def _holder(self, client: MlflowClient, number: int) -> dict[str, str] | None:
        if number not in self._numbers(client):
            return None
        return dict(patiently(client.get_registered_model, self._entity(number)).tags)

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                client = open_client(self.uri)
                patiently(client.set_registered_model_tag, self._entity(self.number), _RENEWED, str(time.time()))
            except Exception as error:  # of the server, which may answer again before the lease expires
                print(f"{self.name}: the lease could not be renewed ({error}); trying again", file=sys.stderr)


def _create(client: MlflowClient, entity: str, tags: dict[str, str]) -> bool:
    """Whether it was created by this call."""
    from mlflow.exceptions import MlflowException

    try:
        patiently(client.create_registered_model, entity, tags=tags, description="a promotion is going on")
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
