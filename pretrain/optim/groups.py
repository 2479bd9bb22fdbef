"""Parameter groups: every parameter belongs to exactly one role, and roles decide weight decay."""

from torch import nn

# BLOOM decays embeddings and matrices, never biases and LayerNorms (the embedding's included).
DECAYED_ROLES = ("embedding", "matrix")
ROLES = (*DECAYED_ROLES, "bias", "norm")


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Role of each named parameter: embedding, matrix, bias or norm (other vectors count as norm).

    A head tied to the embedding is the embedding; an untied one is a matrix.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    roles = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 has emptied the tensor
        if id(parameter) in embeddings:
            roles[name] = "embedding"
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
