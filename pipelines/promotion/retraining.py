"""What `retrain.py` does once its arguments are read: look for new data, train, judge, promote."""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import TYPE_CHECKING, Any

from infra.errors import BadRequest, check_summary, write_summary
from infra.mlflow_store import check_tracking, open_client
from infra.promotion import LEFT, champion_of, champions, history, verify_version
from infra.registry import find_version
from pipelines.data.index import DatasetIndex, load_index, refresh_index
from pipelines.evaluation.command import add_measuring_arguments, request_of
from pipelines.promotion.command import read_gates, show
from pipelines.promotion.gates import Gates
from pipelines.training.config import TrainConfig, load_config
from pipelines.training.run_folder import RunFolder, share_index

if TYPE_CHECKING:
    from pipelines.evaluation.plan import Request

_JUDGED = ("latent_diffusion", "gan", "attn_gan", "pix2pix")
_MODEL = re.compile(r"(models:/)?(?P<name>[^/:@']+)")


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """The arguments of `retrain.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="models:/NAME: of the champion, and of what is trained now")
    add("preset", help="YAML file, or a preset's name: how it is trained")
    add("overrides", nargs="*", metavar="dotted.key=value", help="replaces a value of the preset; values are YAML")
    add("--period", help="names the run, with the model (default: today's date, UTC); the same one goes on")
    add(
        "--from",
        dest="start",
        choices=("champion", "scratch"),
        help="weights to begin with (default: champion; from scratch where there is no champion)",
    )
    add("--samples", type=int, help="samples to train on, in whole steps (default: the preset's run.steps)")
    add("--hours", type=float, help="hours of training after which it ends, if it is not through before")
    add("--new-share", type=float, metavar="SHARE", help="share of an epoch that is new since the champion's training")
    add("--again", action="store_true", help="also on data on which a version was trained, and refused")
    add("--gates", metavar="FILE", help="YAML file with gates that replace the defaults of promote.py")
    add("--gate", action="append", default=[], metavar="key=value", help="replaces a gate; may be given more than once")
    add_measuring_arguments(parser, count=1000)
    add("--summary", metavar="FILE", help="write decision, reason, ids and figures as one JSON object")
    return parser


def retrain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and promote where there is something new; prints and returns the summary.

    Raises:
        BadRequest: something in the request cannot be used, or the run of this period is going on elsewhere.
        RunFailed: training failed; the message gives the first cause. The champion stays.
    """
    check_summary(arguments.summary)
    gates = read_gates(arguments.gates, arguments.gate)
    uri = check_tracking(arguments.tracking_uri)
    named = _MODEL.fullmatch(arguments.model)
    if named is None:
        raise BadRequest(
            f"{arguments.model}: write models:/NAME; which version is trained from is the champion's alias"
        )
    name = named["name"]
    request = request_of(arguments, f"models:/{name}")
    champion = _champion(uri, name)
    config, index = _configure(arguments, uri, name, champion)
    summary: dict[str, Any] = {"model": name, "run": config.run.name, "champion": champion, "promoted": False}
    _check_judgeable(config, request, gates)
    if champion is not None:
        verify_version(uri, name, champion)
    indexes = RunFolder.of(config).path("index")
    for url in (config.data.validation_url, config.data.other_url, config.data.other_validation_url):
        if url is not None:
            refresh_index(url, indexes)
    reason = _nothing_new(uri, name, champion, index.digest, arguments.again)
    if reason is not None:
        if refresh_index(config.data.url, indexes).digest != index.digest:
            reason += f"; run {config.run.name} is of the shards of then: name another --period for those of now"
        summary |= {"event": "nothing_new", "outcome": "nothing new", "reason": reason}
        print(f"{name}: {reason}", flush=True)
        write_summary(arguments.summary, summary)
        return summary
    print(f"{name}: {index.samples} samples, {_since(uri, name, champion)}; run {config.run.name}", flush=True)
    from pipelines.promotion.run import decide
    from pipelines.training.launch import train

    trained = train(config)
    version = trained["model_uri"].rpartition("/")[2]
    decided = decide(uri, name, version, gates, request)
    show(decided)
    summary |= decided | {"run_folder": trained["run_folder"], "mlflow_run_id": trained["mlflow_run_id"]}
    write_summary(arguments.summary, summary)
    return summary


def _champion(uri: str, name: str) -> str | None:
    """The champion's version; None where there is none, or no such model yet. Raises BadRequest where it was lost."""
    from mlflow.exceptions import MlflowException

    try:
        open_client(uri).get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    champion = champion_of(uri, name)
    if champion is None and (lost := champions(history(uri, name))):
        raise BadRequest(
            f"{name} had champion {lost[-1]}, and no version has that alias now: set it in MLflow, or promote another "
            "version by promote.py --anew"
        )
    return champion


