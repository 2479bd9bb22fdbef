"""What a checkpoint holds of a rank: 1-D slices of parameters and optimizer states, each with its
place, so that any number of ranks in any ZeRO stage reads them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pretrain.engine.fragments import Fragment
from pretrain.engine.zero import ZeroEngine
from pretrain.errors import CheckpointError

_TRAINED = "optimizer.trained"


class Slice(torch.Tensor):
    """A 1-D tensor of which this rank holds elements [start, start + local.numel())."""

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls: type["Slice"], local: Tensor, start: int, numel: int) -> "Slice":
        slice_ = torch.Tensor._make_wrapper_subclass(
            cls, (numel,), dtype=local.dtype, device=local.device
        )
        slice_.local, slice_.start = local, start
        return slice_

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].local, args[0].start, args[0].shape[0])
        raise RuntimeError(
            f"a checkpoint slice is only saved and loaded, not computed with: {func}"
        )

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.local.numel()]))

    # The protocol by which torch.distributed.checkpoint asks a tensor about its shards.

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(self._chunk(), properties, torch.Size(self.shape))
        index = MetadataIndex(fqn, torch.Size([self.start]))
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local


def to_save(engine: ZeroEngine) -> dict[str, Slice]:
    """All that a checkpoint holds of this rank; collective.

    `master/NAME` is what is evaluated and exported. Where that is an average, the weights that are
    trained stand beside it as `optimizer.trained/NAME`.
    """
    entries = _optimizer_entries(engine)
    pairs = engine.trained_and_averaged()
    for fragment, (trained, averaged) in zip(engine.fragments(), pairs, strict=True):
        kinds = {"master": trained} if averaged is None else {"master": averaged, _TRAINED: trained}
        for kind, local in kinds.items():
            entries[f"{kind}/{fragment.name}"] = _slice(fragment, local)
    return entries


def to_load(path: Path, engine: ZeroEngine) -> dict[str, Slice]:
    """What is read back from the checkpoint `path`, as slices to be written to; collective."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    # States appear at an optimizer's first step; before it there is nothing to read.
    stepped = any(key.startswith("optimizer.") for key in saved)
    if stepped:
        engine.materialize_state()
    averages = engine.keeps_average and any(key.startswith(_TRAINED) for key in saved)
    kind = _TRAINED if averages else "master"
    entries = _optimizer_entries(engine) if stepped else {}
    entries |= {f"{kind}/{f.name}": _slice(f, f.master) for f in engine.fragments()}
    if missing := sorted({key.partition("/")[0] for key in entries if key not in saved}):
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}: it was written with another optimizer\n"
            "  rule: a run goes on with the optimizer that it began with\n"
            "  cure: restore optimizer.name and its options, give the run another name, or begin "
            "anew with start=fresh"
        )
    return entries


def _optimizer_entries(engine: ZeroEngine) -> dict[str, Slice]:
    entries = {
        f"optimizer.{key}/{fragment.name}": _slice(fragment, value)
        for fragment in engine.fragments()
        for key, value in fragment.state.items()
    }
    for key, value in engine.optimizer_wholes().items():
        # Ranks that all have the same one all offer it; it is written once.
        flat = value.detach().flatten()
        entries[f"optimizer.{key}"] = Slice(flat, 0, flat.numel())
    return entries


def _slice(fragment: Fragment, local: Tensor) -> Slice:
    return Slice(local, fragment.start, fragment.parameter_numel)
