"""The text encoder of a DAMSM as MLflow runs it: sentences in, their features out.

MLflow stores this file with the model and executes it on loading (models from code). Training opens a registered DAMSM
by its export folder instead (`infra.registry.resolve_model`).

In: a frame with column `text`. Out: a frame with column `embedding`, lists of the features of a sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class DamsmModel(PythonModel):
    """Reads sentences with the exported folder that the model was registered with."""

    def load_context(self, context: Any) -> None:
        """Open the export; weights are read here, once."""
        from genmodels.gan.attention.frozen import FrozenDamsm

        self.damsm = FrozenDamsm.from_folder(Path(context.artifacts["export"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The features of each sentence."""
        read = self.damsm.read_texts(self.damsm.tokens(list(model_input["text"])))
        return pd.DataFrame({"embedding": read.sentence.double().tolist()})


set_model(DamsmModel())
