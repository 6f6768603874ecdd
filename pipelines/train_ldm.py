"""Train (text-conditional) latent diffusion.

python pipelines/train_ldm.py                                      the demo preset
python pipelines/train_ldm.py my.yaml workers.count=4 run.steps=20000
ray job submit --working-dir . -- python pipelines/train_ldm.py    the same, as a Ray job
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.training.command import run

if __name__ == "__main__":
    main_exit(lambda: run(__doc__ or "", "ldm_demo", "latent_diffusion"))
