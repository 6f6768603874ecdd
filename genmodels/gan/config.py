"""What a GAN is made of: two networks, a loss, and what keeps them in balance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genmodels.config import Section
from genmodels.gan.losses import SMOOTHED, LossName, adversarial_loss
from genmodels.text.config import NoTextEncoder, PretrainedTextEncoder, TrainedTextEncoder

START = 4  # height and width where generators begin and discriminators end
Policy = Literal["flip", "quarter_turn", "translation", "scale", "rotation", "color", "cutout"]


class DcganGenerator(Section):
    """Strided transposed convolutions (Radford et al. 2016)."""

    kind: Literal["dcgan"] = "dcgan"
    channels: int = Field(64, gt=0, description="at the finest resolution, doubled at each coarser one")
    norm: Literal["batch", "group", "none"] = Field(
        "batch", description="batch: by statistics of the global batch, which accumulation would change"
    )


class DcganDiscriminator(Section):
    """Strided convolutions (Radford et al. 2016)."""

    kind: Literal["dcgan"] = "dcgan"
    channels: int = Field(64, gt=0, description="at the finest resolution, doubled at each coarser one")
    norm: Literal["batch", "group", "none"] = Field("batch", description="as the generator's; none under a penalty")
    spectral_norm: bool = Field(False, description="largest singular value of each layer: 1")


class _Widths(Section):
    channels: int = Field(64, gt=0, description="at the finest resolution, doubled at each coarser one")
    largest: int = Field(512, gt=0, description="channels at most")


class ResNetGenerator(_Widths):
    """Residual blocks with conditional normalisation (Miyato et al. 2018; Miyato and Koyama 2018)."""

    kind: Literal["resnet"] = "resnet"
    norm: Literal["batch", "group"] = Field("group", description="batch: by statistics of the global batch")


class ResNetDiscriminator(_Widths):
    """Residual blocks, with spectral normalisation (Miyato et al. 2018)."""

    kind: Literal["resnet"] = "resnet"
    spectral_norm: bool = Field(True, description="largest singular value of each layer: 1")


class _Modern(_Widths):
    blocks: int = Field(2, gt=0, description="residual blocks at each resolution")
    expansion: int = Field(2, gt=0, description="how much wider a block is inside")
    group_width: int = Field(16, gt=0, description="channels of a group of its 3×3 convolution")

    @model_validator(mode="after")
    def _groups_divide(self) -> _Modern:
        for width in (self.channels, self.largest):
            inner = width * self.expansion
            if inner > self.group_width and inner % self.group_width:
                raise ValueError(f"{width} channels times expansion {self.expansion} is no multiple of group_width")
        return self


class ModernGenerator(_Modern):
    """Without normalisation, grouped and inverted bottlenecks: R3GAN's published recipe (Huang et al. 2024)."""

    kind: Literal["modern"] = "modern"


class ModernDiscriminator(_Modern):
    """Its other half."""

    kind: Literal["modern"] = "modern"


class StyleGenerator(_Widths):
    """A mapping network and modulated convolutions (Karras et al. 2020)."""

    kind: Literal["style"] = "style"
    style_dim: int = Field(512, gt=0, description="features of a style")
    mapping_layers: int = Field(8, gt=0, description="layers from latent to style")


class StyleDiscriminator(_Widths):
    """Residual blocks (Karras et al. 2020)."""

    kind: Literal["style"] = "style"


GeneratorConfig = DcganGenerator | ResNetGenerator | ModernGenerator | StyleGenerator
DiscriminatorConfig = DcganDiscriminator | ResNetDiscriminator | ModernDiscriminator | StyleDiscriminator


class DiffAugment(Section):
    """What the discriminator sees is altered, drawn and real alike (Zhao et al. 2020)."""

    kind: Literal["diff_augment"] = "diff_augment"
    policies: list[Policy] = Field(["color", "translation", "cutout"], min_length=1, description="what is altered")


