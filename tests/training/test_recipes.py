"""The figures on the recipe pages are those of the exact shapes."""

from pathlib import Path

import pytest
import torch

from sparrow_hf import SparrowDraftConfig, SparrowDraftModel

from meta_targets import META_TARGETS

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


@pytest.mark.parametrize(
    ("page", "checkpoint"),
    [("qwen2_5_vl_7b.md", META_TARGETS[0]), ("llava_onevision_7b.md", META_TARGETS[2])],
    ids=["qwen2_5_vl", "llava_onevision"],
)
def test_shapes_on_the_page(page, checkpoint):
    text = (RECIPES / page).read_text()
    target = checkpoint.build()
    with torch.device("meta"):
        draft = SparrowDraftModel(SparrowDraftConfig.from_target_config(target.config))
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (target, draft)]
    assert all(f"{size:,}" in text for size in sizes)
    assert f"| {sizes[0] * 2 / 1e9:.1f} GB |" in text and f"| {sizes[1] * 16 / 1e9:.1f} GB |" in text

    layers = sum(parameter.numel() for parameter in target.get_decoder().layers.parameters())
    head = target.get_output_embeddings().weight
    assert f"2 × {layers:,} ×" in text and f"4 × {head.numel():,} ×" in text and f"× {head.shape[0]:,} × 4 B" in text
    tower = sum(
        parameter.numel()
        for name, parameter in target.named_parameters()
        if "visual." in name or "vision_tower." in name
    )
    assert f"2 × {tower:,} ×" in text
