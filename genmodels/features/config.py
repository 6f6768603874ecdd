"""What a feature extractor is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from genmodels.config import Section


class ClassifierFeatures(Section):
    """A small classifier of this project's own: see `genmodels/features/classifier.py`."""

    kind: Literal["classifier"] = "classifier"
    path: str = Field(description="folder with classifier.json and classifier.safetensors")


class InceptionFeatures(Section):
    """Inception-v3 as the Fréchet inception distance is defined with; needs `pip install torch-fidelity`."""

    kind: Literal["inception"] = "inception"
    path: str = Field(description="file with torch-fidelity's weights, pt_inception-2015-12-05-6726825d.pth")


class Dinov2Features(Section):
    """The class token of a DINOv2 (Oquab et al. 2023)."""

    kind: Literal["dinov2"] = "dinov2"
    path: str = Field(description="folder or hub name of a transformers Dinov2Model")


class ClipFeatures(Section):
    """The image embedding of a CLIP (Radford et al. 2021); it also embeds sentences."""

    kind: Literal["clip"] = "clip"
    path: str = Field(description="folder or hub name of a transformers CLIPModel, or an export of train_clip.py")


FeaturesConfig = Annotated[
    ClassifierFeatures | InceptionFeatures | Dinov2Features | ClipFeatures, Field(discriminator="kind")
]
