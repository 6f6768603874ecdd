"""What a diffusion model is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genmodels.config import Attention, Section, check_groups
from genmodels.text.config import TextEncoderConfig, TrainedTextEncoder

ScheduleName = Literal["linear", "scaled_linear", "cosine", "flow", "edm"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
DIFFUSERS_DIT_CLASSES = 1000  # its pipeline takes this label for "no class"


class UNetConfig(Section):
    """The U-Net: diffusers' UNet2DConditionModel with a text encoder, UNet2DModel without."""

    kind: Literal["unet"] = "unet"
    channels: list[int] = Field(
        [320, 640, 1280, 1280], min_length=1, description="channels per resolution, fine to coarse"
    )
    attention: list[bool] = Field([True, True, True, False], description="attention at that resolution, one per entry")
    layers_per_block: int | list[int] = Field(
        2, description="residual blocks per resolution; a list gives each its own, fine to coarse"
    )
    middle_attention: bool = Field(True, description="attention in the middle; without text alone it can be left out")
    skip_scale: float = Field(
        1.0, gt=0, description="skip connections are multiplied by it: 0.7071 in Imagen's efficient U-Net"
    )
    transformer_layers: int = Field(1, gt=0, description="transformer layers per attention (with a text encoder)")
    head_dim: int = Field(40, gt=0, description="features per attention head; divides the channels that attend")
    heads: int | None = Field(
        None, gt=0, description="attention heads, in place of head_dim: the same at all resolutions"
    )
    linear_projection: bool = Field(
        False, description="linear layers around attention to text, in place of 1x1 convolutions (Stable Diffusion 2)"
    )
    pooled_text: bool = Field(
        False, description="the text, pooled by attention, enters where the timestep does too, not by attention alone"
    )
    scale_shift: bool = Field(False, description="what enters with the timestep scales features too, not only shifts")
    resnet_resampling: bool = Field(False, description="residual blocks resample; without text alone")
    norm_groups: int = Field(32, gt=0, description="groups of the normalisation; divides every entry of channels")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of features dropped; which, depends on workers.count")

    @model_validator(mode="after")
    def _fits(self) -> UNetConfig:
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention has {len(self.attention)} entries, channels has {len(self.channels)}")
        layers = self.layers_per_block
        if isinstance(layers, list) and len(layers) != len(self.channels):
            raise ValueError(f"layers_per_block has {len(layers)} entries, channels has {len(self.channels)}")
        if min(layers if isinstance(layers, list) else [layers]) < 1:
            raise ValueError("layers_per_block must be 1 or more")
        check_groups(self.channels, self.norm_groups)
        for channels, attends in zip(self.channels, self.attention):
            if attends:
                self._check_heads(channels)
        if self.middle_attention:
            self._check_heads(self.channels[-1])
        return self

    def _check_heads(self, channels: int) -> None:
        if self.heads is not None and channels % self.heads:
            raise ValueError(f"channels {channels} is not a multiple of heads {self.heads}")
        if self.heads is None and channels % self.head_dim:
            raise ValueError(f"channels {channels} is not a multiple of head_dim {self.head_dim}")


