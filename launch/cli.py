"""The `anthesis` command. Nothing heavy is imported before a subcommand needs it."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for what the user can mend."""
    options = _parser().parse_args(arguments)
    from pretrain.errors import UserError

    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anthesis", description="Pretrain language models with DeepSpeed ZeRO, BLOOM's way."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[Any], int | None], text: str, into: Any = commands
    ) -> argparse.ArgumentParser:
        sub = into.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("config", _config, "print a run config resolved, or report all its problems")
    sub.add_argument("config", nargs="?", help="a run config in TOML")
    sub.add_argument("overrides", nargs="*", help="key.sub=value")
    sub.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")

    sub = command("train", _train, "train a run on this machine; goes on where it stopped")
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", help="key.sub=value")

    sub = command("eval", _eval, "loss and perplexity of a run on its held-out text")
    sub.add_argument("directory", metavar="RUN", type=Path)
    sub.add_argument("--samples", type=int, help="default: validation.samples of the run")

    sub = command("export", _export, "write a run as a transformers model, checked before done")
    sub.add_argument("directory", metavar="RUN", type=Path)
    sub.add_argument("target", metavar="DIR", type=Path)

    sub = command("sample", _sample, "continue a text with a run's model")
    sub.add_argument("directory", metavar="RUN", type=Path)
    sub.add_argument("text")
    sub.add_argument("--tokens", type=int, default=64, help="how many to add (64)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (0.8)")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("plot", _plot, "draw loss, learning rate and batch against tokens to a PNG")
    sub.add_argument("directory", metavar="RUN", type=Path)
    sub.add_argument("--output", type=Path, help="default: RUN/curves.png")

    command("demo", _demo, "from this machine's Python sources to a trained and exported BLOOM")

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer")
    into = tokenizer.add_subparsers(metavar="COMMAND", required=True)
    sub = command("train", _tokenizer_train, "train BLOOM's byte-level BPE on text", into)
    sub.add_argument("inputs", nargs="+", type=Path, help=".jsonl, .jsonl.gz or text files")
    sub.add_argument("--output", required=True, type=Path, help="folder to write")
    sub.add_argument("--vocab-size", required=True, type=int)
    sub.add_argument("--field", default="text", help="of a JSON line (text)")

    corpus = commands.add_parser("corpus", help="encode text for training")
    into = corpus.add_subparsers(metavar="COMMAND", required=True)
    sub = command("encode", _corpus_encode, "text -> PREFIX.bin, PREFIX.idx (Megatron MMap)", into)
    sub.add_argument("inputs", nargs="+", type=Path, help=".jsonl, .jsonl.gz or text files")
    sub.add_argument("--tokenizer", required=True, type=Path, help="folder of the tokenizer")
    sub.add_argument("--output", required=True, type=Path, metavar="PREFIX")
    sub.add_argument("--field", default="text", help="of a JSON line (text)")
    return parser


def _config(options: argparse.Namespace) -> int:
    if options.schema:
        from pretrain.config_file import schema

        print(json.dumps(schema(), indent=2))
        return 0
    if options.config is None:
        print("error: name a run config, or ask for --schema", file=sys.stderr)
        return 2
    import tomli_w

    from pretrain.config_file import load

    print(tomli_w.dumps(load(options.config, options.overrides).resolved()), end="")
    return 0


def _train(options: argparse.Namespace) -> int:
    from pretrain.config_file import load

    load(options.config, options.overrides)  # says what is wrong before torch is imported
    from pretrain.train import main as worker

    return worker([options.config, *options.overrides])


def _eval(options: argparse.Namespace) -> None:
    from pretrain.finished import evaluate

    print(evaluate(options.directory, options.samples))


def _export(options: argparse.Namespace) -> None:
    from pretrain.finished import export

    print(export(options.directory, options.target))


def _sample(options: argparse.Namespace) -> None:
    from pretrain.finished import sample

    print(
        sample(options.directory, options.text, options.tokens, options.temperature, options.seed)
    )


def _plot(options: argparse.Namespace) -> None:
    from pretrain.observe.plot import plot_run

    print(plot_run(options.directory, options.output or options.directory / "curves.png"))


def _demo(_: argparse.Namespace) -> int:
    from launch.demo import run_demo

    return run_demo()


def _tokenizer_train(options: argparse.Namespace) -> None:
    from tokenizer.documents import read_documents
    from tokenizer.train import save, train_bpe

    trained = train_bpe(read_documents(options.inputs, options.field), options.vocab_size)
    save(trained, options.output)
    print(f"{trained.get_vocab_size()} tokens -> {options.output}")


def _corpus_encode(options: argparse.Namespace) -> None:
    from tokenizer.encode import encode

    manifest = encode(options.inputs, options.tokenizer, options.output, options.field)
    print(f"{manifest['documents']} documents, {manifest['tokens']} tokens -> {options.output}.bin")


if __name__ == "__main__":
    sys.exit(main())
