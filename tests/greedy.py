"""Options of `generate()` for answers of an exact length."""

from typing import Any

from families import FAMILY_BY_NAME


def greedy(length: int) -> dict[str, Any]:
    """Greedy text of exactly so many tokens; a random target would end it early or write placeholders."""
    suppressed = FAMILY_BY_NAME["qwen2_5_vl"].visual_token_ids
    return {
        "do_sample": False,
        "max_new_tokens": length,
        "min_new_tokens": length,
        "suppress_tokens": suppressed,
    }
