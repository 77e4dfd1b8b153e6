"""What a flow imports before its workers start: only what it needs, since nothing runs meanwhile."""

import os
import subprocess
import sys
from pathlib import Path


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
