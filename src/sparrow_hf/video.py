"""Videos, images and chat messages as model inputs; the code is in [`sparrow_hf.data`]."""

from .data.files import DOWNLOAD_TIMEOUT, is_url
from .data.images import read_image
from .data.messages import media_source
from .data.prepare import DEFAULT_FRAMES_PER_SECOND, prepare_inputs
from .data.video import read_video

__all__ = [
    "DEFAULT_FRAMES_PER_SECOND",
    "DOWNLOAD_TIMEOUT",
    "is_url",
    "media_source",
    "prepare_inputs",
    "read_image",
    "read_video",
]
