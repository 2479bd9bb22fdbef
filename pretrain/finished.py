"""What one does with a run's model: evaluate, export, sample. One process; needs no engine."""

import math
import os
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from pretrain.checkpoint import newest_checkpoint, read_masters
from pretrain.config import Config
from pretrain.config_file import load
from pretrain.data.corpus import Corpus
from pretrain.errors import UserError
from pretrain.model import build_model


def load_model(run_directory: Path, attention_of_run: bool = False) -> tuple[Config, nn.Module]:
    """The config of a run and its model with the fp32 weights of the newest checkpoint.

    The model attends across documents, as transformers' BLOOM does, which is the same for a single
    one; with `attention_of_run` as the run does.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports DeepSpeed, which else warns
    checkpoint = newest_checkpoint(run_directory)
    config = load(run_directory / "config.toml")
    masters = read_masters(checkpoint)
    model = build_model(
        config.model, end_of_text=config.attention_end if attention_of_run else None
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[name].view(parameter.shape))
    return config, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def evaluate(run_directory: Path, samples: int | None = None) -> str:
    """Loss and perplexity on the first `samples` held-out samples, as a line of text."""
    config, model = load_model(run_directory, attention_of_run=True)
    samples = samples or config.validation.samples
    corpus = Corpus(config.data, config.seed, config.model.vocab_size, "validation")
    device = next(model.parameters()).device
    total = 0.0
    for sample in tqdm(range(samples), desc="evaluating", unit="sample", disable=None):
        row = torch.from_numpy(corpus.batch(sample, 1)).to(device)
        total += model(row[:, :-1], row[:, 1:]).item()
    loss = total / (samples * config.data.sequence_length)
    return f"{samples} held-out samples: loss {loss:.4f}, perplexity {math.exp(loss):.2f}"


def export(run_directory: Path, target: Path) -> str:
    """Write the model and its tokenizer as a transformers folder; says what was checked."""
    from pretrain.model.hf import export_hf

    config, model = load_model(run_directory)
    length = config.data.sequence_length
    export_hf(model, config.model, target, config.data.tokenizer, sequence_length=length)
    return f"{target}: written; loaded back by transformers, its logits equal the run's"


@torch.no_grad()
def sample(
    run_directory: Path, text: str, new_tokens: int, temperature: float, seed: int = 0
) -> str:
    """`text` continued by `new_tokens` tokens; temperature 0 takes the likeliest each time."""
    from pretrain.model.hf import hf_counterpart, load_tokenizer

    config, model = load_model(run_directory)
    if config.data.tokenizer is None:
        raise UserError(
            f"{run_directory}: the run has no tokenizer to read the text with\n"
            "  cure: set data.tokenizer in its config.toml"
        )
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.vocab_size)
    generator = hf_counterpart(model, config.model, model.state_dict(), None).eval()
    start = tokenizer(text, return_tensors="pt").input_ids.to(next(model.parameters()).device)
    if start.shape[1] == 0:
        raise UserError("the text is empty\n  cure: give at least one word to continue")
    torch.manual_seed(seed)
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    ids = generator.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **choice,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)
