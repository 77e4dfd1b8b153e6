import pytest
import torch
from torch import nn

from deme_core.typed_norms import normalize_in_type


class OwnNorm(nn.LayerNorm):
    """Asks for float32 on purpose, as some of diffusers' do."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.float())


def norms(*, affine: bool) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList([nn.GroupNorm(2, 4, affine=affine), nn.LayerNorm(8, elementwise_affine=affine)])
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("affine", [True, False])
def test_norms_keep_the_type_of_their_input_and_nearly_its_values(affine: bool) -> None:
    plain, typed = norms(affine=affine), norms(affine=affine)
    normalize_in_type(typed)
    features = torch.randn(3, 4, 8)
    assert typed.state_dict().keys() == plain.state_dict().keys()
    for before, after in zip(plain, typed, strict=True):
        assert torch.equal(after(features), before(features))
        halved = features.bfloat16()
        assert after(halved).dtype == torch.bfloat16
        torch.testing.assert_close(after(halved).float(), before(halved.float()), atol=0.03, rtol=0.03)


def test_gradients_reach_the_float32_parameters() -> None:
    typed = norms(affine=True)
    normalize_in_type(typed)
    sum(norm(torch.randn(3, 4, 8).bfloat16()).float().sum() for norm in typed).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in typed.parameters())


def test_a_norm_that_asks_for_float32_is_left_alone() -> None:
    model = nn.Sequential(OwnNorm(8))
    normalize_in_type(model)
    assert model(torch.randn(2, 8).bfloat16()).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_autocast_on_a_gpu_does_not_turn_them_to_float32() -> None:
    plain, typed = norms(affine=True).cuda(), norms(affine=True).cuda()
    normalize_in_type(typed)
    features = torch.randn(3, 4, 8, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert [norm(features).dtype for norm in plain] == [torch.float32] * 2
        assert [norm(features).dtype for norm in typed] == [torch.bfloat16] * 2
