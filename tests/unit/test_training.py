import copy
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deme_core.errors import FrozenModelChangedError, InputError, NonFiniteLossError, TimestepHistogramError
from deme_core.families import EncodedBatch
from deme_core.objectives import training_target
from deme_core.optimizer import build_optimizer
from deme_core.projection import attach_projections, is_projection
from deme_core.recipe import TrainingSpec
from deme_core.seeds import generator
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler, histogram_p_value
from deme_core.training import Training, TrainingProgress
from deme_core.training_checkpoint import restore_checkpoint, save_checkpoint
from deme_core.training_plan import TrainingPlan
from tests.tiny_models import one_level_unet, randomize, same_bits, tiny_adapter, tiny_images, tiny_scheduler

BATCH_SIZE = 4
SAMPLER = TimestepSampler(TimestepSegment(0, 500), 1000, 0.3)


def batches(first: int, batch_size: int = BATCH_SIZE) -> Iterator[EncodedBatch]:
    return (EncodedBatch(tiny_images(batch_size, seed=number), {}) for number in itertools.count(first))


def build(
    model: nn.Module | None = None,
    *,
    source: Any = batches,
    num_steps: int = 3,
    sampler: TimestepSampler = SAMPLER,
    consistency_weight: float = 0.0,
    replay_from_teacher: bool = False,
    min_snr_gamma: float | None = None,
    pretrained: nn.Module | None = None,
    seed: int = 0,
    record_every: int = 10,
    device: str = "cpu",
    **spec: Any,
) -> Training:
    if consistency_weight and pretrained is None:
        pretrained = one_level_unet()
    return Training(
        one_level_unet() if model is None else model,
        tiny_adapter(),
        source,
        spec=TrainingSpec(num_steps=num_steps, **{"batch_size": BATCH_SIZE, "learning_rate": 1e-3, **spec}),
        plan=TrainingPlan(
            "segment 0 [0, 500)",
            sampler,
            num_steps,
            consistency_weight,
            seed,
            replay_from_teacher=replay_from_teacher,
            min_snr_gamma=min_snr_gamma,
        ),
        teacher=Teacher([pretrained]) if pretrained is not None else None,
        device=device,
        record_every=record_every,
    )


def differing(actual: Training, expected: Training) -> list[str]:
    """Returns the names of all state in which two runs differ in any bit."""
    left, right = state_of(actual), state_of(expected)
    assert left.keys() == right.keys()
    return [name for name, tensor in right.items() if not same_bits(left[name], tensor)]


def run(training: Training) -> list[TrainingProgress]:
    return list(training.progress())


def state_of(training: Training) -> dict[str, torch.Tensor]:
    """Returns model, EMA, optimizer moments and timestep counts."""
    moments = training.optimizer.state_dict()["state"]
    return {
        **{f"model {name}": tensor.clone() for name, tensor in training.model.state_dict().items()},
        **{f"ema {name}": tensor for name, tensor in training.averaged_tensors().items()},
        **{f"{moment} {index}": value.clone() for index, each in moments.items() for moment, value in each.items()},
        "timesteps": training.timestep_counts.clone(),
    }


def test_the_loss_falls_on_a_few_fixed_images() -> None:
    images = EncodedBatch(tiny_images(8), {})
    training = build(
        source=lambda first: itertools.repeat(images),
        num_steps=40,
        batch_size=8,
        learning_rate=5e-3,
        sampler=TimestepSampler(TimestepSegment(0, 1000), 1000),
    )
    losses = [progress.loss for progress in run(training)]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]


