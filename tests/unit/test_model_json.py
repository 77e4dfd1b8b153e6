import json
from pathlib import Path

import pytest

from deme_core.digests import sha256_file
from deme_core.model_json import content_digest


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("is_escaped", [True, False])
def test_a_config_has_the_same_digest_wherever_it_was_loaded_from(name: str, is_escaped: bool, tmp_path: Path) -> None:
    """transformers writes what is not ASCII in a tokenizer's config as it is; diffusers escapes it in all configs."""
    config = {"bos_token": "<｜begin▁of▁sentence｜>"} | ({"half": "\ud83d"} if is_escaped else {})
    digests = set[str]()
    for place in ({}, {"name_or_path": "/models/a"}, {"_name_or_path": "/models/ä", "_commit_hash": "1"}):
        text = json.dumps(config | place, indent=2, sort_keys=True, ensure_ascii=is_escaped)
        (tmp_path / name).write_text(f"{text}\n", "utf-8")
        digests.add(content_digest(tmp_path / name))
    assert len(digests) == 1
    (tmp_path / name).write_text(f"{json.dumps(config, indent=2, ensure_ascii=is_escaped)}\n", "utf-8")
    assert digests == {sha256_file(tmp_path / name)}
    (tmp_path / name).write_text('{"half": "\\ud83d", "whole": "▁", "name_or_path": "x"}', "utf-8")
    assert content_digest(tmp_path / name) not in digests
