"""Prompts for a language model without a data set: half are its own, half are tasks about subjects.

    python -m sparrow_research.language.prompts --target FOLDER --output FOLDER

An instruct model that is given the start of a user's turn writes what users ask. Its own prompts are various but
short; the tasks add lists, stories, code, comparisons. Subjects are split, so that validation and test ask about what
training never did. Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`; a stopped run starts again (minutes).
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparrow_hf.artifacts import write_text

SIZES = {"train": 2400, "validation": 96, "test": 96}
"""Prompts of each split; half of them are the model's own."""
BATCH = 48
SAMPLING = {"max_new_tokens": 64, "do_sample": True, "temperature": 1.0, "top_p": 0.95}

# fmt: off
SUBJECTS = (
    "volcanoes", "bread", "bicycles", "the moon", "whales", "libraries", "chess", "rivers", "honey bees", "trains",
    "coffee", "maps", "glaciers", "violins", "gardens", "lighthouses", "clocks", "deserts", "kites", "owls", "cheese",
    "bridges", "dreams", "the printing press", "sailing", "tea", "robots", "earthquakes", "painting", "wolves",
    "photosynthesis", "markets", "snow", "castles", "mathematics", "dancing", "vaccines", "rice", "telescopes", "cats",
    "the Roman Empire", "recycling", "soccer", "mushrooms", "poetry", "airplanes", "salt", "music lessons", "tides",
    "dinosaurs", "electric cars", "forests", "money", "sleep", "radio", "mountains", "pottery", "spiders", "elections",
    "swimming", "computers", "the stock market", "rainbows", "farming", "horses", "chemistry", "camping", "islands",
    "translation", "fashion", "ants", "energy", "museums", "marathons", "ice cream", "lightning", "parrots", "cities",
    "the heart", "puzzles", "paper", "elephants", "space travel", "weather forecasts", "schools", "wine", "kindness",
    "photography", "coral reefs", "origami", "diets", "magnets", "baseball", "languages", "storytelling",
    "wind turbines", "rabbits", "architecture", "memory", "fireworks", "theatre", "apples", "cooking", "the brain",
    "penguins", "teamwork", "old age", "jazz", "gravity", "friendship", "submarines", "butterflies", "taxes", "steel",
    "novels", "running", "houses", "sharks", "winter", "doctors",
)
TASKS = (
    "Explain {} to a ten-year-old.", "Write a short story about {}.", "List seven surprising facts about {}.",
    "What are the advantages and disadvantages of {}?", "Write a poem about {}.", "How did {} change over history?",
    "Give me a step-by-step plan to learn more about {}.", "Write an email to a friend about {}.",
    "Compare {} with something similar. What is different?", "Summarize what an expert would say about {}.",
    "Write a dialogue between two people who disagree about {}.", "What are common mistakes people make with {}?",
    "Write a Python program that stores notes about {}.", "Describe a picture that shows {}.",
    "Write a quiz of five questions about {}, with answers.", "Why do people care about {}?",
    "Write a product description that has to do with {}.", "What will {} be like in a hundred years?",
    "Describe a video about {}: what happens first, then, and at the end?", "Make a table of important terms on {}.",
)
# fmt: on


def tasks(split: str, count: int) -> list[str]:
    """`count` different tasks about the subjects of a split; training has ten subjects of twelve."""
    part = {"train": range(10), "validation": (10,), "test": (11,)}[split]
    subjects = [subject for index, subject in enumerate(SUBJECTS) if index % 12 in part]
    every = [task.format(subject) for subject in subjects for task in TASKS]
    random.Random(0).shuffle(every)
    return every[:count]


def own_prompts(model: Any, tokenizer: Any, count: int) -> list[str]:
    """`count` different user's turns as the model writes them, sampled."""
    start = tokenizer.apply_chat_template([{"role": "user", "content": "#"}], tokenize=False).partition("#")[0]
    ids = tokenizer(start, return_tensors="pt").input_ids.expand(BATCH, -1)
    torch.manual_seed(0)
    found: dict[str, None] = {}
    with tqdm(total=count, desc="the model's own prompts") as progress:
        while len(found) < count:
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **SAMPLING)
            for row in output[:, ids.shape[1] :].tolist():
                # A turn without an end is no whole prompt.
                text = tokenizer.decode(row, skip_special_tokens=True).strip()
                if tokenizer.eos_token_id in row and len(text.split()) >= 4:
                    found[text] = None
            progress.update(min(len(found), count) - progress.n)
    return list(found)[:count]


def write_prompts(model: Any, tokenizer: Any, output: Path) -> None:
    """Writes all splits."""
    own = iter(own_prompts(model, tokenizer, sum(SIZES.values()) // 2))
    for split, size in SIZES.items():
        prompts = [*tasks(split, size // 2), *(next(own) for _ in range(size // 2))]
        random.Random(1).shuffle(prompts)
        rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
        write_text(output / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.bfloat16).eval()
    write_prompts(model, AutoTokenizer.from_pretrained(options.target), options.output)
