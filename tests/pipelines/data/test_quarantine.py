"""Bad samples are counted, recorded once, and stop the run by the stated rule."""

import json
import math

import numpy as np
import pytest

import pipelines.data.quarantine as module
from infra.errors import BadRequest
from pipelines.data.quarantine import DataFailure, Quarantine, allowed_bad, read_quarantine


def test_each_bad_sample_is_recorded_once_also_after_a_restart(tmp_path):
    folder = str(tmp_path / "q")
    first = Quarantine(folder, rank=0, max_share=0.5)
    first.add(["a.tar/x", "a.tar/y/z"], ["", "caption: empty"], step=3)
    first.add(["a.tar/y/z", "b.tar/x"], ["caption: empty", "image: missing"], step=9)
    for rank in (0, 1):  # of other workers' records it knows nothing
        again = Quarantine(folder, rank, max_share=0.5)
        again.add(["a.tar/y/z"], ["caption: empty"], step=3)
        assert again.take() == (1, 1)
    assert first.take() == (3, 4) and first.take() == (0, 0)
    assert len(list((tmp_path / "q").iterdir())) == 3
    assert [record["key"] for record in read_quarantine(folder)] == ["a.tar/y/z", "b.tar/x"]
    (path,) = (tmp_path / "q").glob("step-00000003-rank-0000-*.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"shard": "a.tar", "key": "y/z", "reason": "caption: empty", "step": 3, "split": "train"}
    ]


def test_a_step_done_again_with_other_samples_keeps_the_earlier_record(tmp_path):
    for key in ("a.tar/x", "a.tar/y"):  # the second time by fewer workers, so that this one has others
        Quarantine(str(tmp_path), rank=0).record([key], ["image: missing"], step=3)
    assert {record["key"] for record in read_quarantine(str(tmp_path))} == {"a.tar/x", "a.tar/y"}


def test_the_second_set_has_its_own_records_and_is_named_in_the_failure(tmp_path):
    quarantine = Quarantine(str(tmp_path), 0, max_share=0, chunk_samples=8)
    quarantine.add(["a.tar/x"], ["image: missing"], 3)
    with pytest.raises(DataFailure, match=r"the last: shard a\.tar, key x: image"):
        quarantine.check()
    quarantine.add(["a.tar/x"], ["image: damaged"], 4, split="other train")
    with pytest.raises(DataFailure, match=r"the last: shard a\.tar of the other set, key x: image: damaged"):
        quarantine.check()
    found = [(record["split"], record["key"]) for record in read_quarantine(str(tmp_path))]
    assert found == [("train", "a.tar/x"), ("other train", "a.tar/x")]


def test_samples_read_outside_the_steps_are_recorded_but_not_counted(tmp_path):
    quarantine = Quarantine(str(tmp_path), 1)
    quarantine.record(["v.tar/a", "v.tar/b"], ["", "image: missing"], split="held_out")
    quarantine.record(["v.tar/c"], ["image: missing"], split="held_out")
    assert quarantine.take() == (0, 0)
    records = read_quarantine(str(tmp_path))
    assert {(record["key"], record["split"], record["step"]) for record in records} == {
        ("v.tar/b", "held_out", -1),
        ("v.tar/c", "held_out", -1),
    }


def test_nothing_is_read_or_written_while_all_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_filesystem", lambda url: pytest.fail("the folder was listed"))
    Quarantine(str(tmp_path / "q"), 0).add(["a.tar/x"], [""], 0)
    assert not (tmp_path / "q").exists()


def test_a_dataset_at_its_allowed_share_does_not_stop_the_run():
    """Samples bad with exactly the allowed probability, 200 runs of 200,000 samples, judged every 1,000."""
    share, random = 0.002, np.random.default_rng(0)
    read = np.arange(1000, 200_001, 1000)
    limits = np.array([allowed_bad(share, n, 32) for n in read.tolist()])
    bad = random.binomial(1000, share, (200, len(read))).cumsum(1)
    assert not (bad > limits).any()
    twice = random.binomial(1000, 2 * share, (200, len(read))).cumsum(1)
    assert (twice > limits).any(1).all()  # and twice the share always does


def test_the_rule_over_all_ranks():
    assert allowed_bad(0.01, 10_000, 32) == pytest.approx(100 + 30 + 32)
    assert allowed_bad(0.001, 0, 32) == 32  # a damaged chunk at the very beginning
    assert allowed_bad(0, 10**9, 32) == 0
    quarantine = Quarantine("/nowhere", 0, max_share=0.01)
    assert not quarantine.too_many(162, 10_000) and quarantine.too_many(163, 10_000)
    assert quarantine.too_many(math.ceil(0.011 * 10**7), 10**7)
    last = {"shard": "s.tar", "key": "k", "reason": "caption: empty", "split": "train"}
    assert str(quarantine.failure("163 of the 10000 samples read so far", last)) == (
        "163 of the 10000 samples read so far cannot be used (data.max_bad_share=0.01); the last: shard s.tar, key k: "
        "caption: empty; all are listed in /nowhere"
    )
    assert "the last" not in str(quarantine.failure("163", None))


def test_a_misnamed_caption_stops_at_once(tmp_path):
    quarantine = Quarantine(str(tmp_path), 2)
    quarantine.add([f"s.tar/{n}" for n in range(32)], ["caption: no txt member"] * 32, 0)
    quarantine.check()  # that could be one damaged chunk
    quarantine.add(["s.tar/33"], ["caption: no txt member"], 1)
    with pytest.raises(DataFailure, match=r"33 of the 33 .* rank 2 .*shard s\.tar, key 33: caption: no txt member"):
        quarantine.check()


def test_what_only_one_rank_meets_is_left_to_the_count_of_all(tmp_path):
    quarantine = Quarantine(str(tmp_path), 0)
    quarantine.add(["s.tar/good"], [""], 0)
    quarantine.add([f"s.tar/{n}" for n in range(100)], ["r"] * 100, 1)
    quarantine.check()


def test_a_share_of_zero_allows_none_and_a_share_of_one_allows_all(tmp_path):
    strict = Quarantine(str(tmp_path / "b"), 0, max_share=0)
    strict.check()
    strict.add(["s.tar/a"] * 99, ["r"] + [""] * 98, 0)
    with pytest.raises(DataFailure):
        strict.check()
    lax = Quarantine(str(tmp_path / "c"), 0, max_share=1)
    lax.add(["s.tar/a"] * 999, ["r"] * 999, 0)
    lax.check()
    with pytest.raises(BadRequest):
        Quarantine(str(tmp_path), 0, max_share=2)
