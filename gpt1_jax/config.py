"""The typed configuration: frozen pydantic models whose defaults are the paper's GPT-1.

A YAML file lists only what differs from the defaults; config_file.py reads it. Source of the defaults: Radford et al.
2018, "Improving Language Understanding by Generative Pre-Training", section 4.1, and where the paper is silent the
authors' fine-tuning code (openai/finetune-transformer-lm).
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from etils import epath
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gpt1_jax.section import Fraction, PositiveFloat, Section
from gpt1_jax.source_config import PythonDocs, Source, weight_at
from gpt1_jax.task_config import AnyTask, LearnableTask

# A number in YAML 1.2, which config_file.py reads; in YAML 1.1, which PyYAML writes, some of these are words.
YAML_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$")
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _attention_problems(model: "ModelConfig | FinetuneModelConfig") -> list[str]:
    if model.attention not in ("splash", "cudnn") or not model.attention_dropout:
        return []
    return [
        f"model.attention={model.attention} cannot drop attention probabilities "
        f"(model.attention_dropout={model.attention_dropout}); set that to 0, or model.attention=xla"
    ]


def _check_accumulation(train: "TrainConfig | FinetuneTrainConfig") -> None:
    if train.batch_size % train.accumulation:
        raise ValueError(f"train.accumulation={train.accumulation} does not divide train.batch_size={train.batch_size}")


class LoraConfig(Section):
    """Low-rank updates beside frozen matrices (Hu et al. 2021, "LoRA"): x W + (alpha / rank) x A B."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    # Which matrices of every layer; LoRA's own choice
    targets: Annotated[
        tuple[Literal["query", "key", "value", "out", "mlp_in", "mlp_out", "mlp_gate"], ...], Field(min_length=1)
    ] = ("query", "value")


class ModelConfig(Section):
    """The transformer (paper, section 4.1: 12 decoder layers, 768 wide, 12 heads, 3072 inner, 512 positions).

    The keys from ``objective`` to ``logit_cap``, and ``num_kv_heads``, are departures from the paper, each off by
    default; docs/variations.md gives their sources.
    """

    vocab_size: PositiveInt = 40478
    context_length: PositiveInt = 512  # number of learned positions
    num_layers: PositiveInt = 12
    embed_dim: PositiveInt = 768
    num_heads: PositiveInt = 12
    num_kv_heads: PositiveInt | None = None  # heads of keys and values, each shared by a group of queries; null: all
    mlp_dim: PositiveInt = 3072
    objective: Literal["causal", "masked", "prefix"] = "causal"  # what is predicted, and so who may see whom
    norm_position: Literal["post", "pre"] = "post"  # after each residual sum, or before each branch
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    activation: Literal["gelu", "swiglu"] = "gelu"
    positions: Literal["learned", "rotary"] = "learned"
    qk_norm: bool = False  # normalise queries and keys, head by head
    bias: bool = True  # in every affine map and LayerNorm
    tied_output: bool = True  # the token embedding is also the output projection
    logit_cap: PositiveFloat | None = None  # logits are bent into (-cap, cap) by a tanh
    dropout: Fraction = 0.1  # on the embeddings and on each residual branch
    attention_dropout: Fraction = 0.1  # on the attention probabilities
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; parameters are always float32
    # What computes causal attention; auto: the fastest that does the same (docs/performance.md)
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    scan_layers: bool = False  # one layer in a loop (compiles sooner) instead of all in a row (runs faster)
    remat: Literal["none", "full"] = "none"  # recompute each layer in the backward pass: less memory, more arithmetic
    loss_chunk: PositiveInt | Literal["auto"] = "auto"  # positions of each sequence whose logits exist at once
    special_tokens: NonNegativeInt = 0  # of the vocabulary the last so many, which fine-tuning appended
    num_classes: PositiveInt | None = None  # outputs of the classifier that fine-tuning adds; null: there is none
    classifier_dropout: Fraction = 0.1  # on the state that the classifier reads
    lora: LoraConfig | None = None  # null: none

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def loss_positions(self) -> int:
        """The number of ``loss_chunk``, or of an ``auto`` that nobody has resolved."""
        return 128 if self.loss_chunk == "auto" else self.loss_chunk

    @property
    def mask_id(self) -> int:
        """The token that stands for a hidden one, in the input of a masked model alone: one past the vocabulary."""
        return self.vocab_size

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        problems = []
        if self.embed_dim % self.num_heads:
            problems.append(
                f"model.num_heads={self.num_heads} does not divide model.embed_dim={self.embed_dim}; "
                "choose a width that is a multiple of the number of heads"
            )
        if self.num_heads % self.kv_heads:
            problems.append(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}; "
                "every head of keys serves as many heads of queries"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            problems.append(
                f"model.positions=rotary turns pairs of numbers, but a head is {self.head_dim} wide "
                f"(model.embed_dim={self.embed_dim} / model.num_heads={self.num_heads}); choose an even width"
            )
        problems += _attention_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class NearDuplicates(Section):
    """Documents that say nearly what an earlier one says, by MinHash (gpt1_jax/text/near_duplicates.py)."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5  # Jaccard similarity of the sets of n-grams of words
    ngram: PositiveInt = 5  # words
    permutations: Annotated[int, Field(ge=2)] = 128  # numbers in a signature


class Decontamination(Section):
    """Documents that hold a passage of an evaluation text (gpt1_jax/text/contamination.py)."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]  # the evaluation texts: files, as those of a source
    text_field: str = "text"
    ngram: PositiveInt = 13  # words of the shortest passage that counts
    min_words: PositiveInt = 8  # a text with fewer than ngram words, but so many, counts as a whole


