from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deme_core.checkpoint import Checkpoint, TensorInfo, check_same_tensors, save_tensors, tensor_infos, write_tensors
from deme_core.errors import IncompatibleCheckpointsError, ModelFolderError
from tests.tiny_models import same_bits

FLOATS = torch.tensor([0.0, -0.0, 1.5, -3e-5, float("inf"), float("nan")])
TENSORS: dict[str, torch.Tensor] = {
    # Three bytes first, so that nothing behind them is aligned.
    "a.bool": torch.tensor([True, False, True]),
    "b.float64": torch.arange(6, dtype=torch.float64).view(1, 2, 3) / 7,
    "c.float32": FLOATS,
    "d.float16": FLOATS.half(),
    "e.bfloat16": FLOATS.bfloat16(),
    "f.int64": torch.tensor([2**62, -1]),
    "g.int32": torch.tensor([[2**31 - 1], [-(2**31)]], dtype=torch.int32),
    "h.uint8": torch.arange(256).to(torch.uint8),
    "i.scalar": torch.tensor(-2.5),
    "j.counter": torch.tensor(7),
    "k.empty": torch.zeros((0, 3)),
    "l.transposed": torch.arange(6.0).view(2, 3).T,
}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same_bits(actual[name], tensor)] == []


def test_safetensors_reads_every_bit_of_what_was_written(tmp_path: Path) -> None:
    save_tensors(tmp_path / "all.safetensors", TENSORS)
    assert_same(load_file(tmp_path / "all.safetensors"), TENSORS)


def test_the_data_begin_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    for length in range(1, 9):
        save_tensors(tmp_path / "w.safetensors", {"w" * length: torch.ones(1)})
        assert int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("name", TENSORS)
def test_every_kind_of_tensor_is_written_alone_too(tmp_path: Path, name: str) -> None:
    save_tensors(tmp_path / "one.safetensors", {name: TENSORS[name]})
    assert_same(load_file(tmp_path / "one.safetensors"), {name: TENSORS[name]})


def test_no_tensors_make_a_file_without_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_checkpoint_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors")
    checkpoint = Checkpoint(tmp_path / "theirs.safetensors")
    assert_same(checkpoint.tensors(), TENSORS)
    assert checkpoint.infos == tensor_infos(TENSORS)
    assert list(checkpoint) == sorted(TENSORS)
    assert "c.float32" in checkpoint
    assert "nothing" not in checkpoint


def test_parameters_are_written_without_their_graph(tmp_path: Path) -> None:
    weight = torch.randn(3, 2, requires_grad=True)
    save_tensors(tmp_path / "w.safetensors", {"weight": weight})
    assert_same(load_file(tmp_path / "w.safetensors"), {"weight": weight.detach()})


def test_values_are_cast_to_the_announced_dtype(tmp_path: Path) -> None:
    values = torch.randn(5)
    announced = {"weight": TensorInfo((5,), torch.bfloat16)}
    write_tensors(tmp_path / "cast.safetensors", announced, iter([("weight", values)]))
    assert_same(load_file(tmp_path / "cast.safetensors"), {"weight": values.bfloat16()})


def test_a_tensor_written_to_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"weight": torch.ones(3)})
    Checkpoint(tmp_path / "w.safetensors")["weight"].zero_()
    assert_same(load_file(tmp_path / "w.safetensors"), {"weight": torch.ones(3)})


def fails_halfway() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.ones(3)
    raise RuntimeError("the disk of an expert is gone")


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (fails_halfway, RuntimeError),
        (lambda: iter([("a", torch.ones(3))]), ValueError),
        (lambda: iter([(name, torch.ones(3)) for name in "abc"]), ValueError),
        (lambda: iter([("b", torch.ones(3)), ("a", torch.ones(3))]), AssertionError),
        (lambda: iter([("a", torch.ones(3)), ("b", torch.ones(4))]), AssertionError),
    ],
    ids=["fails halfway", "too few", "too many", "wrong order", "wrong shape"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path: Path, tensors, error, existing: bool) -> None:
    path = tmp_path / "model.safetensors"
    if existing:
        save_tensors(path, {"old": torch.zeros(2)})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    with pytest.raises(error):
        write_tensors(path, {"a": TensorInfo((3,), torch.float32), "b": TensorInfo((3,), torch.float32)}, tensors())

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    save_tensors(tmp_path / "whole.safetensors", TENSORS)
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:kept])
    with pytest.raises(ModelFolderError, match=r"cut\.safetensors is not a whole safetensors file .* fetch it again"):
        Checkpoint(path)


