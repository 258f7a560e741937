"""The loss: that of the public classes, and by hand what they do not have."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gpt1_jax.finetuning import loss
from gpt1_jax.finetuning.loss import finetune_gradient, finetune_loss, task_scores
from gpt1_jax.interop.layout import PREFIX, public_tensors
from gpt1_jax.model.dropout import DropoutKey
from gpt1_jax.model.transformer import bind

KEY = jax.random.key(0)
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # sooner


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model runs no faster on more, and JAX has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_torch(kind, head, config, params, **settings):
    """The public class with our weights, the head's among them."""
    from transformers import OpenAIGPTConfig

    model = config.model
    sizes = {"n_positions": model.context_length, "n_embd": model.embed_dim, "n_layer": model.num_layers}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    theirs = kind(OpenAIGPTConfig(vocab_size=model.vocab_size, n_head=model.num_heads, **sizes, **off, **settings))
    found = {PREFIX + name: torch.tensor(tensor) for name, tensor in public_tensors(params)}
    found[head] = torch.tensor(np.asarray(params["classifier_kernel"])).T.contiguous()
    missing, unexpected = theirs.load_state_dict(found, strict=False)
    assert not unexpected
    for name in missing:  # the head's bias, which ours does not have, and the tied output
        if name != "lm_head.weight":
            assert name == head.replace("weight", "bias"), name
            torch.nn.init.zeros_(theirs.get_parameter(name))
    return theirs


def check_gradients(ours, theirs, head, largest=1e-5):
    found = {PREFIX + name: tensor for name, tensor in public_tensors(ours)}
    found[head] = np.asarray(ours["classifier_kernel"]).T
    named = {name: p.grad.numpy() for name, p in theirs.named_parameters() if not name.endswith("head.summary.bias")}
    assert found.keys() == named.keys()
    for name, expected in named.items():
        difference = np.abs(found[name] - expected[: len(found[name])]).max()
        assert np.abs(expected).max() > 1e-3 and difference < largest, (name, difference)


def language_model_loss(logits, batch):
    """As the authors' train.py: the mean over each sequence's tokens, then over sequences."""
    total = torch.zeros(())
    for b, k in zip(*np.nonzero(batch.last_BK >= 0), strict=True):
        length = batch.last_BK[b, k] + 1
        targets = torch.from_numpy(batch.tokens_BKT[b, k, 1:length]).long()
        sequences = (batch.last_BK[b] >= 0).sum() * len(batch.labels_B)
        total = total + torch.nn.functional.cross_entropy(logits[b, k, : length - 1], targets) / int(sequences)
    return total


def test_multiple_choice_is_the_double_heads_model(run_of, random_params, dataset_of, random_dataset):
    from transformers import OpenAIGPTDoubleHeadsModel

    config, head = run_of("multiple_choice"), "multiple_choice_head.summary.weight"
    assert config.finetune.train.auxiliary == 0.5
    gradient = compiled(partial(finetune_gradient, config))
    rng = np.random.default_rng(0)
    equal = dataset_of(rng.integers(0, 31, (8, 2, 16)).tolist(), labels=rng.integers(0, 2, 8).tolist())
    for seed, dataset in enumerate((equal, random_dataset(8, (2,), vocab=31))):
        params = random_params(config.model, seed)
        batch = dataset.batch(np.arange(8), 16, 8)
        ours, grads = gradient(params, batch, KEY)
        theirs = in_torch(OpenAIGPTDoubleHeadsModel, head, config, params)
        tokens = torch.from_numpy(batch.tokens_BKT).long()
        labels, last = (torch.from_numpy(array).long() for array in (batch.labels_B, batch.last_BK))
        out = theirs(tokens, mc_token_ids=last, labels=tokens, mc_labels=labels)
        # Their mean over all tokens of a batch is the authors' where all sequences are of one length.
        lm_loss = out.loss if dataset is equal else language_model_loss(out.logits, batch)
        total = out.mc_loss + 0.5 * lm_loss
        total.backward()
        assert abs(float(ours) - total.item()) < 1e-5
        check_gradients(grads, theirs, head)


@pytest.mark.parametrize("task", ["classification", "number"])
def test_classes_and_numbers_are_those_of_the_sequence_classifier(run_of, random_params, random_dataset, task):
    from transformers import OpenAIGPTForSequenceClassification

    config = run_of(task, "train.auxiliary=0")
    params, dataset = random_params(config.model), random_dataset(8, vocab=31)
    batch = dataset.batch(np.arange(8), 16, 8)._replace(labels_B=np.array([0, 1, 2, 1, 0, 2, 2, 1], np.float32))
    ours, grads = compiled(partial(finetune_gradient, config))(params, batch, KEY)
    scores = compiled(partial(task_scores, config))(params, batch)
    # Padding with a token that stands nowhere else, since the public class looks for it.
    settings = {"num_labels": config.model.num_classes, "pad_token_id": 31}
    larger = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 32})})
    padded = {**params, "embedding": {**params["embedding"]}}
    padded["embedding"]["token_kernel"] = np.append(params["embedding"]["token_kernel"], np.ones((1, 24), "f4"), axis=0)
    theirs = in_torch(OpenAIGPTForSequenceClassification, "score.weight", larger, padded, **settings)
    tokens = torch.from_numpy(batch.tokens_BKT[:, 0].copy()).long()
    tokens[torch.arange(16) > torch.from_numpy(batch.last_BK)] = 31
    labels = torch.from_numpy(batch.labels_B)
    out = theirs(tokens, labels=labels if task == "number" else labels.long())
    out.loss.backward()
    np.testing.assert_allclose(scores, out.logits.detach().numpy(), rtol=0, atol=1e-5)
    assert abs(float(ours) - out.loss.item()) < 1e-5
    table = theirs.transformer.tokens_embed.weight
    assert not table.grad[31].any()
    check_gradients(grads, theirs, "score.weight", largest=2e-5)


