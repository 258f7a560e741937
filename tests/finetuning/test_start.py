"""From a run to the configuration and the first weights of a fine-tuned one."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt1_jax.config import FinetuneConfig, LoraConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.finetuning.start import first_params
from gpt1_jax.model.lora import merged
from gpt1_jax.model.transformer import abstract_params, init_params
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.run import Run


@pytest.fixture
def base_of(run_of, random_params, letters):
    """Makes the run that a configuration begins with, its own model changed as said."""

    def make(config, **changes):
        model = config.model.model_copy(
            update={"vocab_size": 28, "special_tokens": 0, "num_classes": None, "lora": None, **changes}
        )
        base = config.model_copy(update={"model": model, "finetune": None})
        mesh = make_mesh(base.mesh)
        return Run(Path("base"), base, 5, 40, None, letters, mesh, random_params(model, seed=7))

    return make


def drawn(config):
    return jax.jit(init_params, static_argnums=0)(config.model, jax.random.split(jax.random.key(config.seed))[0])


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def near(found, expected):
    """But for the rounding of another program."""
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), found, expected)


def test_the_base_is_kept_and_rows_are_appended(run_of, base_of):
    config = run_of("classification")
    base = base_of(config)
    found = first_params(config, base)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, abstract_params(config.model))
    table = found["embedding"]["token_kernel"]
    same(table[:28], base.params["embedding"]["token_kernel"])
    same(found["embedding"]["position_kernel"], base.params["embedding"]["position_kernel"])
    same(found["blocks"], base.params["blocks"])
    new = np.concatenate([np.ravel(table[28:]), np.ravel(found["classifier_kernel"])])  # 3 rows of 24, and 3 classes
    assert abs(new.std() - 0.02) < 0.003 and abs(new.mean()) < 0.005 and len(set(new.tolist())) == 6 * 24
    other = first_params(config.model_copy(update={"seed": 1}), base)["embedding"]["token_kernel"]
    assert (np.asarray(other[28:]) != np.asarray(table[28:])).all()


def test_an_old_classifier_is_left_behind_though_it_would_fit(run_of, base_of):
    config = run_of("classification")
    base = base_of(config, vocab_size=31, special_tokens=3, num_classes=3)
    found = first_params(config, base)
    same(found["embedding"], base.params["embedding"])  # with the special tokens that it has learned
    near(found["classifier_kernel"], drawn(config)["classifier_kernel"])


def test_old_low_rank_updates_are_merged_and_new_ones_begin_at_nothing(run_of, base_of):
    config = run_of("classification", "model.lora={rank: 2}")
    base = base_of(config, lora=LoraConfig(rank=3, targets=("key", "query")))
    found = first_params(config, base)
    old = merged(base.config.model, base.params)["blocks"]["attention"]
    for name in ("query", "key", "value", "out"):
        np.testing.assert_allclose(
            found["blocks"]["attention"][name]["kernel"], old[name]["kernel"], rtol=1e-6, atol=1e-7
        )
    query = found["blocks"]["attention"]["query"]
    assert not query["lora_out"].any() and abs(np.asarray(query["lora_in"]).std() - 0.02) < 0.005
    assert "lora_in" not in found["blocks"]["attention"]["key"]


def test_an_output_projection_of_its_own_gets_rows_too(run_of, base_of):
    config = run_of("text_to_text", model=", tied_output: false")
    base = base_of(config)
    found = first_params(config, base)
    same(found["output_kernel"][:28], base.params["output_kernel"])
    near(found["output_kernel"][28:], drawn(config)["output_kernel"][28:])
    assert found["output_kernel"].shape == (30, 24)


def test_from_scratch_has_nothing_of_the_base(run_of, base_of):
    config = run_of("classification", "train.from_scratch=true")
    near(first_params(config, base_of(config)), drawn(config))


def test_the_configuration_of_a_run(run_of):
    config = run_of("classification", "train.epochs=3", "model.lora={rank: 4}", "train.accumulation=2", "name=x")
    assert (config.name, config.seed, config.finetune.seeds) == ("x", 0, (0,))
    model = config.model
    assert (model.vocab_size, model.special_tokens, model.num_classes, model.lora.rank) == (31, 3, 3, 4)
    assert (model.num_layers, model.embed_dim, model.context_length) == (2, 24, 16)  # the base's
    assert (config.train.steps, config.train.batch_size, config.train.accumulation) == (30, 8, 2)
    assert (config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup_steps) == (
        6.25e-5,
        "linear",
        0,  # 0.2 % of 30
    )
    assert config.evaluation.every == config.checkpoint.every == config.checkpoint.keep_every == 10
    assert run_of("classification", "optimizer.warmup_fraction=1").optimizer.warmup_steps == 10
    assert run_of("multiple_choice").model.num_classes == 1
    assert run_of("similarity").model.num_classes == run_of("number").model.num_classes == 1
    assert run_of("chat").model.num_classes is None
    assert (run_of("text_to_text").model.vocab_size, run_of("chat").model.vocab_size) == (30, 32)
    assert parse_config(config.to_yaml(), "again") == config


def test_runs_of_several_seeds_have_a_folder_each(run_of):
    config = run_of("classification", "name=x", "seeds=[3, 0]")
    assert config.run_dir.as_posix() == "runs/x/seed-0"
    assert config.finetune.seeds == (0,)


def test_the_defaults_are_the_papers(settings):
    config: FinetuneConfig = settings("classification")
    train, optimizer, model = config.train, config.optimizer, config.model
    assert (train.epochs, train.batch_size, train.auxiliary) == (3, 32, 0.5)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_fraction) == (6.25e-5, "linear", 0.002)
    assert (optimizer.weight_decay, optimizer.layer_decay, optimizer.clip_norm) == (0.01, 1.0, 1.0)
    assert (model.dropout, model.attention_dropout, model.classifier_dropout) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (", objective: masked", [], "base=base: model.objective=masked: the forms of fine-tuning read from left to"),
        (", objective: prefix", [], "model.objective=prefix"),
        ("", ["train.frozen_layers=3"], "train.frozen_layers=3: the model of base has 2 layers"),
        ("", ["model.lora={targets: [query, mlp_gate]}"], "the model of base has no mlp_gate, model.activation=gelu"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(run_of, model, overrides, message):
    with pytest.raises(UserError, match=message):
        run_of("classification", *overrides, model=model)
