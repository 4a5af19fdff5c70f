"""How the built-in models were made, and the evidence: what trains, compares and reports, never part of the package.

    python -m sparrow_research.pretrain     a built-in video LLM from nothing
    python -m sparrow_research.retrain      its draft
    python -m sparrow_research.results      rivals, measurements, docs/results.md
    python -m sparrow_research.recipes      training recipes compared, docs/recipes.md
    python -m sparrow_research.adaptation   LoRA on a draft whose target was fine-tuned
    python -m sparrow_research.memory       the memory of a training step on a long video
    python -m sparrow_research.gpu          decoding on a CUDA GPU

`sparrow_research.baselines` holds the rivals. All of it imports `sparrow_hf`, which knows nothing of it.
"""
