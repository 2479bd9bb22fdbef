"""Parameters and FLOPs of a BLOOM model in closed form; no torch."""

from pretrain.config import BloomModel


def parameters(model: BloomModel) -> int:
    """Number of parameters; the head is tied to the embedding.

    A block has two LayerNorms (4h), fused QKV (3h^2 + 3h), the attention output (h^2 + h) and the
    MLP (8h^2 + 5h); around the blocks stand the embedding and two LayerNorms.
    """
    hidden = model.hidden_size
    block = 12 * hidden**2 + 13 * hidden
    return model.vocab_size * hidden + model.layers * block + 4 * hidden


def model_flops_per_token(model: BloomModel, sequence_length: int) -> int:
    """FLOPs a token needs, forward and backward, without recomputation: the numerator of MFU.

    Matrix products 72 l h^2, attention 12 l h s (the causal half is not discounted) and the head
    6 V h (PaLM, arXiv 2204.02311, appendix B).
    """
    hidden, layers = model.hidden_size, model.layers
    return (
        72 * layers * hidden**2
        + 12 * layers * hidden * sequence_length
        + 6 * model.vocab_size * hidden
    )


def hardware_flops_per_token(
    model: BloomModel, sequence_length: int, activation_checkpointing: bool
) -> float:
    """FLOPs a token costs by the formula of the BLOOM logs (arXiv 2104.04473, equation 3).

    24 c l h^2 (1 + s / 6h + V / 16lh), c = 4 with activation checkpointing, else 3.
    """
    hidden, layers = model.hidden_size, model.layers
    passes = 4 if activation_checkpointing else 3
    attention = sequence_length / (6 * hidden)
    head = model.vocab_size / (16 * layers * hidden)
    return 24 * passes * layers * hidden**2 * (1 + attention + head)
