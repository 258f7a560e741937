"""One process of a job that reads global batches: prints what each of its devices holds, as JSON.

Two sources, of which one changes its weight on the way, in packed windows: with each row's tokens goes where the
documents of each begin, as the devices make it of the batch.

python read_batches.py '{"folder": CORPUS, ...}', the arguments of main
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.loader import Batches
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.model.segments import document_starts


class Counted:
    """Notes which examples are read."""

    def __init__(self, examples):
        self.context_length = examples.context_length
        self.read = []
        self._examples = examples

    def examples(self, indices):
        self.read += indices.tolist()
        return self._examples.examples(indices)


def main(folder, schedule, end, devices, data_axis, processes, process, port, readers, position):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh((data_axis, jax.device_count() // data_axis), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    weights = [1.0, {int(example): weight for example, weight in schedule.items()}]
    examples = Counted(RandomWindows(Corpus(folder, readers=readers), 8, seed=3, weights=weights))
    starts_of = jax.jit(lambda tokens: document_starts(tokens % 5, 0), out_shardings=sharding)  # a fifth are separators
    held = {}
    with Batches(examples, 16, sharding, position=position, prefetch=1) as batches:
        for _ in range(position, end, 16):
            first, batch = next(batches)
            for shard, starts in zip(batch.addressable_shards, starts_of(batch).addressable_shards, strict=True):
                rows = range(*shard.index[0].indices(16))
                both = np.stack([np.asarray(shard.data), np.asarray(starts.data)], axis=1)
                held |= {first + i: row for i, row in zip(rows, both.tolist(), strict=True)}
    print(json.dumps({"held": held, "read": examples.read}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
