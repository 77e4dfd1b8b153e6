"""``deme up | down | status | env | deploy | worker | follow``: the commands around a Prefect server."""

import json
import os
import shlex
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from deme_core.errors import InputError
from deme_core.settings import Settings

app = typer.Typer()

PortOption = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Port; default that of the last start, else the usual one, else a free one."),
]


@app.command(epilog="Example: deme up")
def up(
    prefect_port: PortOption = None,
    mlflow_port: PortOption = None,
    s3_port: PortOption = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Also start a worker for the pool deme-gpu.")] = False,
) -> None:
    """Start Prefect, MLflow, an S3 server and a worker on this machine, and register the deployments."""
    given = {"prefect": prefect_port, "mlflow": mlflow_port, "s3": s3_port}
    console = Console()
    layout = _stack(console).up({k: v for k, v in given.items() if v}, gpu=gpu)
    console.print(
        f"Prefect  {layout.url('prefect')}, whose front page asks once for the PREFECT_API_AUTH_STRING of deme env\n"
        f"MLflow   {layout.url('mlflow')}\n"
        'this shell: eval "$(deme env)", then: prefect deployment run deme/full',
        highlight=False,
        soft_wrap=True,
    )


@app.command(epilog="Example: deme down")
def down() -> None:
    """Stop what `deme up` started; nothing stored is lost."""
    console = Console()
    if not _stack(console).down():
        console.print("nothing was running")


@app.command(epilog="Example: deme status --json")
def status(json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Tell what of the local stack runs, since when, and what is broken; exit code 1 if anything is."""
    console = Console()
    found = _stack(console).status()
    if json_:
        print(json.dumps({each.name: vars(each) for each in found}))  # noqa: T201
    else:
        table = Table("service", "state", "url", "pid", "since")
        for each in found:
            table.add_row(each.name, each.state, each.url or "", str(each.pid or ""), each.since or "")
        console.print(table)
        for each in found:
            if each.problem:
                console.print(f"{each.name}: {each.problem}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if any(each.problem for each in found) else 0)


@app.command(epilog='Example: eval "$(deme env)"')
def env() -> None:
    """Print what points this shell's prefect, mlflow, aws and deme at the local stack."""
    for name, value in _stack(Console(stderr=True)).layout().client_environment().items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201


@app.command(epilog="Example: PREFECT_API_URL=http://prefect:4200/api deme deploy --pool-type kubernetes")
def deploy(
    pool_type: Annotated[
        Literal["process", "kubernetes"], typer.Option(help="What the work pools start flow runs in.")
    ] = "process",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that is starting.")] = 0.0,
) -> None:
    """Register work pools, deployments and automations with the Prefect server of PREFECT_API_URL."""
    address = _prefect_address()
    from flows.deploy import deploy as register
    from flows.deploy import import_flows
    from tasks.health import check_health

    import_flows()  # Seconds, in which a server may start.
    check_health("PREFECT_API_URL", address, patience=wait)
    warn = Console(stderr=True)
    for name in register(pool_type, lambda line: warn.print(line, highlight=False, soft_wrap=True)):
        Console().print(name, highlight=False)


@app.command(epilog="Example: deme worker deme-gpu --limit 8")
def worker(
    pool: Annotated[str, typer.Argument(help="The work pool to serve: deme-cpu or deme-gpu.")],
    name: Annotated[str | None, typer.Option(help="What Prefect shows; default a name of its own.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Flow runs at a time; default no limit; give the number of GPUs for deme-gpu."),
    ] = None,
    healthcheck: Annotated[bool, typer.Option("--healthcheck", help="Serve /health on port 8080.")] = False,
) -> None:
    """Do flow runs of a work pool on this machine, as Prefect's worker does; when it is stopped, they checkpoint."""
    _prefect_address()
    from flows.worker import start_worker

    options = {"--pool": pool, "--type": "process", "--name": name, "--limit": limit}
    given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    start_worker([*given, *(["--with-healthcheck"] if healthcheck else [])])


@app.command(epilog="Example: prefect deployment run deme/full && deme follow")
def follow(
    run: Annotated[str | None, typer.Argument(help="Flow run id, or its beginning; default the newest.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object, last.")] = False,
) -> None:
    """Follow a run of deme/full to its end, then print its report."""
    address = _prefect_address()
    from flows.follow import follow_run
    from flows.report_text import print_report
    from tasks.health import check_health

    check_health("PREFECT_API_URL", address)
    report = follow_run(run, Console(stderr=True))
    if json_:
        print(json.dumps(report))  # noqa: T201
    else:
        print_report(report, Console())


def _prefect_address() -> str:
    """Returns the address of the Prefect server, after what must be done before Prefect is imported.

    Raises:
        InputError: there is none, or it holds a password.
    """
    from flows.environment import make_folders
    from tasks.health import check_api_address

    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise InputError('There is no PREFECT_API_URL; `deme up` starts a server, eval "$(deme env)" names it.')
    check_api_address(address)
    make_folders()
    return address


def _stack(console: Console) -> Any:
    from flows.stack.stack import Stack

    return Stack(Settings().state_folder, lambda line: console.print(line, style="dim", highlight=False))
