"""The recipe: everything that decides the result of a run, as one frozen model.

Defaults live here and nowhere else. Secrets and endpoints never appear in a recipe; they come from the
environment (`deme_core.settings`).
"""

from collections.abc import Sequence
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deme_core.metrics import METRICS, MetricName, deciding_metric, needs_prompts

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["fp32", "bf16", "fp16"]
Sampler = Literal["ddim", "ddpm", "flow_match_euler"]
DEFAULT_IMAGE_COLUMN = "image"
LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainingSpec(_Spec):
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
    lr_warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    adam_betas: tuple[float, float] = Field((0.95, 0.999), description="Betas of AdamW.")
    weight_decay: float = Field(1e-6, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this L2 norm.")
    ema_decay: Probability = Field(0.9999, description="Largest decay of the moving average that is kept.")
    ema_inv_gamma: float = Field(1.0, gt=0, description="EMA warm-up: decay = 1 - (1 + step/inv_gamma)^-power.")
    ema_power: float = Field(0.75, gt=0, description="EMA warm-up: see ema_inv_gamma.")
    mixed_precision: Precision = Field("fp32", description="Autocast type of the forward pass.")
    checkpoint_every: int = Field(1000, ge=1, description="Optimizer steps between resumable checkpoints.")
    seed: int = Field(0, ge=0, description="Seeds data order, augmentation, noise, timesteps and dropout.")

    @model_validator(mode="after")
    def _warm_up_is_heeded(self) -> Self:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError("lr_scheduler 'constant' ignores lr_warmup_steps; use constant_with_warmup")
        return self


class LoraSpec(_Spec):
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
    consistency_weight: float = Field(1.0, ge=0, description="Weight of the consistency loss (lambda).")
    channel_projection: bool = Field(
        True, description="Train channel-wise projections and fold them after merging; false with lora."
    )
    lora: LoraSpec | None = Field(
        None,
        exclude_if=lambda lora: lora is None,
        description="Train a LoRA adapter on the frozen model instead of a whole copy, and merge adapters.",
    )

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


class PretrainedSpec(_Spec):
    """Where the pretrained model comes from."""

    source: str = Field(description="'pretrain', a diffusers folder, an object-store URI, or a hub id.")
    revision: str | None = Field(None, description="Git revision of a hub id.")
    allow_pickle: bool = Field(False, description="Accept pickled weights (read with weights_only=True).")
    unet: dict[str, Any] = Field(
        default_factory=dict, description="UNet2DModel config, for source 'pretrain'; size and channels are the data's."
    )
    noise_scheduler: dict[str, Any] = Field(
        default_factory=dict, description="DDPMScheduler config, for source 'pretrain'."
    )
    text_encoder: dict[str, Any] | None = Field(
        None,
        description="T5 config, for source 'pretrain' of a model that takes text: unet is then that of a "
        "UNet2DConditionModel, and the encoder, whose random weights stay, knows the words of the captions.",
    )
    training: TrainingSpec | None = Field(None, description="How to pretrain, for source 'pretrain'.")

    @model_validator(mode="after")
    def _training_belongs_to_pretrain(self) -> Self:
        if self.source == "pretrain" and self.training is None:
            raise ValueError("source 'pretrain' needs pretrained.training (at least num_steps)")
        if self.source != "pretrain" and (
            self.training or self.unet or self.noise_scheduler or self.text_encoder is not None
        ):
            raise ValueError("training, unet, noise_scheduler and text_encoder apply to source 'pretrain' only")
        return self


class DatasetSpec(_Spec):
    """Which images, and how they are brought to one size."""

    source: Literal["digits", "imagefolder", "webdataset", "hub"] = Field(description="Where the images come from.")
    path: str | None = Field(
        None,
        description="A folder, a zip (imagefolder) or tar (webdataset), an object-store prefix, or a datasets name.",
    )
    name: str | None = Field(None, description="Configuration of a datasets name.")
    split: str = Field("train", description="Split of a datasets name.")
    image_column: str = Field(
        DEFAULT_IMAGE_COLUMN,
        description="Column of a datasets name that holds the images; or their extension, in tars with several.",
    )
    caption_column: str | None = Field(
        None,
        description="What holds captions, for text-conditional models: a column of a datasets name, a key of "
        "metadata.jsonl, an extension or a JSON key in tars.",
    )
    caption_template: str | None = Field(
        None, description="Captions made from columns instead, e.g. 'a photo of a {label}'."
    )
    caption_dropout: Probability = Field(
        0.0,
        description="Chance that training sees the empty caption, or no label, instead: for classifier-free guidance.",
    )
    label_column: str | None = Field(
        None, description="What holds class labels; without a column 'label' that is the sub-folder of each image."
    )
    resolution: int | None = Field(None, ge=4, description="Side of the square images, in pixels; digits are 8.")
    channels: Literal[1, 3] | None = Field(None, description="Grey (1) or RGB (3); default 3, digits 1.")
    crop: Literal["center", "random"] = Field("center", description="Which square is cut out after resizing.")
    random_flip: bool = Field(False, description="Mirror half of the training images left to right.")
    cache_latents: bool | None = Field(
        None,
        description="Encode images and captions once and train on that, for models on latents; default yes, unless "
        "crop is random.",
    )
    cache_precision: Precision = Field("fp32", description="How the cache stores numbers: half of them take half.")
    stream: bool = Field(
        False,
        description="webdataset below an object-store prefix: keep no copy of it, but read the tars through a bounded "
        "cache, for data sets larger than a disk. Images then train in another order.",
    )
    stream_window: int = Field(8, ge=1, description="stream: so many tars, drawn at random, are mixed at a time.")
    cache_gb: float = Field(
        50.0, gt=0, description="stream: bound of the cache on each machine, 10^9 bytes; each training needs a window."
    )
    num_images: int | None = Field(
        None, ge=1, description="Use only the first so many, by path: of folders by class those of the first classes."
    )
    num_heldout_images: int | None = Field(
        None, ge=2, description="Images that no training sees, for the held-out loss; default a tenth, at most 500."
    )
    skip_broken: bool = Field(
        False, description="Leave out images that cannot be decoded; otherwise they are an error."
    )

    @model_validator(mode="after")
    def _path_and_resolution(self) -> Self:
        if self.source != "digits" and self.path is None:
            raise ValueError(f"source '{self.source}' needs a path")
        if self.source != "digits" and self.resolution is None:
            raise ValueError(f"source '{self.source}' needs a resolution")
        return self

    @model_validator(mode="after")
    def _cache(self) -> Self:
        if self.cache_latents and self.crop == "random":
            raise ValueError("cache_latents needs crop: center, since every random crop has latents of its own")
        if self.stream and (self.source != "webdataset" or not str(self.path).startswith(("s3://", "file://"))):
            raise ValueError("stream needs source webdataset, and as its path a prefix of an object store")
        if self.stream and self.cache_latents:
            raise ValueError("cache_latents keeps all latents on disk; leave it out where stream is set")
        return self

    @model_validator(mode="after")
    def _captions(self) -> Self:
        if self.caption_column is not None and self.caption_template is not None:
            raise ValueError("give either caption_column or caption_template")
        if self.caption_dropout and not (self.caption_column or self.caption_template or self.label_column):
            raise ValueError("caption_dropout needs caption_column, caption_template or label_column")
        try:
            fields = [parsed[1:] for parsed in Formatter().parse(self.caption_template or "")]
        except ValueError as error:
            raise ValueError(f"caption_template '{self.caption_template}' is malformed ({error})") from error
        if any(field != (None, None, None) and (not field[0] or field[1] or field[2]) for field in fields):
            raise ValueError("caption_template takes names of columns in braces and nothing else, as in '{label}'")
        return self


class SegmentsSpec(_Spec):
    """How [0, T) is divided: N equal segments, or explicit edges."""

    count: int | None = Field(None, ge=1, description="Number of equal segments.")
    edges: tuple[int, ...] | None = Field(None, description="0, inner edges, T: strictly increasing.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.count is None) == (self.edges is None):
            raise ValueError("give either count or edges")
        if self.edges is not None:
            if len(self.edges) < 2 or self.edges[0] != 0:
                raise ValueError(f"edges {list(self.edges)} must start at 0 and end at num_train_timesteps")
            if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
                raise ValueError(f"edges {list(self.edges)} must increase strictly")
        return self

    @property
    def num_segments(self) -> int:
        """Number of segments N."""
        return self.count if self.count is not None else len(self.edges or ()) - 1


class SearchSpec(_Spec):
    """How merge weights are searched; the control's scale is searched the same way (METHOD section 5.1)."""

    strategy: Literal["grid", "coordinate", "quadratic", "tpe", "cma_es"] = Field(
        "coordinate",
        description="Every combination of values; one weight at a time around the best so far; a quadratic fit of the "
        "held-out loss and a few scores along the line to its minimum; Optuna's TPE or CMA-ES, started from that fit.",
    )
    values: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5), min_length=1, description="grid: the candidate values of each weight."
    )
    initial_weight: float | None = Field(
        None, gt=0, description="Where every weight starts, and the step of the fit; default 1/N, control 1."
    )
    max_weight: float = Field(2.0, gt=0, description="quadratic, tpe, cma_es: no weight is tried beyond it.")
    few_steps: int | None = Field(
        None, ge=1, description="Score all candidates with so few sampling steps, and only the best in full."
    )
    survivors: float = Field(0.25, gt=0, le=1, description="few_steps: share of the candidates scored in full.")
    step_size: float = Field(0.25, gt=0, description="coordinate: first step, halved when no step helps.")
    max_candidates: int = Field(24, ge=2, description="Score at most so many candidates (of each search).")
    num_images: int = Field(500, ge=2, description="Images generated per candidate and seed.")
    seeds: tuple[int, ...] = Field(
        (1001,), min_length=1, description="Sampling seeds; none may be a seed of the report."
    )
    num_reference_images: int | None = Field(
        None, ge=2, description="Real images set aside for the search alone; default half of the data set."
    )

    def reaches_every_weight(self, num_segments: int) -> bool:
        """Returns whether the budget is enough for the pretrained model and a change of each segment's weight."""
        return self.strategy == "grid" or self.max_candidates > num_segments  # A grid has no budget but its values.


