"""What the priors of unCLIP are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genmodels.config import Attention, Section


class _PriorConfig(Section):
    """What both priors share: the CLIP whose image embeddings they predict from captions."""

    image_size: int = Field(224, gt=0, description="height and width of the images that are read to be embedded")
    clip: str = Field(
        description="folder, checkpoint, models:/NAME or preset:NAME of a CLIP, or hub name of a CLIPModel"
    )
    clip_dim: int = Field(768, gt=0, description="features of its embeddings, for estimates while it is not at hand")
    clip_width: int = Field(768, gt=0, description="features of its text tokens, likewise")
    clip_length: int = Field(77, gt=0, description="tokens of its captions, likewise")
    embedding_member: str | None = Field(
        None,
        description="member of the samples with the image's embedding, clip.npy as encode_latents.py writes it; null: "
        "images are embedded as they come",
    )
    layers: int = Field(20, gt=0, description="transformer layers")
    heads: int = Field(32, gt=0, description="attention heads per layer")
    condition_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of samples trained without their caption, for classifier-free guidance"
    )

    @property
    def conditional(self) -> bool:
        """Whether captions are read: always."""
        return True


class DiffusionPriorConfig(_PriorConfig):
    """Diffusion of image embeddings by diffusers' PriorTransformer (Ramesh et al. 2022, section 2.2)."""

    kind: Literal["diffusion_prior"] = "diffusion_prior"
    head_dim: int = Field(64, gt=0, description="features per attention head")


class AutoregressivePriorConfig(_PriorConfig, Attention):
    """A transformer over the principal components of image embeddings, quantised (Ramesh et al. 2022, section 2.2)."""

    kind: Literal["autoregressive_prior"] = "autoregressive_prior"
    width: int = Field(2048, gt=0, description="features per token; a multiple of heads")
    components: int = Field(319, gt=0, description="principal components that are kept, the largest first")
    buckets: int = Field(1024, gt=1, description="values that each component is quantised to")
    dot_buckets: int = Field(64, gt=1, description="values of the token that tells how well image and caption agree")
