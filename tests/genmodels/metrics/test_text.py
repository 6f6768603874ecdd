import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from genmodels.metrics import text
from genmodels.metrics.text import clip_scores, retrieval_recall


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(90, 12))
    return common + rng.normal(size=(90, 12)), 3 * common + rng.normal(size=(90, 12))


def test_scores_are_cosines(pairs):
    images, texts = pairs
    assert clip_scores(images, texts) == pytest.approx(100 * cosine_similarity(images, texts).diagonal().clip(0))
    assert clip_scores(images, -images) == pytest.approx(np.zeros(90))


@pytest.mark.parametrize("rows", [7, 2048])
@pytest.mark.parametrize("k", [1, 5])
def test_recall_is_the_share_of_ranks_up_to_k(pairs, k, rows, monkeypatch):
    monkeypatch.setattr(text, "_ROWS", rows)
    similarity = cosine_similarity(*pairs)
    ranks = [(-s).argsort(axis=1).argsort(axis=1).diagonal() for s in (similarity, similarity.T)]
    found = retrieval_recall(*pairs, k)
    assert found == pytest.approx([(rank < k).mean() for rank in ranks])
    assert 0 < found[0] < 1


def test_equal_embeddings_are_told_apart_by_nobody():
    assert retrieval_recall(np.ones((10, 3)), np.ones((10, 3))) == (0.0, 0.0)
    assert retrieval_recall(np.eye(10), np.eye(10)) == (1.0, 1.0)


def test_wrong_arguments_are_refused(pairs):
    with pytest.raises(ValueError, match="one shape"):
        clip_scores(pairs[0], pairs[1][:5])
    with pytest.raises(ValueError, match="length 0"):
        clip_scores(pairs[0] * 0, pairs[1])
    with pytest.raises(ValueError, match="between 1 and 90"):
        retrieval_recall(*pairs, 91)
