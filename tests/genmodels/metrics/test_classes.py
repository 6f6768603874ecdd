import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from genmodels.metrics.classes import inception_score


@pytest.mark.parametrize("classes", [2, 10])
def test_balanced_certainty_scores_the_number_of_classes_and_a_constant_1(classes):
    assert inception_score(np.eye(classes).repeat(3, axis=0)) == pytest.approx(classes, abs=1e-9)
    assert inception_score(np.full((50, classes), 1 / classes)) == pytest.approx(1.0, abs=1e-9)
    assert inception_score(np.eye(classes)[[0] * 50]) == pytest.approx(1.0, abs=1e-9)


def test_torchmetrics_agrees():
    logits = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)).double() * 2

    class Logits(nn.Module):
        def forward(self, indices):
            return logits[indices.flatten(1)[:, 0].long()]

    score = InceptionScore(feature=Logits(), splits=1)
    score.update(torch.arange(400).view(-1, 1, 1, 1))
    assert inception_score(logits.softmax(1).numpy()) == pytest.approx(float(score.compute()[0]), rel=1e-3)


def test_what_are_no_probabilities_is_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(np.ones((4, 3)))
    with pytest.raises(ValueError, match="samples, classes"):
        inception_score(np.ones(3))