class RegMeanSpec(_Spec):
    """How the inputs of a copy's linear maps are measured, and used."""

    num_images: int = Field(1024, ge=1, description="Noisy training images that pass through each copy.")
    max_features: int = Field(
        4608,
        ge=1,
        description="Maps from more features than that are averaged: their matrices, of features x features, would be "
        "too large. A 3x3 convolution of 512 channels has 4,608.",
    )
    shrinkage: float = Field(0.9, ge=0, le=1, description="Share of the matrices' off-diagonal entries that is kept.")


class MethodSpec(_Spec):
    """How task vectors are combined (METHOD section 2)."""

    method: Literal["task_arithmetic", "block_weights", "ties", "dare", "average", "regmean"] = Field(
        "task_arithmetic",
        description="theta_0 + sum of w_i tau_i; with a weight per segment and UNet level; with task vectors that act "
        "on the inputs of their own segments alone (RegMean, whose natural weights are 1); trimmed and with elected "
        "signs (TIES); with random entries dropped (DARE); or the plain mean of the copies.",
    )
    regmean: RegMeanSpec = Field(RegMeanSpec(), description="regmean: how inputs are measured.")
    density: float = Field(0.2, gt=0, le=1, description="ties: share of each task vector's entries that is kept.")
    drop_rate: float = Field(0.5, ge=0, lt=1, description="dare: share of each task vector's entries that is dropped.")
    seed: int = Field(0, ge=0, description="dare: decides which entries are dropped.")

    def settings(self) -> dict[str, Any]:
        """Returns what decides the result of this method."""
        own = {"ties": ["density"], "dare": ["drop_rate", "seed"]}.get(self.method, [])
        return {"method": self.method} | {name: getattr(self, name) for name in own}