def test_a_file_of_another_kind_and_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<html>404 Not Found</html>")
    with pytest.raises(ModelFolderError, match=r"page\.safetensors is not a whole safetensors file"):
        Checkpoint(tmp_path / "page.safetensors")
    with pytest.raises(ModelFolderError, match=r"absent\.safetensors is not a whole safetensors file"):
        Checkpoint(tmp_path / "absent.safetensors")


def test_a_tensor_of_a_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    for read in (lambda checkpoint: checkpoint["a"], Checkpoint.tensors, lambda checkpoint: checkpoint.infos):
        with pytest.raises(ModelFolderError, match="Tensor a is of type F6_E2M3, which DeMe"):
            read(Checkpoint(path))


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    save_tensors(tmp_path / "1.safetensors", {"b": torch.ones(1)})
    save_tensors(tmp_path / "2.safetensors", {"a": torch.zeros(2)})
    checkpoint = Checkpoint(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert_same(checkpoint.tensors(), {"a": torch.zeros(2), "b": torch.ones(1)})


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    save_tensors(tmp_path / "1.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    save_tensors(tmp_path / "2.safetensors", {"b": torch.ones(1)})
    with pytest.raises(ModelFolderError, match=r"2\.safetensors repeats tensors of another file: b\."):
        Checkpoint(tmp_path / "1.safetensors", tmp_path / "2.safetensors")


def test_the_size_of_a_tensor_follows_from_its_info() -> None:
    for tensor in TENSORS.values():
        assert TensorInfo(tuple(tensor.shape), tensor.dtype).num_bytes == tensor.numel() * tensor.element_size()


def test_every_difference_is_listed() -> None:
    expected = {name: TensorInfo((2, 3), torch.float32) for name in ("same", "shape", "gone 2", "gone 1")}
    actual = {
        "same": TensorInfo((2, 3), torch.bfloat16),
        "shape": TensorInfo((3, 2), torch.float32),
        "new": TensorInfo((1,), torch.float32),
    }
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        check_same_tensors("expert 2", actual, expected, reference="the pretrained model")
    assert str(caught.value) == (
        "expert 2 does not hold the tensors of the pretrained model; missing tensors: gone 1, gone 2; "
        "extra tensors: new; mis-shaped tensors: shape (3, 2) for (2, 3)."
    )
    assert caught.value.missing == ("gone 1", "gone 2")
    assert caught.value.extra == ("new",)
    assert caught.value.mismatched == ("shape (3, 2) for (2, 3)",)


def test_a_message_names_the_first_three_differences_of_a_kind_and_counts_the_others() -> None:
    expected = {f"layer {number}": TensorInfo((2, 3), torch.float32) for number in range(600)}
    actual = {name: TensorInfo((4, 3), torch.float32) for name in list(expected)[:500]}
    actual |= {f"new {number}": TensorInfo((1,), torch.float32) for number in range(3)}
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        check_same_tensors("expert 2", actual, expected, reference="the pretrained model")
    assert str(caught.value) == (
        "expert 2 does not hold the tensors of the pretrained model; "
        "missing tensors: layer 500, layer 501, layer 502, and 97 more; extra tensors: new 0, new 1, new 2; "
        "mis-shaped tensors: layer 0 (4, 3) for (2, 3), layer 1 (4, 3) for (2, 3), layer 10 (4, 3) for (2, 3), "
        "and 497 more."
    )
    found = caught.value
    assert (len(found.missing), len(found.extra), len(found.mismatched)) == (100, 3, 500)


def test_equal_names_and_shapes_are_no_difference() -> None:
    check_same_tensors("expert", tensor_infos(TENSORS), tensor_infos(TENSORS), reference="the pretrained model")


def test_a_tensor_under_two_names_of_which_one_is_the_others_old_name_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"query": torch.zeros(1), "to_q": torch.ones(1)})
    with pytest.raises(ModelFolderError, match="by its old name and by today's"):
        Checkpoint(tmp_path / "w.safetensors", rename=lambda name: name.replace("query", "to_q"))
