"""A small tokenizer for the tiny targets of `families.py`: no file, no download.

Text is encoded one character per token, so the frame headers of the families are long compared with the frames, as in
real prompts. The letter pairs are never encoded but can be generated: with them, stop strings cross token borders.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 160

PAD, BOS, EOS, UNK, END_OF_TURN = "<pad>", "<bos>", "<eos>", "<unk>", "<end>"
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro "
    "ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec"
).split()


def build_tokenizer(named_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer with exactly `VOCAB_SIZE` tokens: a random target may generate any of them.

    Args:
        named_tokens: Special tokens under the attribute names the processors look for, `{"video_token": "<video>"}`.
    """
    basic = [PAD, BOS, EOS, UNK, END_OF_TURN, *_CHARACTERS]
    basic += _PAIRS[: VOCAB_SIZE - len(basic) - len(named_tokens)]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(basic)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        extra_special_tokens=named_tokens,
    )
