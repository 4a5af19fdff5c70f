"""A tiny, randomly initialised target of one architecture, and real inputs for it.

Inputs come out of the family's own processor (patches, grids, frame headers, token types), so tests pass to
`generate()` what users pass. The architectures themselves are listed in `families.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.video_utils import VideoMetadata

from tiny_tokenizer import END_OF_TURN, VOCAB_SIZE, build_tokenizer

HIDDEN_SIZE = 32
#: Sizes of every text decoder. Fewer KV heads than heads, as in the real models.
TEXT_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

#: Frames and images are squares of this side: 4 × 4 patches, 2 × 2 placeholders after merging or pooling.
FRAME_SIZE, PATCH_SIZE = 32, 8
FRAMES_PER_SECOND = 2.0


@dataclass(frozen=True)
class Family:
    """One architecture: builds a tiny target of it, and inputs for that target.

    Args:
        name: `model_type` of the architecture.
        model_class: The generating model.
        config: Makes the configuration, given the fields of the text decoder and the ids of `named_tokens`.
        processor: Makes the processor around a tokenizer.
        named_tokens: Special tokens under the attribute names the processor looks for.
        placeholder_tokens: Those of `named_tokens` that visual features replace.
        video_prompt, image_prompt: Placeholder of a video or an image in a prompt; the processor expands it.
        mixes_modalities: The processor takes images and videos in one call.
        max_videos: How many videos the processor takes in a prompt.
        reads_videos: The processor takes videos. Otherwise the frames of one are images.
        takes_chunks: Plain `generate()` can read its prompt in chunks.
        counts_padding: A padded prompt is refused with a draft.
        videos_kwargs: What the processor must be told about a video beside its frames.
        attentions: Attention implementations that the model class admits.
        refused: What a draft of this family is refused with; `None` if it is accepted.
        chains_only: Why trees are narrowed to chains; `None` if they are not.
    """

    name: str
    model_class: type[hf.PreTrainedModel]
    config: Callable[[dict[str, Any], dict[str, int]], hf.PreTrainedConfig]
    processor: Callable[[hf.PreTrainedTokenizerFast], hf.ProcessorMixin]
    named_tokens: dict[str, str]
    placeholder_tokens: tuple[str, ...]
    video_prompt: str
    image_prompt: str
    mixes_modalities: bool = True
    max_videos: int = 2
    reads_videos: bool = True
    takes_chunks: bool = True
    counts_padding: bool = False
    videos_kwargs: dict[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ("sdpa", "eager")
    refused: str | None = None
    chains_only: str | None = None

    def takes(self, prompt: str) -> bool:
        """Whether a prompt may be given in a way of `lossless.PROMPTS`."""
        return {"chunked": self.takes_chunks, "padded": not self.counts_padding}.get(prompt, True)

    @cached_property
    def tokenizer(self) -> hf.PreTrainedTokenizerFast:
        """The tokenizer of this family's targets, for streamers and stop strings."""
        return build_tokenizer(self.named_tokens)

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Ids of `named_tokens`."""
        return {name: self.tokenizer.convert_tokens_to_ids(token) for name, token in self.named_tokens.items()}

    @property
    def visual_token_ids(self) -> list[int]:
        """Ids of the visual placeholders."""
        return [self.token_ids[name] for name in self.placeholder_tokens]

    @cached_property
    def _processor(self) -> hf.ProcessorMixin:
        return self.processor(self.tokenizer)

    def build_target(
        self, attn_implementation: str | None = None, seed: int = 1, **text_overrides: Any
    ) -> hf.PreTrainedModel:
        """A random fp32 target on CPU, in eval mode; a seed gives the same weights whatever the attention.

        Args:
            text_overrides: Fields of the text decoder that differ from `TEXT_SIZES`.
        """
        special = {name: getattr(self.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = self.config(TEXT_SIZES | special | text_overrides, self.token_ids)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            target = self.model_class._from_config(
                config, attn_implementation=attn_implementation or self.attentions[0], dtype=torch.float32
            )
            eos_token_ids = [special["eos_token_id"], self.tokenizer.convert_tokens_to_ids(END_OF_TURN)]
            randomize(target, eos_token_ids)
        target.generation_config = hf.GenerationConfig(**(special | {"eos_token_id": eos_token_ids}))
        return target.eval()

    def build_inputs(
        self,
        target: hf.PreTrainedModel,
        *,
        videos: int = 1,
        images: int = 0,
        num_frames: int = 4,
        seed: int = 0,
        question: str = "What moves here?",
    ) -> dict[str, Tensor]:
        """Keyword arguments for `target.generate()`, on its device and in its dtype.

        Args:
            videos, images: How many of each the prompt holds; none of both is a text-only prompt.
            num_frames: Frames of each video.
            seed: Of the pixels. The prompt's ids do not depend on it.
        """
        if not self.reads_videos:
            videos, images = 0, images + videos * num_frames
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randint(256, (*shape, 3, FRAME_SIZE, FRAME_SIZE), generator=generator, dtype=torch.uint8)

        visual: dict[str, Any] = {}
        if videos:
            visual["videos"] = [noise(num_frames) for _ in range(videos)]
            visual["video_metadata"] = [_metadata(num_frames) for _ in range(videos)]
            visual["do_sample_frames"] = False
            visual |= self.videos_kwargs
        if images:
            visual["images"] = [noise() for _ in range(images)]
        text = f"User: {self.video_prompt * videos}{self.image_prompt * images}{question}\nAssistant:"
        inputs = self._processor(text=text, return_tensors="pt", **visual)
        inputs.pop("video_metadata", None)
        return dict(inputs.to(target.device, target.dtype))


def _metadata(num_frames: int) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=num_frames,
        fps=FRAMES_PER_SECOND,
        width=FRAME_SIZE,
        height=FRAME_SIZE,
        duration=num_frames / FRAMES_PER_SECOND,
        frames_indices=list(range(num_frames)),
    )


@torch.no_grad()
def randomize(target: hf.PreTrainedModel, eos_token_ids: list[int]) -> None:
    """Widens the usual initialisation, with which every prompt would be answered by one repeated token.

    Matrices map unit variance to about twice unit variance, norms and biases get some spread. Logits then have a
    standard deviation above one: greedy text varies, and the two best tokens are far apart compared with rounding.
    The end of the text is made unlikely: where a text stops is for each test to say.
    """
    embedding = target.get_input_embeddings().weight
    tied = target.get_output_embeddings().weight is embedding
    for name, parameter in target.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        elif parameter is embedding and not tied:
            parameter.copy_(noise)
        else:
            # The weights of several experts are one tensor: experts × (out × in).
            matrix = parameter[0] if "expert" in name and parameter.ndim == 3 else parameter
            parameter.copy_(1.5 / math.sqrt(matrix[0].numel()) * noise)
    target.get_output_embeddings().weight[eos_token_ids] *= 0.5
