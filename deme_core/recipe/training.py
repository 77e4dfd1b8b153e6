"""How models are trained."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deme_core.recipe.base import Precision, Probability, Spec

LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class TrainingSpec(Spec):
    """How one model is trained: shared by pretraining and finetuning."""

    num_steps: int = Field(ge=1, description="Optimizer steps (of each segment; the control takes N times as many).")
    batch_size: int = Field(16, ge=1, description="Images per forward pass of one process.")
    num_processes: int = Field(
        1,
        ge=1,
        exclude_if=lambda num_processes: bool(num_processes == 1),
        description="Processes (GPUs) that share each training, each with a batch of its own: so many times the images "
        "per step.",
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of AdamW.")
    # Left out of a dump where they are the default: digests made before there was a choice stay.
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        exclude_if=lambda optimizer: bool(optimizer == "adamw"),
        description="AdamW, or bitsandbytes' with moments of 8 bits, which take a quarter of the memory.",
    )
    gradient_checkpointing: bool = Field(
        False,
        exclude_if=lambda checkpointing: not checkpointing,
        description="Compute activations again in the backward pass instead of keeping them: less memory, more time.",
    )
    # These three change results by rounding, so they are part of digests where they are set.
    channels_last: bool = Field(
        False,
        exclude_if=lambda channels_last: not channels_last,
        description="Convolutions in channels-last order: for GPUs, in bf16, with `compile`; without, it costs time.",
    )
    allow_tf32: bool = Field(
        False,
        exclude_if=lambda allow_tf32: not allow_tf32,
        description="fp32 on a GPU: multiply matrices in TF32, with 10 bits of mantissa.",
    )
    compile: bool = Field(
        False,
        exclude_if=lambda compiles: not compiles,
        description="torch.compile the model and its teacher: minutes at the start, faster steps afterwards.",
    )
    lr_scheduler: LrScheduler = Field("constant", description="Learning rate over the steps, by diffusers' names.")
    lr_warmup_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps of linear warm-up, of each copy and of the control alike; more than 0 is refused "
        "with lr_scheduler constant.",
    )
    adam_betas: tuple[float, float] = Field((0.95, 0.999), description="Betas of AdamW, below 1.")
    weight_decay: float = Field(1e-6, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this L2 norm.")
    ema_decay: Probability = Field(0.9999, description="Largest decay of the moving average that is kept.")
    ema_inv_gamma: float = Field(1.0, gt=0, description="EMA warm-up: decay = 1 - (1 + step/inv_gamma)^-power.")
    ema_power: float = Field(0.75, gt=0, description="EMA warm-up: see ema_inv_gamma.")
    mixed_precision: Precision = Field("fp32", description="Autocast type of the forward pass.")
    checkpoint_every: int = Field(1000, ge=1, description="Optimizer steps between resumable checkpoints.")
    seed: int = Field(0, ge=0, description="Seeds data order, augmentation, noise, timesteps and dropout.")

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, of all processes."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    @model_validator(mode="after")
    def _moments_decay(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {list(self.adam_betas)} must be at least 0 and below 1")
        return self

    @model_validator(mode="after")
    def _warm_up_is_heeded(self) -> Self:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError("lr_scheduler 'constant' ignores lr_warmup_steps; use constant_with_warmup")
        return self


class LoraSpec(Spec):
    """A LoRA adapter (arXiv 2106.09685): the weight of a layer becomes W + alpha / rank * B A; B and A learn."""

    rank: int = Field(16, ge=1, description="Rows of A, and columns of B; the control has N times as many.")
    alpha: float | None = Field(None, gt=0, description="Scale of the product, times the rank; default the rank.")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Layers that get an adapter, by how their names end; default all projections of attention.",
    )

    @property
    def scale(self) -> float:
        """What the product B A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def times(self, factor: int) -> "LoraSpec":
        """Returns an adapter of ``factor`` times the rank, and the same scale."""
        alpha = None if self.alpha is None else self.alpha * factor
        return self.model_copy(update={"rank": self.rank * factor, "alpha": alpha})


class FinetuneSpec(TrainingSpec):
    """How the copies, and the control, are finetuned (METHOD section 1)."""

    global_sampling_probability: Probability = Field(
        0.3, description="Chance that a timestep is drawn from all of [0, T) and not from the copy's segment."
    )
    timestep_sampling: Literal["per_sample", "per_batch_mirrored"] = Field(
        "per_sample",
        description="Draw the range for each sample, or once per batch with mirrored pairs as the paper's code does.",
    )
    replay: Literal["data", "pretrained"] = Field(
        "data",
        exclude_if=lambda replay: replay == "data",
        description="What a copy learns on timesteps outside of its segment: to denoise the data, as in the paper, or "
        "to predict what the pretrained model predicts (Li and Hoiem 2016, arXiv 1606.09282).",
    )
    consistency_weight: float = Field(1.0, ge=0, description="Weight of the consistency loss (lambda).")
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        exclude_if=lambda gamma: gamma is None,
        description="Weigh the diffusion loss of copies and control by Min-SNR (Hang et al. 2023, arXiv 2303.09556) "
        "with this gamma, 5 in that paper; default all timesteps alike. Not for flow matching.",
    )
    control_min_snr_gamma: float | None = Field(
        None,
        gt=0,
        exclude_if=lambda gamma: gamma is None,
        description="The same for the control alone, in the place of min_snr_gamma: a reweighted control, as the paper "
        "compares with.",
    )
    channel_projection: bool = Field(
        True, description="Train channel-wise projections and fold them after merging; false with lora."
    )
    lora: LoraSpec | None = Field(
        None,
        exclude_if=lambda lora: lora is None,
        description="Train a LoRA adapter on the frozen model instead of a whole copy, and merge adapters.",
    )

    def for_control(self, num_segments: int) -> "FinetuneSpec":
        """Returns how a copy of all timesteps is finetuned: with the summed rank, and nothing outside of its segment.

        A LoRA has the summed rank of the copies', as their merge has.
        """
        lora = None if self.lora is None else self.lora.times(num_segments)
        gamma = self.control_min_snr_gamma or self.min_snr_gamma
        changed = {"lora": lora, "replay": "data", "min_snr_gamma": gamma, "control_min_snr_gamma": None}
        return self.model_copy(update=changed)

    def for_copies(self) -> "FinetuneSpec":
        """Returns how the copies are finetuned: the same without what is said of the control."""
        return self.model_copy(update={"control_min_snr_gamma": None})

    @property
    def has_teacher(self) -> bool:
        """Whether each step asks the pretrained model for its prediction as well."""
        return self.consistency_weight > 0 or self.replay == "pretrained"

    @model_validator(mode="after")
    def _there_is_something_to_replay(self) -> Self:
        if self.replay == "pretrained" and self.global_sampling_probability == 0:
            raise ValueError("replay 'pretrained' has no effect with global_sampling_probability 0; give it a chance")
        return self

    @model_validator(mode="before")
    @classmethod
    def _no_projection_with_lora(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("lora") is None:
            return given
        if given.get("channel_projection"):
            raise ValueError(
                "finetune.lora and channel_projection exclude each other: a projection that is folded changes a weight "
                "by a matrix of full rank, which no adapter holds; leave channel_projection out"
            )
        return given | {"channel_projection": False}


class DistillSpec(TrainingSpec):
    """How the merged model is trained to predict what the ensemble predicts: an extra row, not the paper's method."""
