"""A tiny corpus and run config for tests of the whole worker."""

from pathlib import Path

import numpy as np
import tomli_w

from pretrain.data import ShardWriter

VOCAB, LENGTH = 61, 8


def write_corpus(folder: Path, documents: int = 400, seed: int = 0) -> Path:
    """A shard of random documents in which each token depends on the one before it."""
    generator = np.random.default_rng(seed)
    prefix = folder / f"shard{seed}"
    with ShardWriter(prefix, VOCAB) as writer:
        for _ in range(documents):
            steps = generator.integers(1, 4, size=generator.integers(5, 30))
            writer.append(((np.cumsum(steps) * 7) % VOCAB).tolist())
    return prefix


def write_config(folder: Path, **changes) -> Path:
    """A run of 24 steps on two sources; batch 3 -> 9 by 2, edges after steps 5, 9 and 12.

    `changes` are overrides with __ for dots.
    """
    prefixes = [write_corpus(folder, seed=seed) for seed in (0, 1)]
    tree = {
        "name": "tiny",
        "directory": str(folder / "runs"),
        "seed": 5,
        "model": {"vocab_size": VOCAB, "hidden_size": 24, "layers": 2, "heads": 3},
        "data": {
            "sequence_length": LENGTH,
            "sources": [
                {"name": "a", "path": str(prefixes[0]), "weight": 0.7},
                {"name": "b", "path": str(prefixes[1]), "weight": 0.3},
            ],
        },
        "recipe": {
            "train": "160 samples",
            "learning_rate": {
                "peak": 1e-2,
                "floor": 1e-3,
                "warmup": "12 samples",
                "decay": "160 samples",
            },
            "batch": {"start": 3, "increment": 2, "final": 9, "ramp": "45 samples"},
        },
        "engine": {"precision": "fp32", "micro_batch_samples": 2},
        "checkpoint": {"every": "2 steps", "keep": 2},
        "validation": {"every": "10 steps", "samples": 6},
        "observe": {"tensorboard": False, "peak_tflops": 1.0},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    path = folder / "tiny.toml"
    path.write_text(tomli_w.dumps(tree))
    return path
