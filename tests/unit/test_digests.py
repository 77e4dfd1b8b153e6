import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deme_core.digests import canonical_json, sha256_bytes, sha256_file, stage_digest

# The SHA-256 of "abc": FIPS 180-2, appendix B.1.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_one_value_has_one_form() -> None:
    assert canonical_json({"b": (1, 2), "a": None}) == '{"a":null,"b":[1,2]}'
    assert canonical_json({"a": None, "b": [1, 2]}) == '{"a":null,"b":[1,2]}'


@given(plain_json)
def test_storing_a_value_keeps_its_form(value: object) -> None:
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


def test_integer_keys_sort_as_the_strings_they_become() -> None:
    assert canonical_json({2: "b", 10: "a"}) == canonical_json({"2": "b", "10": "a"}) == '{"10":"a","2":"b"}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_file_and_bytes_agree_with_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == sha256_bytes(b"abc") == ABC


def test_every_part_of_the_work_decides_its_digest() -> None:
    work: dict[str, Any] = {"settings": {"seed": 0}, "inputs": {"pretrained": "p"}, "dataset": "d", "version": 1}
    changes: list[dict[str, Any]] = [
        {"settings": {"seed": 1}},
        {"inputs": {"pretrained": "q"}},
        {"inputs": {}},
        {"dataset": None},
        {"version": 2},
    ]
    digests = [stage_digest("finetune", **{**work, **change}) for change in [{}, *changes]]
    assert len({*digests, stage_digest("merge", **work)}) == len(changes) + 2


def test_a_digest_stays_what_it_was() -> None:
    # Artifacts of earlier versions are found by it.
    form = '{"dataset":null,"inputs":{"a":"b"},"settings":{"betas":[0.9,0.999]},"stage":"merge","version":1}'
    digest = stage_digest("merge", settings={"betas": (0.9, 0.999)}, inputs={"a": "b"}, version=1)
    assert digest == sha256_bytes(form.encode())
