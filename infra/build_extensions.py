"""Compile, ahead of the first run, what DeepSpeed would compile in it: the shared-memory operations of CPU training.

Takes about a minute, once; the result is kept in TORCH_EXTENSIONS_DIR. Needs a C++ compiler. On a machine with a GPU
there is nothing to build.
"""

import os

import torch


def main() -> None:
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


if __name__ == "__main__":
    main()
