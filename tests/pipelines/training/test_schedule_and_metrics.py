"""Learning rates against their closed forms, and figures against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from genmodels.objective import Mean
from pipelines.training.config import OptimizerConfig
from pipelines.training.metrics import (
    MeanLog,
    Throughput,
    device_peak_flops,
    finite,
    flop_utilisation,
    memory_mib,
)
from pipelines.training.schedule import learning_rate
from tests.processes import on_ranks

STEPS = 110


def rates(**settings: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"learning_rate": 0.5, "warmup_steps": 10, **settings})
    return [learning_rate(optimizer, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_a_straight_line_that_ends_at_the_rate(lr_schedule):
    assert rates(lr_schedule=lr_schedule)[:10] == pytest.approx([0.05 * (n + 1) for n in range(10)], abs=1e-15)


def test_after_warm_up():
    passed = [n / 100 for n in range(100)]
    assert rates()[10:] == [0.5] * 100
    linear = [0.5 * (0.2 + 0.8 * (1 - t)) for t in passed]
    assert rates(lr_schedule="linear", final_lr_ratio=0.2)[10:] == pytest.approx(linear, abs=1e-12)
    cosine = [0.5 * (0.2 + 0.8 * math.cos(math.pi * t / 2) ** 2) for t in passed]  # ½(1 + cos x) = cos²(x/2)
    assert rates(lr_schedule="cosine", final_lr_ratio=0.2)[10:] == pytest.approx(cosine, abs=1e-12)


def test_torch_falls_by_the_same_cosine():
    parameter = torch.nn.Parameter(torch.zeros(()))
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], 0.5), STEPS, eta_min=0.1)
    ours = rates(lr_schedule="cosine", warmup_steps=0, final_lr_ratio=0.2)
    for step in range(STEPS):
        assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        theirs.optimizer.step()
        theirs.step()


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine"])
def test_the_end_and_beyond(lr_schedule):
    optimizer = OptimizerConfig(learning_rate=0.5, lr_schedule=lr_schedule, warmup_steps=5, final_lr_ratio=0.1)
    assert learning_rate(optimizer, 50, 50) == pytest.approx(0.05)
    assert learning_rate(optimizer, 70, 50) == pytest.approx(0.05)
    assert learning_rate(optimizer, 4, 5) == 0.5  # a run that is all warm-up


def test_means_add_up_before_they_are_divided():
    log = MeanLog()
    log.add({"loss": Mean.of(torch.tensor([1.0, 2.0, 3.0]))})
    log.add({"loss": Mean.of(torch.tensor([10.0]))}, prefix="val_")
    log.add({"loss": Mean.of(torch.tensor([4.0, 100.0]), torch.tensor([1.0, 0.0]))})
    log.add({"empty": Mean.of(torch.tensor([5.0]), torch.tensor([0.0]))})
    assert log.read() == {"loss": 10 / 4, "val_loss": 10.0}
    assert log.read() == {}


def test_means_keep_small_parts_of_large_sums():
    log = MeanLog()
    for _ in range(1000):
        log.add({"loss": Mean.of(torch.full((64,), 0.1))})
    assert log.read()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-7)


def _mean_on_rank(rank: int, world_size: int) -> dict[str, float]:
    log = MeanLog()
    log.add({"loss": Mean.of(torch.arange(float(rank + 1)))})  # rank 0: 0; rank 1: 0, 1
    log.add({"one": Mean.of(torch.tensor([7.0]), torch.tensor([float(rank)]))})  # rank 0 counts nothing
    return log.read()


@pytest.mark.slow
def test_ranks_add_up_too():
    assert on_ranks(2, _mean_on_rank) == [{"loss": pytest.approx(1 / 3), "one": 7.0}] * 2


def test_throughput_starts_with_the_first_batch(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput = Throughput()
    now[0] = 150.0
    assert (throughput.seconds, throughput.wait_share) == (0.0, 0.0)
    throughput.first_batch()
    for _ in range(4):
        now[0] += 2.0
        throughput.step(samples=10, waited=0.5)
    assert throughput.window() == (5.0, 0.25)
    now[0] += 2.0
    throughput.step(samples=10, waited=0.0)
    assert throughput.window() == (5.0, 0.0)
    assert throughput.seconds == 10.0 and throughput.wait_share == 0.2 and throughput.samples == 50


def test_flop_utilisation_is_three_forward_passes_a_sample():
    assert flop_utilisation(100.0, 2e9, 6e12) == pytest.approx(0.1)
    assert flop_utilisation(100.0, None, 6e12) is None
    assert flop_utilisation(100.0, 2e9, device_peak_flops(torch.device("cpu"))) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("A kind of device that nobody knows", None),
    ],
)
def test_peaks_are_found_by_whole_words(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device_peak_flops(torch.device("cuda", 0)) == peak


def test_memory_and_what_a_tracking_server_takes():
    assert 50 < memory_mib(torch.device("cpu")) < 100_000
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0}
