"""A fine-tuned run as other software holds it: the public class of its form, its head, and the form of its inputs."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers.processors import TemplateProcessing

from gpt1_jax.model.lora import merged
from gpt1_jax.task_config import Chat, LabelledTask, MultipleChoice, Task, TextToText
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.text.special_tokens import CLASSIFY, DELIMITER, START
from gpt1_jax.text.tokenizer import Tokenizer
from gpt1_jax.training.run import Run

LANGUAGE_MODEL = "OpenAIGPTLMHeadModel"
CLASSIFIER = "OpenAIGPTForSequenceClassification"
DOUBLE_HEADS = "OpenAIGPTDoubleHeadsModel"
_SCORE, _SUMMARY = "score.weight", "multiple_choice_head.summary"
HEADS = (_SCORE, f"{_SUMMARY}.weight", f"{_SUMMARY}.bias")  # tensors of the public classes beside the language model's

# The tokens that a model of each form reads (gpt1_jax/finetuning/forms.py).
INPUTS = {
    "classification": f"`{START} text {CLASSIFY}`",
    "entailment": f"`{START} premise {DELIMITER} hypothesis {CLASSIFY}`",
    "similarity": f"`{START} first {DELIMITER} second {CLASSIFY}`, and the same with the second text first",
    "multiple_choice": f"for each answer `{START} context question {DELIMITER} answer {CLASSIFY}`",
    "text_to_text": f"`{START} source {DELIMITER}`, and behind it comes the target",
    "chat": "`<|user|>question<|end|><|assistant|>`, and behind it comes the answer",
}


def labels_of(task: Task | None) -> tuple[str, ...]:
    """The classes of a classifier's outputs, in their order; none where they are something else."""
    return task.labels if isinstance(task, LabelledTask) else ()


def merged_run(run: Run) -> Run:
    """The same model with its low-rank updates, if it has any, added to the matrices that they belong to."""
    model = run.config.model
    if model.lora is None:
        return run
    config = run.config.model_copy(update={"model": model.model_copy(update={"lora": None})})
    return dataclasses.replace(run, config=config, params=jax.jit(partial(merged, model))(run.params))


def architecture(run: Run) -> str:
    """The public class."""
    if not run.config.model.num_classes:
        return LANGUAGE_MODEL
    return DOUBLE_HEADS if isinstance(run.config.task, MultipleChoice) else CLASSIFIER


def head_config(run: Run) -> dict[str, Any]:
    """What config.json says of the head."""
    task = run.config.task
    if isinstance(task, MultipleChoice):
        return {
            "num_labels": 1,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "summary_proj_to_labels": True,
            "summary_activation": None,
            "summary_first_dropout": run.config.model.classifier_dropout,
        }
    if not isinstance(task, LabelledTask):
        return {}
    # The class reads the last token that is not padding: that is _classify_, as long as padding is another one.
    found: dict[str, Any] = {"pad_token_id": run.tokenizer.separator_id}
    if task.is_number:
        return found | {"problem_type": "regression", "num_labels": 1}
    return found | {
        "problem_type": "single_label_classification",
        "id2label": {str(number): label for number, label in enumerate(labels_of(task))},
        "label2id": {label: number for number, label in enumerate(labels_of(task))},
    }


def head_tensors(run: Run) -> dict[str, np.ndarray]:
    """The tensors of the head by their public names, float32; their kernels are (outputs, inputs)."""
    if not run.config.model.num_classes:
        return {}
    kernel = np.ascontiguousarray(np.asarray(jax.device_get(run.params["classifier_kernel"]), np.float32).T)
    if architecture(run) == CLASSIFIER:
        return {_SCORE: kernel}
    # That class has a bias, which the paper's classifier has not (Eq. 3).
    return {f"{_SUMMARY}.weight": kernel, f"{_SUMMARY}.bias": np.zeros(len(kernel), np.float32)}


def with_input_form(tokenizer_json: bytes, task: Task, tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that puts the special tokens of the form around one text, or around two.

    So a plain call of the public tokenizer, and whatever calls it, gives the tokens that the model was trained on. The
    form of conversations is a chat template instead.

    Args:
        tokenizer_json: without a form.
        task: of the form.
        tokenizer: the same, as the run has it.
    """
    if isinstance(task, Chat):
        return tokenizer_json
    fast = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    separator = FastTokenizer(tokenizer_json).token(tokenizer.separator_id)
    special = {name: tokenizer.special_id(name) for name in (START, DELIMITER)}
    if isinstance(task, TextToText):
        special[separator] = tokenizer.separator_id
        single, pair = [START, "$A", DELIMITER], [START, "$A", DELIMITER, "$B", separator]
    else:
        special[CLASSIFY] = tokenizer.special_id(CLASSIFY)
        single, pair = [START, "$A", CLASSIFY], [START, "$A", DELIMITER, "$B", CLASSIFY]
    fast.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=list(special.items()))
    return fast.to_str().encode()
