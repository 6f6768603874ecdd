"""A registered model's card tells what a program can check, and promotion refuses one that says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from genmodels.families import build_objective
from infra import model_card as cards
from infra import registry, tracking
from infra.errors import BadRequest
from infra.mlflow_store import open_client
from infra.promotion import verify_version
from infra.run_logger import RunLogger
from pipelines.data.index import DatasetIndex
from pipelines.training.config import load_config
from pipelines.training.run_data import RunData
from tests.genmodels import tiny

LINEAGE = {"index_digest": "0123", "seed": 5, "steps": 3, "git_commit": "1e5", "init_from": None}
DATA = {"url": "s3://data/shards", "samples": 44, "index digest": "0123", "licence": "CC BY 4.0", "crop": "center"}
FACTS = {"data": DATA, "figures": {"val_loss": 0.25, "bad_samples": 2.0, "a|b": 1}, "license": "apache-2.0"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store whose model `tiny` has one version, by a run that logged what its card says."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        build_objective(tiny.gan_config()).export(folder / "export")
        run_id = tracking.start_run(None, "tests", "tiny", params={"run.seed": 5}, tags={"index_digest": "0123"})
        with RunLogger(None, run_id) as logger:
            logger.log(2, {"val_loss": 0.5})
            logger.log(3, {"val_loss": 0.2501})
        registry.register_export(None, run_id, folder / "export", "tiny", FACTS, "seed: 0\n", LINEAGE)
        yield folder


@pytest.fixture
def card(store: Path) -> Iterator[Path]:
    """The card of version 1; a test may spoil it, and the version's tags."""
    path = registry.resolve_model("models:/tiny/1").parents[1] / "README.md"
    content, tags = path.read_bytes(), dict(registry.find_version("models:/tiny/1").tags)
    yield path
    path.write_bytes(content)
    client = open_client()
    for key in registry.find_version("models:/tiny/1").tags.keys() - tags.keys():
        client.delete_model_version_tag("tiny", "1", key)
    registry.tag_version(None, "tiny", "1", tags)


def test_a_card_begins_with_facts_that_are_tags_of_the_version(card: Path) -> None:
    told, body = cards.split_card(card.read_text())
    version = verify_version(None, "tiny", "1")
    assert told["license"] == "apache-2.0" and told["data_license"] == "CC BY 4.0"
    assert told["figures"] == FACTS["figures"] and told["samples"] == 44 and told["seed"] == 5
    for key in (*LINEAGE, "samples", "export_digest"):
        assert version.tags[key] == str(told[key])
    assert body.startswith("# tiny\n") and version.description == body[:5000]


def test_a_card_says_what_not_to_do_and_what_the_data_was(card: Path) -> None:
    body = cards.split_card(card.read_text())[1]
    misuse = body.split("## What it should not be used for")[1].split("##")[0]
    for word in ("did not agree", "Deceit", "Evidence", "children", "licence"):
        assert word in misuse
    for row in ("| licence | CC BY 4.0 |", "| samples that could not be used | 2 |", "| crop | center |"):
        assert row in body
    assert "bad_samples" not in body.split("## Figures")[1] and "| git_commit | 1e5 |" in body.split("## Lineage")[1]
    assert "watching people" in cards.model_card("clip", {"layout": "CLIP"})


