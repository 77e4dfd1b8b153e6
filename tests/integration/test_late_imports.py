"""What is imported, and when: a flow starts at once, and work that was done before costs no library."""

import os
import subprocess
import sys
from pathlib import Path

WORK = Path(__file__).resolve().parents[2] / "tasks" / "work"


def test_a_job_that_was_done_before_imports_no_library_to_do_it_with() -> None:
    modules = [f"tasks.work.{path.stem}" for path in WORK.glob("*.py") if path.stem not in ("__init__", "training_run")]
    script = (
        f"import importlib, pathlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "from deme_core.extractors import extractors_digest; "
        "extractors_digest(['efficientnet_lite0'], weights=None, resolution=None, cache=pathlib.Path('none')); "
        "from deme_core.images.digits import DigitsSource; DigitsSource(); "
        "print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    )
    libraries = ["accelerate", "diffusers", "peft", "scipy", "sklearn", "timm", "torchvision", "transformers"]
    done = subprocess.run([sys.executable, "-c", script, *libraries], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_flow_imports_nothing_heavy_before_it_starts(tmp_path: Path) -> None:
    script = "import flows.decouple_then_merge, sys; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    heavy = ["boto3", "diffusers", "matplotlib", "mlflow", "pandas", "ray", "scipy", "torch", "transformers"]
    done = subprocess.run(
        [sys.executable, "-c", script, *heavy],
        env=os.environ | {"DEME_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
