"""The README.md of an exported fine-tuned model: its task, how good it is at it, and code that asks it."""

from collections.abc import Mapping
from typing import Any

from gpt1_jax.interop.finetuned import CLASSIFIER, DOUBLE_HEADS, INPUTS, architecture, labels_of
from gpt1_jax.interop.model_card import corpus, facts_of_model, rows
from gpt1_jax.task_config import Chat, Classification, LearnableTask, MultipleChoice, Similarity, TextToText
from gpt1_jax.text.special_tokens import CLASSIFY
from gpt1_jax.training.run import Run

_PIPELINES = {CLASSIFIER: "text-classification", DOUBLE_HEADS: "multiple-choice"}


def task_card(run: Run, results: Mapping[str, Any], name: str) -> str:
    """The card, Markdown after the front matter that model hubs read.

    Args:
        run: the run, without low-rank updates.
        results: what results.json holds; may be empty.
        name: of the exported folder.
    """
    task, finetune = run.config.task, run.config.finetune
    assert task is not None and finetune is not None
    return f"""---
library_name: transformers
pipeline_tag: {_PIPELINES.get(architecture(run), "text-generation")}
tags:
- gpt1
- openai-gpt
- jax
---

# {name}

A GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"), fine-tuned on
`{finetune.name}` ({task.form.replace("_", " ")}) with gpt1_jax.

| | |
| --- | --- |
{rows(_facts(run, results))}

## Figures

{_figures(run, results)}

## Asking it

It reads {INPUTS[task.form]}. {_by_itself(task)}

In this folder:

```python
{_code(run, task)}```

{_notes(run, task)}
"""


def _facts(run: Run, results: Mapping[str, Any]) -> dict[str, str]:
    finetune, optimizer = run.config.finetune, run.config.optimizer
    assert finetune is not None
    train, lora = finetune.train, finetune.model.lora
    low_rank = ""
    if lora:
        low_rank = f"rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}; merged into the weights"
    return {
        **facts_of_model(run),
        "base": "none: drawn weights" if train.from_scratch else f"`{finetune.base}`",
        "corpus of the base": "" if train.from_scratch else corpus(run),
        "labels": ", ".join(f"`{label}`" for label in labels_of(finetune.task)),
        "seed": f"{run.config.seed}",
        "epochs": f"{train.epochs}" + (f"; epoch {results['epoch']} was chosen" if _is_of(run, results) else ""),
        "batch": f"{train.batch_size} examples",
        "optimizer": f"{optimizer.rule}, peak rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "low-rank updates": low_rank,
    }


def _is_of(run: Run, results: Mapping[str, Any]) -> bool:
    return results.get("step") == run.step


def _figures(run: Run, results: Mapping[str, Any]) -> str:
    if not _is_of(run, results):
        return "None were recorded for these weights."
    lines = ["| split | examples | metric | value | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    for split, metrics in results["figures"].items():
        for metric, found in metrics.items():
            value = "undefined" if found["value"] is None else f"{found['value']:.2f}"
            interval = "-" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"
            lines.append(f"| {split} | {results['examples'][split]:,} | {metric} | {value} | {interval} |")
    lines.append("\nMetrics are in per cent. The best epoch was chosen on the validation split.")
    if perplexity := results["perplexity"]:
        lines.append(
            f"Perplexity per token of {perplexity['tokens']:,} tokens ({perplexity['of']}): "
            f"{perplexity['before']:,.2f} before fine-tuning, {perplexity['after']:,.2f} after it."
        )
    return "\n".join(lines)


def _by_itself(task: LearnableTask) -> str:
    if isinstance(task, Chat):
        return "The tokenizer's chat template writes it."
    return "The tokenizer puts the special tokens there by itself; in a text their names are text."


def _code(run: Run, task: LearnableTask) -> str:
    if isinstance(task, MultipleChoice):
        question = ' + " " + "What is asked about it?"' if task.question else ""
        return "import torch\n" + _load(DOUBLE_HEADS) + _CHOICE.format(question=question)
    if isinstance(task, TextToText):
        beams = f", num_beams={task.beams}" if task.beams > 1 else ""
        room = run.config.context_length - task.target_tokens
        return _load("AutoModelForCausalLM") + _TEXT.format(room=room, new=task.target_tokens, beams=beams)
    if isinstance(task, Chat):
        return _load("AutoModelForCausalLM") + _CHAT.format(new=task.answer_tokens)
    answer = "scores[:, 0].tolist()"
    if not task.is_number:
        answer = "[model.config.id2label[number] for number in scores.argmax(-1).tolist()]"
    load = "import torch\n" + _load("AutoModelForSequenceClassification")
    if isinstance(task, Similarity):
        return load + _SIMILARITY.format(answer=answer)
    texts = '["A text.", "Another text, and a longer one."]'
    if not isinstance(task, Classification):
        texts = '["A premise.", "Another premise, and a longer one."], ["A hypothesis."] * 2'
    return load + _CLASSES.format(texts=texts, answer=answer)


def _load(model_class: str) -> str:
    return (
        f"from transformers import {', '.join(sorted([model_class, 'AutoTokenizer']))}\n\n"
        f'model = {model_class}.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
    )


def _notes(run: Run, task: LearnableTask) -> str:
    context = f"The class has {run.config.model.context_length} positions"
    if architecture(run) not in _PIPELINES:
        penalty = ""
        if isinstance(task, TextToText) and task.beams > 1:
            penalty = " Its length penalty of beams is not that of gpt1_jax, by which the figures were made."
        return (
            f"{context} and no cache. They count from the first column, so give it one prompt at a time, or prompts of "
            f"one length: padding on the left would shift them.{penalty} `gpt1 import` makes it a run of gpt1_jax "
            "again."
        )
    lines = [f"{context}. Pad on the right, as this tokenizer does: they count from the first column."]
    if not isinstance(task, Classification):
        room = run.config.context_length // 2 - 2
        cut = "the context" if isinstance(task, MultipleChoice) else "each text"
        lines.append(f"In training {cut} was cut so that either side of the delimiter had at most {room} tokens.")
    if isinstance(task, Similarity):
        lines.append(
            "The paper adds the states of both orders before the linear layer. That layer has no bias, so the scores "
            "of the two orders add up to the same; those of one order alone mean nothing."
        )
    if isinstance(task, MultipleChoice):
        lines.append(
            f"`mc_token_ids` are the places of `{CLASSIFY}`. Of padding behind them nothing is seen, and the class "
            "takes no mask of three dimensions. `logits` are those of the language model."
        )
    lines.append("`gpt1 import` makes it a run of gpt1_jax again, without the classifier.")
    return " ".join(lines)


_CLASSES = """inputs = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits
print({answer})
"""
_SIMILARITY = """

def scores_of(first, second):
    inputs = tokenizer(first, second, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


first, second = ["A text.", "Another one."], ["A second text, a longer one.", "Its second."]
scores = scores_of(first, second) + scores_of(second, first)
print({answer})
"""
_CHOICE = """context = "What is told."{question}
answers = ["An answer.", "Another answer, a longer one."]
inputs = tokenizer([context] * len(answers), answers, padding=True, truncation=True, return_tensors="pt")
last = inputs.attention_mask.sum(-1) - 1
with torch.no_grad():
    scores = model(inputs.input_ids[None], mc_token_ids=last[None]).mc_logits
print(answers[scores.argmax()])
"""
_TEXT = """inputs = tokenizer("A source text.", truncation=True, max_length={room}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new}{beams})
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
"""
_CHAT = """messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new})
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
"""
