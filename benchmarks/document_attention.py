"""Cost of attention kept inside documents: a training step with it against one without.

    python benchmarks/document_attention.py [--rounds 9] [--device cpu]

Both models hold the same weights and read the same tokens, alternately in one process, so that a
busy machine slows both; the ratio is the median of the ratios of the rounds.
"""

import argparse
import statistics
import time

import torch

from pretrain.config import BloomModel
from pretrain.model import build_model

MODEL = BloomModel(vocab_size=16_384, hidden_size=512, layers=4, heads=8)
SHAPES = ((2, 512), (2, 1024), (1, 2048))  # samples, tokens of each
END_OF_TEXT = 2
DOCUMENT_TOKENS = 200  # on average


def measure(
    samples: int, length: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[float, float]:
    """(seconds of a step without, median ratio of a step with documents to one without)."""
    torch.manual_seed(0)
    stream_bt = torch.randint(3, MODEL.vocab_size, (samples, length + 1))
    stream_bt[torch.rand(stream_bt.shape) < 1 / DOCUMENT_TOKENS] = END_OF_TEXT
    tokens_bt, targets_bt = stream_bt[:, :-1].to(device), stream_bt[:, 1:].to(device)
    models = []
    for end_of_text in (None, END_OF_TEXT):
        torch.manual_seed(0)
        models.append(build_model(MODEL, end_of_text=end_of_text).to(device, dtype))
    seconds: list[list[float]] = []
    for _ in range(1 + rounds):
        seconds.append([])
        for model in models:
            start = time.perf_counter()
            loss = model(tokens_bt, targets_bt)
            loss.backward()
            loss.item()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[-1].append(time.perf_counter() - start)
            model.zero_grad()
    del seconds[0]  # warm-up
    default = statistics.median(without for without, _ in seconds)
    return default, statistics.median(inside / without for without, inside in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    print(f"{arguments.device}, {torch.get_num_threads()} cores, torch {torch.__version__}")
    print("samples x tokens  dtype      default s   documents/default")
    for samples, length in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(samples, length, dtype, arguments.device, arguments.rounds)
            name = str(dtype).removeprefix("torch.")
            print(f"{samples:7} x {length:<6}  {name:9} {found[0]:10.3f} {found[1]:18.2f}")


if __name__ == "__main__":
    main()
