"""What one finetuning step of DeMe costs: over plain steps of diffusers' kind, and over the machine's matrix products.

The plain step is forward, backward, fused AdamW. DeMe adds one forward pass of the frozen pretrained model for the
consistency loss (1 of 3 passes more: 1.33), gradient clipping, the moving average, and channel projections. The loop of
a training script does the same work as DeMe does: diffusers' example, with a second forward pass for consistency. All
draw the same noise and timesteps, so that their losses can be compared. `--options` adds DeMe's options for GPUs; on a
GPU the goal holds only if the fastest of them has the script's mean diffusion loss, within a hundredth of it.
"""

import argparse
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measurement import Duration, median_ratio, print_result, print_table, take_turns, timed
from benchmarks.shapes import SHAPES, adapter_of, random_batch
from deme_core.families import Adapter, EncodedBatch
from deme_core.model_digest import model_digest
from deme_core.model_folder import build_denoiser
from deme_core.projection import attach_projections
from deme_core.recipe import FinetuneSpec
from deme_core.seeds import generator
from deme_core.segments import TimestepSegment
from deme_core.teacher import Teacher
from deme_core.timesteps import TimestepSampler
from deme_core.training import Training, matrix_precision
from deme_core.training_plan import TrainingPlan

# Over the plain step; on a GPU with its options, over the loop of a training script, whose loss shall be the same.
GOAL, GPU_GOAL, LOSS_TOLERANCE = 1.40, 0.5, 0.01
_PLAIN, _SCRIPT = "plain step", "training script, second forward pass"
_OFF, _ON = "DeMe, channel_projection off", "DeMe, channel_projection on"
_NEVER = 1_000_000
_SAMPLER = TimestepSampler(TimestepSegment(0, 250), 1000, 0.3)
# Each with all before it; keys of `finetune` in a recipe.
OPTIONS: dict[str, dict[str, Any]] = {
    "+ allow_tf32": {"allow_tf32": True},
    "+ bf16 autocast": {"mixed_precision": "bf16"},
    "+ channels_last": {"channels_last": True},
    "+ compile": {"compile": True},
}
# How the rows whose operations are counted compute their products, and what that is to torch. On a GPU the convolutions
# of the first are TF32 all the same, by torch's default.
PRODUCTS = {_ON: "fp32", "+ allow_tf32": "tf32"} | dict.fromkeys(list(OPTIONS)[1:], "bf16")
_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Problem:
    """What every contestant trains on.

    Attributes:
        model: theta_0.
        adapter: says how it is called.
        batch: always the same.
    """

    model: nn.Module
    adapter: Adapter
    batch: EncodedBatch

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.batch.latents.device


@dataclass
class Measured:
    """One contestant: how long its steps took, and its diffusion loss at each step."""

    durations: list[Duration] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def build_problem(shape: str, *, tiny: bool, size: int | None, batch_size: int, device: str) -> Problem:
    """Returns a denoiser of a shape of `benchmarks.shapes` with random weights, and a batch."""
    config = SHAPES[shape](tiny=tiny) | ({"sample_size": size} if size else {})
    torch.manual_seed(0)
    with torch.device(device):  # A billion normal draws take a CPU a quarter of a minute.
        model = build_denoiser(config)
    latents, conditioning = random_batch(config, batch_size, device)
    return Problem(model, adapter_of(config), EncodedBatch(latents, conditioning))


