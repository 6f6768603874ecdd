"""Bad samples are counted, recorded once, and stop the run by the stated rule."""

import json

import pytest

from infra.errors import BadRequest
from pipelines.data.quarantine import DataFailure, Quarantine, read_quarantine


def test_each_bad_sample_is_recorded_once_also_after_a_restart(tmp_path):
    folder = str(tmp_path / "q")
    first = Quarantine(folder, rank=0, max_share=0.5)
    first.add(["a.tar/x", "a.tar/y/z"], ["", "caption: empty"], step=3)
    first.add(["a.tar/y/z", "b.tar/x"], ["caption: empty", "image: missing"], step=9)
    again = Quarantine(folder, rank=1, max_share=0.5)
    again.add(["a.tar/y/z"], ["caption: empty"], step=3)
    assert (first.read, first.bad, again.bad) == (4, 3, 1)
    assert [record["key"] for record in read_quarantine(folder)] == ["a.tar/y/z", "b.tar/x"]
    lines = (tmp_path / "q" / "step-00000003-rank-0000.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"shard": "a.tar", "key": "y/z", "reason": "caption: empty", "step": 3}
    ]


def test_the_rule_that_stops_a_run(tmp_path):
    quarantine = Quarantine(str(tmp_path), 2, max_share=0.01)
    quarantine.add(["s.tar/bad"] + ["s.tar/good"] * 3, ["image: missing", "", "", ""], 0)
    quarantine.check()  # one bad sample among the first hundred
    quarantine.add(["s.tar/good"] * 296, [""] * 296, 1)
    quarantine.add(["s.tar/worse"] * 2, ["image: missing"] * 2, 2)
    quarantine.check()  # 3 of 302
    quarantine.add(["s.tar/worst"], ["caption: empty"], 3)
    with pytest.raises(DataFailure, match=r"4 of 303 .*rank 2.*1\.000%.*s\.tar, key worst: caption: empty"):
        quarantine.check()


def test_two_bad_ones_at_the_beginning_stop_at_once_and_none_is_allowed_at_share_zero(tmp_path):
    quarantine = Quarantine(str(tmp_path / "a"), 0, max_share=0.001)
    quarantine.add(["s.tar/a", "s.tar/b"], ["r", "r"], 0)
    with pytest.raises(DataFailure):
        quarantine.check()
    strict = Quarantine(str(tmp_path / "b"), 0, max_share=0)
    strict.check()
    strict.add(["s.tar/a"] * 99, ["r"] + [""] * 98, 0)
    with pytest.raises(DataFailure):
        strict.check()
    with pytest.raises(BadRequest):
        Quarantine(str(tmp_path), 0, max_share=2)
