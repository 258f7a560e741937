"""What a kernel written by hand does: the compiler has no cost for it, so its arithmetic and its bytes are counted."""

import json
import math
import re
from collections.abc import Sequence

from gpt1_jax.planning.hlo import Instruction, shapes, type_bytes

KERNEL = "tpu_custom_call"

# The part of the peak rate that an attention kernel is taken to reach. Heads are 64 wide, which fills half of a matrix
# unit, and for each score the vector units exponentiate, mask and sum while the matrix units wait.
SHARE_OF_PEAK = 0.3

# Products of [T, D] by [D, T] or [T, T] by [T, D] in the kernels of JAX's splash attention, of 2 T T D FLOP each head.
# The gradients make the scores again.
_ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(kernel: Instruction, operands: Sequence[Instruction]) -> float | None:
    """FLOPs of a kernel: what it says of itself, else those of an attention that is known by its name, else None.

    Blocks of scores that causality leaves out of the attention are left out here.
    """
    said = re.search(r'"cost_estimate":(\{[^}]*\})', kernel.attributes)
    if said:
        return float(json.loads(said[1])["flops"])
    named = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", kernel.name + kernel.attributes)
    arrays = [array for operand in operands for array in shapes(operand.type)]
    queries_keys = [dimensions for bits, dimensions in arrays if bits in (16, 32) and len(dimensions) >= 3][:2]
    masks = [dimensions for bits, dimensions in arrays if bits == 8]
    if named is None or len(queries_keys) < 2 or not masks:
        return None
    queries, keys = queries_keys
    # The gradient of the keys may bring that of the queries with it, a part for each block of keys.
    fused = named[1] == "dkv" and any(len(result) > len(queries) for _, result in shapes(kernel.type))
    blocks = masks[0][-1]
    computed = (blocks + 1) / (2 * blocks)
    return (_ATTENTION[named[1]] + fused) * 2.0 * math.prod(queries) * keys[-2] * computed


def moved_bytes(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """Bytes that an instruction without a cost must at least read and write."""
    if instruction.opcode == "custom-call":
        return instruction.bytes + sum(type_bytes(operand.type) for operand in operands)
    if instruction.opcode == "dynamic-update-slice":  # in place: what is written, and not into what
        return 2 * operands[1].bytes
    return 2 * instruction.bytes
