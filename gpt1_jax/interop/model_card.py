"""The README.md of an exported model: what it is, what it was trained on, how good it is, how to load it."""

from collections.abc import Mapping
from typing import Any

from gpt1_jax.model.transformer import num_parameters
from gpt1_jax.training.run import Run


def model_card(run: Run, figures: Mapping[str, Any], name: str) -> str:
    """The card, Markdown after the front matter that model hubs read.

    Args:
        run: the run.
        figures: of its final evaluation, the keys of ``gpt1 evaluate --json``; may be empty.
        name: of the exported folder.
    """
    model, train = run.config.model, run.config.train
    facts = {
        **facts_of_model(run),
        "tokens seen": f"{run.examples * run.config.context_length:,}" if run.corpus else "not known: imported",
        "corpus": corpus(run),
        "objective": "causal language modelling",
        "batch": f"{train.batch_size} sequences of {run.config.context_length} tokens" if run.corpus else "",
        "optimizer": _optimizer(run) if run.corpus else "",
        "seed": f"{run.config.seed}" if run.corpus else "",
    }
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt1
- openai-gpt
- jax
---

# {name}

A GPT-1 language model (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"), trained
with gpt1_jax.

| | |
| --- | --- |
{rows(facts)}

## Figures

{_figures(run, figures)}

## Loading

In this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

`gpt1 import` makes it a run of gpt1_jax again.

The class has {model.context_length} positions and no cache: prompt and new tokens together must fit. Its positions
count from the first column, so give it one prompt at a time, or prompts of one length: padding on the left would shift
them.
"""


def facts_of_model(run: Run) -> dict[str, str]:
    """What every card says of a model, by what it is called."""
    model = run.config.model
    return {
        "parameters": f"{num_parameters(model):,}",
        "layers, width, heads": f"{model.num_layers}, {model.embed_dim}, {model.num_heads}",
        "context": _context(run),
        "vocabulary": f"{model.vocab_size:,} tokens; separator {run.tokenizer.separator_id}",
        "tokenizer's SHA-256": f"`{run.tokenizer.fingerprint}`",
        "run, step": f"`{run.config.name}`, {run.step:,}",
    }


def corpus(run: Run) -> str:
    """What a model was pre-trained on."""
    if run.corpus is None:
        return "not known: the weights were imported"
    kinds = ", ".join(dict.fromkeys(source.kind for source in run.config.data.sources))
    return f"fingerprint `{run.corpus}`; sources: {kinds}"


def rows(facts: Mapping[str, str]) -> str:
    """The rows of a table, but for what is empty."""
    return "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)


def _context(run: Run) -> str:
    model, trained = run.config.model, run.config.context_length
    shorter = f"; trained on sequences of {trained}" if trained < model.context_length else ""
    return f"{model.context_length} tokens{shorter}"


def _optimizer(run: Run) -> str:
    optimizer = run.config.optimizer
    return (
        f"{optimizer.rule}, peak rate {optimizer.learning_rate:g}, {optimizer.schedule} after "
        f"{optimizer.warmup_steps:,} updates of warm-up"
    )


def _figures(run: Run, figures: Mapping[str, Any]) -> str:
    if figures.get("step") != run.step or "perplexity" not in figures:
        return "None were recorded for these weights."
    found = {
        "perplexity per token": f"{figures['perplexity']:,.2f}",
        "perplexity per word": "-" if figures["word_perplexity"] is None else f"{figures['word_perplexity']:,.2f}",
        "bits per byte": f"{figures['bits_per_byte']:.4f} (xz -9: {figures['xz_bits_per_byte']:.4f})",
    }
    head = f"{figures['split']} split: {figures['documents']:,} documents, {figures['tokens']:,} tokens\n"
    return "\n".join([head, "| figure | value |", "| --- | --- |", rows(found)])