class CleaningConfig(Section):
    """What happens to a document before it is kept."""

    fix_unicode: bool = True  # ftfy: mojibake, broken entities (the authors ran ftfy too)
    standardize: bool = False  # the authors' `text_standardize`: ASCII punctuation, spaces around it, white space
    deduplicate: bool = True  # drop a document whose text has been seen before, in any source
    near_duplicates: NearDuplicates | None = None  # drop what is nearly an earlier document; null: keep it
    decontaminate: Decontamination | None = None  # drop what holds evaluation texts; null: keep it
    min_chars: PositiveInt = 32  # after cleaning; a shorter document is dropped
    max_chars: PositiveInt = 10_000_000  # before and after cleaning; a longer document is dropped
    on_invalid: Literal["skip", "error"] = "skip"  # undecodable, binary or malformed input: count and go on, or stop

    @model_validator(mode="after")
    def _bounds(self) -> "CleaningConfig":
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"data.cleaning.min_chars={self.min_chars} is above data.cleaning.max_chars={self.max_chars}"
            )
        return self


class TokenizerConfig(Section):
    """SentencePiece BPE, trained from a sample of the corpus, or a given tokenizer of either kind.

    Deviation: the authors' byte-pair encoding lower-cases and tokenizes with spaCy first; this one is lossless.
    """

    file: str | None = None  # a SentencePiece model or a tokenizer.json, to use instead of training one
    sample_bytes: PositiveInt = 100_000_000  # at most so much of the training split is used to train it


