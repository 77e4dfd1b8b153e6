import subprocess
import sys

import psutil

from tasks.ray_leave import leave
from tests.e2e.waiting import wait_for

# Processes by the words of their command lines; what is said of Ray is no Ray.
_PARENT = """
import subprocess, sys, time
for words in sys.argv[1:]:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words.split()])
time.sleep(60)
"""


def test_ray_and_its_workers_are_told_to_leave_and_nobody_else() -> None:
    words = ["/bin/ray start --block", "-m tasks.worker --device", "tasks.work.ranks ray", "start"]
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, *words])
    root = psutil.Process(parent.pid)
    try:
        wait_for(lambda: len(root.children()) == len(words))
        wait_for(lambda: all("-c" in child.cmdline() for child in root.children()))
        leave(root)
        wait_for(lambda: sum(child.status() == psutil.STATUS_ZOMBIE for child in root.children()) == 2)
        left = {" ".join(c.cmdline()[3:]) for c in root.children() if c.status() != psutil.STATUS_ZOMBIE}
        assert left == set(words[2:])
        assert parent.poll() is None
    finally:
        for process in (*root.children(), root):
            process.kill()
        parent.wait()
