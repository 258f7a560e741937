"""``gpt1`` with a fault in what it computes: the kind of fault and its settings in JSON, then the command.

nan: ``steps``, each with a number that is put into one place of its gradient, within the traced step.
noise: ``steps``; where an undisturbed run reads their examples, there are random tokens.
flip: the ``number`` of a step, ``time`` (0 or 1: which of its two computations), ``process``, ``device`` (of that
process) and ``leaf``: one bit of what that device has computed is another.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt1_jax import cli
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.training import loop, step

BATCH = 8  # of the runs that this is for


def nan(steps: list[tuple[int, float]]) -> None:
    """Puts a number into one place of the gradient of a layer's matrix."""
    update = step.update

    def with_fault(config: Any, optimizer: Any, state: Any, found: Any) -> Any:
        loss, grads = found
        kernel = grads["blocks"]["mlp_in"]["kernel"]
        for number, value in steps:
            kernel = kernel.at[0, 1, 2].set(jnp.where(state.step + 1 == number, value, kernel[0, 1, 2]))
        grads["blocks"]["mlp_in"]["kernel"] = kernel
        return update(config, optimizer, state, (loss, grads))

    step.update = with_fault


def noise(steps: list[int]) -> None:
    """Makes noise of some examples, wherever they are read."""
    examples = RandomWindows.examples
    bad = np.concatenate([np.arange(BATCH * (number - 1), BATCH * number) for number in steps])

    def with_fault(windows: RandomWindows, indices: Any) -> np.ndarray:
        found = examples(windows, indices)
        drawn = np.random.default_rng(0).integers(0, 320, found.shape, found.dtype)
        return np.where(np.isin(indices, bad)[:, None], drawn, found)

    RandomWindows.examples = with_fault  # pyrefly: ignore[bad-assignment]  # self has another name


def flip(number: int, time: int, process: int, device: int, leaf: str) -> None:
    """Flips the lowest bit of the first number that a device holds of a leaf of the new state."""
    compile_train_step = loop.compile_train_step

    def flipped(path: tuple, array: jax.Array) -> jax.Array:
        if leaf not in jax.tree_util.keystr(path):
            return array
        parts = []
        for shard in array.addressable_shards:
            data = np.array(shard.data)
            if jax.process_index() == process and shard.device == jax.local_devices()[device]:
                data.view(np.uint32).flat[0] ^= 1
            parts.append(jax.device_put(data, shard.device))
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    def compile_and_wrap(*arguments: Any) -> Callable:
        compiled, times = compile_train_step(*arguments), []

        def with_fault(state: Any, batch: Any) -> tuple:
            with jax.transfer_guard("allow"):
                is_it = int(state.step) + 1 == number
                state, metrics = compiled(state, batch)
                times.extend([None] * is_it)
                if is_it and len(times) == time + 1:
                    state = jax.tree.map_with_path(flipped, state)
            return state, metrics

        return with_fault

    loop.compile_train_step = compile_and_wrap  # pyrefly: ignore[bad-assignment]  # called as what it gives is


if __name__ == "__main__":
    kind, settings = sys.argv.pop(1), json.loads(sys.argv.pop(1))
    {"nan": nan, "noise": noise, "flip": flip}[kind](**settings)
    cli.main()
