"""What a training is, apart from how: known, and part of a digest, without the libraries that it takes to train."""

from dataclasses import dataclass

from deme_core.timesteps import TimestepSampler

# Keys of `TrainingSpec` that change time and memory and no weight.
SPEED_ONLY = {"checkpoint_every", "gradient_checkpointing"}


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, apart from how (`TrainingSpec`).

    Attributes:
        label: name for messages, e.g. ``segment 2 [500, 750)``.
        sampler: draws the timesteps.
        num_steps: optimizer steps.
        consistency_weight: lambda; 0 switches the consistency loss off.
        seed: seeds noise, timesteps and dropout. Copies need different ones: noise they share adds up in the merge.
        diffusion_weight: of the diffusion loss; 0 for a distillation, which learns from its teacher alone.
        replay_from_teacher: outside of the sampler's segment the target is the teacher's prediction, not the data's.
        min_snr_gamma: of Min-SNR's weights of the diffusion loss; None weighs all timesteps alike.
    """

    label: str
    sampler: TimestepSampler
    num_steps: int
    consistency_weight: float = 0.0
    seed: int = 0
    diffusion_weight: float = 1.0
    replay_from_teacher: bool = False
    min_snr_gamma: float | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether frozen models are asked in each step."""
        return self.consistency_weight > 0 or self.replay_from_teacher
