"""What one finetuning step of DeMe costs, over the plain step of a diffusers training script.

The plain step is forward, backward, fused AdamW. DeMe adds one forward pass of the frozen pretrained model for the
consistency loss (1 of 3 passes more: 1.33), gradient clipping, the moving average, and channel projections.
"""

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from benchmarks.measurement import Duration, median_ratio, print_result, print_table, take_turns, timed
from deme_core.families import EncodedBatch, Unconditional
from deme_core.model_digest import model_digest
from deme_core.projection import attach_projections
from deme_core.recipe import FinetuneSpec
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training import Training, TrainingPlan

GOAL = 1.40
_PLAIN, _OFF, _ON = "plain step", "DeMe, channel_projection off", "DeMe, channel_projection on"
_NEVER = 1_000_000
Durations = dict[str, list[Duration]]


def build_model(*, quick: bool) -> nn.Module:
    """Returns the architecture of google/ddpm-cifar10-32 (35.7 million parameters), or half its width."""
    width = 64 if quick else 128
    model: nn.Module = UNet2DModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return model


def plain_steps(model: nn.Module, clean_images: torch.Tensor) -> Iterator[None]:
    """Trains as diffusers' example does, without its optional parts."""
    noise_scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-5, fused=True)
    while True:
        noise = torch.randn_like(clean_images)
        timesteps = torch.randint(0, 1000, (len(clean_images),), device=clean_images.device)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
        loss = F.mse_loss(model(noisy_images, timesteps).sample, noise)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        yield


def build_training(pretrained: nn.Module, clean_images: torch.Tensor, *, channel_projection: bool) -> Training:
    """Returns a finetuning run as shipped, on one segment and always the same batch."""
    model = copy.deepcopy(pretrained)
    if channel_projection:
        attach_projections(model)
    return Training(
        model,
        Unconditional(denoiser_config=dict(pretrained.config), scheduler_config={}),
        lambda _first_batch: itertools.repeat(EncodedBatch(clean_images, {})),
        spec=FinetuneSpec(num_steps=_NEVER, batch_size=len(clean_images), checkpoint_every=_NEVER),
        plan=TrainingPlan("benchmark", TimestepSampler(TimestepSegment(0, 250), 1000, 0.3), _NEVER, 1.0),
        teacher=Teacher([copy.deepcopy(pretrained)]),
        device=clean_images.device,
        record_every=1,
    )


def parts(training: Training, clean_images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Returns what DeMe adds to a step, and what it adds to a run, each as a call."""
    assert training.teacher is not None
    model, frozen = training.model, training.teacher.models[0]
    assert frozen is not None
    timesteps = torch.zeros(len(clean_images), dtype=torch.int64, device=clean_images.device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return {
        "of it: frozen forward pass": torch.no_grad()(lambda: frozen(clean_images, timesteps)),
        "of it: clipping": lambda: training.accelerator.clip_grad_norm_(model.parameters(), 1.0),
        "of it: moving average": lambda: training.ema.step(model.parameters()),
        "once per run, twice: digest of the frozen model": lambda: model_digest(frozen),
    }


def measure(model: nn.Module, clean_images: torch.Tensor, num_rounds: int) -> tuple[Durations, Durations]:
    """Returns the durations of the three steps, and of the parts, one per round."""
    training = build_training(model, clean_images, channel_projection=True)
    steps: dict[str, Iterator[object]] = {
        _PLAIN: plain_steps(copy.deepcopy(model), clean_images),
        _OFF: build_training(model, clean_images, channel_projection=False).progress(),
        _ON: training.progress(),
    }
    contestants = {name: _waited(step.__next__, clean_images.device) for name, step in steps.items()}
    take_turns(contestants, num_rounds=1)  # Warms up; holds the digest that a run begins with.
    durations = take_turns(contestants, num_rounds=num_rounds)
    of_it = {name: _waited(call, clean_images.device) for name, call in parts(training, clean_images).items()}
    take_turns(of_it, num_rounds=1)
    return durations, take_turns(of_it, num_rounds=num_rounds)


def _waited(call: Callable[[], object], device: torch.device) -> Callable[[], Duration]:
    def wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return lambda: timed(wait)


def report(durations: Durations, of_it: Durations, *, title: str, on_gpu: bool) -> None:
    """Prints the table and the result; on a CPU it is processor time that counts."""
    wall = {name: [duration.wall_sec for duration in values] for name, values in durations.items()}
    cpu = {name: [duration.cpu_sec for duration in values] for name, values in durations.items()}
    wall_ratios = {name: median_ratio(values, wall[_PLAIN]) for name, values in wall.items()}
    ratios = wall_ratios if on_gpu else {name: median_ratio(values, cpu[_PLAIN]) for name, values in cpu.items()}
    rows = [(name, *_medians(values), f"{ratios[name]:.2f}") for name, values in durations.items()]
    rows += [(name, *_medians(values), "") for name, values in of_it.items()]
    print_table(title, ("", "processor s", "wall s", "over plain"), rows)
    print_result(
        "finetune_step",
        ratio=max(ratios[_OFF], ratios[_ON]),
        goal=GOAL,
        holds=max(ratios[_OFF], ratios[_ON]) <= GOAL,
        ratio_channel_projection_off=ratios[_OFF],
        ratio_channel_projection_on=ratios[_ON],
        wall_ratio_channel_projection_off=wall_ratios[_OFF],
        wall_ratio_channel_projection_on=wall_ratios[_ON],
    )


def _medians(durations: Sequence[Duration]) -> tuple[str, str]:
    cpu = statistics.median(duration.cpu_sec for duration in durations)
    wall = statistics.median(duration.wall_sec for duration in durations)
    return f"{cpu:.3f}", f"{wall:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and the result."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build_model(quick=options.quick).to(options.device)
    clean_images = torch.rand(options.batch_size, 3, 32, 32, device=options.device) * 2 - 1
    durations, of_it = measure(model, clean_images, options.rounds)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    title = (
        f"One finetuning step: {num_parameters / 1e6:.1f} M parameters, batch {options.batch_size}, fp32, "
        f"{options.device}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds"
    )
    report(durations, of_it, title=title, on_gpu=clean_images.is_cuda)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.finetune_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow model and few rounds: shows that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, help="images per step (default 4)", default=4)
    parser.add_argument("--rounds", type=int, help="steps of each kind (default 9, quick 3)")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default all cores)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 9)
    return options


if __name__ == "__main__":
    main()
