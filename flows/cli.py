"""The command line. Each command imports what it needs when it runs, so that ``deme --help`` is instant."""

import io
import json
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from deme_core.errors import InputError
from flows.ending import run_to_its_end
from flows.environment import reach_loopback_without_proxy
from flows.stack.commands import app as stack_app
from flows.terminal import say

app = typer.Typer(
    name="deme",
    help="Decouple-then-Merge for diffusion models: finetune one copy per timestep segment, merge the copies into one "
    "model of the same architecture, and compare it fairly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="List and show recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(stack_app)

RecipeArgument = Annotated[str, typer.Argument(help="Name of a recipe, or path or object-store URI of a YAML file.")]
ModelArgument = Annotated[str, typer.Argument(help="A diffusers folder, an object-store URI, or a hub id.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, e.g. finetune.num_steps=50. Repeatable.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist yet or be empty.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the logs of the flow and its workers.")]


def _print_version(asked: bool) -> None:
    if asked:
        from deme_core.code_version import code_version

        print(code_version())  # noqa: T201
        raise typer.Exit


@app.callback()
def deme(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Print version and digest of the sources, which a run and its workers must share, and exit.",
        ),
    ] = False,
) -> None:
    """Takes what holds for all commands."""


@app.command(epilog="Example: deme run digits --set finetune.num_steps=50")
def run(
    recipe: RecipeArgument, set_: SetOption = None, json_: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Decouple, merge and compare: the whole method on one recipe."""
    from flows.flow_command import run_flow
    from flows.report_text import print_report

    report = run_flow("flows.decouple_then_merge:deme", recipe, set_, verbose=verbose)
    _show(report, print_report, as_json=json_)


@app.command(epilog="Example: deme pretrain digits")
def pretrain(
    recipe: RecipeArgument, set_: SetOption = None, json_: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Train the pretrained model of a recipe into the object store, for those who bring none."""
    from flows.flow_command import run_flow
    from flows.report_text import print_model

    report = run_flow("flows.pretrain:pretrain", recipe, set_, verbose=verbose)
    _show(report, print_model, as_json=json_)


@app.command(epilog="Example: deme evaluate s3://bucket/my-model --recipe digits")
def evaluate(
    model: ModelArgument,
    recipe: Annotated[str, typer.Option(help="The recipe whose evaluation is used: name, path or URI.")] = "digits",
    set_: SetOption = None,
    json_: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score any model under a recipe's evaluation."""
    from flows.flow_command import run_flow
    from flows.report_text import print_scores

    report = run_flow("flows.evaluate:evaluate", recipe, set_, verbose=verbose, model=model)
    _show(report, print_scores, as_json=json_)


@app.command(epilog="Example: deme compare 3f2a9c41 b07d5512")
def compare(
    runs: Annotated[list[str], typer.Argument(help="MLflow run ids or their beginnings; the first is the baseline.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; default one under DEME_HOME/reports.")] = None,
    json_: JsonOption = False,
) -> None:
    """Put several runs in one table and on one page, if they were evaluated alike."""
    from flows.environment import make_folders

    make_folders()
    from flows.report_text import print_comparison
    from tasks.comparison import comparable_reports, comparison_table
    from tasks.comparison_page import write_comparison

    reports = comparable_reports(runs)
    page = write_comparison(reports, out)
    _show(comparison_table(reports), print_comparison, as_json=json_)
    # Beside the JSON object, which is the last line of stdout.
    say(Console(stderr=json_), f"page  {page}")


@app.command(epilog="Example: deme report 3f2a9c41 --open")
def report(
    run: Annotated[str | None, typer.Argument(help="MLflow run id or its beginning; default the newest run.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Print the path of a run's page, fetching the page if the run was done elsewhere."""
    from flows.environment import make_folders

    make_folders()
    from tasks.run_page import fetch_page

    path = fetch_page(run)
    say(Console(), str(path))
    if open_ and not webbrowser.open(path.as_uri()):
        raise InputError(f"There is no browser here; open {path} in one.")


def _show(content: dict[str, Any], show: Callable[[dict[str, Any], Console], None], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(content))  # noqa: T201
    else:
        show(content, Console())


@app.command(epilog="Example: deme export --out merged-model")
def export(
    out: OutOption,
    run: Annotated[str | None, typer.Argument(help="MLflow run id or its beginning; default the newest run.")] = None,
    row: Annotated[
        Literal["merged", "distilled"], typer.Option(help="Which model; distilled where the recipe distills.")
    ] = "merged",
    lora: Annotated[
        bool, typer.Option("--lora", help="Of LoRA experts: one LoRA for load_lora_weights, not a whole model.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --lora: the nearest one of this rank, not the exact sum.")
    ] = None,
) -> None:
    """Write the merged model of a run as a folder that stock diffusers loads."""
    from flows.model_commands import export_lora, export_model

    if rank is not None and not lora:
        raise InputError("--rank is that of a LoRA; add --lora.")
    if lora and row != "merged":
        raise InputError("A distilled model is no LoRA; leave out --lora, or --row distilled.")
    wrote = export_lora(run, out, rank) if lora else export_model(run, out, row)
    say(Console(), f"wrote {wrote}")


@app.command(
    epilog="Example: deme merge --pretrained base --expert e0 --expert e1 --weights 0.3,0.3 --out merged-model"
)
def merge(
    pretrained: Annotated[Path, typer.Option(help="Folder of the pretrained model.")],
    expert: Annotated[list[Path], typer.Option(help="Folder of a finetuned copy, lowest timesteps first. Repeatable.")],
    out: OutOption,
    weights: Annotated[
        str | None, typer.Option(help="One merge weight per expert, separated by commas; average takes none.")
    ] = None,
    method: Annotated[
        Literal["task_arithmetic", "block_weights", "ties", "dare", "average"],
        typer.Option(help="How task vectors are combined; block_weights takes a weight per expert and block, too."),
    ] = "task_arithmetic",
    # None where it is not given: a method refuses what is another's.
    density: Annotated[
        float | None, typer.Option(help="ties: share of each tensor's entries that is kept.", show_default="0.2")
    ] = None,
    drop_rate: Annotated[
        float | None, typer.Option(help="dare: share of the entries that is dropped.", show_default="0.5")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="dare: decides which entries are dropped.", show_default="0")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(
            help="Type of the stored weights. The merge is computed in float32; half precision rounds most of a "
            "finetuning away."
        ),
    ] = "float32",
) -> None:
    """Merge finetuned copies of a model into one, in weight space."""
    from flows.model_commands import merge_models

    settings = {"method": method, "density": density, "drop_rate": drop_rate, "seed": seed}
    merged = merge_models(pretrained, expert, weights, out, dtype=dtype, **settings)
    say(Console(), f"wrote {merged}")


@app.command(epilog="Example: deme generate merged-model --num-images 64 --out images")
def generate(
    model: ModelArgument,
    out: OutOption,
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial noise.")] = 0,
    sampler: Annotated[
        str | None, typer.Option(help="ddim or ddpm; flow_match_euler for flow-matching models.", show_default="ddim")
    ] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Path or URI of prompts, for a model that takes text; image i has prompt i modulo their number."
        ),
    ] = None,
    guidance_scale: Annotated[float, typer.Option(min=1, help="Classifier-free guidance; 1 is none.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch; another changes rounding alone.")] = 64,
) -> None:
    """Generate images as PNG files: image i depends on model, seed and i, whoever makes it."""
    from flows.model_commands import generate_images

    generate_images(
        model,
        out,
        num_images=num_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        prompts=prompts,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        console=Console(stderr=True),
    )
    say(Console(), f"wrote {num_images} images to {out}")


@app.command(epilog="Example: deme sweep --older-than 48")
def sweep(
    # The parts of an upload are as old as its beginning.
    older_than: Annotated[float, typer.Option(min=12, help="Hours; anything younger is spared.")] = 48.0,
    checkpoints: Annotated[
        float | None, typer.Option(min=1, help="Days: also checkpoints of trainings that made none for so long.")
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(min=1, help="Days: also copies in this machine's cache that no run asked for since then."),
    ] = None,
) -> None:
    """Free the space of what killed runs left half-done in the object store and on this machine."""
    from datetime import timedelta

    from flows.sweep import sweep as sweep_all
    from flows.sweep import sweep_cache, sweep_checkpoints

    num_objects, num_folders = sweep_all(timedelta(hours=older_than))
    Console().print(f"removed {num_objects} objects and {num_folders} scratch folders", highlight=False)
    if checkpoints is not None:
        num_trainings = sweep_checkpoints(timedelta(days=checkpoints))
        Console().print(f"removed the checkpoints of {num_trainings} trainings", highlight=False)
    if cache is not None:
        num_bytes = sweep_cache(timedelta(days=cache))
        Console().print(f"removed {num_bytes / 1e9:.1f} GB of copies from the cache", highlight=False)


@recipes_app.command("list", epilog="Example: deme recipes list")
def list_recipes() -> None:
    """List the recipes that come with DeMe."""
    from rich.table import Table

    from deme_core.recipe_file import RECIPES_FOLDER, recipe_names

    table = Table.grid("name", "summary", padding=(0, 2))
    for name in recipe_names():
        lines = (RECIPES_FOLDER / f"{name}.yaml").read_text().splitlines()
        about = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        summary = next((line for line in about if line and not line.startswith("deme run")), "")
        table.add_row(name, summary)
    Console().print(table, highlight=False)


@recipes_app.command("show", epilog="Example: deme recipes show digits --set segments.count=8")
def show_recipe(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Print a recipe with every key there is, defaults filled in."""
    from deme_core.recipe_file import load_recipe, spell_out_recipe

    print(spell_out_recipe(load_recipe(recipe, set_ or [])), end="")  # noqa: T201


@app.command(epilog="Example: deme doctor sd14_coco30k --set dataset.path=/data/coco/train2014")
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Name of a recipe, or path or URI of a YAML file: also look for all that it needs."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Check that this machine and its settings are fit for a run, and estimate what a recipe takes."""
    from deme_core.recipe_file import load_recipe
    from flows.doctor import examine

    if recipe is None and set_:
        raise InputError("--set changes a recipe; name one.")
    found = load_recipe(recipe, set_ or []) if recipe else None
    raise typer.Exit(examine(Console(), found))


def main() -> None:
    """Runs the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # In a locale without … a line is better than a traceback.
            stream.reconfigure(errors="replace")
    reach_loopback_without_proxy()
    run_to_its_end(app)


if __name__ == "__main__":
    main()
