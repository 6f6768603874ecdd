"""Drawing from an exported folder, by this project or by diffusers' own pipeline.

python tests/benchmarks/draw.py ours|diffusers FOLDER OUT.json PIXELS.npy
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

PICTURES, STEPS, SCALE, REPEATS = 32, 20, 3.0, 3
PROMPTS = ["a red seven on a white background"] * PICTURES
SEEDS = list(range(PICTURES))


def drawing(who: str, folder: Path) -> Any:
    """A function without arguments that draws, uint8 (pictures, height, width, 3)."""
    if who == "ours":
        from genmodels.diffusion.pipeline import TextToImage

        model = TextToImage.from_folder(folder)
        return lambda: model.draw(PROMPTS, SEEDS, num_steps=STEPS, guidance_scale=SCALE)
    from diffusers import StableDiffusionPipeline

    from genmodels import random

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.sample_size
    latents = random.normal(torch.tensor(SEEDS), (pipeline.unet.config.in_channels, size, size), "initial")
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "np"}

    def draw() -> np.ndarray:
        images = pipeline(PROMPTS, latents=latents, **settings).images
        return (images * 255).round().astype(np.uint8)

    return draw


def main() -> None:
    who, folder, out, pixels = sys.argv[1:]
    torch.set_num_threads(1)
    draw = drawing(who, Path(folder))
    drawn, seconds = draw(), []  # the first is slower
    for _ in range(REPEATS):
        begun = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - begun)
    np.save(pixels, drawn)
    Path(out).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
