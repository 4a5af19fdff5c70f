"""What installing this package adds to `sparrow bench`: SpecVLM-like, and drafts of the rivals' own classes."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparrow_hf.errors import BenchmarkError
from sparrow_hf.evaluation import Arms, compare
from sparrow_research.baselines import ViSpecDraftModel
from sparrow_research.baselines.specvlm import PrunedPromptArm

from families import FAMILY_BY_NAME

SETTINGS = {"max_new_tokens": 10, "do_sample": False}


def test_arms_of_the_rivals(tmp_path: Path) -> None:
    family = FAMILY_BY_NAME["qwen2_5_vl"]
    target = family.build_target()
    target.generation_config.suppress_tokens = family.visual_token_ids
    target.save_pretrained(tmp_path / "sibling")
    ViSpecDraftModel.from_target(target).save_pretrained(tmp_path / "vispec")
    parser = Arms(target, folders={name: str(tmp_path / name) for name in ("sibling", "vispec")})
    arms = parser.parse(["specvlm:sibling", "draft:vispec@chain-2"])
    assert type(arms[1]) is PrunedPromptArm and type(arms[2].draft) is ViSpecDraftModel
    # The weights of both are told beside what is measured.
    assert set(parser.weights) == {str(tmp_path / "sibling"), str(tmp_path / "vispec")}
    runs = compare(target, arms, family.build_inputs(target, num_frames=4), SETTINGS)
    assert [runs[arm.name].differs_at for arm in arms] == [None, None, None]
    with pytest.raises(BenchmarkError, match="unknown arm 'specvlm': .*, specvlm:TEXT or"):
        parser.arm("specvlm")


def test_who_asks_for_arms_need_not_import_the_rivals(tmp_path: Path) -> None:
    """In a process that knows nothing of them, as `sparrow bench` is."""
    target = FAMILY_BY_NAME["qwen2_5_vl"].build_target()
    target.save_pretrained(tmp_path / "target")
    ViSpecDraftModel.from_target(target).save_pretrained(tmp_path / "vispec")
    code = (
        "import sys\n"
        "from transformers import AutoModelForImageTextToText\n"
        "from sparrow_hf.evaluation import Arms\n"
        "target = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "assert 'sparrow_research' not in sys.modules\n"
        "print(type(Arms(target, sys.argv[2]).arm('draft').draft).__name__)\n"
    )
    folders = [str(tmp_path / name) for name in ("target", "vispec")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ViSpecDraftModel"]
