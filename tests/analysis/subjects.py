"""A tiny target of one family with an answered prompt."""

from transformers import PreTrainedModel

from sparrow_hf.analysis.answered import AnsweredPrompt, ProcessedPrompt, answer, find_text
from sparrow_hf.targets import TargetView

from tiny_targets import Family

QUESTION = "What moves here?"
MAX_NEW_TOKENS = 12


def ask(family: Family, target: PreTrainedModel, seed: int = 0) -> AnsweredPrompt:
    inputs = family.build_inputs(target, seed=seed, question=QUESTION)
    prompt = ProcessedPrompt(inputs, find_text(family.tokenizer, inputs["input_ids"][0], QUESTION))
    return answer(target, prompt, MAX_NEW_TOKENS)


class Subject:
    """A target with sdpa attention, the same with eager attention, and a prompt."""

    def __init__(self, family: Family):
        self.family = family
        self.target = family.build_target()
        self.eager = family.build_target("eager")
        self.view, self.eager_view = TargetView(self.target), TargetView(self.eager)
        self.answered = ask(family, self.target)
