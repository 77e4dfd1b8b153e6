"""What is known of a model that a recipe trains from nothing, before anything is trained."""

from deme_core.errors import InputError
from deme_core.families import Adapter, Unconditional, check_conditioned
from deme_core.families.deepfloyd_if import DeepFloydIF
from deme_core.recipe import Recipe
from deme_core.untrained_parts import untrained_scheduler, untrained_unet
from deme_core.untrained_text_model import untrained_text_unet


def untrained_adapter(recipe: Recipe) -> Adapter:
    """Returns the adapter of the model that the recipe pretrains.

    Raises:
        InputError: it cannot be built, or takes text where there is none.
    """
    import diffusers

    source, dataset = recipe.pretrained, recipe.dataset
    channels, size = dataset.num_channels, dataset.side
    fixed = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    family: type[Adapter] = Unconditional
    try:
        if source.text_encoder is None:
            config = untrained_unet("UNet2DModel", source.unet, fixed)
        else:
            config = untrained_text_unet(source.unet, source.text_encoder, (channels, size, size))
            family = DeepFloydIF
        config = {**getattr(diffusers, config["_class_name"]).from_config(config).config, **config}
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"pretrained.unet or text_encoder cannot be built: {error}.") from error
    scheduler = untrained_scheduler(source.noise_scheduler, family)
    adapter = family(denoiser_config=config, scheduler_config=dict(scheduler.config))
    check_conditioned(adapter, captions=dataset.caption_column or dataset.caption_template, labels=dataset.label_column)
    if adapter.conditioned_on == "captions" and recipe.evaluate.prompts is None:
        raise InputError(f"A {adapter.pipeline} makes images from text; set evaluate.prompts.")
    return adapter
