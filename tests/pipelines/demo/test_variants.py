"""The table of variants: what is compared, and how it is shown."""

from itertools import product

import numpy as np
import pytest

from genmodels.families import members_of
from pipelines.demo import variants
from pipelines.demo.evaluation import kept_out_prompts
from pipelines.training.config import load_config


@pytest.fixture(scope="module")
def configs():
    return {name: load_config(name, []) for name in variants.DENOISERS}


def test_every_denoiser_prediction_type_and_regulariser_is_compared_once(configs):
    found = [
        tuple(variants.axes(member).values())
        for config in configs.values()
        for member in members_of(config.objective).values()
    ]
    types = ("epsilon", "v_prediction", "sample", "flow")
    assert sorted(found) == sorted(product(("unet", "dit"), types, ("kl", "vq")))
    assert len({variants.label(member) for c in configs.values() for member in members_of(c.objective).values()}) == 16


def test_the_two_regularisers_differ_in_nothing_else(configs):
    one, other = (config.model_dump() for config in configs.values())
    for config in (one, other):
        config["run"].pop("name")
        for member in config["objective"]["members"].values():
            member["autoencoder"] = member["autoencoder"].rpartition("/")[0]
    assert one == other


def test_the_grid_has_a_row_for_each_and_the_table_marks_what_has_not_learnt(capsys):
    captions = kept_out_prompts(20)[1]
    black = np.zeros((10, 16, 16, 3), np.uint8)
    grid = variants.draw_grid({"unet-flow-kl": black, "dit-flow-kl": black + 255}, captions)
    pixels = np.asarray(grid)
    assert pixels.shape[1] > 10 * 16 and pixels[: pixels.shape[0] // 2].min() == 0 and pixels.max() == 255
    row = {
        "denoiser": "unet", "prediction_type": "flow", "regulariser": "kl", "parameters": 1000, "consistency": 0.5,
        "consistency_ratio": 0.52, "coverage": 0.4, "coverage_ratio": 0.5, "validation_loss": 0.1, "steps": 10,
        "seconds": 3.0, "learnt": False,
    }  # fmt: skip
    variants.show({"variants": [row, {**row, "denoiser": "dit", "consistency_ratio": 0.95, "learnt": True}]})
    shown = capsys.readouterr().out
    assert "0.520 !" in shown and "0.950 !" not in shown and "1,000" in shown
