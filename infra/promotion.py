"""Which version of a registered model is the champion: how that changes, and the record of every decision.

Aliases: `challenger` while a version is judged, `champion`, and `previous_champion`, where a rollback leads. All
changes are made under the model's lease, in an order in which every single step leaves a verified champion.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import BadRequest, RunFailed
from infra.exports import folder_digest
from infra.mlflow_store import open_client, patiently
from infra.model_card import contradiction, differs, split_card
from infra.registry import find_version, resolve_model
from infra.registry_lease import RegistryLease

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous_champion", "challenger"
_DECISION = "decision."  # tags of the registered model, and the number of the lease under which it was made
_LINEAGE = ("export_digest", "index_digest", "seed", "steps", "git_commit")
LEFT = "rolled back"  # what the tag of a version begins with that was the champion, and is left
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
    """The version, after its files were read anew and compared with what was registered, its model card too.

    Raises:
        BadRequest: its lineage is incomplete, its files are missing or others than those that were registered, or its
            card is, or says otherwise than the version's tags or the run that trained it.
    """
    found = find_version(f"models:/{name}/{version}", uri)
    named = f"models:/{name}/{version}"
    if missing := [key for key in _LINEAGE if found.tags.get(key) in (None, "", "None")]:
        raise BadRequest(f"{named}: its lineage lacks {', '.join(missing)}, so it is not promoted; train it again")
    try:
        folder = resolve_model(named, uri, anew=True)
        digest = folder_digest(folder)
    except OSError as error:
        raise BadRequest(f"{named}: its files cannot be read ({error})") from error
    if digest != found.tags["export_digest"]:
        raise BadRequest(f"{named}: its files changed since it was registered, so it is not promoted; train it again")
    if wrong := _wrong_card(uri, found, folder):
        raise BadRequest(
            f"{named}: {wrong}, so it is not promoted; put back the card (README.md beside MLmodel) and the tags as "
            "they were registered, or train it again"
        )
    return found


def _wrong_card(uri: str | None, version: ModelVersion, folder: Path) -> str | None:
    """What is wrong with the card of a version, in words. Those of before there was a tag `card` need none."""
    from mlflow.exceptions import MlflowException

    path, registered = folder.parents[1] / "README.md", version.tags.get("card")
    try:
        card = path.read_bytes().decode() if path.is_file() else ""
        told, _ = split_card(card)
    except (OSError, ValueError) as error:
        return f"its model card cannot be read ({error})"
    if not told:
        return None if registered is None else f"its model card {'tells no facts' if card else 'is missing'}"
    client = open_client(uri)
    try:
        run = patiently(client.get_run, version.run_id) if version.run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None  # runs may be cleared away, and the version stays
    tags, params = ({}, {}) if run is None else (run.data.tags, run.data.params)
    if wrong := contradiction(told, version.tags, tags, params):
        return f"its model card is contradicted: {wrong}"
    for name, value in told.get("figures", {}).items():
        if run is not None and name.startswith("val_") and name in run.data.metrics:
            history = patiently(client.get_metric_history, version.run_id, name)
            if differs(value, logged := [each.value for each in history if str(each.step) == version.tags["steps"]]):
                return f"its model card is contradicted: {name} is {value} there, and {logged[-1]:.6g} in the run"
    if registered is not None and registered != hashlib.sha256(card.encode()).hexdigest():
        return "its model card changed since it was registered"
    return None


def challenge(lease: RegistryLease, version: str) -> None:
    """Mark a verified version as the one that is judged."""
    lease.write(open_client(lease.uri).set_registered_model_alias, lease.name, CHALLENGER, version)


def withdraw(lease: RegistryLease) -> None:
    """No version is judged any more; what another promotion marked, which has taken over, stays."""
    try:
        _drop(lease, CHALLENGER)
    except RunFailed as error:
        print(f"{lease.name}: {error}", file=sys.stderr)


def conclude(
    lease: RegistryLease, event: str, version: str, reason: str, details: Mapping[str, Any] | None = None
) -> Decision:
    """Record a decision of a judged version and, where the event is first or better, make it the champion.

    `details` go, with the decision, to the run that trained the version, as promotion/decision-NUMBER.json. Raises
    RunFailed where another promotion took over; the champion is then whichever that one chose.
    """
    client, name = open_client(lease.uri), lease.name
    before = _aliases(lease.uri, name).get(CHAMPION)
    promoted = event in ("first", "better")
    begun = Decision(
        lease.number, event, version, promoted, reason, before, version if promoted else before, time.time(), "begun"
    )
    _record(lease, begun)
    if promoted:
        if before is not None and before != version and _verified(lease, before):
            lease.write(client.set_registered_model_alias, name, PREVIOUS, before)
        lease.write(client.set_registered_model_alias, name, CHAMPION, version)
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
    earlier = _earlier(lease, target)
    reason = f"rolled back from version {now} to version {target}"
    begun = Decision(lease.number, "rollback", target, False, reason, now, target, time.time(), "begun")
    _record(lease, begun)
    lease.write(client.set_registered_model_alias, name, CHAMPION, target)
    _set_previous(lease, earlier)
    return _finish(lease, begun, None)


def history(uri: str | None, name: str) -> list[Decision]:
    """All decisions, oldest first. Raises BadRequest where there is no such model."""
    tags = _model(uri, name).tags
    found = [Decision(**json.loads(text)) for key, text in tags.items() if key.startswith(_DECISION)]
    return sorted(found, key=lambda decision: decision.number)


def mend(lease: RegistryLease) -> list[Decision]:
    """Finish what decisions that were cut off left undone: what became of them can be seen from the aliases."""
    champion, mended = _aliases(lease.uri, lease.name).get(CHAMPION), []
    for decision in history(lease.uri, lease.name):
        if decision.state == "begun":
            happened = decision.champion == champion
            how = "went through, and was cut off before it was recorded" if happened else "was cut off before it"
            told = replace(
                decision,
                promoted=decision.promoted and happened,
                champion=champion,
                reason=f"{decision.reason} ({how})",
            )
            mended.append(_finish(lease, told, None))
    # Cut off between the two aliases, they are of one version.
    if mended and champion is not None and _aliases(lease.uri, lease.name).get(PREVIOUS) == champion:
        _set_previous(lease, _earlier(lease, champion))
    return mended


def champions(decisions: list[Decision]) -> list[str]:
    """Versions that a rollback leads to, one after the other, the latest champion last."""
    stack: list[str] = []
    for decision in decisions:
        if decision.event == "rollback" and decision.champion in stack:
            while stack[-1] != decision.champion:
                stack.pop()
        elif decision.promoted and decision.state == "done":
            stack.append(decision.version)
    return stack


def _earlier(lease: RegistryLease, version: str) -> str | None:
    """The champion before a version, by the record: the latest that is still there as it was registered."""
    stack = champions(history(lease.uri, lease.name))
    while stack and stack.pop() != version:
        continue
    return next((each for each in reversed(stack) if each != version and _verified(lease, each)), None)


def _verified(lease: RegistryLease, version: str) -> bool:
    try:
        verify_version(lease.uri, lease.name, version)
    except BadRequest:
        return False
    return True


def _set_previous(lease: RegistryLease, version: str | None) -> None:
    """Or none, where there was none."""
    if version is None:
        _drop(lease, PREVIOUS)
    else:
        lease.write(open_client(lease.uri).set_registered_model_alias, lease.name, PREVIOUS, version)


def _finish(lease: RegistryLease, decision: Decision, details: Mapping[str, Any] | None) -> Decision:
    """Tag the version, and the one that was left, keep the artifact, and then call the decision done."""
    from mlflow.exceptions import MlflowException

    client, name, done = open_client(lease.uri), lease.name, replace(decision, state="done")
    told = {done.version: f"{done.event}: {done.reason}"}
    if done.event == "rollback" and done.before is not None and done.champion == done.version:
        told[done.before] = f"{LEFT}: {done.reason}"
    for version, text in told.items():
        try:
            lease.write(client.set_model_version_tag, name, version, _key(done), text[:_TAG_LENGTH])
            run_id = find_version(f"models:/{name}/{version}", lease.uri).run_id
        except (BadRequest, MlflowException):  # it was deleted meanwhile
            continue
        artifact = f"promotion/{_key(done).replace('.', '-')}.json"
        kept = [] if details is not None or not run_id else patiently(client.list_artifacts, run_id, "promotion")
        if run_id and version == done.version and artifact not in [file.path for file in kept]:
            content = {**asdict(done), "details": dict(details or {})}
            lease.write(client.log_dict, run_id, content, artifact)
    _record(lease, done)
    return done


def _record(lease: RegistryLease, decision: Decision) -> None:
    room = _TAG_LENGTH - len(json.dumps(asdict(replace(decision, reason=""))))
    kept = replace(decision, reason=decision.reason[: room // 6])  # an escaped character takes six
    client = open_client(lease.uri)
    lease.write(client.set_registered_model_tag, lease.name, _key(decision), json.dumps(asdict(kept)))


def _key(decision: Decision) -> str:
    return f"{_DECISION}{decision.number:08d}"


def _drop(lease: RegistryLease, alias: str) -> None:
    if alias in _aliases(lease.uri, lease.name):
        lease.write(open_client(lease.uri).delete_registered_model_alias, lease.name, alias)


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
