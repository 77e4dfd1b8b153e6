import pytest
import torch

from deme_core.errors import InputError
from deme_core.noise_process import FlowMatching
from deme_core.objectives import consistency_loss, diffusion_loss, min_snr_weights, training_target
from tests.tiny_models import tiny_scheduler

TIMESTEPS = torch.tensor([0, 10, 500, 999])


def draw(seed: int) -> torch.Tensor:
    return torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_target_follows_the_prediction_type(prediction_type: str) -> None:
    clean_images, noise = draw(0), draw(1)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[TIMESTEPS]
    signal, sigma = (root.view(4, 1, 1, 1) for root in (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()))
    expected = {
        "epsilon": noise.double(),
        "sample": clean_images.double(),
        "v_prediction": signal * noise - sigma * clean_images,
    }[prediction_type]

    target = training_target(tiny_scheduler(prediction_type=prediction_type), clean_images, noise, TIMESTEPS)

    torch.testing.assert_close(target.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_scheduler_recovers_the_clean_images_from_the_target(prediction_type: str) -> None:
    scheduler = tiny_scheduler(prediction_type=prediction_type, clip_sample=False)
    clean_images, noise = draw(0), draw(1)
    target = training_target(scheduler, clean_images, noise, TIMESTEPS)
    noisy_images = scheduler.add_noise(clean_images, noise, TIMESTEPS)

    for index, timestep in enumerate(TIMESTEPS.tolist()):
        one = slice(index, index + 1)
        recovered = scheduler.step(target[one], timestep, noisy_images[one]).pred_original_sample
        torch.testing.assert_close(recovered, clean_images[one], atol=2e-3, rtol=1e-3)


def test_an_unknown_prediction_type_is_refused() -> None:
    scheduler = tiny_scheduler(prediction_type="flow")
    with pytest.raises(InputError, match="prediction_type 'flow' is not one of epsilon, sample, v_prediction"):
        training_target(scheduler, draw(0), draw(1), TIMESTEPS)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_both_losses_equal_the_one_target_form(weight: float) -> None:
    target, pretrained_prediction = draw(1).double(), draw(2).double()
    two, one = (draw(0).double().requires_grad_() for _ in range(2))

    both = diffusion_loss(two, target) + weight * consistency_loss(two, pretrained_prediction)
    blend = (target + weight * pretrained_prediction) / (1 + weight)
    constant = weight / (1 + weight) * ((target - pretrained_prediction) ** 2).mean()
    single = (1 + weight) * ((one - blend) ** 2).mean() + constant

    torch.testing.assert_close(both.double(), single, atol=1e-5, rtol=1e-5)
    both.backward()
    single.backward()
    torch.testing.assert_close(two.grad, one.grad, atol=1e-7, rtol=1e-5)


def test_the_consistency_loss_does_not_train_the_pretrained_model() -> None:
    prediction, pretrained_prediction = draw(0).requires_grad_(), draw(1).requires_grad_()
    consistency_loss(prediction, pretrained_prediction).backward()
    assert prediction.grad is not None
    assert pretrained_prediction.grad is None


@pytest.mark.parametrize("loss", [diffusion_loss, consistency_loss])
def test_losses_are_computed_in_float32(loss) -> None:
    prediction, other = draw(0).bfloat16(), draw(1).bfloat16()
    expected = ((prediction.double() - other.double()) ** 2).mean()
    value = loss(prediction, other)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_an_error_of_the_clean_image_by_the_snr_up_to_gamma(prediction_type: str) -> None:
    """Whatever is predicted: an error of it is turned into the error of x_0 that it makes."""
    scheduler = tiny_scheduler(prediction_type=prediction_type, clip_sample=False)
    clean_images, noise, error = draw(0).double(), draw(1).double(), 0.01 * draw(2).double()
    target = training_target(scheduler, clean_images, noise, TIMESTEPS)
    noisy = scheduler.add_noise(clean_images, noise, TIMESTEPS)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[TIMESTEPS]
    for index, (timestep, snr) in enumerate(zip(TIMESTEPS.tolist(), (alphas / (1 - alphas)).tolist(), strict=True)):
        one = slice(index, index + 1)
        of_images = (
            scheduler.step(target[one] + error[one], timestep, noisy[one]).pred_original_sample
            - scheduler.step(target[one], timestep, noisy[one]).pred_original_sample
        )
        weighted = diffusion_loss(
            target[one] + error[one], target[one], min_snr_weights(scheduler, TIMESTEPS[one], gamma=5.0)
        )
        assert weighted.item() == pytest.approx(min(snr, 5.0) * of_images.square().mean().item(), rel=2e-3)


def test_noise_without_any_signal_weighs_as_its_limit() -> None:
    timesteps, weights = torch.tensor([999]), {}
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = tiny_scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        scheduler.alphas_cumprod[-1] = 0.0  # diffusers leaves 2^-24 there.
        weights[prediction_type] = min_snr_weights(scheduler, timesteps, gamma=5.0).item()
    assert weights == {"epsilon": 1, "sample": 0, "v_prediction": 0}


def test_an_unweighted_loss_is_that_of_weights_of_one() -> None:
    torch.testing.assert_close(diffusion_loss(draw(0), draw(1), torch.ones(4)), diffusion_loss(draw(0), draw(1)))


def test_flow_matching_has_no_min_snr() -> None:
    with pytest.raises(InputError, match="not of flow matching"):
        FlowMatching(1000).min_snr_weights(TIMESTEPS, 5.0)