def _say(key: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        told, body = cards.split_card(path.read_text())
        front = yaml.safe_dump({**told, key: value})
        path.write_text(f"---\n{front}---\n\n{body}")

    return change


def _tag(key: str, value: str) -> Callable[[Path], None]:
    return lambda path: registry.tag_version(None, "tiny", "1", {key: value})


def _forget(path: Path) -> None:
    told, body = cards.split_card(path.read_text())
    del told["steps"]
    path.write_text(f"---\n{yaml.safe_dump(told)}---\n\n{body}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_say("index_digest", "4567"), "index_digest is 4567 there, and 0123 among the version's tags"),
        (_say("samples", 45), "samples is 45 there, and 44 among the version's tags"),
        (_tag("steps", "2000"), "steps is 3 there, and 2000 among the version's tags"),
        (_say("parent", "models:/other/1"), "parent is models:/other/1 there, and missing among the version's tags"),
        (_forget, r"it does not tell steps, and the version's tags do \(3\)"),
        (_say("figures", {"val_loss": 0.05}), "val_loss is 0.05 there, and 0.2501 in the run"),
        (_say("figures", {"recall": 0.99}), "its model card changed since it was registered"),
        (lambda path: path.write_text(path.read_text().replace("CC BY", "CC0")), "changed since it was registered"),
        (lambda path: path.write_text("# A new card\n"), "its model card tells no facts"),
        (lambda path: path.write_text("---\nseed: 5\n"), "its model card cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "its model card cannot be read"),
        (Path.unlink, "its model card is missing"),
    ],
)
def test_what_contradicts_the_registration_is_not_promoted(card: Path, spoil: Callable[..., Any], said: str) -> None:
    spoil(card)
    with pytest.raises(BadRequest, match=f"models:/tiny/1: .*{said}.* put back the card") as caught:
        verify_version(None, "tiny", "1")
    assert "\n" not in str(caught.value)


def test_a_card_and_tags_that_were_both_changed_are_held_against_the_run(card: Path) -> None:
    _say("seed", 6)(card)
    _tag("seed", "6")(card)
    with pytest.raises(BadRequest, match="seed is 6 there, and 5 in the run that trained it"):
        verify_version(None, "tiny", "1")
    _say("seed", 5)(card)
    _tag("seed", "5")(card)
    _say("index_digest", "4567")(card)
    _tag("index_digest", "4567")(card)
    with pytest.raises(BadRequest, match="index_digest is 4567 there, and 0123 in the run"):
        verify_version(None, "tiny", "1")


def test_versions_of_before_cards_were_checked_need_none(card: Path) -> None:
    body = cards.split_card(card.read_text())[1]
    open_client().delete_model_version_tag("tiny", "1", "card")
    for content in (body, ""):
        card.write_text(content)
        verify_version(None, "tiny", "1")
    card.unlink()
    verify_version(None, "tiny", "1")
    wrong = f"---\nseed: 6\nindex_digest: '0123'\n---\n\n{body}"
    card.write_text(wrong)
    with pytest.raises(BadRequest, match="put back the card"):
        verify_version(None, "tiny", "1")


def test_a_card_of_ones_own_gets_the_facts_too(store: Path) -> None:
    run_id = tracking.start_run(None, "tests", "own")
    registry.register_export(None, run_id, store / "export", "own", FACTS, "", LINEAGE, model_card="# By hand\n")
    assert verify_version(None, "own", "1").description == "# By hand\n"
    written = cards.with_front_matter("---\nseed: 5\n---\n\n# By hand\n", FACTS)
    assert cards.split_card(written) == ({"seed": 5}, "# By hand\n")


def test_what_a_run_says_of_its_data() -> None:
    config = load_config("ldm_demo", ["data.crop=random", "data.caption=json:text", "data.max_bad_share=0.01"])
    shards = (["a.tar", "b.tar", "b.tar"], np.array([5, 2, 2]), np.array([10240, 10240, 10240]))
    index = DatasetIndex("s3://bucket/train", "s3://bucket/train", "abc", 32, *shards)
    told = RunData(index).described(config)
    assert told["samples"] == 7 and told["index digest"] == "abc" and told["licence"] == cards.NOT_STATED
    assert told["crop"].startswith("random") and told["caption"] == "json:text"
    assert told["largest allowed share of bad samples"] == "0.01"
    assert "samples in an epoch" not in told
    mixed = RunData(index, new_share=4 / 9).described(config)  # b.tar is new, and comes twice
    assert (mixed["samples"], mixed["samples in an epoch"]) == (7, "9, 0.444 of them new")
    stated = RunData(index).described(load_config("ldm_demo", ["data.license=CC0"]))
    assert stated["licence"] == "CC0"
