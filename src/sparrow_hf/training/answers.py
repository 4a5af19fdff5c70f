"""A folder of answers, before a draft is trained on it: are they this target's, and are all of them there?"""

import os
import warnings
from pathlib import Path

from .._transformers import uses_vllm_positions
from ..checksums import read_json
from ..errors import TrainingDataError
from ..targets import TargetView
from .regenerate import PROVENANCE_FILE, REMEDY


def check_answers(source: str | os.PathLike[str], target: TargetView) -> None:
    """Warns of answers that another target wrote or that are unfinished, and refuses those written at other positions.

    Args:
        source: Rows, as [`load_rows`] takes them. What is no folder of `sparrow regenerate` is not compared.
        target: Of the draft that is trained on them.

    Raises:
        TrainingDataError: The answers were written with `--vllm-positions`, and this target has others, or the other
            way round.
    """
    described = Path(source) / PROVENANCE_FILE
    if not described.is_file():
        return
    found = read_json(described, TrainingDataError, REMEDY)
    # Without the option it is not named.
    in_vllm = bool(found.get("vllm_positions"))
    if in_vllm != uses_vllm_positions(target.model):
        how = f"with{'' if in_vllm else 'out'} --vllm-positions"
        raise TrainingDataError(
            f"the answers in {source} were written {how}: go on {how} too, or run `sparrow regenerate` again into "
            "another folder"
        )
    wrote = found.get("target_sha256")
    # An earlier version did not name it.
    if wrote is not None and wrote != target.sha256:
        warnings.warn(
            f"another target, or this one in another dtype, wrote the answers in {source} "
            f"({found.get('target') or 'unnamed'} in {found.get('dtype')}, sha256 {wrote[:12]}…; this one is in "
            f"{target.dtype}, {target.sha256[:12]}…): a draft accepts most on its target's own answers, which "
            "`sparrow regenerate` writes",
            UserWarning,
            stacklevel=3,
        )
    rows, size = (found.get(name) for name in ("rows", "shard_size"))
    if isinstance(rows, int) and isinstance(size, int):
        shards = (Path(source) / f"answers-{number:05d}.jsonl" for number in range(-(-rows // size)))
        done = sum(min(size, rows - number * size) for number, shard in enumerate(shards) if shard.is_file())
        if done < rows:
            warnings.warn(
                f"{source} holds the answers to {done} of {rows} rows: `sparrow regenerate`, with the same options, "
                "writes the others",
                UserWarning,
                stacklevel=3,
            )
