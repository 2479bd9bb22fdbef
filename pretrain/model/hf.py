"""The border to transformers: any of its causal models as ours, BLOOM checkpoints out and in."""

import dataclasses
import difflib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pretrain.config import BloomModel, HfModel
from pretrain.errors import CheckpointError, ConfigError, Problem, UserError
from pretrain.model.bloom import Bloom
from pretrain.sizes import ModelShape

EXPORT_TOLERANCE = 1e-4  # of the largest logit
SAMPLE_SHAPE = 2, 64


class HfCausalLM(nn.Module):
    """A transformers causal language model behind the contract of `pretrain.model`."""

    def __init__(self, config: HfModel, activation_checkpointing: bool = False) -> None:
        super().__init__()
        hf_config = _checked_config(config)
        try:
            self.model = transformers.AutoModelForCausalLM.from_config(hf_config)
        except Exception as error:
            raise _config_error(config.config, error) from error
        if activation_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """Sum over all tokens of the negative log likelihood of `targets_bt` (fp32 scalar); the
        logits_btv without targets."""
        logits_btv = self.model(input_ids=tokens_bt, use_cache=False).logits
        if targets_bt is None:
            return logits_btv
        rows = logits_btv.float().flatten(0, 1)
        return F.cross_entropy(rows, targets_bt.flatten(), reduction="sum")

    def logits(self, tokens_bt: Tensor) -> Tensor:
        """logits_btv, for inference."""
        return self(tokens_bt)


def shape_of_hf(config: HfModel) -> ModelShape:
    """What a planner has to know of the model, which is built without memory."""
    with torch.device("meta"):
        model = HfCausalLM(config).model
    shapes = [parameter.shape for parameter in model.parameters()]
    matrices = Counter((s[0], s[1:].numel()) for s in shapes if len(s) > 1)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    known = model.config
    return ModelShape(
        hidden_size=known.hidden_size,
        layers=known.num_hidden_layers,
        heads=known.num_attention_heads,
        feed_forward=getattr(known, "intermediate_size", None) or 4 * known.hidden_size,
        vocab_size=config.vocab_size,
        matrices=tuple((rows, columns, count) for (rows, columns), count in matrices.items()),
        vectors=sum(s.numel() for s in shapes if len(s) < 2),
        looked_up=0 if head is embedding else embedding.numel(),
        sliced_loss=False,
    )


def _checked_config(config: HfModel) -> transformers.PreTrainedConfig:
    """The transformers config; transformers itself accepts misspelt keys in silence."""
    given = {**config.config, "vocab_size": config.vocab_size}
    try:
        hf_config = transformers.AutoConfig.for_model(**given)
    except Exception as error:
        raise _config_error(config.config, error) from error
    known = {field.name for field in dataclasses.fields(hf_config)}
    known |= {*hf_config.attribute_map, "model_type"}
    # What a config takes under another name (such as rope_theta) leaves no attribute of that name.
    unknown = [key for key in config.config if key not in known and key in vars(hf_config)]
    problems = [
        Problem(
            f"model.config.{key}",
            config.config[key],
            f"a key of {type(hf_config).__name__}",
            f"did you mean {', '.join(near)}?"
            if (near := difflib.get_close_matches(key, known))
            else "remove it",
        )
        for key in unknown
    ]
    if problems:
        raise ConfigError("model.config", problems)
    return hf_config


def _config_error(given: dict[str, Any], error: Exception) -> ConfigError:
    """What transformers said about the config, in one line of bounded length."""
    kind, said = given.get("model_type"), " ".join(str(error).split())
    near = difflib.get_close_matches(str(kind), transformers.CONFIG_MAPPING.keys())
    if kind not in transformers.CONFIG_MAPPING:
        rule = "an architecture that transformers knows"
        cure = f"did you mean {', '.join(near)}?" if near else 'for example "llama"'
        return ConfigError("model.config", [Problem("model.config.model_type", kind, rule, cure)])
    rule = f"transformers must be able to build a causal model from it; it says: {said[:300]}"
    cure = f"see the documentation of transformers for {kind!r} and correct the key named above"
    return ConfigError("model.config", [Problem("model.config", given, rule, cure)])


def bloom_hf_config(
    config: BloomModel, sequence_length: int | None = None
) -> transformers.BloomConfig:
    """The transformers config of a BLOOM; `sequence_length` is recorded for readers, as in the
    published checkpoints (ALiBi has no limit of its own)."""
    recorded = {} if sequence_length is None else {"seq_length": sequence_length}
    return transformers.BloomConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        n_layer=config.layers,
        n_head=config.heads,
        layer_norm_epsilon=config.layernorm_epsilon,
        initializer_range=config.init_std or (1 / (3 * config.hidden_size)) ** 0.5,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        use_cache=True,
        **recorded,
    )