class DiTConfig(Attention):
    """A diffusion transformer with adaLN-zero (Peebles and Xie 2023); the defaults are DiT-XL/2."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, gt=0, description="side of a patch of latents; a patch is a token")
    width: int = Field(1152, gt=0, description="features per token; a multiple of heads, and of 4")
    depth: int = Field(28, gt=0, description="blocks")
    heads: int = Field(16, gt=0, description="attention heads")
    text_attention: Literal["cross", "joint"] = Field(
        "cross", description="how text enters: cross-attention, or one attention over the tokens of both"
    )

    @model_validator(mode="after")
    def _fits(self) -> DiTConfig:
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, for the position embeddings")
        return self


class LoraConfig(Section):
    """Low-rank adapters beside layers that stay as they are (Hu et al. 2022); needs run.init_from."""

    rank: int = Field(8, gt=0, description="r, of the product that is added to a weight")
    alpha: int | None = Field(None, gt=0, description="the product is multiplied by alpha/rank [rank]")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="layers that get one, by the end of their names; a DiT's last is to_out",
    )


class _ImageCondition(Section):
    """What conditions by an image share."""

    dropout: float = Field(0.0, ge=0, lt=1, description="share of samples trained without it")


class LowResolutionCondition(_ImageCondition):
    """Super-resolution: told the image, made smaller, and in training made worse too."""

    kind: Literal["low_resolution"] = "low_resolution"
    factor: int = Field(4, gt=1, description="by how much; divides image_size")
    degradation: Literal["none", "blur", "bsr"] = Field(
        "none",
        description="of the small image in training: Gaussian blur, or blur, noise, resizing and JPEG in any order",
    )
    blur_sigma: float = Field(0.6, gt=0, description="largest deviation of that blur, in pixels of the small image")
    augmentation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest level of Gaussian noise on it in training, 1 is noise alone; the level is told",
    )
    crop: int | None = Field(
        None, gt=0, description="train on crops of so many pixels a side, a multiple of factor; null: whole images"
    )

    @model_validator(mode="after")
    def _fits(self) -> LowResolutionCondition:
        if self.crop is not None and self.crop % self.factor:
            raise ValueError(f"crop {self.crop} is not a multiple of factor {self.factor}")
        return self


class BlurCondition(_ImageCondition):
    """Deblurring."""

    kind: Literal["blur"] = "blur"
    sigma: float = Field(2.0, gt=0, description="deviation of the Gaussian blur in pixels")


class NoiseCondition(_ImageCondition):
    """Denoising of noisy images."""

    kind: Literal["noise"] = "noise"
    deviation: float = Field(0.5, gt=0, description="of the Gaussian noise, for images in [-1, 1]")


class EdgeCondition(_ImageCondition):
    """Drawing from edges."""

    kind: Literal["edges"] = "edges"
    threshold: float = Field(0.5, gt=0, description="change of a colour between neighbours, of 2, that is an edge")


class MaskCondition(_ImageCondition):
    """Inpainting: told everything outside a rectangle."""

    kind: Literal["mask"] = "mask"
    largest: float = Field(0.7, gt=0, le=1, description="largest side of a training rectangle, over the image's")


class MemberCondition(_ImageCondition):
    """Told another image of the sample: a semantic map, a sketch, a depth map."""

    kind: Literal["member"] = "member"
    member: str = Field("map.png", min_length=1, description="where it is in the shards: the member's suffix")


ImageConditionConfig = (
    MemberCondition | LowResolutionCondition | BlurCondition | NoiseCondition | EdgeCondition | MaskCondition
)


class ImageEmbeddingConfig(Section):
    """The decoder of unCLIP: told the embedding that a CLIP gives an image (Ramesh et al. 2022, section 2.1)."""

    clip: str = Field(
        description="folder, checkpoint, models:/NAME or preset:NAME of a CLIP, or hub name of a CLIPModel"
    )
    clip_dim: int = Field(768, gt=0, description="features of its embeddings, for estimates while it is not at hand")
    member: str | None = Field(
        None,
        description="member of the samples with the embedding, clip.npy as encode_latents.py writes it; null: images "
        "are embedded as they come",
    )
    tokens: int = Field(4, gt=0, description="tokens of context that it becomes, beside what is added to the timestep")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of samples trained without it")


class LatentDiffusionConfig(Section):
    """Diffusion in the latents of an autoencoder or in pixels, with or without text (Rombach et al. 2022)."""

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    image_size: int = Field(256, gt=0, description="height and width in pixels")
    autoencoder: str | None = Field(
        None, description="folder, checkpoint or models:/NAME of the autoencoder; null diffuses pixels"
    )
    latent_member: str | None = Field(
        None,
        description="member of the samples with the autoencoder's posterior, latent.npy as encode_latents.py writes "
        "it; null: images are encoded as they come",
    )
    latent_channels: int = Field(4, gt=0, description="the autoencoder's, for estimates while it is not at hand")
    latent_factor: int = Field(8, gt=0, description="the autoencoder's, for estimates while it is not at hand")
    denoiser: Annotated[UNetConfig | DiTConfig, Field(discriminator="kind")] = Field(
        UNetConfig(), description="kind unet or dit"
    )
    text_encoder: TextEncoderConfig = Field(
        TrainedTextEncoder(), description="kind trained, pretrained or none (no text)"
    )
    classes: list[str] | None = Field(
        None, description="in place of text: the captions are names of classes, and these are all of them"
    )
    image_condition: Annotated[ImageConditionConfig, Field(discriminator="kind")] | None = Field(
        None, description="an image that is told too: kind low_resolution, blur, noise, edges, mask or member"
    )
    image_embedding: ImageEmbeddingConfig | None = Field(
        None, description="the embedding of an image that is told too: the decoder of unCLIP"
    )
    size_conditioning: bool = Field(
        False, description="tell each image's original size and where it was cropped, for data of many sizes"
    )
    prediction_type: PredictionType = Field(
        "v_prediction", description="what the denoiser predicts: epsilon, v_prediction, sample, flow (matching) or edm"
    )
    noise_schedule: ScheduleName = Field(
        "scaled_linear", description="linear, scaled_linear, cosine; flow or edm with the same"
    )
    sigma_data: float = Field(
        1.0, gt=0, description="of edm: deviation of what is diffused, 1 for latents, about 0.5 for images"
    )
    edm_mean: float = Field(-1.2, description="of edm: mean of the logarithm of the noise level in training")
    edm_std: float = Field(1.2, gt=0, description="of edm: its deviation")
    flow_shift: float = Field(
        1.0, gt=0, description="of a flow: moves training and sampling towards the noise; 3 is usual for large images"
    )
    zero_terminal_snr: bool = Field(
        False, description="end the schedule in pure noise, as sampling begins; not for epsilon"
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="weigh errors of the clean sample by min(SNR, gamma), 5 is usual; null: plain errors"
    )
    offset_noise: float = Field(
        0.0,
        ge=0,
        description="deviation of noise that is the same in all of a channel: helps very dark or bright images",
    )
    dynamic_thresholding: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of pixels: where this share of a predicted image's values is beyond [-1, 1], all are scaled back; "
        "0.995 in Imagen; of samplers ddpm, ddim and dpm_solver++",
    )
    learned_variance: bool = Field(
        False, description="predict the variance of each step too, for sampler ddpm; of diffusion schedules"
    )
    train_timesteps: int = Field(1000, ge=4, description="timesteps of the noise schedule")
    timestep_sampling: Literal["power", "logit_normal"] = Field(
        "power",
        description="density of training timesteps: power is t^(timestep_bias-1), logit_normal favours the middle",
    )
    timestep_bias: float = Field(1.0, gt=0, description="of power: 1 is uniform, more favours noise")
    logit_mean: float = Field(0.0, description="of logit_normal: more favours noise")
    logit_std: float = Field(1.0, gt=0, description="of logit_normal: how wide")
    condition_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of samples trained without their caption, for classifier-free guidance"
    )
    lora: LoraConfig | None = Field(None, description="train low-rank adapters only; null trains all weights")
    preview_steps: int = Field(15, gt=0, description="DDIM steps of the sample grids")
    preview_guidance_scale: float = Field(2.0, ge=1, description="guidance scale of the sample grids")
    preview_samples: int = Field(16, gt=0, description="samples in a grid, at most")

    @model_validator(mode="after")
    def _predicts_something(self) -> LatentDiffusionConfig:
        told = self.image_condition
        if isinstance(told, LowResolutionCondition) and self.image_size % told.factor:
            raise ValueError(f"image_condition.factor {told.factor} does not divide image_size {self.image_size}")
        if isinstance(told, LowResolutionCondition) and told.crop is not None:
            if self.autoencoder is not None:
                raise ValueError("image_condition.crop is of pixels: set autoencoder to null")
            if told.crop > self.image_size:
                raise ValueError(f"image_condition.crop {told.crop} is more than image_size {self.image_size}")
        if self.latent_member is not None and (self.autoencoder is None or told is not None):
            raise ValueError("latent_member is of an autoencoder, without image_condition")
        unet = self.denoiser
        if self.image_embedding is not None and (not isinstance(unet, UNetConfig) or self.size_conditioning):
            raise ValueError("image_embedding is of denoiser.kind unet, without size_conditioning")
        if self.image_embedding is not None and (self.classes is not None or told is not None):
            raise ValueError("image_embedding goes with text, or alone: leave classes and image_condition out")
        if self.tells_level and (self.size_conditioning or self.classes or unet.kind != "unet"):
            raise ValueError(
                "image_condition.augmentation is of denoiser.kind unet, without classes and size_conditioning"
            )
        takes_context = self.takes_text or self.image_embedding is not None
        if isinstance(unet, UNetConfig) and not unet.middle_attention and takes_context:
            raise ValueError("middle_attention can be left out by U-Nets without text and image_embedding alone")
        if isinstance(unet, UNetConfig) and self.takes_text and unet.resnet_resampling:
            raise ValueError("resnet_resampling is of U-Nets without text")
        if isinstance(unet, UNetConfig) and not self.takes_text and (unet.pooled_text or self.size_conditioning):
            raise ValueError("pooled_text and size_conditioning are of U-Nets with text")
        if self.classes is not None and self.takes_text:
            raise ValueError("a caption is a text or the name of a class: with classes, set text_encoder.kind=none")
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes must be names, each one once")
        for whole in ("flow", "edm"):
            if (self.noise_schedule == whole) != (self.prediction_type == whole):
                raise ValueError(f"{whole} is prediction_type {whole} together with noise_schedule {whole}")
        if self.zero_terminal_snr and self.noise_schedule in ("flow", "edm"):
            raise ValueError("zero_terminal_snr is of diffusion schedules: a flow ends in pure noise, and edm near it")
        if self.noise_schedule == "edm" and self.min_snr_gamma is not None:
            raise ValueError("edm has weights of its own: leave min_snr_gamma out")
        if self.learned_variance and (self.noise_schedule in ("flow", "edm") or self.zero_terminal_snr):
            raise ValueError("learned_variance is of diffusion schedules that do not end in pure noise")
        if self.dynamic_thresholding is not None and (
            self.autoencoder is not None or self.noise_schedule in ("flow", "edm")
        ):
            raise ValueError("dynamic_thresholding is of pixels (autoencoder: null) and of diffusion schedules")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr needs prediction_type v_prediction or sample: pure noise tells no sample"
            )
        return self

    @property
    def tells_level(self) -> bool:
        """Whether the denoiser is told how noisy the image is that it is told."""
        return isinstance(self.image_condition, LowResolutionCondition) and self.image_condition.augmentation > 0

    @property
    def takes_text(self) -> bool:
        """Whether it is conditioned on text."""
        return self.text_encoder.kind != "none"

    @property
    def conditional(self) -> bool:
        """Whether captions are read: as texts, or as names of classes."""
        return self.takes_text or self.classes is not None


def export_layout(config: LatentDiffusionConfig) -> str:
    """Who opens the export: "Stable Diffusion", "DiTPipeline" or "DDPMPipeline" (all diffusers'), or "own"."""
    if config.image_condition is not None or config.size_conditioning or config.image_embedding is not None:
        return "own"
    if config.denoiser.kind == "unet" and config.denoiser.skip_scale != 1:
        return "own"
    if config.denoiser.kind == "dit":
        of_classes = config.classes is not None and len(config.classes) <= DIFFUSERS_DIT_CLASSES
        return "DiTPipeline" if of_classes and config.autoencoder is not None else "own"
    if config.takes_text and config.autoencoder is not None:
        return "own" if config.learned_variance else "Stable Diffusion"
    if not config.conditional and config.autoencoder is None and config.prediction_type not in ("flow", "edm"):
        return "DDPMPipeline"
    return "own"
