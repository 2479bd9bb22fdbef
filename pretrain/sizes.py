"""Parameters and FLOPs of a model in closed form; no torch."""

from dataclasses import dataclass

from pretrain.config import BloomModel


@dataclass(frozen=True)
class ModelShape:
    """What a planner has to know of a model. `matrices` are (rows, columns, how many), embedding
    included; `vectors` is the number of parameters that are in none of them, `looked_up` that of
    those that nothing is multiplied by (an embedding that is not the head too)."""

    hidden_size: int
    layers: int
    heads: int
    feed_forward: int
    vocab_size: int
    matrices: tuple[tuple[int, int, int], ...]
    vectors: int
    looked_up: int = 0
    sliced_loss: bool = True  # logits are never there as a whole

    @property
    def hidden_matrices(self) -> list[tuple[int, int, int]]:
        """The matrices but embedding and head."""
        return [matrix for matrix in self.matrices if self.vocab_size not in matrix[:2]]

    @property
    def others(self) -> int:
        """Parameters that are in no hidden matrix."""
        return self.parameters - sum(r * c * count for r, c, count in self.hidden_matrices)

    @property
    def multiplied(self) -> int:
        """Elements of the matrices that each token is multiplied by."""
        return (
            sum(rows * columns * count for rows, columns, count in self.matrices) - self.looked_up
        )

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(rows * columns * count for rows, columns, count in self.matrices) + self.vectors

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest parameter."""
        return max(rows * columns for rows, columns, _ in self.matrices)


def shape_of(model: BloomModel) -> ModelShape:
    """The shape of a BLOOM, whose head is tied to the embedding.

    A block has two LayerNorms (4h), fused QKV (3h^2 + 3h), the attention output (h^2 + h) and the
    MLP (8h^2 + 5h); around the blocks stand the embedding and two LayerNorms (4h).
    """
    h, layers = model.hidden_size, model.layers
    block = ((3 * h, h, layers), (h, h, layers), (4 * h, h, layers), (h, 4 * h, layers))
    return ModelShape(
        h, layers, model.heads, 4 * h, model.vocab_size,
        ((model.vocab_size, h, 1), *block), 13 * h * layers + 4 * h,
    )  # fmt: skip


def parameters(model: BloomModel) -> int:
    """Number of parameters of a BLOOM."""
    return shape_of(model).parameters


def model_flops_per_token(model: BloomModel | ModelShape, sequence_length: int) -> int:
    """FLOPs a token needs, forward and backward, without recomputation: the numerator of MFU.

    6 for each element of a matrix (for a BLOOM 72 l h^2 and, for the head, 6 V h) and 12 l h s for
    attention, whose causal half is not discounted (PaLM, arXiv 2204.02311, appendix B).
    """
    shape = shape_of(model) if isinstance(model, BloomModel) else model
    return 6 * shape.multiplied + 12 * shape.layers * shape.hidden_size * sequence_length


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
