"""One process of a job that reads global batches: prints what each of its devices holds, as JSON.

python read_batches.py CORPUS DEVICES DATA_AXIS PROCESSES PROCESS PORT
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.loader import Batches
from gpt1_jax.data.windows import RandomWindows


class Counted:
    """Notes which examples are read."""

    def __init__(self, examples):
        self.context_length = examples.context_length
        self.read = []
        self._examples = examples

    def examples(self, indices):
        self.read += indices.tolist()
        return self._examples.examples(indices)


def main(folder, devices, data_axis, processes, process, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh((data_axis, jax.device_count() // data_axis), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    examples = Counted(RandomWindows(Corpus(folder), 8, seed=3, weights=[1.0, 2.0]))
    held = {}
    with Batches(examples, 16, sharding, position=32, prefetch=1) as batches:
        for _ in range(3):
            position, batch = next(batches)
            for shard in batch.addressable_shards:
                rows = range(*shard.index[0].indices(16))
                held |= {position + i: row for i, row in zip(rows, np.asarray(shard.data).tolist(), strict=True)}
    print(json.dumps({"held": held, "read": examples.read}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
