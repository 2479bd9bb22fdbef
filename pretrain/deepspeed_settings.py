"""DeepSpeed's own config, derived from ours: nothing in it is written by hand."""

from typing import Any

from pretrain.config import Engine
from pretrain.wire import BUCKET_ELEMENTS, LIVE_ELEMENTS


def deepspeed_settings(config: Engine) -> dict[str, Any]:
    """The JSON of an engine, as a tree."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if config.zero_stage == 3:
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_ELEMENTS
    else:
        zero["compute_grad_norm"] = False  # ours, before the step, so that the guard can judge it
    return {
        # DeepSpeed insists on these two; neither governs anything under unmanaged accumulation.
        "train_micro_batch_size_per_gpu": config.micro_batch_samples,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # of gradients; the default would round sums to bf16
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
    }
