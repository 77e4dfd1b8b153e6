"""What one finetuning step of DeMe costs: over plain steps of diffusers' kind, and over the machine's matrix products.

The plain step is forward, backward, fused AdamW. DeMe adds one forward pass of the frozen pretrained model for the
consistency loss (1 of 3 passes more: 1.33), gradient clipping, the moving average, and channel projections. The loop of
a training script does the same work as DeMe does: diffusers' example, with a second forward pass for consistency. All
draw the same noise and timesteps, so that their losses can be compared. `--options` adds DeMe's options for GPUs; on a
GPU the goal holds only if the fastest of them has the script's mean diffusion loss, within a hundredth of it.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.finetune_contestants import (
    OFF,
    ON,
    OPTIONS,
    PLAIN,
    SCRIPT,
    Problem,
    build_problem,
    build_training,
    contestants_of,
    deme_steps,
)
from benchmarks.measurement import Duration, median_ratio, print_result, print_table, take_turns, timed
from benchmarks.shapes import SHAPES
from deme_core.families import EncodedBatch
from deme_core.model_digest import model_digest
from deme_core.training import Training, matrix_precision

# Over the plain step; on a GPU with its options, over the loop of a training script, whose loss shall be the same.
GOAL, GPU_GOAL, LOSS_TOLERANCE = 1.40, 0.5, 0.01
# How the rows whose operations are counted compute their products, and what that is to torch. On a GPU the convolutions
# of the first are TF32 all the same, by torch's default.
PRODUCTS = {ON: "fp32", "+ allow_tf32": "tf32"} | dict.fromkeys(list(OPTIONS)[1:], "bf16")
_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Measured:
    """One contestant: how long its steps took, and its diffusion loss at each step."""

    durations: list[Duration] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


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
    over = {base: {name: median_ratio(own, counted[base]) for name, own in counted.items()} for base in (PLAIN, SCRIPT)}
    wall_ratios = {name: median_ratio(own, wall[PLAIN]) for name, own in wall.items()}
    losses = {name: statistics.fmean(found.losses) for name, found in measured.items()}
    rows = [
        (
            name,
            *_medians(found.durations),
            f"{over[PLAIN][name]:.2f}",
            f"{over[SCRIPT][name]:.2f}",
            f"{flops / statistics.median(wall[name]) / rates[PRODUCTS[name]]:.0%}" if name in PRODUCTS else "",
            f"{losses[name]:.5f}",
        )
        for name, found in measured.items()
    ]
    rows += [(name, *_medians(durations), "", "", "", "") for name, durations in of_it.items()]
    columns = ("", "processor s", "wall s", "over plain", "over script", "of matmul rate", "diffusion loss")
    print_table(title, columns, rows)
    fastest = min((name for name in measured if name not in (PLAIN, SCRIPT)), key=lambda name: over[SCRIPT][name])
    shipped = max(over[PLAIN][OFF], over[PLAIN][ON])
    loss_gap = abs(losses[fastest] / losses[SCRIPT] - 1)
    print_result(
        "finetune_step",
        ratio=over[SCRIPT][fastest] if on_gpu else shipped,
        goal=GPU_GOAL if on_gpu else GOAL,
        holds=(over[SCRIPT][fastest] <= GPU_GOAL and loss_gap <= LOSS_TOLERANCE if on_gpu else shipped <= GOAL),
        fastest=fastest,
        loss_gap=loss_gap,
        loss_tolerance=LOSS_TOLERANCE,
        ratio_channel_projection_off=over[PLAIN][OFF],
        ratio_channel_projection_on=over[PLAIN][ON],
        wall_ratio_channel_projection_off=wall_ratios[OFF],
        wall_ratio_channel_projection_on=wall_ratios[ON],
        ratio_over_script={name: ratio for name, ratio in over[SCRIPT].items() if name != SCRIPT},
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
