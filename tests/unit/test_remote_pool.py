import traceback
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deme_core.errors import InputError
from deme_core.file_store import FileStore
from deme_core.recipe import ExecutionSpec
from tasks.remote_pool import RemotePool


def test_an_address_with_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    pool = RemotePool(ExecutionSpec(runner="prefect"), FileStore(tmp_path), "flow-run")
    address = temporary_settings({PREFECT_API_URL: "http://user:hush@127.0.0.1:1/api"})
    with address, pytest.raises(InputError, match="PREFECT_API_AUTH_STRING") as caught:
        pool.start()
    assert "hush" not in "".join(traceback.format_exception(caught.value))
