"""Everything of transformers that is private, or that its versions name differently. No other room uses these names.

`contract_breaches` checks the installed transformers against all of it. When a new version breaks something, change
this room; `docs/compatibility.md` explains how.
"""

from .attention import (
    GROUPED_ATTENTION,
    attention_function,
    computes_cache_anew,
    eager_attention,
    is_stock_attention,
    makes_masks,
    query_groups,
    register_attention,
    registered_attention,
    rope_borders,
    takes_flat_masks_only,
    takes_masks_of_kinds,
    takes_positions,
)
from .caches import (
    NO_CACHE,
    attention_layers,
    cache_tensors,
    convolution_layers,
    drop_newest,
    first_layer_config,
    first_rows_read,
    layer_kinds,
    new_cache,
    new_inputs,
    outlives_call,
    record_past,
    recurrent_states,
)
from .contract import SUPPORTED_VERSIONS, TESTED_VERSIONS, check_contract, contract_breaches
from .models import (
    TrainingLength,
    as_trained,
    attention_of,
    checkpoint_with_cache,
    commit_of,
    decoder_of,
    execution_device,
    find_file,
    input_device,
    name_of,
    not_given_by_generate,
    on_device,
    run_layer,
    smart_resize,
    training_length,
    unwrap,
    use_one_gpu,
)
from .names import (
    ACTIVATIONS,
    CACHE,
    DECODER_LAYERS,
    DecoderOutput,
    GenerateOutput,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    missing_names,
)
from .positions import OTHER_POSITIONS_IN_VLLM, use_vllm_positions, uses_vllm_positions
from .seam import install_seam
from .slabs import (
    dynamic_copy,
    empty,
    grow_in_place,
    grows_in_place,
    has_windows,
    move_rows,
    slab_cache,
    slab_layers,
    take_rows,
)
from .steps import (
    advance,
    compile_config,
    compile_options,
    compiles,
    decoding,
    length_with_cache,
    pad_token,
    prefill,
    prompt_position_ids,
    replaced_candidate_generator,
    replaced_prefill,
)
