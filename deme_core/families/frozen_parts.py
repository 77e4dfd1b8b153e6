"""What the families with frozen models have in common: how they are loaded, rest, and turn captions into tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from deme_core.errors import ModelFolderError, first_line
from deme_core.families.adapter import Adapter
from deme_core.model_json import INDEX_NAME, check_part, read_json, variant_of
from deme_core.needed_files import needed_files

_TEXT = "_text_pipeline"
# An index may name any module, and whoever imports a module runs it.
_LIBRARIES = ("diffusers", "transformers")


class FrozenPartsAdapter(Adapter):
    """An adapter of a pipeline with text encoders, an autoencoder, or both.

    Attributes:
        parts_left_out: parts of the pipeline that no prompt goes through.
    """

    parts_left_out: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def classes(cls, index: Mapping[str, Any], path: Path) -> dict[str, list[Any]]:
        """Returns library and class of each part that is loaded, both None for one that the pipeline does without.

        Args:
            index: what the index of a pipeline holds.
            path: what messages call it.

        Raises:
            ModelFolderError: a part is no class of diffusers or transformers.
        """
        unused = set(cls.parts_left_out) - set(cls.frozen_parts)
        named = {name: part for name, part in index.items() if isinstance(part, list) and not name.startswith("_")}
        parts = {name: part for name, part in named.items() if name not in unused}
        for name, part in parts.items():
            if part != [None, None] and not _is_class(part):
                libraries = " and ".join(_LIBRARIES)
                raise ModelFolderError(f"{path} says that {name!r} is {part}; only classes of {libraries} are loaded.")
        return parts

    @property
    def text_pipeline(self) -> Any:
        """The stock pipeline without denoiser and autoencoder: its tokenizers and text encoders, ready to work."""
        for encoder in self._text_encoders():
            encoder.to(self.device)
        return self._text_pipeline

    @cached_property
    def _text_pipeline(self) -> Any:
        import diffusers

        index = self._index
        for name in index:
            check_part(self.frozen / name)
        absent = [name for name, (library, _) in index.items() if library is None]
        parts: dict[str, Any] = dict.fromkeys((*self.parts_left_out, *absent))
        parts[self.denoiser_part] = self.denoiser_of_text_pipeline()
        if "safety_checker" in self.parts_left_out:  # Else it is said that somebody disabled it.
            parts["requires_safety_checker"] = False
        parts |= {name: self._load(name) for name in index if name.startswith("text_encoder") and name not in absent}
        with _loading(self.frozen):
            pipeline = getattr(diffusers, self.pipeline).from_pretrained(
                self.frozen, local_files_only=True, use_safetensors=True, **parts
            )
        for name, part in pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                _check_vocabulary(self.frozen / name, part)
        return pipeline

    def encode_by_pipeline(self, *texts: list[str] | None, **settings: Any) -> Any:
        """Returns what the ``encode_prompt`` of the stock pipeline does.

        Raises:
            ModelFolderError: tokenizers and text encoders are damaged, or do not fit together.
        """
        pipeline = self.text_pipeline
        try:
            return pipeline.encode_prompt(*texts, device=self.device, **settings)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ModelFolderError(
                f"The tokenizers and text encoders of {self.frozen} encode no prompt ({first_line(error)})."
            ) from error

    def denoiser_of_text_pipeline(self) -> Any:
        """Returns what stands for the denoiser while prompts are encoded."""
        return None

    @property
    def _index(self) -> dict[str, list[Any]]:
        return self.classes(read_json(self.frozen / INDEX_NAME), self.frozen / INDEX_NAME)

    def _load(self, part: str) -> Any:
        """Loads a frozen model, float32.

        Raises:
            ModelFolderError: its library has no such class of models, it is damaged, or it does not hold all tensors
                of its class, which stock loaders start at random.
        """
        library, class_name = self._index[part]
        model_class: Any = getattr(import_module(library), class_name, None)
        is_model = isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)
        if not is_model:
            raise ModelFolderError(
                f"{self.frozen / INDEX_NAME} says that {part} is a {class_name}, which is no model of {library} here; "
                f"install another version of {library}."
            )
        check_part(self.frozen / part)
        with _loading(self.frozen / part):
            variants = map(variant_of, needed_files(file.name for file in (self.frozen / part).iterdir()))
            model, info = model_class.from_pretrained(
                self.frozen / part,
                torch_dtype=torch.float32,
                local_files_only=True,
                variant=next(filter(None, variants), None),
                use_safetensors=True,  # What was pickled became safetensors when the model was imported.
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelFolderError(f"{self.frozen / part} misses the tensors {', '.join(missing)}; fetch it again.")
        return model.eval().requires_grad_(False).to(self.device)

    def _text_encoders(self) -> list[Any]:
        parts = self._text_pipeline.components
        return [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]

    def rest(self) -> None:
        """Moves the text encoders, if they are loaded, to main memory until they are needed again."""
        for encoder in self._text_encoders() if _TEXT in vars(self) else []:
            encoder.to("cpu")


def _is_class(part: list[Any]) -> bool:
    return len(part) == 2 and part[0] in _LIBRARIES and isinstance(part[1], str) and part[1].isidentifier()


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    # transformers makes a tokenizer that knows no word of a folder without any.
    files = getattr(tokenizer, "vocab_files_names", {}).values()
    if not any((folder / file).is_file() for file in files):
        raise ModelFolderError(f"{folder} holds no vocabulary; fetch it again.")


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Turns what diffusers and transformers say of a part that they cannot load, in errors of any kind, into ours."""
    try:
        with _no_progress_bars():
            yield
    except MemoryError:
        raise
    except ImportError as error:  # Of a library that this part needs, which says so.
        raise ModelFolderError(f"{path} cannot be loaded: {first_line(error).rstrip('.')}.") from error
    except Exception as error:
        raise ModelFolderError(f"{path} cannot be loaded ({first_line(error)}); fetch it again.") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps the libraries from drawing bars of their own for parts that load within seconds."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    drawing = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in drawing:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in drawing:
            log.enable_progress_bar()
