"""Times decoding with a draft on a CUDA GPU: a 7B target's shapes, random weights, nothing to download.

    PYTHONPATH=src:research/src python -m sparrow_research.gpu OUTPUT_FOLDER        (or `make gpu`)

The parts, in the order in which they run. Each prints its rows, and writes them to a JSON file of its own at once:

    rounds       whole calls of `generate()`, plain and with a draft, without torch.compile
    compiled     the same with torch.compile, at a middle length, and how long compiling takes
    steps        the target's forward over 1 … 64 rows: cost of verification
    attention    one layer's attention alone: kernels, backends, the first call at every new length
    draft        whole chains of the draft, as the product runs them and as one CUDA graph
    syncs        synchronisations and kernels of a round
    identity     whether the ids are those of plain `generate()`
    compiled_long  `compiled` at the longest prompt
"""