def _draws(problem: Problem, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns noise and timesteps of a step: those that `Training` draws."""
    rng = generator("training", 0, number, device=problem.device)
    clean = problem.batch.latents
    return torch.randn(clean.shape, generator=rng, device=problem.device), _SAMPLER(len(clean), rng)


def plain_steps(problem: Problem) -> Iterator[float]:
    """Trains as diffusers' example does, without its optional parts; yields the loss."""
    model = copy.deepcopy(problem.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    process, batch = problem.adapter.noise_process, problem.batch
    for number in itertools.count():
        noise, timesteps = _draws(problem, number)
        noisy = process.add_noise(batch.latents, noise, timesteps)
        told = process.model_timesteps(timesteps)
        loss = F.mse_loss(problem.adapter.predict(model, noisy, told, batch.conditioning), noise)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def script_steps(problem: Problem) -> Iterator[float]:
    """Trains as diffusers' train_unconditional.py does, with a second forward pass; yields the diffusion loss."""
    accelerator = Accelerator(cpu=problem.device.type == "cpu")
    frozen = copy.deepcopy(problem.model).eval().requires_grad_(False)
    model = copy.deepcopy(problem.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    process, batch = problem.adapter.noise_process, problem.batch
    for number in itertools.count():
        with accelerator.accumulate(model):
            noise, timesteps = _draws(problem, number)
            noisy = process.add_noise(batch.latents, noise, timesteps)
            told = process.model_timesteps(timesteps)
            prediction = problem.adapter.predict(model, noisy, told, batch.conditioning)
            with torch.no_grad():
                taught = problem.adapter.predict(frozen, noisy, told, batch.conditioning)
            diffusion = F.mse_loss(prediction.float(), noise.float())
            accelerator.backward(diffusion + F.mse_loss(prediction.float(), taught.float()))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        yield diffusion.item()


def build_training(problem: Problem, *, channel_projection: bool, **spec: Any) -> Training:
    """Returns a finetuning run as shipped, on one segment and always the same batch."""
    model = copy.deepcopy(problem.model)
    if channel_projection:
        attach_projections(model)
    batch_size = len(problem.batch)
    return Training(
        model,
        problem.adapter,
        lambda _first_batch: itertools.repeat(problem.batch),
        spec=FinetuneSpec(num_steps=_NEVER, batch_size=batch_size, checkpoint_every=_NEVER, **spec),
        plan=TrainingPlan("benchmark", _SAMPLER, _NEVER, 1.0),
        teacher=Teacher([copy.deepcopy(problem.model)]),
        device=problem.device,
        record_every=1,
    )


def deme_steps(problem: Problem, *, channel_projection: bool, **spec: Any) -> Iterator[float]:
    """Trains as DeMe does; yields the diffusion loss."""
    training = build_training(problem, channel_projection=channel_projection, **spec)
    return (progress.diffusion_loss for progress in training.progress())


def contestants_of(
    *, with_options: bool, left_out: Sequence[str] = ()
) -> dict[str, Callable[[Problem], Iterator[float]]]:
    """Returns who takes part."""
    known: dict[str, Callable[[Problem], Iterator[float]]] = {
        _PLAIN: plain_steps,
        _SCRIPT: script_steps,
        _OFF: partial(deme_steps, channel_projection=False),
        _ON: partial(deme_steps, channel_projection=True),
    }
    spec: dict[str, Any] = {}
    for name, option in OPTIONS.items() if with_options else ():
        if not option.keys() & set(left_out):
            spec |= option
            known[name] = partial(deme_steps, channel_projection=True, **spec)
    return known


def parts(training: Training, batch: EncodedBatch) -> dict[str, Callable[[], object]]:
    """Returns what DeMe adds to a step, and what it adds to a run, each as a call."""
    assert training.teacher is not None
    model, teacher, frozen = training.model, training.teacher, training.teacher.models[0]
    timesteps = torch.zeros(len(batch), dtype=torch.int64, device=batch.latents.device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return {
        "of it: frozen forward pass": lambda: teacher.predict(
            training.adapter, batch.latents, timesteps, batch.conditioning
        ),
        "of it: clipping": lambda: training.accelerator.clip_grad_norm_(model.parameters(), 1.0),
        "of it: moving average": lambda: training.ema.step(model.parameters()),
        "once per run, twice: digest of the frozen model": lambda: model_digest(frozen),
    }


def step_flops(problem: Problem) -> int:
    """Returns the operations of one step of DeMe, with projections, as torch counts them."""
    steps = deme_steps(problem, channel_projection=True)
    next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    return counter.get_total_flops()


def matmul_rate(device: torch.device, kind: str) -> float:
    """Returns how many operations per second the device does: products of matrices, the best of many short ones.

    Args:
        device: what computes.
        kind: fp32, which is no TF32, tf32 or bf16.
    """
    side = 8192 if device.type == "cuda" else 1024
    left, right = torch.rand(2, side, side, device=device, dtype=_TYPES[kind])
    seconds = []
    with matrix_precision(allow_tf32=kind == "tf32"):
        for _ in range(100):  # So that some meet no other program.
            _wait(device)
            started = time.perf_counter()
            left @ right
            _wait(device)
            seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def measure(
    problem: Problem, contestants: Mapping[str, Any], num_rounds: int, *, in_turns: bool
) -> dict[str, Measured]:
    """Returns what each contestant measured, one entry per round, after two rounds that warm up.

    Args:
        problem: what is trained.
        contestants: who takes part.
        num_rounds: steps of each.
        in_turns: all are in memory, and take turns; otherwise one after the other, as GPUs' memory wants it, and
            mixed precision, which is one setting of the whole process to accelerate.
    """
    measured = {name: Measured() for name in contestants}
    groups = [list(contestants)] if in_turns else [[name] for name in contestants]
    for group in groups:
        steps = {name: contestants[name](problem) for name in group}
        calls = {name: partial(_step, steps[name], measured[name], problem.device) for name in group}
        take_turns(calls, num_rounds=2)  # Holds the digest that a run begins with, and compilation.
        for name in group:
            measured[name] = found = Measured(losses=measured[name].losses)
            calls[name] = partial(_step, steps[name], found, problem.device)
        take_turns(calls, num_rounds=num_rounds)
        del steps, calls
        gc.collect()
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()
    return measured


def _step(steps: Iterator[float], found: Measured, device: torch.device) -> None:
    def step() -> None:
        found.losses.append(next(steps))
        _wait(device)

    found.durations.append(timed(step))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_parts(problem: Problem, num_rounds: int) -> dict[str, list[Duration]]:
    """Returns how long each part of a step took."""

    def waited(call: Callable[[], object]) -> Duration:
        return timed(lambda: (call(), _wait(problem.device)))

    of_it = parts(build_training(problem, channel_projection=True), problem.batch)
    contestants = {name: partial(waited, call) for name, call in of_it.items()}
    take_turns(contestants, num_rounds=1)
    return take_turns(contestants, num_rounds=num_rounds)


def report(
    measured: Mapping[str, Measured],
    of_it: Mapping[str, Sequence[Duration]],
    rates: Mapping[str, float],
    *,
    title: str,
    on_gpu: bool,
    flops: int,
) -> None:
    """Prints the table and the result; on a CPU it is processor time that counts, but for the share of the rate.

    Args:
        measured: what each contestant measured.
        of_it: what each part of a step measured.
        rates: `matmul_rate` by the values of `PRODUCTS`.
        title: of the table.
        on_gpu: whether the goal is that of a GPU.
        flops: `step_flops`.
    """
    wall = {name: [duration.wall_sec for duration in found.durations] for name, found in measured.items()}
    cpu = {name: [duration.cpu_sec for duration in found.durations] for name, found in measured.items()}
    counted = wall if on_gpu else cpu
    over = {
        base: {name: median_ratio(own, counted[base]) for name, own in counted.items()} for base in (_PLAIN, _SCRIPT)
    }
    wall_ratios = {name: median_ratio(own, wall[_PLAIN]) for name, own in wall.items()}
    losses = {name: statistics.fmean(found.losses) for name, found in measured.items()}
    rows = [
        (
            name,
            *_medians(found.durations),
            f"{over[_PLAIN][name]:.2f}",
            f"{over[_SCRIPT][name]:.2f}",
            f"{flops / statistics.median(wall[name]) / rates[PRODUCTS[name]]:.0%}" if name in PRODUCTS else "",
            f"{losses[name]:.5f}",
        )
        for name, found in measured.items()
    ]
    rows += [(name, *_medians(durations), "", "", "", "") for name, durations in of_it.items()]
    columns = ("", "processor s", "wall s", "over plain", "over script", "of matmul rate", "diffusion loss")
    print_table(title, columns, rows)
    fastest = min((name for name in measured if name not in (_PLAIN, _SCRIPT)), key=lambda name: over[_SCRIPT][name])
    shipped = max(over[_PLAIN][_OFF], over[_PLAIN][_ON])
    loss_gap = abs(losses[fastest] / losses[_SCRIPT] - 1)
    print_result(
        "finetune_step",
        ratio=over[_SCRIPT][fastest] if on_gpu else shipped,
        goal=GPU_GOAL if on_gpu else GOAL,
        holds=(over[_SCRIPT][fastest] <= GPU_GOAL and loss_gap <= LOSS_TOLERANCE if on_gpu else shipped <= GOAL),
        fastest=fastest,
        loss_gap=loss_gap,
        loss_tolerance=LOSS_TOLERANCE,
        ratio_channel_projection_off=over[_PLAIN][_OFF],
        ratio_channel_projection_on=over[_PLAIN][_ON],
        wall_ratio_channel_projection_off=wall_ratios[_OFF],
        wall_ratio_channel_projection_on=wall_ratios[_ON],
        ratio_over_script={name: ratio for name, ratio in over[_SCRIPT].items() if name != _SCRIPT},
        mean_losses=losses,
        step_flops=flops,
        matmul_flops_per_sec=rates,
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
    problem = build_problem(
        options.shape, tiny=options.tiny, size=options.size, batch_size=options.batch_size, device=options.device
    )
    on_gpu = problem.device.type == "cuda"
    flops = step_flops(problem)
    contestants = contestants_of(with_options=options.options, left_out=options.leave_out)
    measured = measure(problem, contestants, options.rounds, in_turns=not options.options)
    of_it = measure_parts(problem, min(options.rounds, 3))
    kinds = sorted({PRODUCTS[name] for name in measured if name in PRODUCTS})
    rates = {kind: matmul_rate(problem.device, kind) for kind in kinds}
    num_parameters = sum(parameter.numel() for parameter in problem.model.parameters())
    _, height, width = problem.batch.latents.shape[1:]
    title = (
        f"One finetuning step: {options.shape}{', tiny' if options.tiny else ''}, {num_parameters / 1e6:.1f} M "
        f"parameters, {height} x {width}, batch {options.batch_size}, fp32 unless said otherwise, "
        f"{options.device}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds"
    )
    report(measured, of_it, rates, title=title, on_gpu=on_gpu, flops=flops)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.finetune_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows that it runs")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "sdxl"], default="cifar10")
    parser.add_argument("--tiny", action="store_true", help="the shape's parts at a tiny width")
    parser.add_argument("--size", type=int, help="side of images or latents (default the shape's own)")
    parser.add_argument("--options", action="store_true", help="also DeMe's options for GPUs (default on cuda)")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], choices=["channels_last", "compile"], help="options to leave out"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, help="images per step (default 4)", default=4)
    parser.add_argument("--rounds", type=int, help="steps of each kind (default 9, quick 3)")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default all cores)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.tiny = options.tiny or options.quick
    options.options = options.options or options.device.startswith("cuda")
    return options


if __name__ == "__main__":
    main()
