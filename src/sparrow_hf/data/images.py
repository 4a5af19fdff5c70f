"""Reading image files, with Pillow."""

from os import PathLike
from typing import Any

from transformers.image_utils import load_image

from ..errors import ImageError
from ..extras import require
from .files import find_file


def read_image(source: Any) -> Any:
    """An RGB PIL image from a path, a URL, a file's bytes or a PIL image; arrays and tensors are handed on.

    Raises:
        ImageError: The image is missing or cannot be read.
        MissingDependencyError: Pillow is not installed.
    """
    require("video", "Reading images", "PIL")
    from PIL import Image

    if isinstance(source, Image.Image):
        return load_image(source)
    if not isinstance(source, (str, PathLike, bytes)):
        return source
    name, file = find_file(source, "image", ImageError)
    try:
        return load_image(Image.open(file))
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{name} cannot be read as an image ({type(error).__name__}: {error}). Open it in an image viewer, or "
            "save it again as png."
        ) from error
