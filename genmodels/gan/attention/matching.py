"""How well images match sentences and their words, and the loss of telling them apart.

Xu et al. 2018, section 3.2: a word looks at the regions of an image, and an image matches a sentence by how well its
words' views of it match the words (eq. 7 to 10). In a batch each image has to find its sentence, and each sentence its
image (eq. 11 to 13), by the words and by the features of the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from genmodels.gan.ranks import differentiable_global_batch, global_batch


class Features(NamedTuple):
    """Of images: `regions` (batch, dim, places) and `image` (batch, dim)."""

    regions: Tensor
    image: Tensor


class Texts(NamedTuple):
    """Of captions: `words` (batch, length, dim), which of them there are, `mask` bool (batch, length), at least one in
    each caption, and `sentence` (batch, dim)."""

    words: Tensor
    mask: Tensor
    sentence: Tensor


class Gammas(NamedTuple):
    """γ1 of eq. 9, γ2 of eq. 10, γ3 of eq. 11."""

    attention: float
    words: float
    batch: float


class Matching(NamedTuple):
    """Of each sample, float32 (batch,): both directions of the loss by words and by sentences, and whether its own
    caption (image) is the best of the global batch for the image (caption), by both together."""

    word_loss: Tensor
    sentence_loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor

    @property
    def loss(self) -> Tensor:
        """L_DAMSM, (batch,)."""
        return self.word_loss + self.sentence_loss


def word_scores(regions: Tensor, texts: Texts, gammas: Gammas) -> Tensor:
    """R(Q, D) of all images with all captions by their words, (images, captions): eq. 7 to 10."""
    absent = ~texts.mask
    similarity = torch.einsum("ctd,idp->ictp", texts.words, regions)
    # Each place is divided among the words first (eq. 8); then each word among the places (eq. 9).
    of_place = similarity.masked_fill(absent[:, :, None], -torch.inf).softmax(2)
    attention = (gammas.attention * of_place).softmax(3)
    views = torch.einsum("ictp,idp->ictd", attention, regions)
    relevance = cosine_similarity(views, texts.words, dim=3)
    return (gammas.words * relevance).masked_fill(absent, -torch.inf).logsumexp(2) / gammas.words


def sentence_scores(images: Tensor, sentences: Tensor) -> Tensor:
    """R(Q, D) of all images with all captions by the whole, (images, captions)."""
    return normalize(images, dim=1) @ normalize(sentences, dim=1).T


def match(features: Features, texts: Texts, token_ids: Tensor, weight: Tensor, gammas: Gammas) -> Matching:
    """Compare this rank's images and captions with those of the global batch; gradients reach those of other ranks too.

    A sample with the same caption is no wrong answer, and one of weight 0 is no answer for others at all. Collective;
    all ranks hold equally many. In float32, also under autocast.

    Args:
        features, texts: of this rank's samples, in pairs.
        token_ids: int64 (batch, length): which captions are the same.
        weight: (batch,), 0 for quarantined samples.
    """
    with torch.autocast(weight.device.type, enabled=False):
        features, texts = Features(*map(torch.Tensor.float, features)), _in_float32(texts)
        all_features, all_texts = _gather(features, texts)
        told = torch.cat([token_ids, (weight > 0).long()[:, None]], dim=1)
        all_told, first = global_batch(told)
        by_words = word_scores(features.regions, all_texts, gammas)
        alone = len(all_told) == len(told)
        back = by_words if alone else word_scores(all_features.regions, texts, gammas)
        by_sentence = sentence_scores(features.image, all_texts.sentence)
        pairs = [(by_words, back.T), (by_sentence, sentence_scores(all_features.image, texts.sentence).T)]
        own = torch.arange(len(told), device=weight.device) + first
        itself = torch.arange(len(all_told), device=weight.device) == own[:, None]
        same = (token_ids[:, None] == all_told[None, :, :-1]).all(2)
        out = (same | (all_told[:, -1] == 0)) & ~itself
        losses = [
            sum(_negative_log_softmax(gammas.batch * scores, itself, out) for scores in directions)
            for directions in pairs
        ]
        both = [(words + sentences).detach().masked_fill(out, -torch.inf) for words, sentences in zip(*pairs)]
        right = [(scores.argmax(1) == own).float() for scores in both]
    return Matching(*losses, *right)  # type: ignore[arg-type]


def _gather(features: Features, texts: Texts) -> tuple[Features, Texts]:
    """Of the global batch, in one collective with gradients and one without."""
    parts = [*features, texts.words, texts.sentence]
    whole = differentiable_global_batch(torch.cat([part.flatten(1) for part in parts], dim=1))
    split = whole.split([part[0].numel() for part in parts], dim=1)
    regions, image, words, sentence = (
        value.unflatten(1, part.shape[1:]) for value, part in zip(split, parts, strict=True)
    )
    return Features(regions, image), Texts(words, global_batch(texts.mask.long())[0].bool(), sentence)


def _negative_log_softmax(scores: Tensor, itself: Tensor, out: Tensor) -> Tensor:
    """Of each row's own column, among those that are not `out`: (rows,)."""
    return scores.masked_fill(out, -torch.inf).logsumexp(1) - (scores * itself).sum(1)


def _in_float32(texts: Texts) -> Texts:
    return Texts(texts.words.float(), texts.mask, texts.sentence.float())
