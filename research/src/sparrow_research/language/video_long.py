"""Greedy answers about long clips and the target's states of them, in one prefill, on a CPU.

    python -m sparrow_research.language.video_long --target FOLDER --prompts FILE --output RECORDING

`sparrow regenerate` and `sparrow record` prefill every clip, once each, and on a CPU a prefill of 25,000 visual tokens
is nearly all attention. Here there is one, with an attention that goes over blocks of rows: on one core with bf16
arithmetic it is 1.4 times as fast as torch's own kernel (103 and 71 GFLOPS at 16,384 rows with SmolLM2's heads, by a
script that is not kept). Its sums round differently, so states are those of `record` up to rounding, and a near-tie of
two tokens may fall the other way.

The recording is one of `sparrow record`: it is read by `video_lengths`, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, StoppingCriteria
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparrow_hf import SparrowDraftModel
from sparrow_hf.data.datasets import load_rows
from sparrow_hf.draft_inputs import draft_positions
from sparrow_hf.hidden_states import HiddenStateCollector
from sparrow_hf.loading import load_target
from sparrow_hf.training import SparrowDataCollator
from sparrow_hf.training.checkpoints import digest_of_rows
from sparrow_hf.training.data import TrainingStates, check_sample
from sparrow_hf.training.recording import Recorder

ATTENTION = "sparrow_row_blocks"
BLOCK = 256
"""Rows that are attended from at a time."""
NEW_TOKENS = 96


def attend_in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: causal attention of one sequence, a block of rows at a time.

    Two buffers take the scores and the shares of every block, since memory that is handed back to the system and
    asked for again costs more than the sums. What is not causal, or masked, is left to torch.

    Args:
        query: `(1, G·k, rows, size)`, the last rows of what the keys are of.
        key, value: `(1, G, seen, size)`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or attention_mask is not None or len(query) != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    (heads, rows, size), (groups, seen) = query.shape[1:], key.shape[1:3]
    in_group, before = heads // groups, seen - rows
    output = query.new_empty(1, rows, heads, size)
    scores, shares = (query.new_empty(in_group * min(BLOCK, rows) * seen) for _ in range(2))
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu(1)
    for group in range(groups):
        own = slice(group * in_group, (group + 1) * in_group)
        keys, values = key[0, group].T.contiguous(), value[0, group].contiguous()
        for start in range(0, rows, BLOCK):
            # keys   0 ……… before │ 0 …… start │ start … end │ …… rows     seen by this block: up to `end`
            end = min(start + BLOCK, rows)
            shape = (in_group, end - start, before + end)
            flat = (shape[0] * shape[1], shape[2])
            asked = (query[0, own, start:end] * scaling).reshape(-1, size)
            of_block, shared = (buffer[: flat[0] * flat[1]].view(flat) for buffer in (scores, shares))
            torch.mm(asked, keys[:, : flat[1]], out=of_block)
            own_keys = of_block.view(shape)[:, :, before + start :]
            own_keys.masked_fill_(later[: end - start, : end - start], float("-inf"))
            torch.softmax(of_block, -1, out=shared)
            output[0, start:end, own] = (shared @ values[: flat[1]]).view(*shape[:2], size).transpose(0, 1)
    return output, None


AttentionInterface.register(ATTENTION, attend_in_blocks)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class EndIsRead(StoppingCriteria):
    """Stops one token behind the one that ends an answer.

    Args:
        start: Length of the prompt.
        ends: Tokens that end an answer.
    """

    def __init__(self, start: int, ends: list[int | None]):
        self.start, self.ends = start, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        ended = input_ids.shape[1] > self.start + 1 and input_ids[0, -2].item() in self.ends
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)


class AnswerRecorder(Recorder):
    """Records the target's greedy answers to prompts, which it writes in the same forwards.

    Args:
        draft, folder, source: As of [`Recorder`].
        new_tokens: Maximum length of an answer.
    """

    def __init__(self, draft: SparrowDraftModel, folder: Path, new_tokens: int, source: Mapping[str, Any]):
        super().__init__(draft, folder, source=source)
        self.new_tokens = new_tokens

    @torch.inference_mode()
    def _read(self, sample: Mapping[str, Any]) -> TrainingStates:
        model, config = self.draft.target.model, self.draft.config
        bridge, last = config.bridge_layer_id, config.target_num_hidden_layers
        layers = dict.fromkeys((*config.feature_layer_ids, last, bridge))
        start, ends = sample["input_ids"].shape[1], model.generation_config.eos_token_id
        is_read = EndIsRead(start, ends if isinstance(ends, list) else [ends])
        # generate() does not read the token that it ends with: let that be one behind the answer. No token is an end.
        decoding = {
            "max_new_tokens": self.new_tokens + 1,
            "eos_token_id": config.vocab_size,
            "stopping_criteria": [is_read],
        }
        with HiddenStateCollector(layers).active() as collector:
            ids = model.generate(**sample, **decoding, do_sample=False)[0, :-1]
        check_sample(ids, start, config.visual_token_ids or [])
        states = {layer: collector.take(layer)[0] for layer in layers}
        positions = draft_positions(ids, config.visual_token_ids or [], len(ids))
        return TrainingStates(
            input_ids=ids,
            answer_start=start,
            text_states=torch.cat([states[layer][positions.text] for layer in config.feature_layer_ids], dim=-1),
            last_states=states[last][positions.text],
            visual_rows=positions.visual,
            visual_states=states[bridge][positions.visual],
        )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument(
        "--prompts", type=Path, required=True, help="a file of video_clips, such as length-25000.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the recording")
    parser.add_argument("--rows", type=int, help="the first ones only")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    target, processor = load_target(options.target, dtype=options.dtype, device="cpu")
    target.set_attn_implementation(ATTENTION)
    draft = SparrowDraftModel.from_target(target)
    collator = SparrowDataCollator(processor, draft.config.visual_token_ids)
    rows = load_rows(str(options.prompts), "train")
    source = {"prompts": digest_of_rows(options.prompts), "new_tokens": options.new_tokens}
    recorder = AnswerRecorder(draft, options.output, options.new_tokens, source)
    todo = [index for index in range(len(rows))[: options.rows] if not recorder.has(index)]
    for index in tqdm(todo, unit="clip"):
        recorder.write(index, collator.prepare_prompt(rows[index]))
    recorder.digests.tidy()


if __name__ == "__main__":
    main()
