"""What the DAMSM sees of images and reads of captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from genmodels.gan.attention.config import DamsmConfig, RecurrentTextEncoder, RegionEncoder
from genmodels.gan.attention.matching import Features, Texts


class Encoders(nn.Module):
    """Both, as one module with one forward, so that one engine shards and updates them together."""

    def __init__(self, config: DamsmConfig, tokenizer: CLIPTokenizer | None = None) -> None:
        """Raises ValueError where the tokenizer does not fit the text encoder."""
        super().__init__()
        self.of_images = ImageEncoder(config.image_encoder, config.image_size, config.embedding_dim)
        self.of_texts = TextEncoder(config.text_encoder, config.embedding_dim, tokenizer)

    def forward(self, images: Tensor, token_ids: Tensor) -> tuple[Features, Texts]:
        """Images (batch, 3, height, width) in [-1, 1] and captions, int64 (batch, length)."""
        return self.of_images(images), self.of_texts(token_ids)


class ImageEncoder(nn.Module):
    """Features of regions, and of the whole image, which is where they lead to."""

    def __init__(self, config: RegionEncoder, image_size: int, dim: int) -> None:
        super().__init__()
        halvings: list[nn.Module] = []
        before = 3
        for channels in config.channels:
            layers: list[nn.Module] = []
            for stride in [2] + [1] * (config.depth - 1):
                layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.GroupNorm(config.norm_groups, channels)]
                layers.append(nn.SiLU())
                before = channels
            halvings.append(nn.Sequential(*layers))
        self.near = nn.Sequential(*halvings[: config.regions_after])
        self.far = nn.Sequential(*halvings[config.regions_after :])
        self.region = nn.Conv2d(config.channels[config.regions_after - 1], dim, 1)
        self.whole = nn.Linear(before * (image_size // 2 ** len(config.channels)) ** 2, dim)

    def forward(self, images: Tensor) -> Features:
        near = self.near(images)
        return Features(self.region(near).flatten(2), self.whole(self.far(near).flatten(1)))


class TextEncoder(nn.Module):
    """An LSTM ahead and one back; a word is what both have read up to it, a sentence what both end with.

    Words are the tokens between the start and the end, and the end, so that an empty caption has one too. Nothing of
    them depends on the padding.
    """

    def __init__(self, config: RecurrentTextEncoder, dim: int, tokenizer: CLIPTokenizer | None = None) -> None:
        super().__init__()
        if tokenizer is not None:
            if len(tokenizer) > config.vocab_size:
                raise ValueError(
                    f"tokenizer has {len(tokenizer)} tokens, text_encoder.vocab_size is {config.vocab_size}"
                )
            if tokenizer.model_max_length != config.length:
                raise ValueError(
                    f"tokenizer gives {tokenizer.model_max_length} tokens, text_encoder.length is {config.length}"
                )
        self.end = 1 if tokenizer is None else int(tokenizer.eos_token_id)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.ahead, self.back = (nn.LSTM(config.width, dim // 2, batch_first=True) for _ in range(2))

    def forward(self, token_ids: Tensor) -> Texts:
        ended = token_ids == self.end
        lengths = (ended.cumsum(1) == 0).sum(1, keepdim=True) + 1  # up to the first end token, which pads as well
        places = torch.arange(token_ids.shape[1], device=token_ids.device)
        last = (lengths - 1).clamp(max=len(places) - 1)
        # Reversed within its own length, a caption is followed by its padding; reversing twice restores the order.
        reverse = torch.where(places <= last, last - places, places)
        read = self.embedding(token_ids)
        ahead = self.ahead(read)[0]
        back = _reordered(self.back(_reordered(read, reverse))[0], reverse)
        words = torch.cat([ahead, back], dim=2)
        sentence = torch.cat([_reordered(ahead, last)[:, 0], back[:, 0]], dim=1)
        mask = (places <= last) & (places > 0)
        return Texts(words * mask[..., None], mask, sentence)


def _reordered(values: Tensor, order: Tensor) -> Tensor:
    """The rows of (batch, length, dim) by their places in `order`, int64 (batch, any length)."""
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[2]))