class MergeSpec(MethodSpec):
    """How the copies become one model, and which weights they get."""

    weights: tuple[float, ...] | None = Field(
        None, description="Fixed merge weights, lowest timesteps first; block_weights takes one for each copy."
    )
    search: SearchSpec | None = Field(None, description="Search the weights instead.")
    on_bad_expert: Literal["drop", "keep", "fail"] = Field(
        "drop", description="What to do with a copy that is no better than the pretrained model on its own segment."
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.method == "average":
            if self.weights is not None or self.search is not None:
                raise ValueError("method 'average' takes neither weights nor search")
        elif (self.weights is None) == (self.search is None):
            raise ValueError("give either weights or search")
        return self


class EvaluateSpec(_Spec):
    """How every row is sampled and scored: the same for all rows (METHOD section 5.3)."""

    num_images: int = Field(ge=2, description="Images generated per row and seed.")
    seeds: tuple[int, ...] = Field(
        (1, 2, 3), min_length=3, description="Sampling seeds; at least three for an interval."
    )
    sampler: Sampler = Field(
        "ddim", description="Sampler of the reverse process; flow_match_euler for flow-matching models, and only those."
    )
    num_inference_steps: int = Field(50, ge=1, description="Sampling steps.")
    eta: float = Field(0.0, ge=0, le=1, description="Noise of DDIM; 0 is deterministic.")
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None, description="Spacing of the sampling timesteps; default the model's own scheduler config."
    )
    # Left out of a dump where it is the default, as are others below: digests made before there was a choice stay.
    guidance_scale: float = Field(
        1.0,
        ge=1,
        exclude_if=lambda scale: bool(scale == 1.0),
        description="Classifier-free guidance: unconditional + scale * (conditional - unconditional); 1 is none.",
    )
    mixed_precision: Precision = Field(
        "fp32",
        exclude_if=lambda precision: bool(precision == "fp32"),
        description="Autocast type of the denoiser while it samples, a condition of all scores; the autoencoder and "
        "held-out losses stay fp32.",
    )
    batch_size: int = Field(64, ge=1, description="Images per sampling batch; does not change the images.")
    extractor: Literal["inception", "efficientnet_lite0", "dinov2_vitl14", "clip_vit_b_32"] = Field(
        "inception", description="Feature extractor; distances are named after it."
    )
    # Left out of a dump where it is the default: digests made before there were modes stay.
    extractor_mode: Literal["clean", "legacy_pytorch", "legacy_tensorflow"] = Field(
        "clean",
        exclude_if=lambda mode: bool(mode == "clean"),
        description="inception: network and resizing as clean-fid's mode of that name, to compare with older numbers.",
    )
    extractor_weights: str | None = Field(
        None, description="Path or object-store URI of the extractor's weights; default the library's own."
    )
    extractor_resolution: int | None = Field(
        None,
        ge=32,
        description="Side images are resized to for efficientnet_lite0; default 224. inception is always 299.",
    )
    # Left out of a dump where there are none: digests made before there were prompts stay.
    prompts: str | None = Field(
        None,
        exclude_if=lambda prompts: prompts is None,
        description="Path or object-store URI of prompts, one per line, or a .tsv or .csv file with a column Prompt or "
        "caption; or imagenet1k or cifar10, a photo of each class. Image i belongs to prompt i modulo their number.",
    )
    clip_weights: str | None = Field(
        None,
        exclude_if=lambda weights: weights is None,
        description="clip_score: path or object-store URI of a CLIP model's folder; default ViT-B/32 from the hub.",
    )
    metrics: tuple[MetricName, ...] = Field(
        ("fid", "kid"), min_length=1, description="What is computed; the first is searched and decides the verdict."
    )
    kid_subset_size: int = Field(1000, ge=2, description="Images per subset of the KID estimate.")
    num_reference_images: int | None = Field(
        None, ge=2, description="Real images in the reference; default all that the search does not set aside."
    )
    reference_dataset: DatasetSpec | None = Field(
        None,
        exclude_if=lambda dataset: dataset is None,
        description="Real images of the reference, and of the search's, where they are not those of the training.",
    )
    num_bootstrap: int = Field(
        100, ge=0, description="Resamples of the generated images for the verdict's second interval; 0 for none."
    )

    @model_validator(mode="after")
    def _distinct_seeds(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ from one another")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must differ from one another")
        if deciding_metric(self.metrics[0]) is None:
            able = ", ".join(metric for metric in METRICS if deciding_metric(metric))
            raise ValueError(f"metrics must begin with one of {able}: {self.metrics[0]} alone does not decide")
        if needs_prompts(self.metrics) and self.prompts is None:
            raise ValueError("clip_score needs prompts; set evaluate.prompts to a text file with one per line")
        if self.extractor == "inception" and self.extractor_resolution not in (None, 299):
            raise ValueError("extractor_resolution: inception is defined at 299 pixels only")
        if self.extractor != "inception" and self.extractor_mode != "clean":
            raise ValueError(f"extractor_mode {self.extractor_mode} is a mode of inception, not of {self.extractor}")
        return self

    @property
    def extractor_name(self) -> str:
        """The extractor together with its mode: what `load_extractor` loads and `metric_name` names scores after."""
        return self.extractor if self.extractor_mode == "clean" else f"{self.extractor}_{self.extractor_mode}"


