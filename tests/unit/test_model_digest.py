import torch

from deme_core.model_digest import model_digest, tensors_digest
from tests.tiny_models import tiny_unet


def test_the_digest_is_of_names_dtypes_shapes_and_bits() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    others = [
        base | {"a": torch.arange(6.0).view(torch.int32)},
        base | {"a": torch.arange(6.0).view(2, 3)},
        base | {"a": torch.arange(6.0).half()},
        base | {"a": torch.tensor([-0.0, 1, 2, 3, 4, 5])},
        base | {"b": torch.tensor([1.0])},
        base | {"c": torch.zeros(0)},
        {"a": base["b"], "b": base["a"]},
        {},
    ]
    digests = [tensors_digest(tensors) for tensors in (base, *others)]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_not_of_order_strides_or_gradients() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    digest = tensors_digest({"a": matrix, "b": torch.ones(1).bfloat16()})
    assert tensors_digest({"b": torch.ones(1).bfloat16(), "a": matrix}) == digest
    assert tensors_digest({"a": matrix.T.contiguous().T, "b": torch.ones(1).bfloat16()}) == digest
    assert tensors_digest({"a": matrix.clone().requires_grad_(), "b": torch.ones(1).bfloat16()}) == digest


def test_one_changed_number_changes_the_digest_of_a_model() -> None:
    model = tiny_unet()
    digest = model_digest(model)
    assert model_digest(tiny_unet()) == digest
    with torch.no_grad():
        model.conv_out.bias += 1e-6
    assert model_digest(model) != digest
