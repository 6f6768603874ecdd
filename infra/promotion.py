"""Which version of a registered model is the champion: how that changes, and the record of every decision.

Aliases: `challenger` while a version is judged, `champion`, and `previous_champion`, where a rollback leads. All
changes are made under the model's lease, in an order in which every single step leaves a verified champion.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from infra.errors import BadRequest
from infra.exports import folder_digest
from infra.mlflow_store import open_client, patiently
from infra.registry import find_version, resolve_model
from infra.registry_lease import RegistryLease

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous_champion", "challenger"
_DECISION = "decision."  # tags of the registered model, and the number of the lease under which it was made
_LINEAGE = ("export_digest", "index_digest", "seed", "steps", "git_commit")
_TAG_LENGTH = 5000  # characters that the registry stores


@dataclass(frozen=True)
class Decision:
    """What was decided of a version.

    Attributes:
        number: of the lease; it grows from decision to decision.
        event: first, better, refused or rollback.
        version: that was judged, or gone back to.
        promoted: whether a new version passed the gates and became the champion.
        reason: in one sentence.
        before, champion: the champion's version before and after; None where there was none.
        time: seconds since 1970.
        state: `begun` before the aliases move, `done` after.
    """

    number: int
    event: str
    version: str
    promoted: bool
    reason: str
    before: str | None
    champion: str | None
    time: float
    state: str = "done"


def champion_of(uri: str | None, name: str) -> str | None:
    """The champion's version; None where there is none. Raises BadRequest where there is no such model."""
    return _aliases(uri, name).get(CHAMPION)


def verify_version(uri: str | None, name: str, version: str) -> ModelVersion:
    """The version, after its files were read anew and compared with what was registered.

    Raises:
        BadRequest: its lineage is incomplete, or its files are missing or others than those that were registered.
    """
    found = find_version(f"models:/{name}/{version}", uri)
    named = f"models:/{name}/{version}"
    if missing := [key for key in _LINEAGE if found.tags.get(key) in (None, "", "None")]:
        raise BadRequest(f"{named}: its lineage lacks {', '.join(missing)}, so it is not promoted; train it again")
    try:
        digest = folder_digest(resolve_model(named, uri, anew=True))
    except OSError as error:
        raise BadRequest(f"{named}: its files cannot be read ({error})") from error
    if digest != found.tags["export_digest"]:
        raise BadRequest(f"{named}: its files changed since it was registered, so it is not promoted; train it again")
    return found


def challenge(lease: RegistryLease, version: str) -> None:
    """Mark a verified version as the one that is judged."""
    lease.check()
    patiently(open_client(lease.uri).set_registered_model_alias, lease.name, CHALLENGER, version)


def withdraw(lease: RegistryLease) -> None:
    """No version is judged any more."""
    _drop(lease, CHALLENGER)


def conclude(
    lease: RegistryLease, event: str, version: str, reason: str, details: Mapping[str, Any] | None = None
) -> Decision:
    """Record a decision of a judged version and, where the event is first or better, make it the champion.

    `details` go, with the decision, to the run that trained the version, as promotion/decision-NUMBER.json.
    """
    client, name = open_client(lease.uri), lease.name
    before = _aliases(lease.uri, name).get(CHAMPION)
    promoted = event in ("first", "better")
    begun = Decision(
        lease.number, event, version, promoted, reason, before, version if promoted else before, time.time(), "begun"
    )
    lease.check()
    _record(lease, begun)
    if promoted:
        if before is not None and before != version:
            patiently(client.set_registered_model_alias, name, PREVIOUS, before)
        lease.check()
        patiently(client.set_registered_model_alias, name, CHAMPION, version)
    withdraw(lease)
    return _finish(lease, begun, details)


def roll_back(lease: RegistryLease) -> Decision:
    """Make the previous champion the champion again; the one before it, where there is one, becomes the previous.

    Raises:
        BadRequest: there is none to go back to, or its files are not those that were registered.
    """
    client, name = open_client(lease.uri), lease.name
    aliases = _aliases(lease.uri, name)
    now, target = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if target is None or target == now:
        raise BadRequest(f"{name}: there is no previous champion to go back to")
    verify_version(lease.uri, name, target)
    reason = f"rolled back from version {now} to version {target}"
    begun = Decision(lease.number, "rollback", target, False, reason, now, target, time.time(), "begun")
    lease.check()
    _record(lease, begun)
    patiently(client.set_registered_model_alias, name, CHAMPION, target)
    earlier = _champion_before(history(lease.uri, name), target)
    if earlier is None:
        _drop(lease, PREVIOUS)
    else:
        patiently(client.set_registered_model_alias, name, PREVIOUS, earlier)
    return _finish(lease, begun, None)


def history(uri: str | None, name: str) -> list[Decision]:
    """All decisions, oldest first. Raises BadRequest where there is no such model."""
    tags = _model(uri, name).tags
    found = [Decision(**json.loads(text)) for key, text in tags.items() if key.startswith(_DECISION)]
    return sorted(found, key=lambda decision: decision.number)


def mend(lease: RegistryLease) -> list[Decision]:
    """Finish the record of decisions that were cut off: what became of them can be seen from the aliases."""
    champion, mended = _aliases(lease.uri, lease.name).get(CHAMPION), []
    for decision in history(lease.uri, lease.name):
        if decision.state == "begun":
            happened = decision.champion == champion
            told = Decision(
                **{
                    **asdict(decision),
                    "promoted": decision.promoted and happened,
                    "champion": champion,
                    "reason": f"{decision.reason} ({'finished' if happened else 'cut off'} before it was recorded)",
                    "state": "done",
                }
            )
            _record(lease, told)
            mended.append(told)
    return mended


def _champion_before(decisions: list[Decision], version: str) -> str | None:
    """Whom a version replaced when it was promoted."""
    for decision in reversed(decisions):
        if decision.promoted and decision.version == version and decision.state == "done":
            return decision.before
    return None


def _finish(lease: RegistryLease, begun: Decision, details: Mapping[str, Any] | None) -> Decision:
    done = Decision(**{**asdict(begun), "state": "done"})
    _record(lease, done)
    client = open_client(lease.uri)
    told = f"{done.event}: {done.reason}"[:_TAG_LENGTH]
    patiently(client.set_model_version_tag, lease.name, done.version, f"{_DECISION}{done.number:08d}", told)
    run_id = find_version(f"models:/{lease.name}/{done.version}", lease.uri).run_id
    if run_id:
        content = {**asdict(done), "details": dict(details or {})}
        patiently(client.log_dict, run_id, content, f"promotion/decision-{done.number:08d}.json")
    return done


def _record(lease: RegistryLease, decision: Decision) -> None:
    room = _TAG_LENGTH - len(json.dumps(asdict(Decision(**{**asdict(decision), "reason": ""}))))
    kept = Decision(**{**asdict(decision), "reason": decision.reason[: room // 6]})  # an escaped character takes six
    text = json.dumps(asdict(kept))
    client = open_client(lease.uri)
    patiently(client.set_registered_model_tag, lease.name, f"{_DECISION}{decision.number:08d}", text)


def _drop(lease: RegistryLease, alias: str) -> None:
    if alias in _aliases(lease.uri, lease.name):
        patiently(open_client(lease.uri).delete_registered_model_alias, lease.name, alias)


def _aliases(uri: str | None, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in _model(uri, name).aliases.items()}


def _model(uri: str | None, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    try:
        return patiently(client.get_registered_model, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise BadRequest(f"there is no registered model {name!r}") from error
