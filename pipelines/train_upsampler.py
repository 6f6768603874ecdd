"""Train an upsampler: larger images from small ones.

python pipelines/train_upsampler.py                           the demo preset
python pipelines/train_upsampler.py my.yaml workers.count=4 run.steps=20000

`train_unclip.py` trains all stages, one after the other.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.training.command import run

if __name__ == "__main__":
    main_exit(lambda: run(__doc__ or "", "unclip_upsampler_demo", "latent_diffusion"))
