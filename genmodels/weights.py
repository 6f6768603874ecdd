"""Weights from elsewhere, always as safetensors, and the size of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def required_folder(inputs: Path | None, name: str) -> Path:
    """The folder `name` among the inputs of a run. Raises ValueError where there is none."""
    if inputs is None or not (inputs / name).is_dir():
        raise ValueError(f"this configuration needs {name}/ among its inputs, and there is none in {inputs}")
    return inputs / name


def load_into(network: nn.Module, folder: Path) -> None:
    """Copy the weights of a diffusers or transformers folder into `network`, which is of the same class.

    Raises:
        ValueError: the folder is missing, or names or shapes differ; the message gives the first few.
    """
    copy_weights(open_folder(type(network), folder), network, folder)


def open_folder(kind: type, folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers or transformers model of class `kind`. Raises ValueError where there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"init_from: {folder} holds no {kind.__name__} (no config.json there)")
    source: Any = kind
    return source.from_pretrained(folder, use_safetensors=True).state_dict()


def copy_weights(weights: dict[str, Tensor], network: nn.Module, folder: Path) -> None:
    """Copy `weights`, which come from `folder`, into `network`.

    Raises:
        ValueError: names or shapes differ; the message gives the first few.
    """
    own = network.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not part of this network" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"init_from: the weights in {folder} do not fit this config: {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(weights)


def weights_digest(network: nn.Module, settings: str) -> str:
    """Of settings and all weights: equal digests mean the same network. Sixteen hexadecimal digits."""
    digest = hashlib.sha256(settings.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def forward_flops(build: Callable[[], nn.Module], *shapes_and_types: tuple[tuple[int, ...], torch.dtype]) -> float:
    """Floating point operations of one forward pass, counted on the meta device: nothing is computed or allocated."""
    with torch.device("meta"):
        network = build().requires_grad_(False)
        inputs = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes_and_types]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(*inputs)
    return float(counter.get_total_flops())