class DataConfig(Section):
    """Where the corpus comes from and how it is prepared.

    Deviation: the paper's BooksCorpus is no longer distributed; the default is the embedded corpus.
    """

    root: str = "data/prepared"  # prepared corpora, a folder each
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = (PythonDocs(kind="python_docs"),)
    cleaning: CleaningConfig = CleaningConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01  # of the documents, chosen by their hash
    shard_tokens: PositiveInt = 100_000_000  # most tokens in one .tokens file, unless one document has more
    engine: Literal["local", "beam"] = "local"  # what prepares: this machine's processes, or a Beam runner
    beam_options: tuple[str, ...] = ()  # of the Beam pipelines, e.g. --runner=DataflowRunner
    workers: PositiveInt | None = None  # processes that clean and encode; null: one for each core
    windows: Literal["contiguous", "packed"] = "contiguous"  # packed: documents in a window do not see each other
    prefetch: PositiveInt = 2  # batches held on the devices ahead of the step
    verify: bool = True  # check every shard's SHA-256 when it is first opened; false on trusted storage
    readers: NonNegativeInt = 0  # threads that read windows at once beside the loader's

    @model_validator(mode="after")
    def _options_are_used(self) -> "DataConfig":
        if self.beam_options and self.engine != "beam":
            raise ValueError(
                f"data.beam_options={json.dumps(self.beam_options)} does nothing with data.engine={self.engine}; "
                "set data.engine=beam, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _schedules(self) -> "DataConfig":
        weights = [source.weight for source in self.sources]
        problems = [
            f"data.sources.{number}.weight={json.dumps(weight)}: a schedule begins at step 0; add a weight for it"
            for number, weight in enumerate(weights)
            if isinstance(weight, dict) and 0 not in weight
        ]
        if not problems:
            problems += [
                f"data.sources.0.weight={json.dumps(weights[0])}: from step {step} on every source has weight 0; "
                "give one of them a weight above 0 there"
                for step in sorted({step for weight in weights if isinstance(weight, dict) for step in weight})
                if not any(weight_at(weight, step) for weight in weights)
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SpikeConfig(Section):
    """Which losses are spikes, and what is left out then (Chowdhery et al. 2022, "PaLM", section 5.1)."""

    threshold: PositiveFloat = 20.0  # so many median absolute deviations above the median of the losses before
    window: Annotated[int, Field(ge=2)] = 128  # that many losses before
    skip: PositiveInt = 200  # batches left out: half of them before the spike, half from its own on
    max_rewinds: NonNegativeInt = 20  # of a run; at the next spike it stops


class TrainConfig(Section):
    """The length and the batch of the run (paper: 100 epochs, 64 random windows of 512 tokens an update).

    100 epochs over BooksCorpus, about 1.1 billion tokens, are about 3.3 million updates of 32,768 tokens.
    """

    steps: PositiveInt = 3_300_000
    batch_size: PositiveInt = 64  # sequences in one update
    context_length: PositiveInt | None = None  # tokens in a sequence; null: model.context_length
    accumulation: PositiveInt = 1  # micro-batches whose gradients are averaged into one update
    # In which slices and data add up gradients; auto: bfloat16 on TPUs and GPUs if model.dtype is that, else float32
    gradient_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Add up gradients of so many groups of rows, in order: the same bits on any number of devices that divides it
    deterministic_groups: PositiveInt | None = None
    log_every: PositiveInt = 100  # steps; the first and the last are always logged
    compilation_cache: str | None = "auto"  # folder of compiled functions; auto: in runs_dir; null: none is kept
    max_skipped_steps: PositiveInt = 10  # in a row, whose loss or gradient is not finite; then the run stops
    spikes: SpikeConfig | None = None  # go back to before a spike of the loss; null: train on
    double_check_every: NonNegativeInt = 0  # steps; each such step is computed twice and compared; 0: none is

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> "TrainConfig":
        _check_accumulation(self)
        rows = self.batch_size // self.accumulation
        if self.deterministic_groups and rows % self.deterministic_groups:
            raise ValueError(
                f"train.deterministic_groups={self.deterministic_groups} does not divide train.batch_size="
                f"{self.batch_size} / train.accumulation={self.accumulation}, that is {rows} rows"
            )
        return self


Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay", "inverse_square_root"]


class UpdateRule(Section):
    """Adam with decoupled weight decay (paper, section 4.1; betas, epsilon and clipping from the authors' code)."""

    rule: Literal["adamw", "authors", "lion", "adafactor", "muon"] = "adamw"  # authors: Adam as their code has it
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2  # of the run, at its end: warmup_stable_decay's descent
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # on matrices and embeddings, not on biases and gains
    clip_norm: PositiveFloat = 1.0  # a gradient of a larger global norm is scaled down to it


class OptimizerConfig(UpdateRule):
    """The rule and its rate in pre-training (paper, section 4.1)."""

    learning_rate: PositiveFloat = 2.5e-4  # the peak
    schedule: Schedule = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 2000  # linear from 0, then the schedule, to train.steps


class FinetuneOptimizerConfig(UpdateRule):
    """The rule and its rate in fine-tuning (paper, section 4.1, Fine-tuning details)."""

    learning_rate: PositiveFloat = 6.25e-5  # the peak
    schedule: Schedule = "linear"
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.002  # of the updates
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # each layer's rate is so many times that of the next one up


class MeshConfig(Section):
    """Sizes of the mesh axes; one of data to tensor may be null and then takes the devices that are left."""

    slices: PositiveInt | None = None  # groups of devices that a slower network joins; null: as the devices say
    data: PositiveInt | None = None  # batch split, parameters replicated
    fsdp: PositiveInt | None = 1  # batch split, parameters split too
    sequence: PositiveInt | None = 1  # positions of a sequence split
    tensor: PositiveInt | None = 1  # heads, MLP and vocabulary split
    shard_optimizer: bool = False  # split the optimizer's state over data (ZeRO-1)

    @property
    def axes(self) -> dict[str, int | None]:
        """Sizes of the axes within a slice, the slowest to communicate first."""
        return {axis: getattr(self, axis) for axis in ("data", "fsdp", "sequence", "tensor")}

    @model_validator(mode="after")
    def _one_free(self) -> "MeshConfig":
        free = [f"mesh.{axis}" for axis, size in self.axes.items() if size is None]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are both null; only one axis can take the devices that are left")
        return self


class CheckpointConfig(Section):
    """When a checkpoint is written and which are kept."""

    every: PositiveInt = 1000  # steps; the last step is always saved
    keep: PositiveInt = 3  # the newest ones kept
    keep_every: PositiveInt | None = None  # steps; multiples of it are kept for good


class EvaluationConfig(Section):
    """Perplexity on the validation split while training, and how windows overlap."""

    every: PositiveInt = 1000  # steps; the last step is always evaluated
    batch_size: PositiveInt = 64  # windows
    stride: PositiveInt | None = None  # tokens between windows; null: the context length, so none overlap
    max_tokens: PositiveInt | None = None  # tokens of the split used while training; null: all of it
    mask_period: PositiveInt = 7  # of a masked model: one token in so many is hidden at once, each of them once
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("The",)  # sampled at the end of a run
    sample_tokens: PositiveInt = 128  # new tokens of each sample, at most


class LoggingConfig(Section):
    """What is written about a run beside metrics.jsonl."""

    tensorboard: bool = True
    progress: Literal["auto", "bar", "plain"] = "auto"  # auto: a bar on a terminal, else plain lines
    peak_flops: PositiveFloat | None = None  # FLOP/s of one device, for MFU where the device is not known by name


class DistributedConfig(Section):
    """Which process of a job this is; with none of the first three, found as JAX finds it on TPUs, SLURM and so on."""

    coordinator: str | None = None  # host:port at which the others find process 0
    processes: PositiveInt | None = None  # of the job, one for each host; 1: this one alone, nothing is looked for
    process: NonNegativeInt | None = None  # number of this one, from 0
    timeout: PositiveFloat = 120.0  # seconds that the processes wait for each other at the start

    @model_validator(mode="after")
    def _together(self) -> "DistributedConfig":
        given = {"coordinator": self.coordinator, "processes": self.processes, "process": self.process}
        shown = ", ".join(f"distributed.{key}={'null' if value is None else value}" for key, value in given.items())
        if self.processes == 1 and self.coordinator is None and not self.process:
            return self
        if None in given.values() and any(value is not None for value in given.values()):
            raise ValueError(f"{shown}: give all three, or none of them to have them found")
        if self.process is not None and self.processes is not None and self.process >= self.processes:
            raise ValueError(f"{shown}: the processes are numbered from 0 to {self.processes - 1}")
        if self.coordinator is not None:
            address = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})", self.coordinator)
            if not address or not 0 < int(address[2]) < 2**16:
                raise ValueError(
                    f"distributed.coordinator={self.coordinator}: not an address; give host:port, such as "
                    "10.0.0.1:8476, an IPv6 address in brackets"
                )
        return self


