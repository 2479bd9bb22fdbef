"""Parameter groups: every parameter belongs to exactly one role, and roles decide weight decay and
which method updates a parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROLES = ("embedding", "matrix", "head", "bias", "norm")


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Role of each named parameter: embedding, matrix, head, bias or norm (other vectors count as
    norm).

    A head tied to the embedding is the embedding.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    heads = {
        id(head.weight)
        for module in model.modules()
        if (head := getattr(module, "get_output_embeddings", lambda: None)()) is not None
    }
    roles = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 has emptied the tensor
        if id(parameter) in embeddings:
            roles[name] = "embedding"
        elif id(parameter) in heads:
            roles[name] = "head"
        elif name.endswith("bias"):
            roles[name] = "bias"
        else:
            roles[name] = "matrix" if len(shape) >= 2 else "norm"
    return roles


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """One optimizer group for each role that occurs, with its `role`; they partition the model."""
    roles = parameter_roles(model)
    groups = []
    for role in ROLES:
        parameters = [p for name, p in model.named_parameters() if roles[name] == role]
        if parameters:
            groups.append({"params": parameters, "role": role})
    return groups


@dataclass(frozen=True)
class Matrices:
    """How a parameter falls into matrices: dimension `axis` holds `outer` times the `sizes` of the
    parts, one after another. Without sizes it is one matrix, or a stack of them if it has three
    dimensions (experts)."""

    axis: int = 0
    outer: int = 1
    sizes: tuple[int, ...] = ()

    def split(self, whole: Tensor) -> list[Tensor]:
        """The matrices of a parameter of its own shape."""
        if not self.sizes:
            return list(whole.flatten(0, -3)) if whole.dim() > 2 else [whole]
        parts = whole.unflatten(self.axis, (self.outer, sum(self.sizes)))
        split = parts.split(self.sizes, dim=self.axis + 1)
        return [part.flatten(self.axis, self.axis + 1) for part in split]

    def join(self, matrices: list[Tensor], shape: torch.Size) -> Tensor:
        """What `split` split, of `shape`."""
        if not self.sizes:
            return torch.stack(matrices).view(shape) if len(shape) > 2 else matrices[0]
        parts = [matrix.unflatten(self.axis, (self.outer, -1)) for matrix in matrices]
        return torch.cat(parts, dim=self.axis + 1).flatten(self.axis, self.axis + 1)


def fused_matrices(model: nn.Module) -> dict[str, Matrices]:
    """The parameters that hold query, key and value in one, and how: as BLOOM and GPT-NeoX do (the
    three of a head side by side), as GPT-2 (side by side in columns) and as Phi-3 (in rows)."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        rows, columns = (*getattr(weight, "ds_shape", weight.shape), 0, 0)[:2]
        kind, parent = name.rpartition(".")[2], model.get_submodule(name.rpartition(".")[0])
        heads = _first_attribute(parent, ("heads", "num_heads", "num_attention_heads"))
        if kind == "query_key_value" and heads and rows == 3 * columns:
            size = rows // heads // 3
            found[f"{name}.weight"] = Matrices(0, heads, (size, size, size))
        elif kind == "c_attn" and columns == 3 * rows:
            found[f"{name}.weight"] = Matrices(1, 1, (rows, rows, rows))
        elif kind == "qkv_proj" and hasattr(parent, "num_key_value_heads") and heads:
            keys = parent.num_key_value_heads
            size = rows // (heads + 2 * keys)
            found[f"{name}.weight"] = Matrices(0, 1, (heads * size, keys * size, keys * size))
    return found


def _first_attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """An attribute of a module, or of its config."""
    places = (module, getattr(module, "config", None))
    values = (getattr(place, name, None) for name in names for place in places)
    return next((value for value in values if isinstance(value, int)), None)