def _configure(
    arguments: argparse.Namespace, uri: str, name: str, champion: str | None
) -> tuple[TrainConfig, DatasetIndex]:
    """The configuration of the period's run, and its shards; its first launch has settled both, and where it begins."""
    period = arguments.period or time.strftime("%Y-%m-%d", time.gmtime())
    own: dict[str, str | None] = {"run.name": f"{name}-{period}", "tracking.register_as": name, "tracking.uri": uri}
    own["run.continue_from"] = None  # of a preset that a search wrote
    fixed = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    theirs = tuple(assignment.partition("=")[0] + "=" for assignment in fixed)
    theirs += ("run.init_from=", "data.index=", "data.old_index=", "data.new_share=")
    if told := [text for text in arguments.overrides if text.startswith(theirs)]:
        raise BadRequest(
            f"retraining sets run.name, run.init_from, data.index and tracking itself: leave out {', '.join(told)}"
        )
    config = load_config(arguments.preset, [*arguments.overrides, *fixed])
    if arguments.samples is not None:
        if arguments.samples < config.data.global_batch_size:
            raise BadRequest(f"--samples {arguments.samples}: a step alone takes {config.data.global_batch_size}")
        fixed.append(f"run.steps={arguments.samples // config.data.global_batch_size}")
    if arguments.hours is not None:
        fixed.append(f"run.max_hours={arguments.hours}")
    folder = RunFolder.of(config)
    begun = folder.read("config.json")
    settled: dict[str, Any]
    if begun is None:
        tags = {} if champion is None else find_version(f"models:/{name}/{champion}", uri).tags
        if "run_folder" in tags:  # the index is there where the shards cannot be written to
            share_index(RunFolder(tags["run_folder"]), folder)
        index = refresh_index(config.data.url, folder.path("index"))
        start = None if champion is None or arguments.start == "scratch" else f"models:/{name}/{champion}"
        settled = {"run.init_from": start, "data.index": index.digest, "data.old_index": None, "data.new_share": None}
        if arguments.new_share is not None and champion is None:
            print(f"note: --new-share is left out, as {name} has no champion yet: all samples are new", flush=True)
        elif arguments.new_share is not None:
            settled |= {"data.old_index": tags.get("index_digest"), "data.new_share": arguments.new_share}
    else:
        index = load_index(config.data.url, folder.path("index"), progress=False, digest=begun["data"].get("index"))
        settled = {"run.init_from": begun["run"]["init_from"]}
        settled |= {f"data.{key}": begun["data"].get(key) for key in ("index", "old_index", "new_share")}
        _check_settled(arguments, settled, config.run.name)
    fixed += [f"{key}={json.dumps(value)}" for key, value in settled.items()]
    return load_config(arguments.preset, [*arguments.overrides, *fixed]), index


def _check_settled(arguments: argparse.Namespace, settled: dict[str, Any], run: str) -> None:
    """Raise BadRequest where a run is typed again with another beginning.

    One that found no champion began from scratch, with all shards new, whatever was asked for.
    """
    start, share = settled["run.init_from"], settled["data.new_share"]
    other = {
        "--from scratch": arguments.start == "scratch" and start is not None,
        f"--new-share {arguments.new_share}": arguments.new_share is not None
        and arguments.new_share != share
        and (share is not None or start is not None),
    }
    if told := [argument for argument, differs in other.items() if differs]:
        began = f"from {start or 'scratch'}" + ("" if share is None else f" with --new-share {share:g}")
        raise BadRequest(f"run {run} began {began}: leave out {' and '.join(told)}, or name another --period")


def _nothing_new(uri: str, name: str, champion: str | None, digest: str, again: bool) -> str | None:
    """Why there is nothing to train; None where there is something."""
    if champion is not None:
        known = find_version(f"models:/{name}/{champion}", uri).tags.get("index_digest")
        if known == digest:
            return f"nothing new since champion {champion} was trained"
    if again:
        return None
    for version in open_client(uri).search_model_versions(f"name = '{name}'"):
        told = [text for key, text in sorted(version.tags.items()) if key.startswith("decision.")]
        if version.tags.get("index_digest") == digest and told and told[-1].startswith(("refused:", f"{LEFT}:")):
            return f"nothing new since version {version.version}, which was {told[-1]} (train on them --again?)"
    return None


def _check_judgeable(config: TrainConfig, request: Request, gates: Gates) -> None:
    """Raise BadRequest where what is trained could not be judged: better now than after hours."""
    if config.objective.kind not in _JUDGED:
        raise BadRequest(
            f"objective.kind={config.objective.kind} is not promoted by gates, only {', '.join(_JUDGED)}: train and "
            "register it by its own pipeline"
        )
    if request.data is None and config.data.validation_url is None:
        raise BadRequest("name data.validation_url, or --data: held-out pictures to judge with")
    features = request.features or ("digits" if config.data.demo == "digits" else None)
    if features is None:
        raise BadRequest("name what looks at the pictures, such as --features dinov2:FOLDER_OR_HUB_NAME")
    conditional = getattr(config.objective, "conditional", False)
    if gates.captions and conditional and features != "digits" and request.clip is None:
        raise BadRequest("name what looks at captions: --clip FOLDER_OR_HUB_NAME (or --gate captions=false)")


def _since(uri: str, name: str, champion: str | None) -> str:
    if champion is None:
        return "and no champion yet"
    known = find_version(f"models:/{name}/{champion}", uri).tags.get("index_digest", "")
    return f"other than those of champion {champion} (index {known[:12]})"
