"""How pictures are drawn: the arguments that `generate.py` and `evaluate.py` share."""

from __future__ import annotations

import argparse
from typing import Any

from infra.errors import BadRequest

SAMPLERS = ("ddpm", "ddim", "dpm_solver++", "euler", "heun", "euler_ancestral")


def add_drawing_arguments(parser: argparse.ArgumentParser, precision: str = "fp32") -> None:
    """Add sampler, steps, guidance, batch size and precision, which is `precision` where nothing is said."""
    add = parser.add_argument
    add("--num-steps", type=int, default=20, help="denoiser steps for each picture (default: %(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="1 is no guidance (default: %(default)s)")
    add(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="bring the deviation of guided predictions back, 0 to 1 (default: %(default)s)",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="guide only between these shares of the schedule, 0 is clean and 1 is noise (default: 0 1)",
    )
    add("--sampler", default="ddim", choices=SAMPLERS, help="heun makes two passes a step (default: %(default)s)")
    add("--eta", type=float, default=0.0, help="of ddim: share of fresh noise, 0 to 1 (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="pictures drawn at once; it changes none (default: %(default)s)")
    add(
        "--precision",
        default=precision,
        choices=["fp32", "bf16", "auto"],
        help="of the U-Net; auto: bf16 where the device is fast at it (default: %(default)s)",
    )


def drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the arguments `TextToImage.draw` takes, by its names.

    Raises:
        BadRequest: a number is out of range.
    """
    for name in ("num_steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise BadRequest(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")
    low, high = arguments.guidance_interval
    if not 0 <= low < high <= 1:
        raise BadRequest(f"--guidance-interval must be LOW < HIGH, both from 0 to 1, not {low:g} {high:g}")
    if not 0 <= arguments.guidance_rescale <= 1:
        raise BadRequest(f"--guidance-rescale must be from 0 to 1, not {arguments.guidance_rescale:g}")
    if not 0 <= arguments.eta <= 1 or (arguments.eta and arguments.sampler != "ddim"):
        raise BadRequest(f"--eta {arguments.eta:g}: only --sampler ddim takes one, from 0 to 1")
    return {
        "num_steps": arguments.num_steps,
        "guidance_scale": arguments.guidance_scale,
        "guidance_rescale": arguments.guidance_rescale,
        "guidance_interval": (low, high),
        "sampler": arguments.sampler,
        "eta": arguments.eta,
        "batch_size": arguments.batch_size,
    }
