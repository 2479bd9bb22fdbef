"""Fragments: one view of DeepSpeed's shards for ZeRO 1, 2 and 3.

This is the one module that knows where DeepSpeed keeps master weights, gradients and optimizer
states. Layer-wise optimizers, checkpoints and metrics are written against `Fragment`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.world import World
from pretrain.optim.groups import Matrices
from pretrain.optim.shards import Place, Shards


@dataclass
class Fragment:
    """One contiguous slice of a parameter's flattened fp32 master weight, owned by this rank.

    `master`, `gradient` and `state` are 1-D views of `master.numel()` elements: what is written to
    them takes effect. `gradient` is there only between the end of accumulation and the step.
    """

    name: str
    shape: torch.Size
    role: str
    start: int
    master: Tensor
    gradient: Tensor | None
    state: dict[str, Tensor]

    @property
    def parameter_numel(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()


class FragmentMap:
    """The fragments of this rank, found once; `fragments()` costs only views.

    `zero` is DeepSpeed's ZeRO wrapper, whose optimizer only holds groups: the real one is built on
    `shards`, and its states, by master, are given as `states`. `parameters` are the named
    parameters in their order, `roles` a role for each name. With `offload` masters, and so the
    states, are moved to the host.
    """

    def __init__(
        self,
        zero: Any,
        parameters: dict[str, torch.nn.Parameter],
        roles: dict[str, str],
        matrices: dict[str, Matrices],
        stage: int,
        world: World,
        offload: bool,
    ) -> None:
        self._zero, self._stage, self._device = zero, stage, world.device
        if offload:
            for master in self.masters:
                # In place, for DeepSpeed keeps the tensor itself.
                host = torch.empty(master.shape, pin_memory=master.is_cuda)
                master.data = host.copy_(master.data)
        names = {id(parameter): name for name, parameter in parameters.items()}
        find = _places_stage_3 if stage == 3 else _places_stage_1_2
        places = [
            Place(name, shape, roles[name], start, length, buffer, offset)
            for parameter, shape, start, length, buffer, offset in find(zero)
            for name in [names[id(parameter)]]
        ]
        buffer_roles = [zero.optimizer.param_groups[g]["role"] for g in self._groups_of_buffers()]
        self.shards = Shards(self.masters, buffer_roles, places, list(parameters), world, matrices)
        self.states: dict[Any, dict[str, Any]] = {}

    def _groups_of_buffers(self) -> list[int]:
        if self._stage == 3:
            return [self._zero.sub_group_to_group_id[i] for i in range(len(self.masters))]
        return list(range(len(self.masters)))

    @property
    def masters(self) -> list[Tensor]:
        """The flat fp32 buffers that the optimizer steps, padding included."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def fragments(self) -> list[Fragment]:
        """Live views of all that this rank owns."""
        masters, gradients = self.masters, self._gradients_by_group()
        fragments = []
        for place in self.shards.places:
            master, span = masters[place.buffer], (0, place.offset, place.length)
            gradient = gradients.get(place.buffer)
            state = {
                key: value.detach().narrow(*span)
                for key, value in self.states.get(master, {}).items()
                if torch.is_tensor(value) and value.shape == master.shape
            }
            fragments.append(
                Fragment(
                    place.name,
                    place.shape,
                    place.role,
                    place.start,
                    master.detach().narrow(*span),
                    None if gradient is None else gradient.narrow(*span),
                    state,
                )
            )
        return fragments

    def hand_over_gradients(self) -> None:
        """Make the accumulated gradients those of the masters."""
        for buffer, gradient in self._gradients_by_group().items():
            master = self.masters[buffer]
            master.grad = gradient.to(master.device)

    def flat_gradients(self) -> list[Tensor]:
        """The gradients of all fragments in as few tensors as there are groups; padding is zero."""
        return list(self._gradients_by_group().values())

    def _gradients_by_group(self) -> dict[int, Tensor]:
        """The flat gradient of each group, where there is one now."""
        averaged = self._zero.averaged_gradients
        flats = {}
        for group, gradients in sorted(averaged.items()):
            if gradients is not None:
                flats[group] = getattr(gradients, "flat_partition", None)
                if flats[group] is None:
                    flats[group] = _flat_view(gradients)
        return flats

    def flatten_gradients(self) -> None:
        """Lay the gradients of each group out in one buffer, as DeepSpeed's step would do anyway.

        ZeRO 1 and 2 in fp32 hold them as a list of separate tensors; the step takes a group with a
        `flat_partition` as it is, so this moves the copy to before the step instead of adding one.
        """
        if self._stage == 3:
            return
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        averaged = self._zero.averaged_gradients
        for group, gradients in sorted(averaged.items()):
            if getattr(gradients, "flat_partition", None) is None:
                # Where the ranks talk, which with offload is not where the masters are.
                flat = torch.zeros(self.masters[group].shape, device=self._device)
                sizes = [gradient.numel() for gradient in gradients]
                views = list(flat.detach().narrow(0, 0, sum(sizes)).split(sizes))
                torch._foreach_copy_(views, [gradient.reshape(-1) for gradient in gradients])
                averaged[group] = GradPartitionBufferGroup(views, flat.detach())

    def discard_gradients(self) -> None:
        """Forget the accumulated gradients, as if the backward passes had not been."""
        optimizer = self._zero
        for master in self.masters:
            master.grad = None
        if self._stage == 3:
            # The buffers are overwritten by the first micro-batch after micro_step_id is reset.
            optimizer._pre_step()
        else:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copy the masters into the weights that the model computes with, on all ranks."""
        optimizer = self._zero
        if self._stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(self.masters)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters are kept whole between passes and have to be gathered anew.
            persistent = optimizer.persistent_parameters
            if persistent:
                for parameter in persistent:
                    parameter.partition()
                persistent[0].all_gather(persistent)
        else:
            optimizer.update_lp_params()


def _flat_view(gradients: list[Tensor]) -> Tensor:
    """One view over gradients that lie side by side in one storage (ZeRO 3)."""
    first, total = gradients[0], sum(gradient.numel() for gradient in gradients)
    end = gradients[-1].storage_offset() + gradients[-1].numel()
    if end - first.storage_offset() != total:
        raise RuntimeError("DeepSpeed's ZeRO-3 gradient partitions are no longer contiguous")
    return first.as_strided((total,), (1,), first.storage_offset())


_Found = tuple[torch.nn.Parameter, torch.Size, int, int, int, int]


def _places_stage_1_2(optimizer: Any) -> Iterator[_Found]:
    """A group's parameters lie end to end in one flat buffer, cut into equal parts by rank."""
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        size = optimizer.partition_size[group]
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
        begin, end = rank * size, (rank + 1) * size
        offsets = optimizer.round_robin_bit16_offsets[group]
        for parameter, offset in zip(parameters, offsets, strict=True):
            low, high = max(offset, begin), min(offset + parameter.numel(), end)
            if low < high:
                yield parameter, parameter.shape, low - offset, high - low, group, low - begin


def _places_stage_3(optimizer: Any) -> Iterator[_Found]:
    """Every parameter is cut into equal parts by rank, the last padded; parts lie end to end."""
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    for group, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            start = rank * part
            length = min(part, parameter.ds_numel - start)
            if length > 0:
                yield parameter, parameter.ds_shape, start, length, group, offset
            offset += part
