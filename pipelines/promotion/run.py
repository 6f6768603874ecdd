"""One promotion from beginning to end: verify, measure candidate and champion alike, judge, move, record."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from infra.errors import BadRequest
from infra.promotion import challenge, champion_of, champions, conclude, history, mend, verify_version, withdraw
from infra.registry_lease import RegistryLease
from pipelines.evaluation.plan import Request
from pipelines.evaluation.references import data_of, pinned_index
from pipelines.evaluation.run import evaluate_together
from pipelines.evaluation.subject import find_subject
from pipelines.promotion.command import tell_mended
from pipelines.promotion.gates import Evaluated, Gates, judge, reason_of


def decide(
    uri: str, name: str, version: str, gates: Gates, request: Request, dry_run: bool = False, anew: bool = False
) -> dict[str, Any]:
    """Judge a version and, unless `dry_run`, promote or refuse it; returns what was decided and why.

    With `anew` it is judged by itself, as where there is no champion.

    Raises:
        BadRequest: somebody else promotes the model, a version is not what was registered, or it cannot be measured.
    """
    with ExitStack() as held:
        lease = None if dry_run else held.enter_context(RegistryLease(uri, name))
        if lease is not None:
            tell_mended(name, mend(lease))
        verify_version(uri, name, version)
        champion = champion_of(uri, name)
        found: dict[str, Any] = {"model": name, "version": version, "before": champion, "champion": champion}
        if champion == version:
            reason = f"version {version} is the champion already"
            return {**found, "outcome": "already champion", "promoted": False, "reason": reason, "checks": []}
        compared = None if anew else champion
        if compared is not None:
            try:
                verify_version(uri, name, compared)
            except BadRequest as error:
                raise BadRequest(
                    f"nothing can be compared with the champion ({error}): --rollback, or --anew"
                ) from None
        elif not anew and (lost := champions(history(uri, name))):
            raise BadRequest(
                f"{name} had champion {lost[-1]}, and no version has that alias now: set it in MLflow, or judge this "
                "one by itself with --anew"
            )
        if lease is not None:
            challenge(lease, version)
            held.callback(withdraw, lease)
        request = replace(request, model=f"models:/{name}/{version}", tracking_uri=uri, log=not dry_run)
        request, conditional = _of_candidate(request)
        requests = {"candidate": request}
        if compared is not None:
            requests["champion"] = replace(request, model=f"models:/{name}/{compared}")
        summaries = dict(zip(requests, evaluate_together(list(requests.values())), strict=True))
        evaluated = {role: Evaluated.of(summary, conditional) for role, summary in summaries.items()}
        try:
            checks = judge(evaluated["candidate"], evaluated.get("champion"), gates)
        except ValueError as error:
            raise BadRequest(f"the gates cannot judge version {version}: {error}") from None
        passed = all(check.passed for check in checks)
        event = "refused" if not passed else "first" if compared is None else "better"
        reason = reason_of(checks)
        details = {
            "checks": [check._asdict() for check in checks],
            "gates": gates.model_dump(),
            **{role: {key: summary[key] for key in _KEPT} for role, summary in summaries.items()},
        }
        found |= {"event": event, "promoted": passed and not dry_run, "reason": reason, **details}
        if lease is None:
            return {**found, "champion": champion, "outcome": "would be promoted" if passed else "would be refused"}
        decision = conclude(lease, event, version, reason, details)
        return {**found, **asdict(decision), "outcome": "promoted" if passed else "refused"}


_KEPT = ("figures", "real", "digest", "report")


def _of_candidate(request: Request) -> tuple[Request, bool]:
    """With the data that the candidate was trained and is measured on, for the champion too; and whether it is told
    captions."""
    subject = find_subject(request.model, request.tracking_uri)
    if subject.kind != "text_to_image":
        raise BadRequest(f"{request.model} is of kind {subject.kind}: only models that draw are promoted by gates")
    data, training_data = data_of(subject, request.data, request.training_data)
    caption = request.caption
    if caption is None and subject.conditional and subject.config is not None:
        caption = subject.config.data.caption
    features = request.features
    if features is None and subject.config is not None and subject.config.data.demo == "digits":
        features = "digits"
    pinned = None if training_data is None else pinned_index(subject, training_data)
    told = replace(request, data=data, training_data=training_data, caption=caption, features=features)
    return replace(told, training_index=pinned), subject.conditional
