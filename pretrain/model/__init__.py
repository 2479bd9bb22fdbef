"""The language model: `build_model` and its contract.

Every model is an nn.Module with `forward(tokens_bt, targets_bt)`, the fp32 sum over all tokens of
the negative log likelihood, and `logits(tokens_bt)`.
"""

from torch import nn

from pretrain.config import BloomModel, HfModel
from pretrain.model.bloom import Bloom
from pretrain.sizes import ModelShape, shape_of

__all__ = ["Bloom", "build_model", "model_shape"]


def build_model(
    config: BloomModel | HfModel,
    activation_checkpointing: bool = False,
    end_of_text: int | None = None,
) -> nn.Module:
    """The model that the config describes, freshly initialised from torch's seed.

    With `end_of_text`, the id of the token that ends a document, attention stays inside each
    document (see `Bloom`); ValueError for models of transformers, which cannot do so.
    """
    if isinstance(config, BloomModel):
        return Bloom(config, activation_checkpointing, end_of_text)
    if end_of_text is not None:
        raise ValueError(
            "attention inside documents needs family = 'bloom': use it, or data.attention = "
            "'window'"
        )
    # transformers takes seconds to import, and BLOOM does not need it.
    from pretrain.model.hf import HfCausalLM

    return HfCausalLM(config, activation_checkpointing)


def model_shape(config: BloomModel | HfModel) -> ModelShape:
    """Sizes of the model that the config describes."""
    if isinstance(config, BloomModel):
        return shape_of(config)
    from pretrain.model.hf import shape_of_hf

    return shape_of_hf(config)
