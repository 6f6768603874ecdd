"""What a run would be, without starting it: sizes, memory for each ZeRO stage, steps an epoch, export layout."""

from __future__ import annotations

import json
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from infra.errors import BadRequest
from pipelines.data.index import load_index
from pipelines.training.config import TrainConfig, abstract_networks
from pipelines.training.run_folder import RunFolder

_FLOAT = 4  # bytes of fp32: weights, gradients, moments and averages


def state_bytes(parameters: int, stage: int, world_size: int) -> float:
    """Bytes that one rank holds for the state of a network: weights, gradients, two AdamW moments, averages.

    ZeRO (Rajbhandari et al. 2020, fig. 1) in fp32. From stage 1 on the optimizer keeps a copy of its share of the
    weights. Activations are not in it.
    """
    whole = {0: 5, 1: 2, 2: 1, 3: 0}[stage]  # weights, gradients, moments (2) and averages
    shared = {0: 0, 1: 4, 2: 5, 3: 6}[stage]  # the last three, and weights and gradients as the stage says
    return _FLOAT * parameters * (whole + shared / world_size)


def describe(config: TrainConfig) -> dict[str, Any]:
    """Print the resolved run and return it as JSON."""
    console = Console(soft_wrap=True)
    console.print(yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False), markup=False, highlight=False)
    networks = abstract_networks(config)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in networks.items()}
    world_size = config.workers.count
    table = Table(title=f"State of one of {world_size} workers, MiB (activations not counted)")
    for column in ("network", "parameters", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "this run"):
        table.add_column(column, justify="left" if column == "network" else "right")
    memory = {}
    for name, count in parameters.items():
        memory[name] = [state_bytes(count, stage, world_size) / 2**20 for stage in range(4)]
        engine = config.engine_of(name)
        table.add_row(
            name, f"{count:,}", *(f"{mib:,.1f}" for mib in memory[name]), f"{engine.kind} {engine.zero_stage}"
        )
    console.print(table)
    facts: dict[str, Any] = {
        "run": config.run.name,
        "run_folder": RunFolder.of(config).url,
        "parameters": parameters,
        "memory_mib": memory,
        "global_batch_size": config.data.global_batch_size,
        "accumulation": config.accumulation,
        "layout": _layout(config.objective),
    }
    try:
        samples = load_index(config.data.url, RunFolder.of(config).path("index"), build=False).samples
        facts |= {"samples": samples, "steps_an_epoch": samples / config.data.global_batch_size}
        facts["epochs"] = config.run.steps / facts["steps_an_epoch"]
    except BadRequest as error:
        facts["data"] = str(error)
    for key in (
        "run_folder",
        "global_batch_size",
        "accumulation",
        "samples",
        "steps_an_epoch",
        "epochs",
        "layout",
        "data",
    ):
        if key in facts:
            value = facts[key]
            console.print(
                f"{key:18} {value:.2f}" if isinstance(value, float) else f"{key:18} {value}",
                markup=False,
                highlight=False,
            )
    return facts


def _layout(objective: Any) -> str:
    """Who opens the export."""
    if objective.kind == "side_by_side":
        return "; ".join(f"{name}: {_layout(member)}" for name, member in objective.members.items())
    if objective.kind == "latent_diffusion":
        from genmodels.diffusion.config import export_layout

        layout = export_layout(objective)
        return f"{layout} (diffusers opens it)" if layout != "own" else "our own: only generate.py opens it"
    if objective.kind == "clip":
        whole = objective.image_encoder.kind == "transformer"
        return "CLIPModel (transformers opens it)" if whole else "CLIP (transformers opens its text encoder)"
    if objective.kind == "diffusion_prior":
        return "PriorTransformer (diffusers opens it)"
    if objective.kind in ("autoregressive_prior", "damsm"):
        return "our own"
    if objective.kind in ("gan", "pix2pix", "cycle_gan", "attn_gan"):
        return "our own: only generate.py opens it"
    name = "AutoencoderKL" if objective.regulariser.kind == "kl" else "VQModel"
    return f"{name} (diffusers opens it)"
