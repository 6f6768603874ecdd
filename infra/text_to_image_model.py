"""The text-to-image model as MLflow runs it: `mlflow.pyfunc.load_model("models:/NAME/1").predict(frame)` draws.

MLflow stores this file with the model and executes it on loading (models from code), with `genmodels` beside it. It
therefore imports nothing else of this project.

In: a frame with column `prompt` and, optionally, `negative_prompt`, `seed` (0), `num_steps` and `guidance_scale`;
for an unconditional model `seed` and, optionally, `num_steps`; for one that makes pictures of images `image`, a file as
bytes, and, optionally, `seed` and, of a CycleGAN, `direction` (ab).
Out: a frame with column `png`, one PNG file as bytes for each row. A picture depends on its own row only.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image, ImageOps


def _given(frame: pd.DataFrame, column: str, default: Any) -> list[Any]:
    """The column's values, with `default` where the column or a value is missing."""
    if column not in frame:
        return [default] * len(frame)
    return [default if pd.isna(value) else value for value in frame[column]]


def _square(data: bytes, size: int, nearest: bool) -> np.ndarray:
    """The square in the middle of an image, upright, as in training: uint8 (size, size, 3)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    resampling = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), resampling))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class TextToImageModel(PythonModel):
    """Draws pictures from prompts with the exported folder that the model was registered with."""

    def load_context(self, context: Any) -> None:
        """Open the export; weights are read here, once."""
        from pathlib import Path

        from genmodels.drawing import open_drawing_model

        self.pipeline = open_drawing_model(Path(context.artifacts["export"]))
        self.sampling = dict(context.model_config or {})

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Draw each row; rows that share steps and guidance are drawn together."""
        if "image" in model_input:
            return self._of_images(model_input)
        rows = pd.DataFrame(
            {
                "prompt": _given(model_input, "prompt", ""),
                "negative_prompt": _given(model_input, "negative_prompt", ""),
                "seed": [int(seed) for seed in _given(model_input, "seed", 0)],
                "num_steps": _given(model_input, "num_steps", self.sampling["num_steps"]),
                "guidance_scale": _given(model_input, "guidance_scale", self.sampling["guidance_scale"]),
            }
        )
        pictures = pd.Series([b""] * len(rows), dtype=object)
        for (num_steps, guidance_scale), group in rows.groupby(["num_steps", "guidance_scale"]):
            negative = list(group["negative_prompt"])
            images = self.pipeline.draw(
                list(group["prompt"]) if self.pipeline.conditional else None,
                list(group["seed"]),
                negative_prompts=negative if any(negative) else None,
                num_steps=int(num_steps),
                guidance_scale=float(guidance_scale),
                sampler=self.sampling["sampler"],
            )
            for row, image in zip(group.index, images, strict=True):
                pictures[row] = _png(image)
        return pd.DataFrame({"png": pictures.to_numpy()})

    def _of_images(self, frame: pd.DataFrame) -> pd.DataFrame:
        size, nearest = self.pipeline.given_size, getattr(self.pipeline, "takes_map", False)
        images = np.stack([_square(data, size, nearest) for data in frame["image"]])
        seeds, directions = [int(seed) for seed in _given(frame, "seed", 0)], _given(frame, "direction", "ab")
        pictures = [b""] * len(frame)
        for direction in sorted({*directions}):
            rows = [row for row, each in enumerate(directions) if each == direction]
            model: Any = self.pipeline
            drawn = model.draw(None, [seeds[row] for row in rows], images=images[rows], direction=direction)
            for row, image in zip(rows, drawn, strict=True):
                pictures[row] = _png(image)
        return pd.DataFrame({"png": pictures})


set_model(TextToImageModel())
