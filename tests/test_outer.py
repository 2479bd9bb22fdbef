"""Outer weights: the identities of DiLoCo in double precision, parts, momentum."""

import pytest
import torch

from pretrain.sync.outer import OuterWeights

STEPS, FEATURES, ROWS = 50, 24, 8


def data(step, replica):
    generator = torch.Generator().manual_seed(1000 * step + replica)
    inputs = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.sin(3 * inputs.sum(1))


def gradient(weights, replicas, step):
    """Of a small non-linear regression, mean over the batches of some replicas."""
    weights = weights.detach().clone().requires_grad_()
    loss = 0.0
    for replica in replicas:
        inputs, target = data(step, replica)
        hidden = torch.tanh(inputs @ weights.view(FEATURES, 4))
        loss = loss + ((hidden.sum(1) - target) ** 2).mean() / len(replicas)
    loss.backward()
    return weights.grad


def start():
    generator = torch.Generator().manual_seed(7)
    return 0.1 * torch.randn(4 * FEATURES, generator=generator, dtype=torch.float64)


def data_parallel(make, count):
    weights = start().requires_grad_()
    optimizer = make([weights])
    for step in range(STEPS):
        weights.grad = gradient(weights, range(count), step)
        optimizer.step()
    return weights.detach()


def diloco(make, count, every, rate, momentum, parts=1):
    """The outer weights after all steps, every replica of which is simulated here."""
    replicas = [start().requires_grad_() for _ in range(count)]
    optimizers = [make([weights]) for weights in replicas]
    outers = [OuterWeights([weights], rate, momentum, parts) for weights in replicas]
    for step in range(STEPS):
        for replica, (weights, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            weights.grad = gradient(weights, [replica], step)
            optimizer.step()
        if (step + 1) % every == 0:
            for part in range(parts):
                mean = sum(
                    outer.difference(part, [weights])
                    for outer, weights in zip(outers, replicas, strict=True)
                )
                for outer, weights in zip(outers, replicas, strict=True):
                    outer.advance(part, mean / count)
                    outer.blend(part, [weights], 0.0)
    for outer in outers:
        assert torch.equal(outer.weights[0], outers[0].weights[0])
    return outers[0].weights[0]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


def sgd_momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def distance(first, second):
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("make", [adamw, sgd_momentum])
def test_one_replica_with_an_outer_rate_of_one_is_the_inner_optimizer(make, every):
    assert distance(diloco(make, 1, every, 1.0, 0.0), data_parallel(make, 1)) < 1e-14


@pytest.mark.parametrize("make", [sgd, sgd_momentum])
def test_meeting_after_each_step_of_sgd_is_data_parallel(make):
    assert distance(diloco(make, 4, 1, 1.0, 0.0), data_parallel(make, 4)) < 1e-14


def test_adamw_within_replicas_is_not_data_parallel():
    assert distance(diloco(adamw, 4, 1, 1.0, 0.0), data_parallel(adamw, 4)) > 1e-3


def test_outer_steps_are_nesterovs_as_torch_has_them():
    outer = OuterWeights([start()], 0.7, 0.9)
    reference = start().requires_grad_()
    optimizer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(10):
        reference.grad = torch.sin(step + torch.arange(4 * FEATURES, dtype=torch.float64))
        optimizer.step()
        outer.advance(0, reference.grad)
    assert distance(outer.weights[0], reference.detach()) < 1e-14


def test_gain_of_the_outer_step():
    """A difference that never changes moves 1.33 times as far at first, and 7 times in the end."""
    outer, step = (
        OuterWeights([torch.zeros(1, dtype=torch.float64)], 0.7, 0.9),
        torch.ones(1).double(),
    )
    moves = []
    for _ in range(300):
        before = outer.weights[0].clone()
        outer.advance(0, step)
        moves.append((before - outer.weights[0]).item())
    assert moves[0] == pytest.approx(1.33)
    assert moves[-1] == pytest.approx(7.0)


def test_parts_are_equal_and_together_the_whole():
    masters = [torch.arange(10.0), torch.arange(7.0), torch.arange(1.0)]
    outer = OuterWeights(masters, 0.7, 0.9, parts=4)
    sizes = [sum(length for *_, length in part) for part in outer.parts]
    assert sum(sizes) == 18
    assert max(sizes) - min(sizes) <= 1
    seen = sorted(
        (b, i) for part in outer.parts for b, first, n in part for i in range(first, first + n)
    )
    assert seen == [(b, i) for b, master in enumerate(masters) for i in range(len(master))]
    whole = diloco(adamw, 2, 5, 0.7, 0.9)
    assert distance(diloco(adamw, 2, 5, 0.7, 0.9, parts=3), whole) < 1e-15


def test_blend_keeps_a_share_of_the_replicas_own_weights():
    outer, trained = OuterWeights([torch.zeros(4)], 1.0, 0.0), [torch.full((4,), 2.0)]
    outer.blend(0, trained, 0.25)
    assert trained[0].tolist() == [0.5] * 4
