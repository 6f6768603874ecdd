"""A DAMSM that a GAN is trained with: frozen, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from genmodels.clip.frozen import fit
from genmodels.gan.attention.config import DamsmConfig
from genmodels.gan.attention.encoders import Encoders
from genmodels.gan.attention.layout import DAMSM, ENCODERS
from genmodels.gan.attention.matching import Gammas, Matching, Texts, match
from genmodels.text.tokenizer import encode
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.text.tokenizer import save as save_tokenizer
from genmodels.weights import copy_weights, weights_digest


class FrozenDamsm(nn.Module):
    """Both encoders in evaluation mode, and how they are compared.

    Attributes:
        embedding_dim: features of regions, words, images and sentences.
        length: tokens per caption.
        digest: of the weights, the tokenizer and the settings: which DAMSM it is. Sixteen hexadecimal digits.
    """

    def __init__(self, config: DamsmConfig, encoders: Encoders, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.config, self.encoders, self.tokenizer = config, encoders, tokenizer
        self.embedding_dim, self.length = config.embedding_dim, config.text_encoder.length
        self.digest = weights_digest(encoders, f"{config.model_dump_json()} {sorted(tokenizer.get_vocab().items())}")
        self.eval().requires_grad_(False)

    @staticmethod
    def from_folder(folder: Path) -> FrozenDamsm:
        """Open an export. Raises ValueError where the folder holds none."""
        if not (folder / DAMSM).is_file():
            raise ValueError(f"{folder} holds no DAMSM (no {DAMSM} there)")
        config = DamsmConfig.model_validate_json((folder / DAMSM).read_text())
        tokenizer = load_tokenizer(folder / "tokenizer")
        encoders = Encoders(config, tokenizer)
        copy_weights(load_file(folder / ENCODERS), encoders, folder)
        return FrozenDamsm(config, encoders, tokenizer)

    def save(self, folder: Path) -> None:
        """Write what `from_folder` opens."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in self.encoders.state_dict().items()}, folder / ENCODERS)
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        (folder / DAMSM).write_text(json.dumps(self.config.model_dump(), indent=2) + "\n")

    @torch.no_grad()
    def read_texts(self, token_ids: Tensor) -> Texts:
        """Of captions, int64 (batch, length); float32, also under autocast, so that a penalty can be taken of them."""
        words, mask, sentence = self.encoders.of_texts(token_ids)
        return Texts(words.float(), mask, sentence.float())

    def match(self, images: Tensor, texts: Texts, token_ids: Tensor, weight: Tensor) -> Matching:
        """How well images, (batch, 3, height, width) in [-1, 1] of any size, match their own captions among those of
        the global batch; gradients reach the images. See `matching.match`."""
        features = self.encoders.of_images(fit(images, self.config.image_size))
        return match(features, texts, token_ids, weight, gammas_of(self.config))

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids of sentences, int64 (len(texts), length)."""
        return encode(self.tokenizer, texts)

    def check_length(self, texts: list[str]) -> None:
        """Raises ValueError for a sentence that is longer than the text encoder reads."""
        for text in texts:
            count = len(self.tokenizer(text)["input_ids"])
            if count > self.length:
                raise ValueError(f"{text[:60]!r}… has {count} tokens, and this DAMSM reads {self.length}: shorten it")


def gammas_of(config: DamsmConfig) -> Gammas:
    """How sharply it compares."""
    return Gammas(config.gamma1, config.gamma2, config.gamma3)
