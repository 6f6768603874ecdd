"""What an export folder of a GAN is made of, read without any model library."""

from __future__ import annotations

INDEX = "gan.json"  # marks the folder
GENERATOR, DISCRIMINATOR = "generator.safetensors", "discriminator.safetensors"