class AdaptiveAugment(Section):
    """As much as keeps the discriminator from knowing real images by heart (Karras et al. 2020, "Training Generative
    Adversarial Networks with Limited Data")."""

    kind: Literal["adaptive"] = "adaptive"
    policies: list[Policy] = Field(
        ["flip", "quarter_turn", "translation", "scale", "rotation", "color"],
        min_length=1,
        description="what is altered; leave out what would change what an image shows (flip, for writing)",
    )
    target: float = Field(0.6, gt=0, lt=1, description="of the mean sign of the discriminator's output for real images")
    every: int = Field(4, gt=0, description="steps between changes of the probability")
    images: float = Field(500_000, gt=0, description="real images in which the probability can go from 0 to 1")


class Penalties(Section):
    """On the gradient of the discriminator at images; none of them under ZeRO stage 3."""

    r1: float = Field(0.0, ge=0, description="γ of γ/2 ‖∇D‖² at real images (Mescheder et al. 2018)")
    r2: float = Field(0.0, ge=0, description="γ, likewise at drawn images")
    gradient: float = Field(0.0, ge=0, description="λ of λ(‖∇D‖−1)² between the two (Gulrajani et al. 2017)")
    every: int = Field(1, gt=0, description="steps; each time as many times as strong (Karras et al. 2020)")

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return max(self.r1, self.r2, self.gradient) > 0


class SemiSupervised(Section):
    """Few samples have a label: the discriminator sorts images into the classes and "drawn" (Salimans et al. 2016,
    section 5). It is the classifier that this trains."""

    label: str = Field(description="shard member with the class of a sample, where it has one: cls, or json:KEY")
    classes: list[str] = Field(min_length=2, description="the labels that count; samples with others have none")
    feature_matching: bool = Field(
        True,
        description="the generator's loss: mean features as those of real images (section 3.1), in place of the game",
    )


