"""What the tests share: a tiny corpus with a real tokenizer, and the smallest model."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt1_jax.config import Config, parse_config
from gpt1_jax.data.manifest import MANIFEST, FileSum, Manifest, Shard, SourceCounts, SplitCounts, sha256_of
