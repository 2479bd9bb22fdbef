"""Training BLOOM's kind of tokenizer: byte-level BPE without normalisation.

Reversible for any text, spaces and line ends included. The pre-tokenizer's regex is that of BLOOM
(`tokenizer.json` of bigscience/bloom), its nested character class written flat, which is the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pretrain.errors import DataError

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0 to 3
# A piece is a run of anything but space and punctuation, with the one space before it; what lies
# between such runs stays in one piece.
_PIECE = r" ?[^()|\s.,!?…。，、।۔،]+"


def train_bpe(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` entries, or fewer where the text has no more pairs to merge.

    All 256 bytes and the special tokens are always in. Raises DataError for a smaller `vocab_size`.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size = {vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"at least {smallest}; choose more, for example 32,000"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads without our code."""
    from transformers import PreTrainedTokenizerFast  # seconds to import, and only needed here

    unk, bos, eos, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    # transformers 5 writes a class name that 4 does not know; both know the one from before.
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