class ExecutionSpec(_Spec):
    """Where work runs. Changes the speed of a run, never its result."""

    runner: Literal["local", "prefect", "ray"] = Field(
        "local",
        description="local: supervised worker processes on this machine. prefect: every job is a flow run of its own, "
        "on whatever machine serves the work pool deme-gpu or deme-cpu. ray: on a Ray cluster, wherever it has room.",
    )
    ray_address: str | None = Field(
        None,
        description="ray: the cluster, e.g. ray://HOST:10001; default RAY_ADDRESS, and without it this machine alone.",
    )
    cpus_per_job: int = Field(
        1, ge=1, description="ray: cores that each process of a job reserves, and threads that it uses."
    )
    gpu_stages: tuple[
        Literal[
            "pretrained",
            "latents",
            "embeddings",
            "finetune",
            "features",
            "reference",
            "heldout",
            "grams",
            "confined",
            "search",
            "merged",
            "distilled",
            "evaluate",
        ],
        ...,
    ] = Field(
        ("pretrained", "latents", "embeddings", "finetune", "heldout", "grams", "search", "distilled", "features"),
        description="prefect: the stages whose jobs go to deme-gpu. ray: those whose jobs reserve a GPU for each of "
        "their processes, if the cluster has any or device is cuda. All others take CPUs alone.",
    )
    num_workers: int | None = Field(None, ge=1, description="Worker processes; default one per GPU, or one on CPU.")
    images_per_task: int = Field(
        5000,
        ge=1,
        description="Images that one task generates, turns into features or encodes, in whole batches; or captions.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is one.")