class DeadlineConfig(Section):
    """Seconds without progress after which a run is taken for stuck, and ends with exit code 5."""

    start: PositiveFloat = 3600.0  # finding the devices; a part of the preparation; a restore; compilation
    step: PositiveFloat = 600.0  # an update, its batch, and the metrics of the one before
    evaluation: PositiveFloat = 1800.0  # a batch of an evaluation; all that follows the last
    save: PositiveFloat = 1800.0  # a checkpoint


class FinetuneModelConfig(Section):
    """What fine-tuning changes of a model, and how it is computed; the keys are those of :class:`ModelConfig`."""

    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    classifier_dropout: Fraction = 0.1
    lora: LoraConfig | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    scan_layers: bool = False
    remat: Literal["none", "full"] = "none"

    @model_validator(mode="after")
    def _attention_fits(self) -> "FinetuneModelConfig":
        if problems := _attention_problems(self):
            raise ValueError("\n".join(problems))
        return self


class FinetuneTrainConfig(Section):
    """Length, batch and loss of fine-tuning (paper, section 4.1; the weight of the auxiliary loss is its lambda)."""

    epochs: PositiveInt = 3
    batch_size: PositiveInt = 32  # examples in one update
    accumulation: PositiveInt = 1  # micro-batches whose gradients are averaged into one update
    auxiliary: Annotated[float, Field(ge=0)] = 0.5  # weight of the language-model loss beside that of a classifier
    frozen_layers: NonNegativeInt = 0  # the lowest so many, and the embeddings, are not trained
    from_scratch: bool = False  # begin with drawn weights in the place of the base's, to see what its training is worth
    log_every: PositiveInt = 10  # updates
    gradient_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compilation_cache: str | None = "auto"
    max_skipped_steps: PositiveInt = 10
    double_check_every: NonNegativeInt = 0

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> "FinetuneTrainConfig":
        _check_accumulation(self)
        return self


