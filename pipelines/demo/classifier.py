"""The feature extractor of the embedded default: a classifier of digit, ink and paper, in the sources with its weights.

python pipelines/demo/classifier.py           train it anew (a minute on 2 cores), and print its digest
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from genmodels.features.classifier import Classifier, ClassifierConfig, save_classifier, train_classifier
from genmodels.features.config import ClassifierFeatures
from genmodels.features.extractor import FeatureExtractor, open_extractor
from infra.errors import main_exit
from pipelines.demo.digits import COLOURS, draw_split, parse_caption

FOLDER = Path(__file__).with_name("digits_classifier")
DIGEST = "9f8b1e921b057595"
"""Of the weights in the sources: figures of other ones would not compare with those in the documentation."""

_CONFIG = ClassifierConfig(image_size=32, heads={"digit": 10, "ink": len(COLOURS), "paper": len(COLOURS)})
_REPEATS = 24  # colours in which each training digit is seen


def digits_extractor() -> FeatureExtractor:
    """The extractor for the demo's digits. Raises ValueError where its weights are not those of `DIGEST`."""
    extractor = open_extractor(ClassifierFeatures(path=str(FOLDER)))
    if extractor.digest != DIGEST:
        raise ValueError(f"{FOLDER} holds other weights ({extractor.digest}) than those that belong there ({DIGEST})")
    return extractor


def train() -> Classifier:
    """Learn from the training digits, in all colours but those that are kept out."""
    drawn = list(draw_split("train", _CONFIG.image_size, _REPEATS))
    names = list(COLOURS)
    read = [parse_caption(caption) for _, _, caption, _ in drawn]
    classes = {
        "digit": np.array([each.digit for each in read]),
        "ink": np.array([names.index(each.ink) for each in read]),
        "paper": np.array([names.index(each.paper) for each in read]),
    }
    return train_classifier(np.stack([picture for _, picture, _, _ in drawn]), classes, _CONFIG)


def main() -> None:
    save_classifier(train(), FOLDER)
    print(open_extractor(ClassifierFeatures(path=str(FOLDER))).digest)


if __name__ == "__main__":
    main_exit(main)
