"""Which failure is told when many workers fail, and how."""

from __future__ import annotations

import pytest

from pipelines.training.board import describe_failure, figures_text, first_cause


def failure(rank: int, error: str, time: float, fatal: bool = False, **more: object) -> dict:
    entry = {"rank": rank, "node": "node-a", "step": 12, "phase": None, "shards": [], "traceback": "Traceback: …"}
    return entry | {"error": error, "time": time, "fatal": fatal, **more}


PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
CAUSE = "ValueError: shard 00003.tar: the checksum is another"


def test_nothing_failed():
    assert first_cause([]) is None


@pytest.mark.parametrize("fatal", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_who_lost_a_peer_came_later_whoever_noticed_first(fatal, reverse):
    cause = failure(1, CAUSE, time=20.0, fatal=fatal)
    failures = [failure(0, PEER, time=10.0), cause, failure(2, PEER, time=11.0)]
    assert first_cause(failures[::-1] if reverse else failures) == cause


def test_what_a_restart_would_repeat_comes_before_what_may_pass():
    passing, fatal = failure(0, "OSError: disk is full", time=1.0), failure(1, CAUSE, time=9.0, fatal=True)
    assert first_cause([passing, fatal]) == fatal


def test_among_equals_the_earliest():
    early, late = failure(0, CAUSE, time=1.0, fatal=True), failure(1, CAUSE, time=2.0, fatal=True)
    assert first_cause([late, early]) == early
    only_peers = [failure(0, PEER, time=2.0), failure(1, PEER, time=1.0)]
    assert first_cause(only_peers) == only_peers[1]


def test_a_failure_names_worker_step_phase_and_shards():
    text = describe_failure(failure(3, CAUSE, 1.0, phase="generator", shards=["00001.tar", "00003.tar"]))
    first, *rest = text.splitlines()
    assert first == f"worker 3 on node-a, step 12, phase generator, shards 00001.tar, 00003.tar: {CAUSE}"
    assert rest == ["Traceback: …"]
    assert describe_failure(failure(0, PEER, 1.0)).startswith(f"worker 0 on node-a, step 12: {PEER}")


def test_figures_beside_the_bar():
    entry = {"step": 3, "doing": "saving", "loss": 0.123456, "val_loss": 0.2, "samples_per_second": 99.6}
    assert figures_text(entry) == "saving  loss 0.1235  val 0.2000  100 samples/s"
    assert figures_text({"step": 3, "doing": "", "loss": 1.0}) == "loss 1.0000"