def export_hf(
    model: Bloom | HfCausalLM,
    config: BloomModel | HfModel,
    directory: Path,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    sequence_length: int | None = None,
) -> None:
    """Write `model` (with all its weights: not sharded) as a transformers checkpoint.

    It is written beside `directory`, loaded back and compared with `model`, weights rounded to
    `dtype`, on random tokens; only then does it get its name. UserError if the directory is taken,
    the model has no counterpart in transformers or the tokenizer does not fit; CheckpointError if
    what was loaded back computes something else.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists: remove it or name another directory for the export")
    if isinstance(config, BloomModel) and not config.residual:
        raise UserError(
            "model.residual = false: transformers' BLOOM always has skip connections, so this "
            "model cannot be exported; keep its checkpoint, or train with residual = true"
        )
    loaded_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer, config.vocab_size)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
        hf_model = hf_counterpart(model, config, state, sequence_length)
        if loaded_tokenizer is not None:
            loaded_tokenizer.save_pretrained(partial)
            _adopt_special_tokens(hf_model, loaded_tokenizer)
        hf_model.save_pretrained(partial)
        _compare(model, state, partial, config.vocab_size)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_tokenizer(folder: Path, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder; UserError if there is none or the model has no row for a token."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged file causes
        raise UserError(
            f"data.tokenizer = {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}\n"
            "  cure: name a folder that `anthesis tokenizer train` or transformers has written"
        ) from error
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size}: the tokenizer {folder} has {len(tokenizer)} tokens\n"
            "  rule: the model needs a row for every token\n"
            f"  cure: model.vocab_size={-(-len(tokenizer) // 128) * 128} (a multiple of 128 is "
            "fastest), or the tokenizer that the text was encoded with"
        )
    return tokenizer


def hf_counterpart(
    model: Bloom | HfCausalLM,
    config: BloomModel | HfModel,
    state: dict[str, Tensor],
    sequence_length: int | None,
) -> transformers.PreTrainedModel:
    """A transformers model that holds the tensors of `state` themselves, not copies."""
    if isinstance(config, BloomModel):
        hf_config: transformers.PreTrainedConfig = bloom_hf_config(config, sequence_length)
        wanted = state
    else:
        hf_config = _checked_config(config)
        wanted = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        hf_model = transformers.AutoModelForCausalLM.from_config(hf_config)
    hf_model.load_state_dict(wanted, assign=True)
    hf_model.tie_weights()
    return hf_model


def _adopt_special_tokens(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Let generation start and stop at the tokens of this tokenizer, not of BLOOM's."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))


def _compare(model: nn.Module, state: dict[str, Tensor], folder: Path, vocab_size: int) -> None:
    """CheckpointError unless the checkpoint in `folder` computes the logits of `model`."""
    device = next(iter(state.values())).device
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    reloaded = reloaded.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(vocab_size, SAMPLE_SHAPE, generator=generator).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        wide = {name: tensor.float() for name, tensor in state.items()}
        expected_btv = functional_call(model, wide, (tokens_bt,), tie_weights=False)
        found_btv = reloaded(input_ids=tokens_bt).logits
    model.train(was_training)
    difference_btv = (found_btv - expected_btv).abs()
    bound = EXPORT_TOLERANCE * expected_btv.abs().max().item()
    largest = difference_btv.max().item()
    if not largest <= bound:
        sample, position, token = torch.unravel_index(difference_btv.argmax(), difference_btv.shape)
        raise CheckpointError(
            f"export refused: the checkpoint loaded back from {folder} differs from the model by "
            f"{largest:.3g} in a logit (sample {sample}, position {position}, token {token}); "
            f"allowed are {bound:.3g}. Nothing was kept; a full or faulty disk, or weights that "
            "are not finite, are the usual causes"
        )


def import_hf(directory: Path) -> tuple[BloomModel, dict[str, Tensor]]:
    """Config and weights of a BLOOM checkpoint of transformers, for `Bloom.load_state_dict`.

    CheckpointError where it is absent or damaged, no BLOOM, or a BLOOM that `Bloom` cannot be.
    """
    try:
        hf_config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise _unreadable(directory, error) from error
    if differences := _not_represented(hf_config):
        raise CheckpointError(
            f"{directory} cannot be imported as family = 'bloom':\n  "
            + "\n  ".join(differences)
            + "\nTrain it as family = 'hf' instead"
        )
    try:
        hf_model, report = transformers.BloomForCausalLM.from_pretrained(
            directory, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise _unreadable(directory, error) from error
    # transformers fills absent weights with random ones and only warns.
    faults = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if faults:
        raise CheckpointError(f"{directory} is not a complete BLOOM: {faults}; copy it again")
    config = BloomModel(
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        layers=hf_config.n_layer,
        heads=hf_config.n_head,
        init_std=hf_config.initializer_range or None,
        layernorm_epsilon=hf_config.layer_norm_epsilon,
        dropout=hf_config.hidden_dropout,
    )
    return config, hf_model.state_dict()


def _unreadable(directory: Path, error: Exception) -> CheckpointError:
    said = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{directory}: transformers cannot load a checkpoint from there ({said}); name the folder "
        "that holds config.json and the weights"
    )


def _not_represented(config: transformers.PreTrainedConfig) -> list[str]:
    """What makes a checkpoint's config differ from every `Bloom`."""
    if config.model_type != "bloom":
        return [f"model_type is {config.model_type!r}, not 'bloom'"]
    differences = []
    if config.architectures not in (None, ["BloomForCausalLM"], ["BloomModel"]):
        differences.append(f"architectures are {config.architectures}, not a language model's")
    if config.apply_residual_connection_post_layernorm:
        differences.append("apply_residual_connection_post_layernorm is true")
    if not config.tie_word_embeddings:
        differences.append("tie_word_embeddings is false")
    if config.hidden_dropout != config.attention_dropout:
        differences.append(
            f"hidden_dropout is {config.hidden_dropout}, attention_dropout "
            f"{config.attention_dropout}: Bloom has one for both"
        )
    return differences
