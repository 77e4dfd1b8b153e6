"""How a command ends that Prefect would keep."""

import os
import signal
import subprocess
import sys

# As a flow whose server is away: it goes on waiting after Ctrl-C.
_COMMAND = """
import time
from flows import ending
ending._SECONDS_TO_TELL = 0.1
ending.leave_in_time_after_interrupt()
for _ in range(2):
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


def test_ctrl_c_ends_a_command_in_time_whatever_it_waits_for() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DEME_STOP_SECONDS": "0.1"},
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "begun\n"
        command.send_signal(signal.SIGINT)
        try:
            _, said = command.communicate(timeout=20)
        finally:
            command.kill()
    assert command.returncode == 128 + signal.SIGINT
    assert said == "deme: interrupted; run the same command again to go on.\n"
