"""Low-rank adapters: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), eq. 3, through peft.

Only the adapters are trained. The export holds the model with the adapters added to its weights, which opens as any
other, and `lora/`, the adapters alone, which diffusers adds to the model that was started from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from genmodels.diffusion.config import LoraConfig

ADAPTER = "default"
TRAINED = ["*.lora_A.*", "*.lora_B.*"]  # names of the parameters of adapters


def add_adapters(backbone: nn.Module, config: LoraConfig) -> None:
    """Put an adapter beside every layer that `config.targets` names; they begin as 0.

    Raises:
        ValueError: no layer has such a name, or peft is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("objective.lora needs the package peft: pip install 'genmodels-on-ray[lora]'") from None
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=list(config.targets), lora_dropout=0.0
    )
    inject_adapter_in_model(settings, backbone, ADAPTER)


def adapted_layers(backbone: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in backbone.named_modules() if hasattr(module, "lora_A")}


def without_adapters(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights under the adapters, by the names that they have in a backbone without: views, not copies."""
    plain = {}
    for name, value in backbone.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            plain[name.replace(".base_layer.", ".")] = value.detach()
    return plain


@torch.no_grad()
def merged(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights with the adapters added, W + (α/r) B A, by the names that they have in a backbone without."""
    weights = without_adapters(backbone)
    for name, layer in adapted_layers(backbone).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
    return weights


def save_adapters(backbone: Any, folder: Path) -> None:
    """Write the adapters alone, as diffusers' `load_lora_weights` reads them."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(backbone, adapter_name=ADAPTER),
        safe_serialization=True,
        unet_lora_adapter_metadata=backbone.peft_config[ADAPTER].to_dict(),
    )
