"""The text-to-image model as MLflow runs it: `mlflow.pyfunc.load_model("models:/NAME/1").predict(frame)` draws, and so
does `mlflow models serve -m models:/NAME@champion --env-manager local`, whose answers hold the PNGs in base64.

MLflow stores this file with the model and executes it on loading (models from code), with `genmodels` beside it. It
therefore imports nothing else of this project.

In: a frame with column `prompt` and, optionally, `negative_prompt`, `seed` (0), `num_steps` and `guidance_scale`;
for an unconditional model `seed` and, optionally, `num_steps`; for one that makes pictures of images `image`, a file as
bytes, and, optionally, `seed` and, of a CycleGAN, `direction` (ab). A row may leave out what is optional.
Out: a frame with column `png`, one PNG file as bytes for each row, with what made it as text. A picture depends on its
own row only. A row that cannot be drawn raises MlflowException, which a server answers with 400 and the reason; columns
of other names never come here, since MLflow takes them off.
"""

from __future__ import annotations

import io
import json
import numbers
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

_EXACT = 2**53  # beside rows without a seed, pandas makes floats of seeds, which are exact below this
_WHOLE = {"seed": (-(2**63), 2**63 - 1), "num_steps": (1, 2**31)}


def _given(frame: pd.DataFrame, column: str, default: Any) -> list[Any]:
    """The column's values, with `default` where the column or a value is missing."""
    if column not in frame:
        return [default] * len(frame)
    missing = [value is None or (isinstance(value, numbers.Real) and value != value) for value in frame[column]]
    return [default if none else value for none, value in zip(missing, frame[column], strict=True)]


def _refused(row: int, column: str, expected: str, value: Any) -> MlflowException:
    said = f"row {row}: {column} must be {expected}, not {'missing' if value is None else repr(value)[:80]}"
    return MlflowException.invalid_parameter_value(said)


def _texts(frame: pd.DataFrame, column: str, default: str | None) -> list[str]:
    values = _given(frame, column, default)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise _refused(row, column, "text", value)
    return values


def _whole(frame: pd.DataFrame, column: str, default: int) -> list[int]:
    values, (least, most) = _given(frame, column, default), _WHOLE[column]
    for row, value in enumerate(values):
        exact = isinstance(value, numbers.Integral) or (
            isinstance(value, numbers.Real) and float(value).is_integer() and abs(float(value)) < _EXACT
        )
        if not exact or isinstance(value, bool) or not least <= int(value) <= most:
            also = " (where other rows leave it out, of 53 bits at most)" if isinstance(value, float) else ""
            raise _refused(row, column, f"a whole number from {least} to {most}{also}", value)
    return [int(value) for value in values]


def _numbers(frame: pd.DataFrame, column: str, default: float) -> list[float]:
    values = _given(frame, column, default)
    for row, value in enumerate(values):
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not np.isfinite(float(value)):
            raise _refused(row, column, "a number", value)
    return [float(value) for value in values]


def _square(data: Any, row: int, size: int, nearest: bool) -> np.ndarray:
    """The square in the middle of an image, upright, as in training: uint8 (size, size, 3)."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        resampling = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), resampling))
    except (OSError, TypeError, ValueError, Image.DecompressionBombError):
        raise _refused(row, "image", "an image file (by REST in base64)", data) from None


def _png(image: Any, facts: dict[str, Any]) -> bytes:
    """A PNG file with what made it as text, under the names that generate.py uses; None is left out."""
    info = PngInfo()
    for name, value in {"Software": "genmodels", **facts}.items():
        if value is not None:
            info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


class TextToImageModel(PythonModel):
    """Draws pictures from prompts with the exported folder that the model was registered with."""

    def load_context(self, context: Any) -> None:
        """Open the export; weights are read here, once."""
        from pathlib import Path

        from genmodels.drawing import open_drawing_model

        self.pipeline = open_drawing_model(Path(context.artifacts["export"]))
        self.sampling = dict(context.model_config or {})
        named = {"Model": "model", "Model digest": "model_digest"}  # versions of before name neither
        self.origin = {name: self.sampling.get(key) for name, key in named.items()}

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Draw each row; rows that share steps and guidance are drawn together."""
        frame = model_input.reset_index(drop=True)
        if "image" in frame:
            return self._of_images(frame)
        told = self.pipeline.conditional
        rows = pd.DataFrame(
            {
                "prompt": _texts(frame, "prompt", None if told else ""),
                "negative_prompt": _texts(frame, "negative_prompt", ""),
                "seed": _whole(frame, "seed", 0),
                "num_steps": _whole(frame, "num_steps", self.sampling["num_steps"]),
                "guidance_scale": _numbers(frame, "guidance_scale", self.sampling["guidance_scale"]),
            }
        )
        pictures = pd.Series([b""] * len(rows), dtype=object)
        sampler, in_steps = self.sampling["sampler"], not hasattr(self.pipeline, "generator")  # a GAN's
        for (num_steps, guidance_scale), group in rows.groupby(["num_steps", "guidance_scale"]):
            steps = {"num_steps": int(num_steps), "guidance_scale": float(guidance_scale), "sampler": sampler}
            negative = list(group["negative_prompt"])
            try:
                images = self.pipeline.draw(
                    list(group["prompt"]) if told else None,
                    list(group["seed"]),
                    negative_prompts=negative if any(negative) else None,
                    **steps,
                )
            except ValueError as error:  # a prompt that names no class, or too many steps
                raise MlflowException.invalid_parameter_value(" ".join(str(error).split())) from error
            for (row, asked), image in zip(group.iterrows(), images, strict=True):
                settings = {**(steps if in_steps else {}), "negative_prompt": asked["negative_prompt"] or None}
                facts = {"Prompt": asked["prompt"] if told else None, "Seed": int(asked["seed"]), "Settings": settings}
                pictures[row] = _png(image, {**self.origin, **facts})
        return pd.DataFrame({"png": pictures.to_numpy()})

    def _of_images(self, frame: pd.DataFrame) -> pd.DataFrame:
        size, nearest = self.pipeline.given_size, getattr(self.pipeline, "takes_map", False)
        images = np.stack([_square(data, row, size, nearest) for row, data in enumerate(frame["image"])])
        seeds, directions = _whole(frame, "seed", 0), _texts(frame, "direction", "ab")
        pictures = [b""] * len(frame)
        for direction in sorted({*directions}):
            rows = [row for row, each in enumerate(directions) if each == direction]
            model: Any = self.pipeline
            try:
                drawn = model.draw(None, [seeds[row] for row in rows], images=images[rows], direction=direction)
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(" ".join(str(error).split())) from error
            for row, image in zip(rows, drawn, strict=True):
                pictures[row] = _png(image, {**self.origin, "Seed": seeds[row], "Settings": {"direction": direction}})
        return pd.DataFrame({"png": pictures})


set_model(TextToImageModel())
