"""Libraries that only parts of the package need, and the extras of the package that bring them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["MissingExtraError", "extra", "require"]

_HF = ("safetensors", "transformers")
_VISION = ("safetensors", "torchvision")
_PLOT = ("matplotlib",)
_LIBRARIES = {
    "hf": _HF,
    "vision": _VISION,
    "plot": _PLOT,
    "recipes": (*_HF, *_VISION, *_PLOT, "sklearn"),
}
"""What is imported of each extra, by the names that Python imports; DeepSpeed itself requires tqdm."""


class MissingExtraError(ModuleNotFoundError):
    """A library is not installed that one of the package's extras brings."""


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Put imports of libraries that the extra `name` brings into this block.

    Args:
        name: such as "plot".
        what: what needs the library, as the subject of the message.

    Raises:
        MissingExtraError: the library is not installed; one line that says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _LIBRARIES[name]:
            raise  # the library is there, and itself lacks something
        raise _missing(name, what, library) from None


def require(name: str, what: str) -> None:
    """Find all libraries of the extra `name`, before something is begun that would fail without them.

    Args:
        name: such as "plot".
        what: what needs them, as the subject of the message.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    for library in _LIBRARIES[name]:
        if sys.modules.get(library) is None and find_spec(library) is None:
            raise _missing(name, what, library)


def _missing(name: str, what: str, library: str) -> MissingExtraError:
    return MissingExtraError(f'{what} needs {library}: pip install "ds_ddg[{name}]"', name=library)