def losses_over_forward_passes(
    model: nn.Module, pretrained: nn.Module, numbers: Iterable[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of METHOD section 1 over the images of all ``numbers`` as one batch."""
    scheduler, images, noises, timesteps = tiny_scheduler(), [], [], []
    for number in numbers:
        rng = generator("training", 0, number)
        images.append(tiny_images(BATCH_SIZE, seed=number))
        noises.append(torch.randn(images[-1].shape, generator=rng))
        timesteps.append(SAMPLER(BATCH_SIZE, rng))
    clean_images, noise, t = torch.cat(images), torch.cat(noises), torch.cat(timesteps)
    noisy_images = scheduler.add_noise(clean_images, noise, t)
    prediction = model(noisy_images, t).sample
    with torch.no_grad():
        pretrained_prediction = pretrained(noisy_images, t).sample
    diffusion = ((prediction - training_target(scheduler, clean_images, noise, t)) ** 2).mean()
    return diffusion, ((prediction - pretrained_prediction) ** 2).mean()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "2"),
        ("DYNAMO_BACKEND", "eager"),
        ("TORCH_DEVICE", "meta"),
        ("FP8_BACKEND", "MSAMP"),
        *((f"USE_{other}", "true") for other in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "SAGEMAKER")),
    ],
)
def test_no_variable_of_accelerate_changes_a_training(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    training = build(num_steps=2, record_every=1)
    assert all(progress.grad_norm > 0 for progress in run(training))
    averaged = training.averaged_tensors()
    assert averaged.keys() == one_level_unet().state_dict().keys()
    averages = zip(training.trained, training.ema.shadow_params, strict=True)
    assert all(same_bits(averaged[name], average) for name, average in averages)


def test_an_average_that_belongs_to_no_tensor_is_an_error() -> None:
    training = build(num_steps=1)
    training.model = nn.ModuleDict({"wrapped": training.model})
    with pytest.raises(KeyError, match="conv_in"):
        training.averaged_tensors()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_equals_adamw_on_all_accumulated_images_at_once(accumulation: int) -> None:
    weight, rate, decay, max_norm = 0.5, 1e-2, 5.0, 0.05
    model, pretrained = randomize(one_level_unet(), seed=1, scale=0.02), one_level_unet()
    expected = copy.deepcopy(model)
    diffusion, consistency = losses_over_forward_passes(expected, pretrained, range(accumulation))
    (diffusion + weight * consistency).backward()
    diffusion, consistency = diffusion.item(), consistency.item()
    norm = torch.stack([p.grad.square().sum() for p in expected.parameters()]).sum().sqrt()
    with torch.no_grad():
        for p in expected.parameters():
            gradient = p.grad * min(1.0, max_norm / float(norm))
            p.mul_(1 - rate * decay)  # AdamW's first step: both moments divided by their bias are the gradient itself.
            p.sub_(rate * gradient / (gradient.abs() + 1e-8))

    training = build(
        model,
        num_steps=1,
        consistency_weight=weight,
        pretrained=pretrained,
        gradient_accumulation_steps=accumulation,
        learning_rate=rate,
        weight_decay=decay,
        max_grad_norm=max_norm,
    )
    (progress,) = run(training)

    assert progress.diffusion_loss == pytest.approx(diffusion, rel=1e-5)
    assert progress.consistency_loss == pytest.approx(consistency, rel=1e-5)
    assert progress.loss == pytest.approx(diffusion + weight * consistency, rel=1e-5)
    assert progress.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert max_norm < norm
    for actual, wanted in zip(training.model.parameters(), expected.parameters(), strict=True):
        # A gradient that is nearly zero may have either sign: compare where its sign is sure.
        sure = wanted.grad.abs() > 1e-5
        torch.testing.assert_close(actual[sure], wanted[sure], atol=1e-4, rtol=1e-3)


EVERYTHING: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "ema_decay": 0.7,
    "checkpoint_every": 3,
    "consistency_weight": 0.5,
    "num_steps": 6,
}


def model_with_everything(**config: Any) -> nn.Module:
    model = one_level_unet(dropout=0.3, **config)
    attach_projections(model)
    return model


@pytest.mark.parametrize(
    ("precision", "per_batch_mirrored", "channels_last"),
    [("fp32", False, False), ("fp32", True, True), ("bf16", True, False)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, precision: str, per_batch_mirrored: bool, channels_last: bool
) -> None:
    sampler = TimestepSampler(TimestepSegment(500, 1000), 1000, 0.3, per_batch_mirrored)
    settings = EVERYTHING | {"sampler": sampler, "mixed_precision": precision, "channels_last": channels_last}
    whole = build(model_with_everything(), **settings)
    records = []
    for progress in whole.progress():
        records.append(progress)
        if progress.global_step == 3:
            save_checkpoint(whole, tmp_path)
            halfway = state_of(whole)

    # What the process that resumes drew and built before must not matter.
    torch.rand(17)
    resumed = build(randomize(model_with_everything(), seed=5), **settings)
    restore_checkpoint(resumed, tmp_path)
    restored = state_of(resumed)
    assert resumed.global_step == 3
    assert [name for name, tensor in halfway.items() if not same_bits(restored[name], tensor)] == []
    (last,) = run(resumed)

    assert differing(resumed, whole) == []
    assert [record.global_step for record in records] == [3, 6]
    for name in ("global_step", "num_steps", "loss", "diffusion_loss", "consistency_loss", "learning_rate"):
        assert getattr(last, name) == getattr(records[1], name)
    # The comparison is of something: the second half moved every part.
    moved = {name.split()[0] for name, tensor in state_of(whole).items() if not same_bits(halfway[name], tensor)}
    assert moved == {"model", "ema", "exp_avg", "exp_avg_sq", "step", "timesteps"}


def test_gradient_checkpointing_changes_no_bit() -> None:
    settings = EVERYTHING | {"num_steps": 2}
    kept, computed_again = (
        build(model_with_everything(), **settings, gradient_checkpointing=again) for again in (False, True)
    )
    assert (kept.model.is_gradient_checkpointing, computed_again.model.is_gradient_checkpointing) == (False, True)
    run(kept)
    run(computed_again)
    assert differing(computed_again, kept) == []


def test_channels_last_and_a_compiled_model_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor's code takes a minute of C++ compilation; what is traced, and that names stay, is tested all the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = EVERYTHING | {"num_steps": 2}
    # Without dropout, which draws its mask in the order of memory.
    plain = build(one_level_unet(), **settings)
    fast = build(one_level_unet(), **settings, channels_last=True, compile=True, allow_tf32=True)
    assert fast.teacher is not None
    for model in (fast.model, *fast.teacher.models):
        weight = next(parameter for parameter in model.parameters() if parameter.dim() == 4 and parameter.shape[1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert model._compiled_call_impl is not None
    run(plain)
    run(fast)
    assert torch.get_float32_matmul_precision() == "highest"  # As it was: the next training is another one.
    expected, actual = plain.averaged_tensors(), fast.averaged_tensors()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-4, rtol=1e-4)


WIDE: dict[str, Any] = {"block_out_channels": [32]}  # Small tensors keep moments of 32 bits.


def test_moments_of_eight_bits_train_and_are_restored(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra bitsandbytes, which make install leaves out")
    settings = EVERYTHING | {"optimizer": "adamw_8bit", "pretrained": one_level_unet(**WIDE), "learning_rate": 1e-3}
    whole = build(model_with_everything(**WIDE), **settings)
    losses = []
    for progress in whole.progress():
        losses.append(progress.loss)
        if progress.global_step == 3:
            save_checkpoint(whole, tmp_path)
    moments = [moment for each in whole.optimizer.optimizer.state.values() for moment in each.values()]
    assert sum(isinstance(moment, torch.Tensor) and moment.dtype == torch.uint8 for moment in moments) >= 8

    resumed = build(randomize(model_with_everything(**WIDE), seed=5), **settings)
    restore_checkpoint(resumed, tmp_path)
    assert run(resumed)[-1].loss == losses[-1]
    for name, tensor in whole.averaged_tensors().items():
        assert same_bits(resumed.averaged_tensors()[name], tensor), name
    plain = build(model_with_everything(**WIDE), **(settings | {"optimizer": "adamw"}))
    assert run(plain)[-1].loss == pytest.approx(losses[-1], rel=0.02)


def test_the_optimizer_has_the_betas_of_the_recipe() -> None:
    spec = TrainingSpec(num_steps=1, batch_size=1, learning_rate=1e-3, adam_betas=(0.5, 0.6))
    assert build_optimizer([nn.Parameter(torch.ones(1))], spec).defaults["betas"] == (0.5, 0.6)


def test_the_eight_bit_optimizer_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match=r"needs the package bitsandbytes, 0\.50 or newer; install it"):
        build(optimizer="adamw_8bit")


def test_a_checkpoint_before_the_first_step_restores_the_beginning(tmp_path: Path) -> None:
    save_checkpoint(build(), tmp_path)
    resumed = build(randomize(one_level_unet(), seed=1))
    restore_checkpoint(resumed, tmp_path)
    run(resumed)
    fresh = build()
    run(fresh)
    assert differing(resumed, fresh) == []


def test_a_checkpoint_at_the_end_leaves_nothing_to_do(tmp_path: Path) -> None:
    finished = build()
    run(finished)
    save_checkpoint(finished, tmp_path)
    again = build()
    restore_checkpoint(again, tmp_path)
    assert run(again) == []
    assert differing(again, finished) == []


def test_parameters_that_are_not_trained_stay_and_are_restored(tmp_path: Path) -> None:
    config = {"time_embedding_type": "fourier"}  # Its frequencies are a parameter without gradient.
    training = build(one_level_unet(**config), consistency_weight=0.5, pretrained=one_level_unet(**config))
    run(training)
    assert same_bits(training.averaged_tensors()["time_proj.weight"], one_level_unet(**config).time_proj.weight)
    save_checkpoint(training, tmp_path)
    resumed = build(one_level_unet(1, **config))
    restore_checkpoint(resumed, tmp_path)
    assert differing(resumed, training) == []


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    training = build(num_steps=1)
    run(training)
    save_checkpoint(training, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.json", "tensors.safetensors"]


def test_another_seed_draws_other_noise_and_timesteps() -> None:
    runs = [build(num_steps=1, seed=seed) for seed in (1, 1, 2)]
    losses = [run(training)[-1].loss for training in runs]
    assert losses[0] == losses[1] != losses[2]
    assert runs[0].timestep_counts.equal(runs[1].timestep_counts)
    assert not runs[0].timestep_counts.equal(runs[2].timestep_counts)


def test_the_state_of_the_global_generator_does_not_matter() -> None:
    losses = []
    for seed in (1, 2):
        model = one_level_unet(dropout=0.5)
        torch.manual_seed(seed)
        losses.append(run(build(model))[-1].loss)
    assert losses[0] == losses[1]


def test_dropout_is_another_in_each_pass_and_of_each_seed() -> None:
    masks: list[torch.Tensor] = []
    for seed in (0, 1):
        model = one_level_unet(dropout=0.5)
        dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout) and module.p)
        dropout.register_forward_hook(lambda _module, _inputs, output: masks.append(output == 0))
        run(build(model, num_steps=2, seed=seed))
    assert len(masks) == 4
    assert not any(left.equal(right) for left, right in itertools.combinations(masks, 2))


def test_dropout_is_on_in_the_copy_and_off_in_the_pretrained_model() -> None:
    def first_record(dropout: float) -> TrainingProgress:
        model, pretrained = one_level_unet(dropout=dropout), one_level_unet(dropout=dropout)
        return run(build(model, num_steps=1, consistency_weight=1.0, pretrained=pretrained.train()))[0]

    assert first_record(0.0).consistency_loss < 1e-10
    assert first_record(0.5).consistency_loss > 1e-4


@pytest.mark.parametrize("max_decay", [0.5, 0.9999])
def test_the_moving_average_equals_the_explicit_formula(max_decay: float) -> None:
    training = build(num_steps=5, record_every=1, ema_decay=max_decay, ema_inv_gamma=2.0, ema_power=0.6)
    expected: dict[str, torch.Tensor] = {}
    for progress in training.progress():
        step = progress.global_step - 1
        decay = min(1 - (1 + step / 2.0) ** -0.6, max_decay)
        for name, parameter in training.model.named_parameters():
            current = parameter.detach().double()
            expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * current

    averaged = training.averaged_tensors()
    assert averaged.keys() == training.model.state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged[name].double(), tensor, atol=1e-6, rtol=1e-5)
    assert any(not averaged[name].equal(p) for name, p in training.model.named_parameters())


def test_projections_are_trained_and_averaged_with_all_other_weights() -> None:
    training = build(model_with_everything(), consistency_weight=1.0)
    run(training)
    averaged = training.averaged_tensors()
    projections = {name: tensor for name, tensor in averaged.items() if is_projection(name)}
    assert len(projections) == 6
    assert all(not tensor.equal(torch.eye(len(tensor))) for tensor in projections.values())
    start = model_with_everything().state_dict()
    assert all(not tensor.equal(start[name]) for name, tensor in averaged.items())


def test_what_was_averaged_does_not_change_with_further_training() -> None:
    training = build(num_steps=4, record_every=2)
    steps = training.progress()
    next(steps)
    taken = training.averaged_tensors()
    before = {name: tensor.clone() for name, tensor in taken.items()}
    list(steps)
    assert all(same_bits(taken[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, [1e-3] * 4),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0.0, 5e-4, 1e-3, 1e-3]),
        ({"lr_scheduler": "linear"}, [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        ({"lr_scheduler": "linear", "gradient_accumulation_steps": 2}, [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        ({"lr_scheduler": "cosine"}, [1e-3, 8.535534e-4, 5e-4, 1.464466e-4]),
    ],
    ids=str,
)
def test_the_reported_learning_rate_is_that_of_the_last_step(spec: dict[str, Any], expected: list[float]) -> None:
    records = run(build(num_steps=4, record_every=1, **spec))
    assert [record.learning_rate for record in records] == pytest.approx(expected, rel=1e-5)


def test_a_first_step_of_rate_zero_changes_nothing() -> None:
    training = build(num_steps=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=1)
    run(training)
    assert all(same_bits(training.model.state_dict()[name], t) for name, t in one_level_unet().state_dict().items())


def test_records_come_regularly_at_checkpoints_and_at_the_end() -> None:
    records = run(build(num_steps=11, record_every=4, checkpoint_every=5))
    assert [record.global_step for record in records] == [4, 5, 8, 10, 11]
    assert {record.num_steps for record in records} == {11}
    assert all(record.images_per_sec > 0 and record.gpu_memory_gb == 0 for record in records)


def test_a_record_holds_the_means_since_the_one_before() -> None:
    single = run(build(num_steps=4, record_every=1, consistency_weight=1.0))
    pairs = run(build(num_steps=4, record_every=2, consistency_weight=1.0))
    for index, pair in enumerate(pairs):
        for name in ("loss", "diffusion_loss", "consistency_loss", "grad_norm"):
            mean = sum(getattr(record, name) for record in single[2 * index : 2 * index + 2]) / 2
            assert getattr(pair, name) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_names_the_step_at_which_it_came(value: float, accumulation: int) -> None:
    bad_batch = 5

    def source(first: int) -> Iterator[EncodedBatch]:
        for number, batch in enumerate(batches(first), start=first):
            yield EncodedBatch(batch.latents + (value if number == bad_batch else 0.0), {})

    training = build(source=source, num_steps=20, record_every=4, gradient_accumulation_steps=accumulation)
    with pytest.raises(NonFiniteLossError) as caught:
        run(training)
    assert caught.value.global_step == bad_batch // accumulation + 1
    assert caught.value.run == "segment 0 [0, 500)"


def with_norms(training: Training, norms: Iterable[float], monkeypatch: pytest.MonkeyPatch) -> Training:
    """Has a training find these norms in place of those of its gradients."""
    given = map(torch.tensor, norms)
    monkeypatch.setattr(training.accelerator, "clip_grad_norm_", lambda *_: next(given))
    return training


def test_steps_that_the_scaler_of_fp16_skips_count_in_no_mean_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    inf, nan = float("inf"), float("nan")
    training = with_norms(build(num_steps=6, record_every=3), [inf, nan, inf, 3.0, inf, 1.0], monkeypatch)
    training.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)  # accelerate has none for a CPU.
    assert [record.grad_norm for record in run(training)] == [0.0, 2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_a_scaler_a_gradient_that_is_not_finite_is_an_error(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step has ruined the weights, though the loss was still finite."""
    with pytest.raises(NonFiniteLossError) as caught:
        run(with_norms(build(num_steps=3), [1.0, value, 1.0], monkeypatch))
    assert caught.value.global_step == 2


def test_a_non_finite_loss_is_raised_before_the_step_of_the_checkpoint_is_yielded() -> None:
    training = build(
        source=lambda first: itertools.repeat(EncodedBatch(torch.full((4, 1, 8, 8), float("nan")), {})),
        checkpoint_every=2,
    )
    with pytest.raises(NonFiniteLossError):
        next(training.progress())


def test_a_changed_frozen_model_is_an_error() -> None:
    pretrained = one_level_unet()
    training = build(num_steps=4, record_every=2, consistency_weight=1.0, pretrained=pretrained)
    with pytest.raises(FrozenModelChangedError, match=r"changed while segment 0 \[0, 500\) was trained"):
        for _ in training.progress():
            pretrained.conv_out.bias.data += 1e-6


def test_the_frozen_model_stays_frozen() -> None:
    pretrained = one_level_unet().train()
    run(build(consistency_weight=1.0, pretrained=pretrained))
    assert not pretrained.training
    assert not any(p.requires_grad or p.grad is not None for p in pretrained.parameters())
    assert all(same_bits(pretrained.state_dict()[name], t) for name, t in one_level_unet().state_dict().items())


def test_timesteps_that_contradict_the_sampler_are_an_error() -> None:
    training = build()
    training.timestep_counts[900] = 10_000
    with pytest.raises(TimestepHistogramError):
        run(training)


def unlikely_counts(sampler: TimestepSampler, batch_size: int) -> torch.Tensor:
    """Returns the timesteps of 100 batches that seem wrong where each image is taken for a draw of its own."""
    for seed in range(50):
        rng = torch.Generator().manual_seed(seed)
        counts = torch.bincount(torch.cat([sampler(batch_size, rng) for _ in range(100)]), minlength=1000)
        if histogram_p_value(counts, sampler) < 1e-12:
            return counts
    raise AssertionError("no seed of these gives any")


def test_a_mirrored_batch_that_is_decided_as_a_whole_counts_as_one_draw() -> None:
    sampler = TimestepSampler(TimestepSegment(0, 500), 1000, 0.3, per_batch_mirrored=True)
    training = build(source=lambda first: batches(first, 64), batch_size=64, sampler=sampler, num_steps=1)
    training.timestep_counts += unlikely_counts(sampler, 64)
    run(training)


def test_the_histogram_counts_every_image() -> None:
    training = build(num_steps=3, gradient_accumulation_steps=2)
    run(training)
    assert int(training.timestep_counts.sum()) == 3 * 2 * BATCH_SIZE


def test_replay_from_the_teacher_learns_the_data_inside_of_the_segment_and_the_teacher_outside() -> None:
    model, pretrained = randomize(one_level_unet(), seed=1, scale=0.02), one_level_unet()
    rng, images = generator("training", 0, 0), tiny_images(BATCH_SIZE, seed=0)
    noise, everywhere = torch.randn(images.shape, generator=rng), TimestepSampler(TimestepSegment(0, 500), 1000, 1.0)
    t = everywhere(BATCH_SIZE, rng)
    inside = t < 500
    assert inside.any() and not inside.all()
    noisy = tiny_scheduler().add_noise(images, noise, t)
    with torch.no_grad():
        target = torch.where(inside[:, None, None, None], noise, pretrained(noisy, t).sample)
        expected = float(((model(noisy, t).sample - target) ** 2).mean())
    settings: dict[str, Any] = {"num_steps": 1, "sampler": everywhere, "pretrained": pretrained}
    (progress,) = run(build(model, replay_from_teacher=True, **settings))
    assert progress.loss == pytest.approx(expected, rel=1e-5)
    # All timesteps are the control's segment: there is nothing outside.
    control = TimestepSampler(TimestepSegment(0, 1000), 1000, 1.0)
    losses = [
        run(build(num_steps=2, sampler=control, pretrained=each, replay_from_teacher=each is not None))[-1].loss
        for each in (None, one_level_unet())
    ]
    assert losses[0] == losses[1]


def test_the_loss_of_each_image_is_weighted_by_min_snr() -> None:
    model = randomize(one_level_unet(), seed=1, scale=0.02)
    rng, images = generator("training", 0, 0), tiny_images(BATCH_SIZE, seed=0)
    noise, everywhere = torch.randn(images.shape, generator=rng), TimestepSampler(TimestepSegment(0, 1000), 1000)
    t, scheduler = everywhere(BATCH_SIZE, rng), tiny_scheduler()
    with torch.no_grad():
        errors = (model(scheduler.add_noise(images, noise, t), t).sample - noise).square().mean(dim=(1, 2, 3))
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    expected = float((torch.minimum(snr, torch.tensor(0.5)) / snr * errors).mean())
    (progress,) = run(build(model, num_steps=1, sampler=everywhere, min_snr_gamma=0.5))
    assert progress.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("weight", "replays"), [(0.0, False), (1.0, False), (0.0, True)])
def test_a_teacher_and_what_is_learnt_from_it_go_together(weight: float, replays: bool) -> None:
    with pytest.raises(ValueError, match="go together"):
        Training(
            one_level_unet(),
            tiny_adapter(),
            batches,
            spec=TrainingSpec(num_steps=1),
            plan=TrainingPlan("control", SAMPLER, 1, weight, replay_from_teacher=replays),
            teacher=None if weight or replays else Teacher([one_level_unet()]),
        )


def test_bfloat16_trains_float32_weights_through_a_rounded_forward_pass() -> None:
    loss_full = run(build(num_steps=2))[-1].loss
    rounded = build(num_steps=2, mixed_precision="bf16")
    loss_rounded = run(rounded)[-1].loss
    assert loss_rounded == pytest.approx(loss_full, rel=0.02)
    assert loss_rounded != loss_full
    assert {tensor.dtype for tensor in rounded.averaged_tensors().values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_and_resumes_on_a_gpu(tmp_path: Path, precision: str) -> None:
    settings = EVERYTHING | {"mixed_precision": precision, "device": "cuda"}
    training = build(model_with_everything(), **settings)
    for progress in training.progress():
        if progress.global_step == 3:
            save_checkpoint(training, tmp_path)
    assert progress.loss > 0
    assert math.isfinite(progress.grad_norm)
    assert progress.gpu_memory_gb > 0

    resumed = build(model_with_everything(), **settings)
    restore_checkpoint(resumed, tmp_path)
    if precision == "fp16":
        assert resumed.accelerator.scaler.get_scale() > 0
    run(resumed)
    for name, tensor in training.averaged_tensors().items():
        torch.testing.assert_close(resumed.averaged_tensors()[name], tensor, atol=1e-4, rtol=1e-3)