class GanConfig(Section):
    """Generator and discriminator, with classes, a text, or neither."""

    kind: Literal["gan"] = "gan"
    image_size: int = Field(64, gt=0, description="height and width in pixels: 8, 16, 32, … 1024")
    latent_dim: int = Field(128, gt=0, description="numbers that a picture is drawn from")
    generator: Annotated[GeneratorConfig, Field(discriminator="kind")] = Field(
        ModernGenerator(), description="kind dcgan, resnet, modern or style"
    )
    discriminator: Annotated[DiscriminatorConfig, Field(discriminator="kind")] = Field(
        ModernDiscriminator(), description="kind dcgan, resnet, modern or style; of another kind than the generator too"
    )
    text_encoder: Annotated[TrainedTextEncoder | PretrainedTextEncoder | NoTextEncoder, Field(discriminator="kind")] = (
        Field(NoTextEncoder(), description="kind pretrained (frozen), or none")
    )
    clip: str | None = Field(
        None,
        description="folder, checkpoint, models:/NAME or preset:NAME of a CLIP, or hub name of a CLIPModel: its "
        "embeddings of the captions are told, in place of a text_encoder's",
    )
    clip_dim: int = Field(512, gt=0, description="features of its embeddings, for estimates while it is not at hand")
    matching_weight: float = Field(
        0.0,
        ge=0,
        description="of telling, by that CLIP, a picture's own caption from those of the global batch: the sentence's "
        "part of DAMSM (Xu et al. 2018)",
    )
    diversity_weight: float = Field(
        0.0,
        ge=0,
        description="of how little two pictures of one condition differ for how far their latents are apart (mode "
        "seeking: Mao et al. 2019); without it a latent may be ignored where conditions vary enough",
    )
    classes: list[str] | None = Field(
        None, description="in place of text: the captions are names of classes, and these are all of them"
    )
    condition_dim: int = Field(128, gt=0, description="features of a condition, and of what the score is read off")
    auxiliary_weight: float = Field(
        0.0, ge=0, description="of naming the class, for both networks (Odena et al. 2017); needs classes"
    )
    semi_supervised: SemiSupervised | None = Field(None, description="a classifier from few labels")
    matching_aware: bool = Field(
        False, description="real images with another sample's text are a third kind of input (Reed et al. 2016)"
    )
    loss: LossName = Field("relativistic", description="the game; f_… are f-divergences (Nowozin et al. 2016)")
    real_target: float = Field(
        1.0, gt=0.5, le=1, description="0.9 is one-sided label smoothing (Salimans et al. 2016); of logistic losses"
    )
    penalties: Penalties = Penalties()
    weight_clip: float | None = Field(
        None, gt=0, description="after each step the discriminator's weights are cut to ± this (Arjovsky et al. 2017)"
    )
    discriminator_steps: int = Field(1, gt=0, description="steps of the discriminator for each of the generator")
    instance_noise: float = Field(
        0.0, ge=0, description="deviation of noise on all images that the discriminator sees, at the start"
    )
    instance_noise_steps: int | None = Field(None, gt=0, description="in which it goes to 0; null: it stays")
    augmentation: Annotated[DiffAugment | AdaptiveAugment, Field(discriminator="kind")] | None = Field(
        None, description="of what the discriminator sees: kind diff_augment or adaptive"
    )
    preview_samples: int = Field(16, gt=0, description="samples in a grid, at most")

    @model_validator(mode="after")
    def _fits(self) -> GanConfig:
        doubled = START
        while doubled < self.image_size:
            doubled *= 2
        if doubled != self.image_size or self.image_size == START:
            raise ValueError(
                f"image_size {self.image_size} cannot be made by doubling {START}: use 8, 16, 32, 64, … 1024"
            )
        if isinstance(self.text_encoder, TrainedTextEncoder):
            raise ValueError("text_encoder.kind is pretrained or none: a GAN's is frozen (train a CLIP first)")
        if self.clip is not None and self.text_encoder.kind != "none":
            raise ValueError("clip reads the captions in place of a text_encoder: give one")
        if self.matching_weight and self.clip is None:
            raise ValueError("matching_weight is of a CLIP: name it with clip")
        if self.takes_text and self.classes is not None:
            raise ValueError("a caption is a text or the name of a class: with classes, set text_encoder.kind=none")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes must be two names at least, each one once")
        if self.matching_aware and not self.conditional:
            raise ValueError("matching_aware needs something to match: a text_encoder, or classes")
        if self.auxiliary_weight and self.classes is None:
            raise ValueError("auxiliary_weight is of classes: name them")
        if self.semi_supervised is not None and (self.conditional or self.matching_aware):
            raise ValueError("semi_supervised draws without a condition: leave classes and text_encoder out")
        if self.real_target != 1 and self.loss not in SMOOTHED:
            raise ValueError(f"real_target is of losses {', '.join(SMOOTHED)}: {self.loss} has no target to soften")
        if isinstance(self.augmentation, AdaptiveAugment) and adversarial_loss(self.loss).border is None:
            raise ValueError(
                f"augmentation.kind=adaptive goes by the sign of what the discriminator says, which has no meaning of "
                f"its own with loss={self.loss}: use non_saturating, hinge or another"
            )
        if self.penalties.any and getattr(self.discriminator, "norm", "none") == "batch":
            raise ValueError(
                "under a penalty no gradient may run between samples: set discriminator.norm=group or none, not batch"
            )
        return self

    @property
    def couples_samples(self) -> bool:
        """Whether a loss mixes the samples of a batch, which accumulation would change."""
        norms = (getattr(network, "norm", "none") for network in (self.generator, self.discriminator))
        return "batch" in norms or self.semi_supervised is not None

    @property
    def label(self) -> str | None:
        """Where the samples' labels are read, if they are."""
        return None if self.semi_supervised is None else self.semi_supervised.label

    @property
    def takes_text(self) -> bool:
        """Whether it is conditioned on text."""
        return self.text_encoder.kind != "none" or self.clip is not None

    @property
    def conditional(self) -> bool:
        """Whether captions are read: as texts, or as names of classes."""
        return self.takes_text or self.classes is not None
