"""The `anthesis` command. Nothing heavy is imported before a subcommand needs it."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.arguments import positive
from launch.doctor import add_arguments as doctor_arguments
from launch.doctor import run as doctor
from launch.launch_command import (
    add_launch_arguments,
    add_render_arguments,
    run_launch,
    run_render,
)
from launch.measure import add_arguments as measure_arguments
from launch.measure import run as measure_cluster
from launch.plan_command import add_arguments as plan_arguments
from launch.plan_command import run as plan_command
from pretrain.errors import exit_code
from pretrain.lab.compare_arguments import add_arguments as compare_arguments
from pretrain.lab.range_test import add_arguments as lr_find_arguments
from pretrain.stopping import listening


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for what the user can mend."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if left and all("=" in text and text[0] != "-" for text in left) and "overrides" in options:
        options.overrides += left  # key=value after options, which argparse does not expect
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    try:
        return exit_code(lambda: options.run(options), "interrupted")
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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

    text = "start a run on one node or many, by the launcher of your choice"
    add_launch_arguments(command("launch", run_launch, text))
    text = "print a file that is derived from the run config and the cluster profile"
    add_render_arguments(command("render", run_render, text))

    text = "what would keep a run from starting, or from going well, host by host"
    doctor_arguments(command("doctor", doctor, text))

    text = "where replicas that are launches of their own meet (sync.coordinator)"
    sub = command("coordinator", _coordinator, text)
    sub.add_argument("--host", default="", help="address to listen at (all of this machine)")
    sub.add_argument("--port", type=int, default=29400, help="29400")

    plan_arguments(command("plan", plan_command, "what a run will be: stages, memory, time, cost"))

    text = "between which learning rates the loss falls (range test); changes nothing of a run"
    lr_find_arguments(command("lr-find", _lr_find, text))

    text = "train a run with several optimizers, the same budget for each, and compare them"
    compare_arguments(command("compare", _compare, text))

    _run_commands(command)
    command("demo", _demo, "from this machine's Python sources to a trained and exported BLOOM")

    cluster = commands.add_parser("cluster", help="profiles of clusters")
    text = "fill in a cluster profile by measuring this machine, or the nodes of a job"
    into = cluster.add_subparsers(metavar="COMMAND", required=True)
    measure_arguments(command("measure", measure_cluster, text, into))

    _tokenizer_commands(command, commands)
    _corpus_commands(command, commands)
    return parser


def _run_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
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


def _tokenizer_commands(command: Callable[..., argparse.ArgumentParser], commands: Any) -> None:
    tokenizer = commands.add_parser("tokenizer", help="train, import and inspect tokenizers")
    into = tokenizer.add_subparsers(metavar="COMMAND", required=True)
    sub = command("train", _tokenizer_train, "train a tokenizer as its config says", into)
    sub.add_argument("config", help="a tokenizer config in TOML, see configs/tokenizer")
    sub.add_argument("overrides", nargs="*", help="key=value")

    text = "make a folder of a byte-level BPE in GPT-2's two files"
    sub = command("import", _tokenizer_import, text, into)
    sub.add_argument("--vocab", required=True, type=Path, help="JSON of token -> id")
    sub.add_argument("--merges", required=True, type=Path, help="two tokens a line")
    sub.add_argument("--end-of-text", required=True, help="the token that ends a document")
    sub.add_argument("--output", required=True, type=Path, help="folder to write")

    sub = command("inspect", _tokenizer_inspect, "what tokenizers make of text, by source", into)
    sub.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    sub.add_argument("--inputs", nargs="+", required=True, help="files or globs; each is a source")
    sub.add_argument("--documents", type=positive, default=1000, help="of each source (1000)")
    sub.add_argument("--field", default="text", help="of a JSON line or a row (text)")
    sub.add_argument("--plot", type=Path, help="also draw the fertility to this PNG")


def _corpus_commands(command: Callable[..., argparse.ArgumentParser], commands: Any) -> None:
    corpus = commands.add_parser("corpus", help="encode text for training, and look at it")
    into = corpus.add_subparsers(metavar="COMMAND", required=True)
    text = "text -> PREFIX.bin, .idx (Megatron MMap) and .json; goes on where it stopped"
    sub = command("encode", _corpus_encode, text, into)
    sub.add_argument(
        "inputs",
        nargs="+",
        help="files or globs of .jsonl, .parquet, .arrow or text, also .gz and .zst; "
        "hub:NAME[@REVISION][:CONFIG[:SPLIT]]",
    )
    sub.add_argument("--tokenizer", required=True, type=Path, help="folder of the tokenizer")
    sub.add_argument("--output", required=True, type=Path, metavar="PREFIX")
    sub.add_argument("--field", default="text", help="of a JSON line or a row (text)")
    sub.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                     help="at a line that is no document (stop)")  # fmt: skip
    sub.add_argument("--dedup", nargs="+", choices=("lines", "documents"), default=(),
                     help="drop exact repetitions, as BLOOM did")  # fmt: skip
    sub.add_argument("--workers", type=positive, help="processes that encode (one a core)")
    sub.add_argument("--restart", action="store_true", help="begin anew, discarding what is there")

    sub = command("check", _corpus_check, "verify checksums and layout of shards in full", into)
    sub.add_argument("prefixes", nargs="+", type=_prefix, metavar="PREFIX")

    text = "a document of a shard; a sample or the batch of a step of a run, as text"
    sub = command("show", _corpus_show, text, into)
    sub.add_argument("target", type=_prefix, metavar="PREFIX|RUN|CONFIG")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, metavar="N", help="of PREFIX, from 0")
    what.add_argument("--sample", type=int, metavar="N", help="of the run, from 0")
    what.add_argument("--step", type=int, metavar="N", help="of the run, from 1")
    sub.add_argument("--full", action="store_true", help="with --step: all of the text")
    sub.add_argument("--validation", action="store_true", help="--sample of the held-out text")
    sub.add_argument("--tokenizer", type=Path, help="default: that of PREFIX.json or the config")

    text = "tokens and share of each source and, of a run, its epochs"
    sub = command("stats", _corpus_stats, text, into)
    sub.add_argument("targets", nargs="+", type=_prefix, metavar="PREFIX|RUN|CONFIG")
    sub.add_argument("--plot", type=Path, help="also draw it to this PNG")


def _prefix(text: str) -> Path:
    """What shells complete to is a shard too: corpus/*.idx."""
    return Path(text.removesuffix(".bin").removesuffix(".idx"))


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


def _coordinator(options: argparse.Namespace) -> None:
    from pretrain.sync.coordinator import serve

    serve(options.host, options.port)


def _train(options: argparse.Namespace) -> int:
    from pretrain.config_file import load

    load(options.config, options.overrides)  # says what is wrong before torch is imported
    with listening():
        from pretrain.train import main as worker

        return worker([options.config, *options.overrides])


def _lr_find(options: argparse.Namespace) -> int:
    from pretrain.config_file import load

    load(options.config, options.overrides)  # says what is wrong before torch is imported
    from pretrain.lab.lr_finder import run

    return run(options)


def _compare(options: argparse.Namespace) -> None:
    from pretrain.lab.compare_setup import comparison_of

    comparison = comparison_of(options)  # says what is wrong before torch is imported
    from pretrain.lab.compare import run

    run(comparison)


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
    from tokenizer.config import load_tokenizer_config
    from tokenizer.train import train

    print(train(load_tokenizer_config(options.config, options.overrides)))


def _tokenizer_import(options: argparse.Namespace) -> None:
    from tokenizer.folder import import_bpe

    loaded = import_bpe(options.vocab, options.merges, options.end_of_text, options.output)
    print(f"{loaded.vocab_size} tokens -> {options.output}")


def _tokenizer_inspect(options: argparse.Namespace) -> None:
    from tokenizer.inspection import inspect_tokenizers, plot, table
    from tokenizer.sampling import each_file

    sources = {name: [i.name for i in ins] for name, ins in each_file(options.inputs).items()}
    report = inspect_tokenizers(options.folders, sources, options.documents, options.field)
    print(table(report))
    if options.plot:
        plot(report, options.plot)
        print(f"-> {options.plot}")


def _corpus_encode(options: argparse.Namespace) -> None:
    from tokenizer.encode import encode

    manifest = encode(
        options.inputs,
        options.tokenizer,
        options.output,
        options.field,
        on_error=options.on_error,
        dedup=options.dedup,
        workers=options.workers,
        restart=options.restart,
    )
    print(f"{manifest['documents']} documents, {manifest['tokens']} tokens -> {options.output}.bin")
    for key, found in (
        ("empty_documents", "empty documents"),
        ("duplicate_documents", "repeated documents"),
        ("duplicate_lines", "repeated lines"),
        ("bad_documents", "lines or rows that are no documents"),
    ):
        if manifest[key]:
            print(f"  left out: {manifest[key]} {found}")
    for example in manifest["bad_examples"]:
        print(f"    {example}")


def _corpus_check(options: argparse.Namespace) -> None:
    from tokenizer.corpus_check import check

    print(check(options.prefixes))


def _corpus_show(options: argparse.Namespace) -> None:
    from pretrain.errors import UserError
    from tokenizer import corpus_show as show

    if options.document is not None:
        print(show.show_document(options.target, options.document, options.tokenizer))
        return
    config = show.load_run(options.target)
    if config is None:
        raise UserError(
            f"{options.target}: samples and steps are those of a run\n"
            "  cure: name a run's folder or a run config in TOML"
        )
    if options.step is not None:
        print(show.show_step(config, options.step, options.full))
    else:
        split = "validation" if options.validation else "train"
        print(show.show_sample(config, options.sample, split))


def _corpus_stats(options: argparse.Namespace) -> None:
    from tokenizer import corpus_stats as stats
    from tokenizer.corpus_show import load_run

    config = load_run(options.targets[0]) if len(options.targets) == 1 else None
    rows = stats.run_stats(config) if config else stats.shard_stats(options.targets)
    print(stats.table(rows, config.data.mixture.epoch_limit if config else None))
    if options.plot:
        stats.plot(rows, options.plot)
        print(f"-> {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
