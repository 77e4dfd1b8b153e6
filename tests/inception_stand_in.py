"""Files of weights that clean-fid's own classes load as Inception, random and small where they may be."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


class TorchscriptStandIn(torch.nn.Module):
    """Called as clean-fid calls NVIDIA's file: 2048 features out of ``layers``, or resized and scaled by itself."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        mixing = torch.nn.Conv2d(3, 8, kernel_size=1)
        mixing.weight.data = torch.randn(mixing.weight.shape, generator=generator)
        mixing.bias.data = torch.randn(mixing.bias.shape, generator=generator)
        self.layers = torch.nn.Sequential(
            mixing, torch.nn.Hardtanh(), torch.nn.AdaptiveAvgPool2d(16), torch.nn.Flatten()
        )

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        resized = F.interpolate(images, size=[299, 299], mode="bilinear", align_corners=True)
        return self.layers((resized - 128) / 128)


def save_torchscript_stand_in(path: Path) -> Path:
    """Writes a stand-in of NVIDIA's file."""
    torch.jit.script(TorchscriptStandIn()).save(str(path))
    return path


def save_pytorch_stand_in(path: Path) -> Path:
    """Writes a state dict of pytorch-fid's architecture in full, random and of a scale that keeps features apart."""
    from cleanfid import inception_pytorch

    tensors: dict[str, torch.Tensor] = {}

    class CapturedError(Exception):
        pass

    def capture(network: torch.nn.Module, _state: object) -> None:
        tensors.update(network.state_dict())
        raise CapturedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", capture)
        with pytest.raises(CapturedError):
            inception_pytorch.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 4:  # Convolutions start so small that nothing of the images would reach the features.
            tensors[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    torch.save(tensors, path)
    return path


def draw_images(num_images: int, channels: int, size: int, *, seed: int = 0) -> torch.Tensor:
    """Returns uint8 noise (num_images, channels, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, channels, size, size), dtype=torch.uint8, generator=generator)
