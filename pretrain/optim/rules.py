"""The arithmetic of element-wise updates, one element at a time; see `kernels`.

p weight, g gradient, m and v moments, z as in Schedule-Free; `keep` is 1 - lr wd, `l2` a decay that
is added to the gradient; b a beta and c its complement.
"""

from collections.abc import Callable
from typing import Any

Element = Callable[..., Any]


def lion(xp: Any) -> Element:
    """-> p, m."""

    def rule(p, g, m, keep, lr, b1, c1, b2, c2):
        return p * keep - lr * xp.sign(m * b1 + c1 * g), m * b2 + c2 * g

    return rule


def sgdw(xp: Any) -> Element:
    """-> p, m."""

    def rule(p, g, m, keep, lr, mu):
        m = m * mu + g
        return p * keep - lr * m, m

    return rule


def sgdw_nesterov(xp: Any) -> Element:
    """-> p, m."""

    def rule(p, g, m, keep, lr, mu):
        m = m * mu + g
        return p * keep - lr * (g + mu * m), m

    return rule


def rmsprop(xp: Any) -> Element:
    """-> p, v."""

    def rule(p, g, v, l2, lr, a, ca, eps):
        g = g + l2 * p
        v = v * a + ca * g * g
        return p - lr * (g / (xp.sqrt(v) + eps)), v

    return rule


def rmsprop_momentum(xp: Any) -> Element:
    """-> p, v, m."""

    def rule(p, g, v, m, l2, lr, a, ca, eps, mu):
        g = g + l2 * p
        v = v * a + ca * g * g
        m = m * mu + g / (xp.sqrt(v) + eps)
        return p - lr * m, v, m

    return rule


def adadelta(xp: Any) -> Element:
    """-> p, v, d."""

    def rule(p, g, v, d, l2, lr, a, ca, eps):
        g = g + l2 * p
        v = v * a + ca * g * g
        update = xp.sqrt(d + eps) / xp.sqrt(v + eps) * g
        return p - lr * update, v, d * a + ca * update * update

    return rule


def ademamix(xp: Any) -> Element:
    """-> p, m, s, v; s is the slow moment, k1 and k2 Adam's corrections."""

    def rule(p, g, m, s, v, keep, lr, b1, c1, b3, c3, b2, c2, a, k1, k2, eps):
        m = m * b1 + c1 * g
        s = s * b3 + c3 * g
        v = v * b2 + c2 * g * g
        return p * keep - lr * ((m * k1 + a * s) / (xp.sqrt(v) * k2 + eps)), m, s, v

    return rule


def schedule_free_adamw(xp: Any) -> Element:
    """-> p, z, v; p is y, `share` the weight of the step and `ly` y's own rate, negative."""

    def rule(p, g, z, v, wd, lr, share, rest, ly, b2, c2, k2, eps):
        v = v * b2 + c2 * g * g
        d = g / (xp.sqrt(v) * k2 + eps) + wd * p
        return p * rest + share * z + ly * d, z - lr * d, v

    return rule


def schedule_free_sgd(xp: Any) -> Element:
    """-> p, z."""

    def rule(p, g, z, wd, lr, share, rest, ly):
        d = g + wd * p
        return p * rest + share * z + ly * d, z - lr * d

    return rule


def lars(xp: Any) -> Element:
    """-> p, m; `ratio` scales the decayed gradient before it enters the momentum."""

    def rule(p, g, m, wd, ratio, lr, mu):
        m = m * mu + ratio * (g + wd * p)
        return p - lr * m, m

    return rule


def lars_nesterov(xp: Any) -> Element:
    """-> p, m."""

    def rule(p, g, m, wd, ratio, lr, mu):
        g = ratio * (g + wd * p)
        m = m * mu + g
        return p - lr * (g + mu * m), m

    return rule


def lamb_direction(xp: Any) -> Element:
    """-> g, m, v; g becomes Adam's update with the decay in it."""

    def rule(p, g, m, v, wd, b1, c1, b2, c2, k1, k2, eps):
        m = m * b1 + c1 * g
        v = v * b2 + c2 * g * g
        return (m * k1) / (xp.sqrt(v) * k2 + eps) + wd * p, m, v

    return rule


def subtract(xp: Any) -> Element:
    """-> p - rate u."""

    def rule(p, u, rate):
        return (p - rate * u,)

    return rule


def muon(xp: Any) -> Element:
    """-> g, m; g becomes the momentum."""

    def rule(g, m, mu, rest):
        m = m * mu + rest * g
        return m, m

    return rule


def muon_nesterov(xp: Any) -> Element:
    """-> g, m; g becomes the momentum, looked ahead."""

    def rule(g, m, mu, rest):
        m = m * mu + rest * g
        return m * mu + rest * g, m

    return rule


def decay_and_subtract(xp: Any) -> Element:
    """-> p."""

    def rule(p, u, keep, lr):
        return (p * keep - lr * u,)

    return rule


def nothing(xp: Any) -> Element:
    """-> (): for the sums of squares alone."""

    def rule(p, g):
        return ()

    return rule