class FinetuneEvaluationConfig(Section):
    """How a fine-tuned model is measured."""

    batch_size: PositiveInt = 64  # sequences
    resamples: NonNegativeInt = 1000  # of the examples, for the 95 % interval of each metric; 0: no intervals
    # Texts, a document each, whose perplexity before and after is reported; empty: the base's validation split
    texts: tuple[str, ...] = ()
    max_tokens: PositiveInt | None = 200_000  # so many of them at most; null: all


class _Recipe(Section):
    """A file of data/tasks/, but for the task itself."""

    name: RunName = "finetuned"
    runs_dir: str = "runs"
    base: str | None = None  # the run to begin with: pre-trained, imported, or fine-tuned itself
    base_step: NonNegativeInt | None = None  # which checkpoint of it; null: the newest, of a fine-tuned one the best
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)  # several: a run for each, and their mean and median
    model: FinetuneModelConfig = FinetuneModelConfig()
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: FinetuneEvaluationConfig = FinetuneEvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()
    deadlines: DeadlineConfig = DeadlineConfig()

    @property
    def run_dir(self) -> epath.Path:
        """Folder of the run, or with several seeds of the runs."""
        return epath.Path(self.runs_dir) / self.name

    @model_validator(mode="after")
    def _seeds_differ(self) -> "_Recipe":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: give every seed once")
        return self


class FinetuneConfig(_Recipe):
    """What ``gpt1 finetune`` reads: a task, the run to begin with, and the paper's settings (section 4.1)."""

    task: LearnableTask


class Recipe(_Recipe):
    """What ``gpt1 evaluate --task`` reads: the same file, and the forms that are only asked without training."""

    task: AnyTask


class Config(Section):
    """A whole run. ``name`` is its folder under ``runs_dir``; configuration and ``seed`` fix its result."""

    name: RunName = "gpt1"
    runs_dir: str = "runs"
    seed: Seed = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    finetune: FinetuneConfig | None = None  # what made a fine-tuned run; null: it was pre-trained

    @property
    def run_dir(self) -> epath.Path:
        """Folder of the run, local or in a bucket."""
        return epath.Path(self.runs_dir) / self.name

    @property
    def task(self) -> LearnableTask | None:
        """What the run was fine-tuned on; None: it was pre-trained."""
        return self.finetune.task if self.finetune else None

    @property
    def context_length(self) -> int:
        """Tokens in a training sequence."""
        return self.train.context_length or self.model.context_length

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        problems = []
        if self.context_length > self.model.context_length:
            problems.append(
                f"train.context_length={self.context_length} is longer than the model's positions, "
                f"model.context_length={self.model.context_length}"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            problems.append(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is longer than the run, "
                f"train.steps={self.train.steps}"
            )
        spikes, reach = self.train.spikes, (self.checkpoint.keep - 1) * self.checkpoint.every
        if spikes and spikes.skip // 2 > reach:
            problems.append(
                f"train.spikes.skip={spikes.skip} goes back {spikes.skip // 2} steps, and checkpoint.keep="
                f"{self.checkpoint.keep} with checkpoint.every={self.checkpoint.every} reaches back {reach}; raise one"
            )
        context = f"{'train' if self.train.context_length else 'model'}.context_length={self.context_length}"
        stride = self.evaluation.stride
        if stride is not None and stride > self.context_length:
            problems.append(
                f"evaluation.stride={stride} is longer than {context}: tokens between windows would be left out"
            )
        if self.evaluation.sample_tokens >= self.context_length:
            problems.append(
                f"evaluation.sample_tokens={self.evaluation.sample_tokens} leaves no room for a prompt in {context}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that reads back to an equal object."""
        return as_yaml(self.model_dump(mode="json"))


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which also quotes the words that would be read as numbers, such as a run's name ``1e5``."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+.0123456789"))


def as_yaml(values: Mapping[str, Any]) -> str:
    """Keys and values as YAML that reads back to the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any, key: str = "") -> Iterable[tuple[str, Any, Any]]:
    """The dotted keys in which two configurations differ, dumped to JSON, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
