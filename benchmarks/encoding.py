"""Encoding: speed against tokenizers' own encode_batch, and memory against the number of documents.

    python benchmarks/encoding.py TOKENIZER FILE.jsonl(.gz) ... [--rounds 3] [--workers N]
    python benchmarks/encoding.py TOKENIZER --memory [--documents 100000 10000000]

Speed: the same text on the same cores, alternately, in one run. The peer gets all documents as
strings in memory and one call of `encode_batch` over all its threads; ours reads and unpacks files,
encodes, writes the shard and its manifest. Memory: the highest resident size of `corpus encode` and
its workers together, sampled 20 times a second, over tiny synthetic documents.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizer.documents import read_documents
from tokenizer.encode import encode
from tokenizer.folder import load


def speed(tokenizer_dir: Path, files: list[str], rounds: int, workers: int) -> None:
    """Print the text each encodes in a second, by round."""
    texts = list(read_documents(files))
    size = sum(len(text.encode()) for text in texts)
    tokenizer = load(tokenizer_dir).tokenizer
    print(f"{len(texts)} documents, {size / 1e6:.1f} MB, {workers} workers")
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    ratios = []
    for number in range(rounds + 1):  # the first warms up
        begin = time.perf_counter()
        tokenizer.encode_batch(texts, add_special_tokens=False)
        peer = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            encode(files, tokenizer_dir, Path(folder) / "shard", workers=workers)
            ours = time.perf_counter() - begin
        if number:
            ratios.append(peer / ours)
            print(f"encode_batch {size / peer / 1e6:.2f} MB/s, corpus encode "
                  f"{size / ours / 1e6:.2f} MB/s, ratio {peer / ours:.2f}")  # fmt: skip
    print(f"median ratio {statistics.median(ratios):.2f}")


def memory(tokenizer_dir: Path, counts: list[int]) -> None:
    """Print the peak of resident memory for each number of documents."""
    for count in counts:
        folder = Path(tempfile.mkdtemp(dir="."))
        try:
            with (folder / "tiny.jsonl").open("w") as file:
                for number in range(count):
                    file.write(json.dumps({"text": f"tiny {number}"}) + "\n")
            command = [sys.executable, "-m", "launch.cli", "corpus", "encode",
                       str(folder / "tiny.jsonl"), f"--tokenizer={tokenizer_dir}",
                       f"--output={folder}/shard"]  # fmt: skip
            begin = time.perf_counter()
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            peak = own = 0
            while process.poll() is None:
                sizes = [_resident(pid) for pid in [process.pid, *_children(process.pid)]]
                peak, own = max(peak, sum(sizes)), max(own, sizes[0])
                time.sleep(0.05)
            seconds = time.perf_counter() - begin
            found = f"{peak / 2**20:.0f} MiB in all processes, {own / 2**20:.0f} MiB in the writing"
            print(f"{count:>12,} documents: {found} one; {seconds:.0f} s", flush=True)
        finally:
            shutil.rmtree(folder)


def _children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _resident(pid: int) -> int:
    """Anonymous resident bytes: those of mapped files can be given up at any time."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--documents", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    options = parser.parse_args()
    if options.memory:
        memory(options.tokenizer, options.documents)
    else:
        speed(options.tokenizer, options.files, options.rounds, options.workers)
