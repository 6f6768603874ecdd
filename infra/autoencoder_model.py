"""The autoencoder as MLflow runs it: pictures in, their reconstructions out.

MLflow stores this file with the model and executes it on loading (models from code). Training opens a registered
autoencoder by its export folder instead (`infra.registry.resolve_model`).

In: a frame with column `png`, a picture file as bytes, its sides multiples of the reduction factor. Out: the same.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image


class AutoencoderModel(PythonModel):
    """Encodes and decodes pictures with the exported folder that the model was registered with."""

    def load_context(self, context: Any) -> None:
        """Open the export; weights are read here, once."""
        from genmodels.autoencoder.codec import LatentCodec

        self.autoencoder = LatentCodec.from_folder(Path(context.artifacts["export"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Reconstruct each picture, from the mean of its posterior where there is one."""
        import torch

        pictures = []
        for data in model_input["png"]:
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 127.5 - 1.0
            with torch.inference_mode():
                images = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, height, width)
                decoded = self.autoencoder.decode(self.autoencoder.encode(images))[0].permute(1, 2, 0)
            buffer = io.BytesIO()
            Image.fromarray(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        return pd.DataFrame({"png": pictures})


set_model(AutoencoderModel())
