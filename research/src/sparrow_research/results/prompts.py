"""Prompts that show less than a clip: single pictures, and questions with nothing to see.

The targets learned from clips alone. To a picture they answer what they would to a very short clip, and without
anything to see they make a story up: enough to see a draft at work, not to judge the answers.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from sparrow_hf.data.prepare import prepare_prompt
from sparrow_hf.evaluation.benchmark import Prompt
from sparrow_hf.testbed.captions import PROMPTS
from sparrow_hf.testbed.scenes import BLANK
from sparrow_hf.testbed.world import EVALUATION_SEEDS, render, write_script


def picture_prompts(processor: ProcessorMixin, number: int) -> list[Prompt]:
    """The first frames of unseen clips as still pictures, each with its clip's question."""
    return [
        Prompt(f"picture {seed}", None, partial(picture_inputs, processor, seed)) for seed in EVALUATION_SEEDS[:number]
    ]


def picture_inputs(processor: ProcessorMixin, seed: int) -> BatchFeature:
    """The processed prompt of one picture."""
    script = write_script(seed, visual_tokens=0)
    scene = next(step for step in script.timeline if step.scene != BLANK)
    frame = render(script.story, [scene], np.random.default_rng([seed, 1]))[0]
    parts = [{"type": "image", "image": frame}, {"type": "text", "text": script.prompt}]
    return prepare_prompt(processor, {"messages": [{"role": "user", "content": parts}]})


def text_prompts(processor: ProcessorMixin, number: int) -> list[Prompt]:
    """Questions about a video that is not there, at most as many as the world has."""
    questions = [question for questions in PROMPTS.values() for question in questions][:number]
    rows = ({"messages": [{"role": "user", "content": question}]} for question in questions)
    return [
        Prompt(question, None, partial(prepare_prompt, processor, row))
        for question, row in zip(questions, rows, strict=True)
    ]
