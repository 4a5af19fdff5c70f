"""Answers lmms-eval's requests with `sparrow_hf`: messages to tensors, `generate()`, and the acceptance."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from sparrow_hf.captioning import NO_DRAFT, load_models
from sparrow_hf.data import prepare_prompt, to_target
from sparrow_hf.data.prepare import tokenizer_of
from sparrow_hf.measurement import PLAIN, Arm, measure
from sparrow_hf.metrics import Run, acceptance

MAX_NEW_TOKENS = 4096
"""Longest answer where the task sets none: that of lmms-eval's own chat models."""
WINDOW = {"start_time": "video_start", "end_time": "video_end"}
"""lmms-eval's names of the ends of a video's window → ours."""


class Sparrow(lmms):
    """A video LLM, with or without a draft.

    Args:
        pretrained (`str`): The target: a folder or a Hub id.
        draft (`str`, *optional*): A draft of it. Without one, `generate()` is plain.
        processor (`str`, *optional*): The target's processor, if it lies elsewhere.
        dtype (`str`, *optional*, defaults to `"auto"`): "auto" is the checkpoint's own.
        attn_implementation (`str`, *optional*): Of the target; transformers' choice by default.
        fps (`float`, *optional*, defaults to 2.0): Maximum number of frames per second to read of a video.
        max_num_frames (`int`, *optional*, defaults to 128): Maximum number of frames to read of a video.
        seed (`int`, *optional*, defaults to 0): Every sampled answer starts from it.
        device (`str`, *optional*): The accelerator by default, else the CPU.
        batch_size, max_batch_size (`int`, *optional*): Handed over by lmms-eval; requests are answered one by one.

    Raises:
        ValueError: The batch size is not 1.
        SparrowError: The target or the draft cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        draft: str | None = None,
        processor: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        fps: float = 2.0,
        max_num_frames: int = 128,
        seed: int = 0,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(
                f"the model sparrow answers one request at a time: set --batch_size 1, found {batch_size}"
            )
        self.target, self.processor, drafter = load_models(
            pretrained, draft or NO_DRAFT, "", processor, dtype, device, attn_implementation
        )
        self.arm = Arm(PLAIN) if drafter is None else Arm("draft", drafter)
        self.fps, self.max_num_frames, self.seed = fps, max_num_frames, seed

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests in order, and logs tokens, seconds and acceptance, over all and for each task."""
        answers, runs = [], {}
        for request in tqdm(requests, desc="sparrow"):
            _, doc_to_messages, gen_kwargs, doc_id, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            inputs = prepare_prompt(self.processor, {"messages": plain_turns(messages)}, self.fps, self.max_num_frames)
            run, tokens = measure(
                self.target,
                self.arm,
                to_target(inputs, self.target),
                # Stop strings of the target's generation_config need the tokenizer.
                settings_of(gen_kwargs) | {"tokenizer": tokenizer_of(self.processor)},
                self.seed,
            )
            text = self.processor.decode(tokens, skip_special_tokens=True).strip()
            counts = TokenCounts(input_tokens=inputs["input_ids"].shape[1], output_tokens=len(tokens))
            answers.append(GenerationResult(text, counts))
            runs.setdefault(task, []).append(run)
        if answers:
            log_runs(runs)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("the model sparrow generates: choose tasks whose output type is generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("the model sparrow answers tasks of one round: output type generate_until")


def plain_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages as `sparrow_hf.data` reads them, which refuses what it does not understand."""
    return [
        {"role": turn["role"], "content": [plain_part(part) for part in turn["content"]]}
        if not isinstance(turn["content"], str)
        else dict(turn)
        for turn in messages
    ]


def plain_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part whose source may be a dictionary with the window of a video, and whose window may be lmms-eval's."""
    source = part.get("url")
    if isinstance(source, Mapping):
        part = {name: value for name, value in part.items() if name != "url"} | dict(source)
    return {WINDOW.get(name, name): value for name, value in part.items()}


def settings_of(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate()`. Sampled where the temperature is above 0; `until` is not read, as in the chat models
    of lmms-eval itself, because a task that names none gets a blank line.

    A sampled answer is drawn from all tokens within `top_p`, and not from the `top_k` of the target's
    `generation_config`: one of 1 there would choose greedily.
    """
    settings = {"max_new_tokens": gen_kwargs.get("max_new_tokens") or MAX_NEW_TOKENS, "do_sample": False}
    if (gen_kwargs.get("num_beams") or 1) > 1:
        settings["num_beams"] = gen_kwargs["num_beams"]
    if (temperature := gen_kwargs.get("temperature") or 0.0) > 0:
        top_p = gen_kwargs.get("top_p") or 1.0
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return settings


def log_runs(runs: Mapping[str, list[Run]]) -> None:
    """Hands τ and k to lmms-eval, which puts them into its throughput table: of each task too if there are several."""
    every = [run for those in runs.values() for run in those]
    seconds, tokens = sum(run.seconds for run in every), sum(run.new_tokens for run in every)
    taken = acceptance(every)
    figures = {"tau": taken.tau, "k": taken.k}
    if len(runs) > 1:
        figures |= {f"tau_{task}": acceptance(those).tau for task, those in runs.items()}
    log_metrics(seconds, tokens, tokens / seconds, figures)
