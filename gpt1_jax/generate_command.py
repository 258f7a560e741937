"""The command ``gpt1 generate``: a text that goes on, the best text by beam search, or a conversation."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer

from gpt1_jax.console import Json, RunFolder, print_json, say
from gpt1_jax.errors import UserError

# JAX takes seconds to import, so what needs it is imported where it is used, and --help is quick.
if TYPE_CHECKING:
    from gpt1_jax.generation.sampling import Sampling
    from gpt1_jax.training.run import Run

_LENGTH_PENALTY = 0.6  # of Wu et al. 2016


def generate(
    run: RunFolder,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from, or of a text-to-text run the source; may be empty.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="New tokens, at most; else what a fine-tuned run's task says, or 64.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token; else 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens whose probabilities reach p; else 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Of the random draws; else 0.")] = None,
    beams: Annotated[
        int | None,
        typer.Option(
            help="Search with so many hypotheses instead of drawing, as a text-to-text run does whose task says so; "
            "printed at the end."
        ),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(help=f"Of --beams: higher prefers longer texts; else what the task says, or {_LENGTH_PENALTY}."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation: each line of the input is a question.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a text, printed as it is generated, up to the end of the document; or turn one into another, or talk."""
    from gpt1_jax.generation.beam import check_beams
    from gpt1_jax.generation.prompts import beams_of, new_tokens
    from gpt1_jax.generation.sampling import Sampling
    from gpt1_jax.training.run import open_run

    drawing = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    drawn_with = [name for name, value in drawing.items() if value is not None]
    _check_options(prompt, chat, beams, length_penalty, drawn_with)
    sampling = Sampling(1.0 if temperature is None else temperature, top_k, 1.0 if top_p is None else top_p)
    if beams is not None:
        check_beams(beams, length_penalty or 0)
    opened = open_run(run)
    its_beams, its_penalty = beams_of(opened.config)
    if not drawn_with:
        beams = beams or its_beams
    alpha = next(value for value in (length_penalty, its_penalty, _LENGTH_PENALTY) if value is not None)
    count = new_tokens(opened.config) if tokens is None else tokens
    show = _quiet if as_json else _show
    if prompt is None:
        answer = _converse(opened, sampling, count, seed or 0, show)
    else:
        asked = _asked(opened, prompt, count)
        show(asked.shown)
        if beams is None:
            answer = _drawn(opened, asked, sampling, count, seed or 0, show)
        else:
            answer = _searched(opened, asked, beams, alpha, count, show)
        answer = {"prompt": prompt, **answer}
    if as_json:
        print_json(answer)


class _Asked(NamedTuple):
    """A prompt as the model gets it."""

    tokens: np.ndarray
    shown: str  # what is printed before what follows
    context: np.ndarray  # the tokens whose text what follows goes on from


def _check_options(
    prompt: str | None, chat: bool, beams: int | None, length_penalty: float | None, drawing: list[str]
) -> None:
    """Checks that the options go together."""
    if prompt is None and not chat:
        raise UserError('PROMPT is missing: give the text to go on from, "" for the start of a document, or --chat')
    if prompt is not None and chat:
        raise UserError(
            f"PROMPT {prompt!r} and --chat exclude each other: a conversation reads its questions by itself"
        )
    if beams is None and length_penalty is not None:
        raise UserError(f"--length-penalty {length_penalty} is of beam search alone: give --beams N, or leave it out")
    others = [*drawing, *(["--chat"] if chat else [])]
    if beams is not None and others:
        raise UserError(
            f"--beams {beams} and {', '.join(others)} exclude each other: beam search draws nothing, and its text is "
            "there at the end alone"
        )


def _asked(run: "Run", prompt: str, count: int) -> _Asked:
    """The prompt in the form of the run, with a warning where some of it is cut off."""
    from gpt1_jax.generation.prompts import prompt_ids, turns_texts

    ids, dropped = prompt_ids(run.config, run.tokenizer, prompt, count)
    source = turns_texts(run.config)
    if dropped:
        whole, room = len(run.tokenizer.encode(prompt)), len(ids) - (2 if source else 0)
        say(
            f"warning: the prompt has {whole} tokens, the context has room for {room}: its "
            f"{'end' if source else 'beginning'} is cut off"
        )
    # A target stands for itself; what goes on from a text may begin with the space after it.
    return _Asked(ids, "", ids[:0]) if source else _Asked(ids, prompt, ids)


def _drawn(
    run: "Run", asked: _Asked, sampling: "Sampling", count: int, seed: int, show: Callable[[str], None]
) -> dict[str, Any]:
    """Draws what follows, and shows it as it comes."""
    from gpt1_jax.generation.decode import stream
    from gpt1_jax.generation.detokenize import Detokenizer

    started = time.perf_counter()
    pieces = stream(
        run.config,
        run.params,
        [asked.tokens],
        sampling=sampling,
        max_tokens=count,
        seed=seed,
        separator_id=run.tokenizer.separator_id,
    )
    detokenizer = Detokenizer(run.tokenizer.decode, asked.context)
    completion, new_tokens = "", 0
    for (new,) in pieces:
        new_tokens += len(new)
        text = detokenizer.push(new)
        show(text)
        completion += text
    rest = detokenizer.flush()
    show(rest + "\n")
    return {"completion": completion + rest, "tokens": new_tokens, "seconds": time.perf_counter() - started}


def _searched(
    run: "Run", asked: _Asked, beams: int, alpha: float, count: int, show: Callable[[str], None]
) -> dict[str, Any]:
    """Searches for what follows, and shows it at the end."""
    from gpt1_jax.generation.beam import beam_search
    from gpt1_jax.generation.detokenize import Detokenizer

    started = time.perf_counter()
    (found,) = beam_search(
        run.config,
        run.params,
        [asked.tokens],
        beams=beams,
        length_penalty=alpha,
        max_tokens=count,
        separator_id=run.tokenizer.separator_id,
    )
    detokenizer = Detokenizer(run.tokenizer.decode, asked.context)
    completion = detokenizer.push(found.tokens) + detokenizer.flush()
    show(completion + "\n")
    seconds = time.perf_counter() - started
    return {"completion": completion, "tokens": len(found.tokens), "score": found.score, "seconds": seconds}


def _converse(run: "Run", sampling: "Sampling", count: int, seed: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Talks, with whoever is at standard input."""
    from gpt1_jax.generation.chat import COMMANDS, Chat, check_chat

    check_chat(run, count)
    if sys.stdin.isatty():
        say(f"{COMMANDS}; Ctrl-C ends an answer.")
    started = time.perf_counter()
    chat = Chat(run, sampling, count, seed, read=_line, write=show, note=say)
    chat.converse()
    seconds = time.perf_counter() - started
    return {"messages": [message._asdict() for message in chat.messages], "tokens": chat.tokens, "seconds": seconds}


def _line() -> str | None:
    """The next line of standard input without its end, or None; asks for it where somebody types."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8: {error}; convert it first") from None
    return line.rstrip("\r\n") if line else None


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _quiet(text: str) -> None:
    """With --json, standard output is for the object."""
