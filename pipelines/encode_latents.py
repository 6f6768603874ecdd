"""Write shards with the embeddings of a CLIP and the latents of an autoencoder: training from them runs neither.

    python pipelines/encode_latents.py s3://bucket/train s3://bucket/train-clip --clip models:/clip-demo
    python pipelines/encode_latents.py DATA OUT --clip CLIP --autoencoder models:/autoencoder-demo --image-size 32

Samples keep their keys, order and shards. `clip.npy` holds the embedding, `latent.npy` the autoencoder's posterior, of
the centre of each image. The work runs over the cluster, a shard at a time; after an interruption the same command goes
on with the shards that are missing. A prior reads `clip.npy` with objective.embedding_member=clip.npy, a decoder with
objective.image_embedding.member=clip.npy; latent diffusion reads `latent.npy` with objective.latent_member=latent.npy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="DATA", help="folder, glob or s3:// URL of webdataset shards")
    add("out", metavar="OUT", help="folder or s3:// URL for the new shards")
    add(
        "--clip",
        metavar="MODEL",
        help="writes clip.npy: a run, an export, models:/NAME, or a CLIPModel of transformers",
    )
    add("--autoencoder", metavar="MODEL", help="writes latent.npy: a run, an export or models:/NAME")
    add("--image-size", type=int, help="of the images that the autoencoder sees, pixels")
    add(
        "--keep",
        default="txt,json",
        metavar="A,B",
        help="members that are copied; png,jpg keeps images (default: %(default)s)",
    )
    add("--half", action="store_true", help="store 16 bits a number in place of 32")
    add("--batch-size", type=int, default=64, help="images that an actor encodes at once (default: %(default)s)")
    add("--actors", type=int, help="that encode side by side (default: one a GPU, or one a core)")
    add("--gpus", action="store_true", help="one GPU for each actor")
    add("--tracking-uri", help="MLflow server for models:/… (default: MLFLOW_TRACKING_URI, else the local one)")
    add("--overwrite", action="store_true", help="begin anew where OUT holds other shards")
    add("--summary", metavar="FILE", help="write counts and digests as one JSON object")
    arguments = parser.parse_args()

    from pipelines.encoding import encode_shards  # imported late, so that --help is quick

    encode_shards(arguments)


if __name__ == "__main__":
    main_exit(main)
