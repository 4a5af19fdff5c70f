"""Videos and images that are given as arrays, as libraries and data sets make them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rows import ask

from sparrow_hf.data import prepare_inputs
from sparrow_hf.errors import MessagesError
from sparrow_hf.testbed.nano import build_processor


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def turns(*parts: Any) -> list[dict[str, Any]]:
    return ask(*parts)["messages"][:1]


def test_floats_that_are_scaled_are_refused(processor: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    forms = {"image": [pixels[0], torch.from_numpy(pixels[0]), pixels[0].tolist()], "video": [pixels, [*pixels]]}
    for kind, sources in forms.items():
        for source in sources:
            assert prepare_inputs(processor, turns({"type": kind, kind: source}))
    for kind, sources in {"image": [pixels[0] / 255, (pixels[0] / 255).tolist()], "video": [pixels / 255]}.items():
        for source in sources:
            told = (
                rf"an? {kind} given as floats must have values from 0 to 255, found none above 1: multiply it by 255"
            )
            with pytest.raises(MessagesError, match=told):
                prepare_inputs(processor, turns({"type": kind, kind: source}))
    # Black either way.
    assert prepare_inputs(processor, turns({"type": "image", "image": np.zeros((32, 32, 3))}))


@pytest.mark.parametrize("size", [{}, {"resized_height": 32, "resized_width": 32}], ids=("as it is", "resized"))
def test_arrays_of_other_channels_are_what_pillow_makes_of_them(processor: Any, size: dict[str, int]) -> None:
    def read(image: Any) -> Any:
        return prepare_inputs(processor, turns({"type": "image", "image": image} | size))["pixel_values"]

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    opaque = read(Image.fromarray(pixels[:, :, :3]))
    for array in (pixels, pixels.transpose(2, 0, 1)):
        assert torch.equal(read(array), opaque)
    grey = read(Image.fromarray(pixels[:, :, 0]))
    for array in (pixels[:, :, 0], pixels[:, :, :1], pixels[None, :, :, 0]):
        assert torch.equal(read(array), grey)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"max_frames": 2.5}, "the given 'max_frames' must be a positive number, and a whole one, found 2.5"),
        ({"max_frames": "4"}, "'max_frames' must be .*, found '4'"),
        ({"fps": 0}, "the given 'fps' must be a positive number, found 0"),
    ],
)
def test_sampling_that_is_none_is_refused(processor: Any, sampling: dict[str, Any], told: str) -> None:
    with pytest.raises(MessagesError, match=told):
        prepare_inputs(processor, turns({"type": "text", "text": "what ?"}), **sampling)
