"""Pictures to features: one face for every network that measures, each with a digest that says which it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from genmodels.features.classifier import load_classifier
from genmodels.features.config import (
    ClassifierFeatures,
    ClipFeatures,
    Dinov2Features,
    FeaturesConfig,
    InceptionFeatures,
)
from genmodels.features.resize import resize
from genmodels.weights import weights_digest

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # Radford et al.'s own pictures
_SENTENCES = 256  # that are embedded at once


class Features(NamedTuple):
    """Features, float32 (n, dimensions), and a classifier's probabilities, float32 (n, classes), if it is one."""

    features: np.ndarray
    probabilities: np.ndarray | None = None


class FeatureExtractor:
    """A network and what is done to a picture before it.

    Attributes:
        network: in evaluation mode.
        device: where it is.
        size: height and width that it sees.
        dimensions: of the features.
    """

    def __init__(
        self, kind: str, network: nn.Module, size: int, dimensions: int, device: torch.device, settings: str = ""
    ) -> None:
        self.kind, self.size, self.dimensions, self.device, self._settings = kind, size, dimensions, device, settings
        self.network = network.to(device).eval().requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """Of kind, size, settings and weights: equal digests mean comparable features. Sixteen hexadecimal digits."""
        return weights_digest(self.network, f"{self.kind} {self.size} {self._settings}")

    def to(self, device: torch.device) -> None:
        """Move it: it can be pickled on one machine and go on on another."""
        self.device = device
        self.network.to(device)

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Features:
        """Features of pictures, uint8 (n, height, width, 3) of any size, resized without aliasing."""
        images = torch.from_numpy(resize(pictures, self.size)).permute(0, 3, 1, 2).to(self.device)
        return self._features(images)

    def _features(self, images: Tensor) -> Features:
        """Of images, float32 (n, 3, size, size) in [0, 255]."""
        raise TypeError

    @torch.inference_mode()
    def texts(self, sentences: Sequence[str]) -> np.ndarray:
        """Embeddings of sentences in the space of the pictures, float32 (n, dimensions). Raises ValueError if none."""
        parts = [list(sentences[start : start + _SENTENCES]) for start in range(0, len(sentences), _SENTENCES)]
        return np.concatenate([self._texts(part).cpu().numpy() for part in parts])

    def _texts(self, sentences: list[str]) -> Tensor:
        raise ValueError(f"features of kind {self.kind!r} have no side for text: use kind clip")


def open_extractor(config: FeaturesConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that a configuration names. Raises ValueError where weights or a library are missing."""
    device = torch.device(device)
    if isinstance(config, ClassifierFeatures):
        return _Classifier(Path(config.path), device)
    if isinstance(config, ClipFeatures) and (Path(config.path) / "clip.json").is_file():
        return _OwnClip(Path(config.path), device)
    if isinstance(config, InceptionFeatures):
        return _Inception(Path(config.path), device)
    try:
        return _Dinov2(config, device) if isinstance(config, Dinov2Features) else _Clip(config, device)
    except OSError as error:
        raise ValueError(f"{config.path} holds no model for features of kind {config.kind!r}: {error}") from None


class _Classifier(FeatureExtractor):
    def __init__(self, folder: Path, device: torch.device) -> None:
        network = load_classifier(folder)
        super().__init__("classifier", network, network.config.image_size, network.config.width, device)

    def _features(self, images: Tensor) -> Features:
        features, logits = self.network(images / 127.5 - 1)
        first = next(iter(logits.values())).softmax(1)
        return Features(features.cpu().numpy(), first.cpu().numpy())


class _Inception(FeatureExtractor):
    def __init__(self, file: Path, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError("features of kind 'inception' need: pip install torch-fidelity") from None
        if not file.is_file():
            raise ValueError(f"no file {file} with torch-fidelity's Inception-v3 weights")
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        )
        super().__init__("inception", network, 299, 2048, device)

    def _features(self, images: Tensor) -> Features:
        features, logits = self.network(images.round().to(torch.uint8))
        return Features(features.cpu().numpy(), logits.softmax(1).cpu().numpy())


class _Pretrained(FeatureExtractor):
    """A network of transformers, with the mean and deviation of its pixels that its folder tells."""

    def __init__(self, kind: str, network: Any, path: str, size: int, dimensions: int, device: torch.device) -> None:
        mean, deviation = _pixel_statistics(path, _CLIP if kind == "clip" else _IMAGENET)
        parts = [network.config, *(getattr(network.config, f"{side}_config", None) for side in ("text", "vision"))]
        activations = [getattr(part, "hidden_act", None) for part in parts]
        super().__init__(kind, network, size, dimensions, device, f"{mean} {deviation} {activations}")
        self._mean, self._deviation = (torch.tensor(v).view(3, 1, 1) for v in (mean, deviation))

    def _pixels(self, images: Tensor) -> Tensor:
        return (images / 255 - self._mean.to(self.device)) / self._deviation.to(self.device)


class _Dinov2(_Pretrained):
    def __init__(self, config: Dinov2Features, device: torch.device) -> None:
        from transformers import Dinov2Model

        network: Any = Dinov2Model.from_pretrained(config.path, use_safetensors=True)
        size = min(network.config.image_size, 224)  # trained at up to 518, and used at 224
        super().__init__("dinov2", network, config.path, size, network.config.hidden_size, device)

    def _features(self, images: Tensor) -> Features:
        return Features(self.network(self._pixels(images)).pooler_output.cpu().numpy())


class _Clip(_Pretrained):
    def __init__(self, config: ClipFeatures, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        network: Any = CLIPModel.from_pretrained(config.path, use_safetensors=True)
        size = network.config.vision_config.image_size
        super().__init__("clip", network, config.path, size, network.config.projection_dim, device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(config.path)
        self._settings += f" {sorted(self.tokenizer.get_vocab().items())}"

    def _features(self, images: Tensor) -> Features:
        network: Any = self.network
        pooled = network.vision_model(pixel_values=self._pixels(images)).pooler_output
        return Features(network.visual_projection(pooled).cpu().numpy())

    def _texts(self, sentences: list[str]) -> Tensor:
        network: Any = self.network
        length = network.config.text_config.max_position_embeddings
        read = self.tokenizer(
            sentences, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        pooled = network.text_model(**read).pooler_output
        return network.text_projection(pooled)


class _OwnClip(FeatureExtractor):
    """A pair of encoders that this project trained."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from genmodels.clip.objective import open_pair

        self._pair = open_pair(folder)
        shape, tokenizer = self._pair.config, self._pair.tokenizer
        assert tokenizer is not None
        settings = f"{shape.model_dump_json()} {sorted(tokenizer.get_vocab().items())}"
        super().__init__("clip", self._pair.clip, shape.image_size, shape.embedding_dim, device, settings)

    def _features(self, images: Tensor) -> Features:
        embedded = self._pair.clip.image_encoder(images / 127.5 - 1)
        return Features(nn.functional.normalize(embedded.float(), dim=1).cpu().numpy())

    def _texts(self, sentences: list[str]) -> Tensor:
        return self._pair.embed_texts(sentences)


def _pixel_statistics(path: str, usual: tuple[Sequence[float], Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and deviation of a channel's values in [0, 1], as the folder tells, or the usual where it does not."""
    from transformers.image_processing_base import ImageProcessingMixin  # its classes would need torchvision

    try:
        told, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except (OSError, ValueError):
        told = {}
    return list(told.get("image_mean", usual[0])), list(told.get("image_std", usual[1]))
