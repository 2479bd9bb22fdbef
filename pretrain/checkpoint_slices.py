"""What a checkpoint holds of a rank: 1-D slices of parameters and optimizer states, each with its
place, so that any number of ranks in any ZeRO stage reads them."""

from collections.abc import Callable, Collection
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
_FACTOR = "sync.factor"


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

    `master/NAME` is what is evaluated and exported. Where that is an average, or what replicas
    agreed on, the weights that are trained stand beside it as `optimizer.trained/NAME`. What
    replicas have of their own begins with `replica-N/`, but for the first one's. What several ranks
    offer is written once.
    """
    sync, own = engine.sync, _prefix(engine.world.replicas.rank)
    alike = "" if sync.in_step else own
    entries = {alike + key: value for key, value in _optimizer_entries(engine).items()}
    pairs = engine.trained_and_averaged()
    for fragment, (trained, averaged) in zip(engine.fragments(), pairs, strict=True):
        kinds = {"master": trained}
        if averaged is not None:
            kinds = {"master": averaged, alike + _TRAINED: trained}
        for kind, local in kinds.items():
            entries[f"{kind}/{fragment.name}"] = _slice(fragment, local)
    for kind, flats in sync.shared_state().items():
        entries |= _entries_of(engine, kind, flats)
    for kind, flats in sync.own_state().items():
        entries |= _entries_of(engine, own + kind, flats)
    for key, factor in sync.factors().items():
        flat = factor.detach().flatten()
        entries[f"{_FACTOR}/{key}"] = Slice(flat, 0, flat.numel())
    return entries


def to_load(path: Path, engine: ZeroEngine) -> tuple[dict[str, Slice], Callable[[], None]]:
    """What is read back from the checkpoint `path`, as slices to be written to, and what is to be
    done once they are; collective."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    sync, replica = engine.sync, engine.world.replicas.rank
    # A replica that was not there takes up what one of the others had.
    alike = "" if sync.in_step else _prefix(replica % _replicas_of(saved, "opt"))
    # States appear at an optimizer's first step; before it there is nothing to read.
    stepped = any(key.startswith("optimizer.") for key in saved)
    if stepped:
        engine.materialize_state()
    entries = _optimizer_entries(engine) if stepped else {}
    averages = engine.keeps_average and any(key.startswith(_TRAINED) for key in saved)
    outer = sync.outer_weights
    finish: list[Callable[[], None]] = []
    if averages:
        entries |= _entries_of(engine, _TRAINED, engine.masters)
    entries = {alike + key: value for key, value in entries.items()}
    if outer or not averages:
        entries |= _entries_of(engine, "master", outer or engine.masters)
    if outer and not averages:
        finish.append(lambda: _copy(outer, engine.masters))
    if missing := sorted({key.partition("/")[0] for key in entries if key not in saved}):
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}: it was written with another optimizer\n"
            "  rule: a run goes on with the optimizer that it began with\n"
            "  cure: restore optimizer.name and its options, give the run another name, or begin "
            "anew with start=fresh"
        )
    for kind, flats in sync.shared_state().items():
        found = _entries_of(engine, kind, flats)
        entries |= {key: value for key, value in found.items() if key in saved}
    for kind, flats in sync.own_state().items():
        read, mean = _own_entries(engine, kind, flats, saved)
        entries |= read
        finish.append(mean)
    for key, factor in sync.factors().items():
        if (name := f"{_FACTOR}/{key}") in saved:
            entries[name] = Slice(factor.view(-1), 0, factor.numel())
    return entries, lambda: [step() for step in finish] and None


def _own_entries(
    engine: ZeroEngine, kind: str, flats: list[Tensor], saved: Collection[str]
) -> tuple[dict[str, Slice], Callable[[], None]]:
    """A state of each replica: its own where there are as many as were saved, else the mean of all,
    which is what their sum amounts to."""
    replicas, count = engine.world.replicas, _replicas_of(saved, kind)
    if not any(key.startswith(f"{kind}/") for key in saved):
        return {}, lambda: None
    if count == replicas.size:
        return _entries_of(engine, _prefix(replicas.rank) + kind, flats), lambda: None
    everyone = [[torch.zeros_like(flat) for flat in flats] for _ in range(count)]
    entries: dict[str, Slice] = {}
    for replica, copies in enumerate(everyone):
        entries |= _entries_of(engine, _prefix(replica) + kind, copies)

    def mean() -> None:
        for number, flat in enumerate(flats):
            flat.copy_(sum(copies[number] for copies in everyone) / count)

    return entries, mean


def _prefix(replica: int) -> str:
    return f"replica-{replica}/" if replica else ""


def _replicas_of(saved: Collection[str], kind: str) -> int:
    """How many replicas saved a kind of state of their own."""
    numbers = {
        int(key.partition("/")[0].removeprefix("replica-"))
        for key in saved
        if key.startswith("replica-") and key.partition("/")[2].startswith(kind)
    }
    return 1 + max(numbers, default=0)


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for from_, to in zip(source, target, strict=True):
        to.detach().copy_(from_)


def _optimizer_entries(engine: ZeroEngine) -> dict[str, Slice]:
    entries = {
        f"optimizer.{key}/{fragment.name}": _slice(fragment, value)
        for fragment in engine.fragments()
        for key, value in fragment.state.items()
    }
    for key, value in engine.optimizer_wholes().items():
        flat = value.detach().flatten()
        entries[f"optimizer.{key}"] = Slice(flat, 0, flat.numel())
    return entries


def _entries_of(engine: ZeroEngine, kind: str, flats: list[Tensor]) -> dict[str, Slice]:
    """Slices of flat tensors that are laid out like the masters."""
    return {
        f"{kind}/{place.name}": Slice(
            flats[place.buffer].detach().narrow(0, place.offset, place.length),
            place.start,
            place.shape.numel(),
        )
        for place in engine.shards.places
    }


def _slice(fragment: Fragment, local: Tensor) -> Slice:
    return Slice(local, fragment.start, fragment.parameter_numel)