class Recipe(_Spec):
    """One run, completely described."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the MLflow experiment.")
    pretrained: PretrainedSpec
    dataset: DatasetSpec
    segments: SegmentsSpec
    finetune: FinetuneSpec
    merge: MergeSpec
    distill: DistillSpec | None = Field(
        None,
        description="Train the merged model to predict, at every timestep, what its segment's copy predicts: the row "
        "distilled. The control takes as many optimizer steps more.",
    )
    evaluate: EvaluateSpec
    execution: ExecutionSpec = ExecutionSpec()

    @property
    def num_processes(self) -> int:
        """Processes of the training that takes most."""
        trainings = (self.finetune, self.pretrained.training, self.distill)
        return max(training.num_processes for training in trainings if training)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        num_segments = self.segments.num_segments
        if self.merge.weights is not None and len(self.merge.weights) != num_segments:
            raise ValueError(f"merge.weights has {len(self.merge.weights)} values for {num_segments} segments")
        if self.pretrained.source == "pretrain" and self.segments.edges is not None:
            # Of a model from elsewhere this is known once it is there; of this one it would be after its training.
            num_timesteps = self.pretrained.noise_scheduler.get("num_train_timesteps", 1000)
            if self.segments.edges[-1] != num_timesteps:
                raise ValueError(
                    f"segments.edges {list(self.segments.edges)} must end at {num_timesteps}, the number of timesteps"
                )
        if self.merge.search and (shared := _shared(self.merge.search.seeds, self.evaluate.seeds)):
            raise ValueError(f"merge.search.seeds and evaluate.seeds share {shared}: a search must not see the report")
        if self.merge.search and not self.merge.search.reaches_every_weight(num_segments):
            raise ValueError(
                f"merge.search.max_candidates {self.merge.search.max_candidates} is too small for {num_segments} "
                f"segments: theta_0 and a change of each weight take {num_segments + 1}"
            )
        return self

    @property
    def reference_dataset(self) -> DatasetSpec:
        """Where the real images of reference and search come from."""
        return self.evaluate.reference_dataset or self.dataset


def _shared(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return sorted(set(left) & set(right))
