"""The second style of captions: told in the world's own words, true to the story, told apart from the first."""

import numpy as np

from sparrow_hf.testbed.captions import STYLES, content, write_caption
from sparrow_hf.testbed.nano import build_tokenizer
from sparrow_hf.testbed.scenes import sample_story
from sparrow_research.adaptation import write_telegram


def test_the_second_style_tells_the_same_story_in_known_words():
    tokenizer = build_tokenizer()
    for seed in range(20):
        story = sample_story(np.random.default_rng(seed))
        caption = write_telegram(np.random.default_rng(seed), story, STYLES[0])
        ids = tokenizer(caption)["input_ids"]
        assert len(ids) == len(caption.split())
        assert tokenizer.unk_token_id not in ids
        told = content(caption)
        for sentence, scene in enumerate(reversed(story)):
            facts = {"colour": scene.glyph.colour, "shape": scene.glyph.shape, "size": scene.glyph.size}
            facts |= {"motion": scene.motion, "background": scene.background}
            assert {slot: told[sentence, slot, 0] for slot in facts} == facts
        assert caption != write_caption(np.random.default_rng(seed), story, STYLES[0])
