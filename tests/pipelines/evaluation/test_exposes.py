"""Generators with a known fault are each exposed by the figures, and told from real held-out data."""

import numpy as np
import pytest

from genmodels.metrics.figure import Conditions
from pipelines.demo.evaluation import follow_captions
from pipelines.evaluation.figures import Measured, Sets, measure_figures
from pipelines.evaluation.findings import findings
from tests.pipelines.evaluation import digits_sets as digits

pytestmark = pytest.mark.slow

GENERATORS = {
    "real": lambda: digits.real("held_out", 1),
    "copies": digits.copies,
    "modes": digits.one_mode,
    "quality": digits.blurred,
    "captions": digits.deaf,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("stores")
    held_out = digits.store(*digits.real("held_out", 0), folder / "held_out")
    training = digits.store(*digits.real("train"), folder / "training")
    found = {}
    for name, generate in GENERATORS.items():
        generated = digits.store(*generate(), folder / name)
        sets = Sets(generated, held_out, training)
        found[name] = measure_figures(sets, Conditions(count=generated.count), follow_captions)
    return found


@pytest.mark.parametrize("fault", [name for name in GENERATORS if name != "real"])
def test_each_fault_is_named(measured, fault):
    assert fault in {finding.kind for finding in findings(measured[fault])}


def test_real_pictures_of_other_writers_are_not_told_from_real_ones(measured):
    assert [finding.kind for finding in findings(measured["real"])] == ["none"]


def test_only_the_deaf_generator_ignores_captions(measured):
    for name, found in measured.items():
        followed = found.value("caption_consistency")
        assert followed < 0.1 if name == "captions" else followed > 0.8 or name == "quality", (name, followed)


def test_a_copier_beats_reality_in_distance_to_training_data_only(measured):
    copier, honest = measured["copies"], measured["real"]
    assert copier.value("frechet_distance_training") < 0.5 * honest.value("frechet_distance_training")
    assert copier.value("copy_share") > 0.9 and honest.value("copy_share") < 0.15


def test_distances_are_worse_than_reality_for_what_looks_wrong(measured):
    for name in ("modes", "quality"):
        for figure in ("frechet_distance", "kernel_distance"):
            assert measured[name].value(figure) > 3 * measured["real"].value(figure), (name, figure)
    assert measured["modes"].value("ms_ssim") >= measured["real"].value("ms_ssim")
    assert measured["modes"].value("recall") < 0.75 * measured["real"].value("recall")


def test_intervals_hold_what_half_the_pictures_say(measured, tmp_path):
    pictures, captions = digits.real("held_out", 1)
    held_out = digits.store(*digits.real("held_out", 0), tmp_path / "held_out")
    half = digits.store(pictures[::2], captions[::2], tmp_path / "half")
    found = measure_figures(Sets(half, held_out), Conditions(count=half.count))
    whole = {figure.name: figure for figure in measured["real"].figures}
    distance = next(figure for figure in found.figures if figure.name == "frechet_distance")
    assert distance.low < whole["frechet_distance"].value < distance.high
    assert np.isfinite(found.real["frechet_distance"]), "without training data, halves of the held-out ones"