def plain_scores(config, params, sequences):
    """The classifier's scores of each sequence by itself, unpadded, states added."""
    model = bind(config.model, params)
    states = [model(jnp.asarray(tokens)[None])[0][0, -1] for tokens in sequences]
    return np.asarray(sum(states)) @ np.asarray(params["classifier_kernel"])


def test_similarity_adds_the_states_of_both_orders(run_of, random_params, dataset_of):
    config = run_of("similarity")
    params, orders = random_params(config.model), [[28, 1, 2, 29, 3, 30], [28, 3, 29, 1, 2, 30]]
    batch = dataset_of([orders, orders[::-1], [[28, 5, 29, 30], [28, 29, 5, 30]]]).batch([0, 1, 2], 16, 3)
    scores = np.asarray(compiled(partial(task_scores, config))(params, batch))
    np.testing.assert_allclose(scores[0], plain_scores(config, params, orders), rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert abs(scores[0] - scores[2]) > 0.1


@pytest.fixture(scope="module")
def choices(run_of):
    """Of multiple choice with dropout on the classifier: configuration, loss with a key, loss and gradient without."""
    config = run_of("multiple_choice", "model.classifier_dropout=0.5", "train.auxiliary=0")
    dropped = compiled(lambda params, batch, key: finetune_loss(config, params, batch, DropoutKey(key)))
    without = compiled(jax.value_and_grad(lambda params, batch: finetune_loss(config, params, batch, None)))
    return config, dropped, without


def test_the_sequences_of_an_example_share_a_classifier_mask(choices, random_params, dataset_of):
    config, dropped, _ = choices
    params, answer = random_params(config.model), [28, 1, 29, 2, 30]
    batch = dataset_of([[answer, answer], [answer, answer, answer]]).batch([0, 1], 16, 2)
    for seed in range(3):  # equal answers have equal scores under one mask, whatever it drops
        found = float(dropped(params, batch, jax.random.key(seed)))
        assert math.isclose(found, (math.log(2) + math.log(3)) / 2, rel_tol=1e-6)


def test_missing_answers_count_for_nothing(choices, random_params, dataset_of):
    config, dropped, without = choices
    params, answers = random_params(config.model), [[28, n, 29, n + 1, 30] for n in range(3)]
    batch = dataset_of([answers[:2], answers], labels=[1.0, 2.0]).batch([0, 1], 16, 2)
    scores = np.array([plain_scores(config, params, [tokens])[0] for tokens in answers], np.float64)
    expected = [np.log(np.exp(scores[:k]).sum()) - scores[k - 1] for k in (2, 3)]
    found, grads = without(params, batch)
    assert math.isclose(float(found), np.mean(expected), rel_tol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    scores_BK = np.asarray(compiled(partial(task_scores, config))(params, batch))
    assert scores_BK[0, 2] == -np.inf and np.isfinite(scores_BK[0, :2]).all()
    assert len({float(dropped(params, batch, jax.random.key(seed))) for seed in range(3)}) == 3  # dropout is on


def test_two_micro_batches_make_the_gradient_of_one(run_of, random_params, random_dataset):
    found = []
    for accumulation in (1, 2):
        config = run_of("multiple_choice", f"train.accumulation={accumulation}")
        params, batch = random_params(config.model), random_dataset(8, (2, 3), vocab=31).batch(np.arange(8), 16, 8)
        found.append(compiled(partial(finetune_gradient, config))(params, batch, KEY))
    assert math.isclose(float(found[0][0]), float(found[1][0]), rel_tol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-7), *(grads for _, grads in found))


def test_of_texts_the_loss_is_that_of_the_targets_alone(run_of, random_params, letters):
    from gpt1_jax.data.examples import Pair
    from gpt1_jax.finetuning.dataset import Dataset
    from gpt1_jax.finetuning.forms import encode, special_tokens

    config = run_of("text_to_text", "train.auxiliary=0")  # which is of classifiers
    task, params = config.finetune.task, random_params(config.model)
    tokenizer = letters.with_special_tokens(special_tokens(task))
    dataset = Dataset(encode(task, [Pair("abc", "de"), Pair("f", "ghijk")], tokenizer, 16))
    found = compiled(lambda params, batch: finetune_loss(config, params, batch, None))(
        params, dataset.batch([0, 1], 16, 2)
    )
    means = []
    for number, prompt in ((0, 5), (1, 3)):
        (tokens,) = dataset.sequences(number)
        model = bind(config.model, params)
        logits = np.asarray(model.logits(model(jnp.asarray(tokens)[None])[0]))[0].astype(np.float64)
        nats = np.log(np.exp(logits).sum(1))[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]]
        means.append(nats[prompt - 1 :].mean())
    assert math.isclose(float(found), np.mean(means), rel_tol=1e-5)


def test_without_its_weight_no_language_model_loss_is_computed(run_of, random_dataset, monkeypatch):
    from gpt1_jax.model.transformer import abstract_params

    calls = []
    plain = loss.cross_entropy
    monkeypatch.setattr(loss, "cross_entropy", lambda *arguments: calls.append(1) or plain(*arguments))
    batch = random_dataset(8, vocab=31).batch(np.arange(8), 16, 8)
    for auxiliary, expected in (("0.5", 1), ("0", 0)):
        config = run_of("classification", f"train.auxiliary={auxiliary}")
        jax.eval_shape(lambda params, c=config: finetune_loss(c, params, batch, None), abstract_params(config.model))
        assert len(calls) == expected
        calls.clear()
