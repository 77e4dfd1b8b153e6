"""Draws docs/scaling.png, and prints the table beside it, from `benchmarks.cluster_simulation`: no measurement.

python -m benchmarks.scaling_plot [--out docs/scaling.png]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib

from benchmarks.cluster_simulation import Cluster, Plan, knee, simulate
from benchmarks.measurement import print_table

# A transformer sees each of 4,096 patches once: two operations for each parameter and patch.
_PATCHES = 4096
_GPUS = [8, 16, 32, 64, 128, 256, 512, 1000]
_SEGMENTS = [4, 16, 64]
_SIZES = {"0.1": 1e8, "0.9": 9e8, "2.6": 2.6e9, "12": 12e9}


def _plan(num_segments: int, num_parameters: float = 12e9, **changes: bool) -> Plan:
    plan = Plan(num_segments, num_parameters, forward_flops=2.0 * num_parameters * _PATCHES)
    return replace(plan, **changes)  # type: ignore[arg-type]


def draw(out: Path) -> None:
    """Draws time by GPUs, and what a training needs and waits for by size of the model."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for num_segments, color in zip(_SEGMENTS, ("#1b6ca8", "#c4631a", "#3d8b4f"), strict=True):
        for has_control, line in ((True, "-"), (False, "--")):
            plan = _plan(num_segments, has_control=has_control)
            hours = [simulate(plan, Cluster(count)).hours for count in _GPUS]
            label = f"{num_segments} segments{'' if has_control else ', no control'}"
            left.plot(_GPUS, hours, line, color=color, marker="o", markersize=3, label=label)
            at = min(knee(plan), _GPUS[-1])
            left.plot([at], [simulate(plan, Cluster(at)).hours], "D", color=color, markersize=7, markerfacecolor="none")
    left.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="hours", title="A run of a 12-billion-parameter model")
    left.set_xticks(_GPUS, [str(count) for count in _GPUS])
    left.minorticks_off()
    left.legend(fontsize=8)
    left.grid(alpha=0.3)

    sizes = [10 ** (8 + step / 10) for step in range(0, 22)]
    right.plot(
        [s / 1e9 for s in sizes], [6 * 4 * s / 1e9 for s in sizes], color="#1b6ca8", label="memory of a training"
    )
    right.axhline(80, color="#1b6ca8", linestyle=":", label="memory of an H100")
    right.plot([s / 1e9 for s in sizes], [66 * 4 * s / 1e9 for s in sizes], color="#c4631a", label="read by a merge")
    right.axhline(4000, color="#c4631a", linestyle=":", label="disk assumed")
    right.plot(
        [s / 1e9 for s in sizes], [65 * 2 * 16 * s / 1e9 for s in sizes], color="#3d8b4f", label="checkpoints kept"
    )
    right.set(
        xscale="log", yscale="log", xlabel="billion parameters", ylabel="GB", title="What breaks, with 64 segments"
    )
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/scaling.png"))
    draw(parser.parse_args().out)
    rows = []
    for num_segments in _SEGMENTS:
        for count in (16, 64, 512, 1000):
            found = simulate(_plan(num_segments), Cluster(count))
            without = simulate(_plan(num_segments, has_control=False), Cluster(count))
            cells = [f"{found.hours:,.0f}", f"{found.busy:.0%}", f"{without.hours:,.0f}", f"{without.busy:.0%}"]
            rows.append([f"{num_segments} segments, {count} GPUs", *cells])
    print_table("12 billion parameters", ["", "hours", "busy", "hours, no control", "busy"], rows)
    rows = []
    for name, size in _SIZES.items():
        found = simulate(_plan(64, size), Cluster(1000))
        limits = "; ".join(found.limits) or "all fits"
        cells = [f"{found.training_sec / 3600:,.1f}", f"{found.merge_sec / 60:,.1f}", f"{found.images_sec / 3600:,.1f}"]
        rows.append([f"{name} billion", *cells, f"{found.checkpoint_share:.1%}", limits])
    columns = ["64 segments, 1,000 GPUs", "training, h", "merge, min", "images, h", "checkpoints", "what breaks"]
    print_table("By size", columns, rows)


if __name__ == "__main__":
    main()
