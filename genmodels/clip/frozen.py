"""A CLIP that others are trained on: frozen, with all that says which one it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPModel, CLIPTokenizer

from genmodels.clip.layout import FACTS, is_transformers_clip
from genmodels.clip.network import EncoderPair, VisionTransformer, from_transformers
from genmodels.clip.objective import open_pair
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.text.tokenizer import encode
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.weights import weights_digest

_USUAL_MEAN, _USUAL_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FrozenClip(nn.Module):
    """Image and text encoder in evaluation mode, and what is done to an image before it.

    Attributes:
        image_size: height and width that the image side sees, pixels.
        embedding_dim: features of the embeddings.
        text_width, text_length: features per token of the text side, and tokens per caption.
        statistics: how the embeddings are distributed; None of a CLIP that came without.
        digest: of the weights, the tokenizer and the sizes: which CLIP it is. Sixteen hexadecimal digits.
    """

    def __init__(
        self,
        pair: EncoderPair,
        tokenizer: CLIPTokenizer,
        image_size: int,
        statistics: EmbeddingStatistics | None = None,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        deviation: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        """Args: `mean` and `deviation` of each channel, for values in [0, 1]."""
        super().__init__()
        self.source: Path | None = None  # the folder that it was opened from
        self.pair = pair
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.statistics = statistics
        settings = f"{image_size} {mean} {deviation} {sorted(tokenizer.get_vocab().items())} {_activations(pair)}"
        self.digest = weights_digest(pair, settings)
        self.embedding_dim = pair.text_projection.out_features
        self.text_width = int(pair.text_encoder.config.hidden_size)
        self.text_length = int(pair.text_encoder.config.max_position_embeddings)
        self._mean, self._deviation = (
            nn.Buffer(torch.tensor(v).view(3, 1, 1), persistent=False) for v in (mean, deviation)
        )
        self.eval().requires_grad_(False)

    @staticmethod
    def from_folder(folder: Path) -> FrozenClip:
        """Open an export of this project, or a CLIPModel of transformers with its tokenizer.

        Raises:
            ValueError: the folder holds neither.
        """
        clip = FrozenClip._open(folder)
        clip.source = folder
        return clip

    def save(self, folder: Path) -> None:
        """Copy the folder that it was opened from. Raises ValueError where it was not opened from one."""
        if self.source is None:
            raise ValueError("this CLIP was opened from no folder, so it cannot be copied")
        shutil.copytree(self.source, folder)

    @staticmethod
    def _open(folder: Path) -> FrozenClip:
        if (folder / FACTS).is_file():
            own = open_pair(folder)
            assert own.tokenizer is not None
            return FrozenClip(own.clip, own.tokenizer, own.config.image_size, own.statistics)
        if not is_transformers_clip(folder):
            raise ValueError(f"{folder} holds no CLIP (no {FACTS}, and no config.json of a CLIPModel)")
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        mean, deviation = _USUAL_MEAN, _USUAL_DEVIATION
        if (folder / "preprocessor_config.json").is_file():
            told = json.loads((folder / "preprocessor_config.json").read_text())
            mean, deviation = tuple(told.get("image_mean", mean)), tuple(told.get("image_std", deviation))
        size = int(model.config.vision_config.image_size)
        statistics = EmbeddingStatistics.load(folder)
        return FrozenClip(from_transformers(model), load_tokenizer(folder), size, statistics, mean, deviation)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors, float32 (batch, embedding_dim), of images (batch, 3, height, width) in [-1, 1] of any size.

        In float32 also under autocast, so that they are those that are stored in shards.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.embed_drawn(images.float())

    def embed_drawn(self, images: Tensor) -> Tensor:
        """As `embed_images`, of images that gradients are to reach; under autocast in its precision."""
        return self.pair.embed_images(((fit(images, self.image_size) + 1) / 2 - self._mean) / self._deviation)

    @torch.no_grad()
    def read_texts(self, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of captions, int64 (batch, length): features (batch, length, text_width), which of the tokens are text, bool
        (batch, length), and unit vectors (batch, embedding_dim)."""
        features, embeddings = self.pair.read_texts(token_ids)
        ends = (token_ids == self.tokenizer.eos_token_id).long()
        return features, ends.cumsum(1) - ends == 0, embeddings  # up to the first end token, which pads as well

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids of sentences, int64 (len(texts), length)."""
        return encode(self.tokenizer, texts)

    def check_length(self, texts: list[str]) -> None:
        """Raises ValueError for a sentence that is longer than the text encoder reads."""
        for text in texts:
            count = len(self.tokenizer(text)["input_ids"])
            if count > self.text_length:
                raise ValueError(
                    f"{text[:60]!r}… has {count} tokens, and this CLIP reads {self.text_length}: shorten it"
                )

    def describe(self) -> dict[str, object]:
        """What an artifact that was trained on it says of it."""
        facts: dict[str, object] = {"digest": self.digest, "embedding_dim": self.embedding_dim}
        if self.statistics is not None:
            facts["statistics"] = {
                "count": self.statistics.count,
                "norm_of_mean": round(float(self.statistics.mean.norm()), 6),
                "total_variance": round(float(self.statistics.covariance.trace()), 6),
                "dot_mean": round(self.statistics.dot_mean, 6),
                "dot_deviation": round(self.statistics.dot_deviation, 6),
            }
        return facts


def fit(images: Tensor, size: int) -> Tensor:
    """Images (batch, 3, height, width) in [-1, 1] at `size` pixels a side: bicubic, antialiased."""
    if images.shape[-2:] == (size, size):
        return images
    resized = interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(-1, 1)


def fetch_clip(path: str, folder: Path) -> None:
    """Copy a CLIPModel of transformers (a folder or a hub name), with its tokenizer, to `folder`: safetensors only.
    Statistics of its embeddings that were put into a folder go with it.

    Raises:
        OSError, ValueError: there is none.
    """
    from transformers.image_processing_base import ImageProcessingMixin  # its classes would need torchvision

    CLIPModel.from_pretrained(path, use_safetensors=True).save_pretrained(folder, safe_serialization=True)
    CLIPTokenizer.from_pretrained(path).save_pretrained(folder)
    if (statistics := EmbeddingStatistics.load(Path(path).expanduser())) is not None:
        statistics.save(folder)
    try:
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(path)
        kept = {name: pixels[name] for name in ("image_mean", "image_std", "size", "do_normalize") if name in pixels}
        (folder / "preprocessor_config.json").write_text(json.dumps(kept, indent=2) + "\n")
    except OSError:
        print(f"{path} does not say how its pixels are scaled: as those of Radford et al. are", flush=True)


def _activations(pair: EncoderPair) -> list[str]:
    parts = [pair.text_encoder]
    if isinstance(pair.image_encoder, VisionTransformer):
        parts.append(pair.image_encoder.transformer)
    return [str(part.config.hidden_act) for part in parts]
