"""From a row to the tensors of a target: reading data sets, checking messages, decoding videos, and processing."""

from .datasets import Rows, StreamedRows, load_rows
from .images import read_image
from .messages import clean_messages, fingerprint, split_answer, text_of
from .prepare import append_answer, kind_of, prepare_conversation, prepare_inputs, prepare_prompt, to_target
from .video import read_video

__all__ = [
    "Rows",
    "StreamedRows",
    "append_answer",
    "clean_messages",
    "fingerprint",
    "kind_of",
    "load_rows",
    "prepare_conversation",
    "prepare_inputs",
    "prepare_prompt",
    "read_image",
    "read_video",
    "split_answer",
    "text_of",
    "to_target",
]
