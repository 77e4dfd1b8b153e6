"""Denoiser and noise schedule of a model that is to be trained here, from what a recipe says of them."""

import inspect
from collections.abc import Mapping
from typing import Any

from deme_core.errors import InputError
from deme_core.families import Adapter
from deme_core.recipe_file import what_was_meant


def untrained_unet(class_name: str, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a denoiser.

    Args:
        class_name: its class in diffusers.
        settings: ``pretrained.unet`` of a recipe.
        fixed: what the data decide.

    Raises:
        InputError: the class has no such setting, which diffusers would leave out in silence, or the data decide it.
    """
    import diffusers

    known = sorted(inspect.signature(getattr(diffusers, class_name)).parameters)
    for name, value in settings.items():
        if name not in known:
            raise InputError(f"pretrained.unet: a {class_name} has no {name} ({what_was_meant(name, known)}).")
        if name in fixed and value != fixed[name]:
            raise InputError(f"pretrained.unet.{name} follows from the data, which give {fixed[name]}; leave it out.")
    return {"_class_name": class_name, **settings, **fixed}


def untrained_scheduler(settings: Mapping[str, Any], family: type[Adapter]) -> Any:
    """Returns the DDPMScheduler that ``pretrained.noise_scheduler`` of a recipe describes.

    Raises:
        InputError: there is none, or none that models of the family are sampled with.
    """
    from diffusers import DDPMScheduler

    _check_scheduler(settings, family)  # Before it is built, which of too many timesteps takes all memory.
    try:
        scheduler = DDPMScheduler(**settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"pretrained.noise_scheduler cannot be built: {' '.join(str(error).split())}.") from error
    _check_scheduler(scheduler.config, family)
    return scheduler


def _check_scheduler(config: Mapping[str, Any], family: type[Adapter]) -> None:
    if problem := family.unsupported({}, config):
        raise InputError(f"pretrained.noise_scheduler has {problem}; change it.")
