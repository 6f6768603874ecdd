"""The learned perceptual distance of images, from weights in a local file.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018), eq. 1, on the
features of VGG-16 (Simonyan and Zisserman 2015). In plain torch: torchvision is not needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Output channels of the 3×3 convolutions of VGG-16, by stage; a 2×2 maximum is taken between stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class PerceptualDistance(nn.Module):
    """Weighted squared distance of unit-normalised VGG-16 features, averaged over positions, summed over stages.

    `state_dict` names: `features.N.weight` and `.bias`, N as in torchvision's VGG-16, and `linear.K.weight`
    (1, channels, 1, 1) for stage K.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        width = 3
        for stage, widths in enumerate(STAGES):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for wider in widths:
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
                width = wider
            self.ends.append(len(layers) - 1)
        self.features = nn.ModuleList(layers)
        self.linear = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in STAGES)
        # From [-1, 1] to the channel statistics that VGG was trained with.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1), persistent=False)

    @staticmethod
    def from_file(path: Path) -> PerceptualDistance:
        """Read weights from a safetensors file: the names above, or `linK.model.1.weight` for the linear layers.

        Raises:
            ValueError: the file is missing, or does not hold these weights.
        """
        if not path.is_file():
            raise ValueError(f"perceptual: {path} is not a file; give VGG-16 and LPIPS weights as one safetensors file")
        network = PerceptualDistance()
        weights = {}
        for name, tensor in load_file(path).items():
            if name.startswith("lin") and ".model.1." in name:
                name = f"linear.{name[3]}.weight"
            if name.startswith(("features.", "linear.")):  # a classifier's head may come along, and is not read
                weights[name] = tensor
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"perceptual: {path} does not hold VGG-16 and LPIPS weights: {error}") from error
        return network.eval().requires_grad_(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Features at the end of each stage, of unit length along the channels."""
        x, found = (images - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                # Within the root: at a position where all channels are 0, its derivative must stay finite.
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt())
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances (batch,) of images (batch, 3, height, width) in [-1, 1], at least 16 pixels a side."""
        distances = [
            linear((a - b).square()).mean((1, 2, 3))
            for linear, a, b in zip(self.linear, self.stages(images), self.stages(others))
        ]
        return torch.stack(distances).sum(0)
