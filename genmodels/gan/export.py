"""Export folders of GANs: the two networks that were trained, and the configuration that builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from genmodels.config import Section
from genmodels.gan.layout import DISCRIMINATOR, GENERATOR, INDEX
from genmodels.weights import copy_weights

_FILES = {"generator": GENERATOR, "discriminator": DISCRIMINATOR}


def write_networks(folder: Path, config: Section, networks: dict[str, nn.Module], **index: Any) -> dict[str, Any]:
    """Write networks "generator" and "discriminator", the configuration and what else is in the `index`; returns facts
    for the model card."""
    folder.mkdir(exist_ok=True)
    for name, file in _FILES.items():
        state = networks[name].state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / file)
    content = {"config": json.loads(config.model_dump_json()), **index}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return {"layout": "own", "parameters": parameters}


def read_index(folder: Path) -> dict[str, Any]:
    """What `write_networks` wrote beside the weights. Raises ValueError where there is no export of a GAN."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no export of a GAN (no {INDEX} there)")
    return dict(json.loads((folder / INDEX).read_text()))


def read_networks(folder: Path, networks: dict[str, nn.Module]) -> None:
    """Copy an export's weights into networks of these names. Raises ValueError where there is none, or it does not
    fit."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"init_from: {folder} is no export of a GAN (no {INDEX} there)")
    for name, network in networks.items():
        if not (folder / _FILES[name]).is_file():
            raise ValueError(f"{folder} is no whole export of a GAN (no {_FILES[name]} there)")
        copy_weights(load_file(folder / _FILES[name]), network, folder)
