"""The two networks of a configuration."""

from __future__ import annotations

from torch import nn

from genmodels.gan.config import GanConfig
from genmodels.gan.networks import dcgan, modern, resnet, style
from genmodels.gan.networks.blocks import Conditioner
from genmodels.text.config import PretrainedTextEncoder
from genmodels.text.encoder import pretrained_width

_KINDS = {"dcgan": dcgan, "resnet": resnet, "modern": modern, "style": style}


def build_generator(config: GanConfig, text_width: int | None = None) -> nn.Module:
    """Freshly initialised; `text_width` are the features of the text encoder or CLIP at hand [those configured]."""
    kind = _KINDS[config.generator.kind]
    conditioner = build_conditioner(config, text_width)
    return kind.Generator(config.generator, config.image_size, config.latent_dim, conditioner, config.condition_dim)


def build_discriminator(config: GanConfig, text_width: int | None = None) -> nn.Module:
    """Freshly initialised; see `build_generator`."""
    kind = _KINDS[config.discriminator.kind]
    spectral = getattr(config.discriminator, "spectral_norm", False)
    conditioner = build_conditioner(config, text_width, spectral)
    joint = config.semi_supervised is not None
    named = config.semi_supervised.classes if config.semi_supervised is not None else config.classes or []
    classes = len(named) if joint or config.auxiliary_weight else 0
    return kind.Discriminator(
        config.discriminator, config.image_size, conditioner, config.condition_dim, classes, joint
    )


def build_conditioner(config: GanConfig, text_width: int | None = None, spectral: bool = False) -> Conditioner | None:
    """What makes a vector of a condition; None where there is none."""
    if not config.conditional:
        return None
    if config.classes is not None:
        return Conditioner(len(config.classes), None, config.condition_dim, spectral)
    width = text_width or config.clip_dim
    if text_width is None and isinstance(config.text_encoder, PretrainedTextEncoder):
        width = pretrained_width(config.text_encoder)
    return Conditioner(None, width, config.condition_dim, spectral)
