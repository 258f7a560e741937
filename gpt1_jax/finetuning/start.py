"""From a run to begin with and a task to the configuration and the first weights of a fine-tuned run."""

from typing import Any

import jax
import jax.numpy as jnp

from gpt1_jax.config import CheckpointConfig, Config, FinetuneConfig, OptimizerConfig, TrainConfig, UpdateRule
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.model.lora import merged
from gpt1_jax.model.sharding import tree_shardings
from gpt1_jax.model.transformer import Params, abstract_params, init_params, parameter_axes
from gpt1_jax.task_config import LabelledTask, MultipleChoice, Task
from gpt1_jax.text.tokenizer import Tokenizer
from gpt1_jax.training.run import Run

_OF_THE_MODEL = (
    "dropout",
    "attention_dropout",
    "classifier_dropout",
    "lora",
    "dtype",
    "attention",
    "scan_layers",
    "remat",
)
_OF_THE_TRAINING = (
    "batch_size",
    "accumulation",
    "log_every",
    "gradient_dtype",
    "compilation_cache",
    "max_skipped_steps",
    "double_check_every",
)


def run_config(config: FinetuneConfig, base: Config, tokenizer: Tokenizer, steps_per_epoch: int, seed: int) -> Config:
    """The configuration of one run: the base's model and corpus, and what fine-tuning makes of them.

    Args:
        config: of the fine-tuning.
        base: of the run to begin with.
        tokenizer: the base's, with the special tokens of the task's form.
        steps_per_epoch: updates in an epoch.
        seed: of the run.

    Raises:
        UserError: if the base is not a causal model, or the settings do not fit it.
    """
    if base.model.objective != "causal":
        raise UserError(
            f"base={config.base}: model.objective={base.model.objective}: the forms of fine-tuning read from left to "
            "right; begin with a run trained with model.objective=causal"
        )
    if config.train.frozen_layers > base.model.num_layers:
        raise UserError(
            f"train.frozen_layers={config.train.frozen_layers}: the model of {config.base} has "
            f"{base.model.num_layers} layers"
        )
    lora = config.model.lora
    if lora and "mlp_gate" in lora.targets and base.model.activation != "swiglu":
        raise UserError(
            f"model.lora.targets={list(lora.targets)}: the model of {config.base} has no mlp_gate, "
            f"model.activation={base.model.activation}; leave it out"
        )
    several = len(config.seeds) > 1
    steps = config.train.epochs * steps_per_epoch
    rule = {name: getattr(config.optimizer, name) for name in UpdateRule.model_fields}
    found = Config(
        name=f"seed-{seed}" if several else config.name,
        runs_dir=str(config.run_dir) if several else config.runs_dir,
        seed=seed,
        model=base.model.model_copy(
            update={
                **{name: getattr(config.model, name) for name in _OF_THE_MODEL},
                "vocab_size": tokenizer.vocab_size,
                "special_tokens": base.model.special_tokens + tokenizer.vocab_size - base.model.vocab_size,
                "num_classes": classes(config.task),
            }
        ),
        data=base.data,
        train=TrainConfig(
            steps=steps,
            context_length=base.train.context_length,
            **{name: getattr(config.train, name) for name in _OF_THE_TRAINING},
        ),
        optimizer=OptimizerConfig(
            **rule,
            learning_rate=config.optimizer.learning_rate,
            schedule=config.optimizer.schedule,
            warmup_steps=round(config.optimizer.warmup_fraction * steps),
        ),
        mesh=config.mesh,
        # The best may be any epoch's; one that a signal left behind between two takes the place of none.
        checkpoint=CheckpointConfig(every=steps_per_epoch, keep=1, keep_every=steps_per_epoch),
        evaluation=base.evaluation.model_copy(
            update={"every": steps_per_epoch, "batch_size": config.evaluation.batch_size}
        ),
        logging=config.logging,
        deadlines=config.deadlines,
        finetune=config.model_copy(update={"seeds": (seed,)}),
    )
    return parse_config(found.to_yaml(), f"the configuration of {found.run_dir}")  # what was copied is checked too


def classes(task: Task) -> int | None:
    """Outputs of the classifier that a form needs for each sequence; None: it needs none."""
    if isinstance(task, MultipleChoice):
        return 1
    return task.outputs if isinstance(task, LabelledTask) else None


def first_params(config: Config, base: Run) -> Params:
    """The weights that fine-tuning begins with: the base's, and drawn ones for what is new.

    New are the rows of special tokens, the classifier and low-rank updates, all but one factor from N(0, 0.02^2). A
    classifier that the base has is left behind, and its low-rank updates are merged into its matrices.
    """
    shapes = abstract_params(config.model)
    layouts = tree_shardings(base.mesh, parameter_axes(config.model), shapes)

    def make(old: Params) -> Params:
        # As new_state draws them.
        drawn = init_params(config.model, jax.random.split(jax.random.key(config.seed))[0])
        old = merged(base.config.model, old)
        return drawn if config.finetune and config.finetune.train.from_scratch else _over(drawn, old)

    return jax.jit(make, out_shardings=layouts)(base.params)


def _over(drawn: Any, old: Any) -> Any:
    """The old parameters over the drawn ones, wherever both have one."""
    if isinstance(drawn, dict):
        kept = {name: _over(inner, old[name]) for name, inner in drawn.items() if name in old and name not in _NEW}
        return {**drawn, **kept}
    return old if old.shape == drawn.shape else jnp.concatenate([old, drawn[old.shape[0] :]])


_NEW = ("classifier_kernel", "lora_in", "lora_out")
