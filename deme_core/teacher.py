"""The teacher: frozen models whose predictions a training is pulled towards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deme_core.families import Adapter, ConditioningTensors
from deme_core.model_digest import model_digest
from deme_core.segments import TimestepSegment


@dataclass(frozen=True, eq=False)
class Teacher:
    """One frozen model per timestep segment: theta_0 for all of [0, T), or the experts of a distillation.

    Attributes:
        models: theta_0; or the experts, lowest timesteps first.
        segments: the experts' segments; none for one model.
    """

    models: Sequence[nn.Module]
    segments: Sequence[TimestepSegment] = ()

    def __post_init__(self) -> None:
        """Freezes the models."""
        if len(self.models) != max(len(self.segments), 1):
            raise ValueError(f"{len(self.models)} models cannot teach {len(self.segments)} segments")
        for model in self.models:
            model.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "Teacher":
        """Returns the teacher with its models on ``device``."""
        return Teacher([model.to(device) for model in self.models], self.segments)

    def digests(self) -> list[str]:
        """Returns the digest of each model's weights: equal before and after a training."""
        return [model_digest(model) for model in self.models]

    def predict(
        self, adapter: Adapter, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        """Returns what the teacher predicts, each row by the model of its timestep's segment.

        Args:
            adapter: says how the models are called.
            noisy: x_t, (B, C, H, W).
            timesteps: int64 (B,), in [0, T).
            conditioning: tensors of B rows.
        """
        with torch.inference_mode():
            prediction = self._predict(adapter, noisy, timesteps, conditioning)
        return prediction.clone()  # A tensor of inference mode cannot be kept for a backward pass.

    def _predict(
        self, adapter: Adapter, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: ConditioningTensors
    ) -> torch.Tensor:
        told = adapter.noise_process.model_timesteps(timesteps)
        if not self.segments:
            return adapter.predict(self.models[0], noisy, told, conditioning)
        prediction = torch.empty_like(noisy)
        for segment, model in zip(self.segments, self.models, strict=True):
            rows = segment.holds(timesteps).nonzero()[:, 0]
            if len(rows):
                given = {name: tensor[rows] for name, tensor in conditioning.items()}
                prediction[rows] = adapter.predict(model, noisy[rows], told[rows], given).to(noisy.dtype)
        return prediction
