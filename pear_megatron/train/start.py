"""What a run starts from, and what it leaves beside its checkpoints so that they can be exported."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from pear_megatron.data.tokenizer import read_chat_template
from pear_megatron.hf.assets import (
    ASSETS,
    LoraBase,
    check_same_model,
    find_root,
    write_lora_file,
    write_model_files,
)
from pear_megatron.hf.weights import HFWeights
from pear_megatron.megatron.checkpoint import state as checkpoint
from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
from pear_megatron.megatron.checkpoint.paths import resolve
from pear_megatron.megatron.hf_weights import load_weights
from pear_megatron.megatron.initialize import initialize_weights
from pear_megatron.megatron.layout import Layout
from pear_megatron.ranks import from_main, same_on_every_node, together
from pear_megatron.recipe import Recipe, RecipeError

log = logging.getLogger("pear_megatron")


def start_model(recipe: Recipe, layout: Layout, model: Any) -> None:
    """Fills a new run's model: from model.hf, from checkpoint.pretrained, or with fresh weights.

    Then writes model.yaml and hf/ into output_dir; of a LoRA run, whose frozen weights these are, lora.yaml too.

    Raises:
        RecipeError, CheckpointError, DataError: on every rank: the weights cannot be read, they are of another
            model (of a LoRA run that goes on: other weights), or output_dir cannot be written.
    """
    source = digest = None
    if recipe.model.hf:
        source = folder = Path(recipe.model.hf)
        digest = same_on_every_node("weights in model.hf", lambda: read_model_facts(folder).digest)
        together(partial(_load_from_hf, source, recipe, layout, model))
    elif recipe.checkpoint.pretrained:
        folder = resolve(recipe.checkpoint.pretrained)
        root = _root_of(folder)
        if root is not None:
            check_same_model(root, recipe.model)
        checkpoint.load(folder, model)
        source = root / ASSETS if root is not None and (root / ASSETS).is_dir() else None
    else:
        initialize_weights(model, seed=recipe.seed, vocab_size=recipe.model.vocab_size)

    def write() -> None:
        if recipe.lora is not None:
            base = LoraBase(str(folder.absolute()), digest or read_model_facts(folder).digest, recipe.lora)
            write_lora_file(Path(recipe.output_dir), base)
        own = recipe.data.tokenizer if recipe.data.tokenizer != recipe.model.hf else None
        write_model_files(
            Path(recipe.output_dir),
            recipe.model,
            recipe.train.precision,
            source=source,
            tokenizer=own,
            chat_template=read_chat_template(recipe.data.chat_template),
        )
        if recipe.data.chat_template_kwargs:
            log.warning(
                "data.chat_template_kwargs %s are no part of an exported tokenizer: what samples from the model "
                "needs them too (eval --chat-template-kwargs, policy.tokenizer.chat_template_kwargs of a GRPO recipe, "
                "a server's own)",
                json.dumps(recipe.data.chat_template_kwargs),
            )

    from_main(write)


def _root_of(folder: Path) -> Path | None:
    """The checkpoint's root; None, with a warning, where another program wrote it (Megatron-LM, say)."""
    try:
        return find_root(folder)
    except RecipeError:
        log.warning(
            "%s has no model.yaml: that it holds the recipe's model is taken on trust, but for its shapes",
            folder,
        )
        return None


def _load_from_hf(source: Path, recipe: Recipe, layout: Layout, model: Any) -> None:
    with HFWeights(source, recipe.model) as weights:
        load_weights(weights, model, layout)
