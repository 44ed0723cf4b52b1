"""What the processes of test_torchrun.py import: the server of forks does so once for all of them."""

import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import lab.curves  # noqa: F401
import lab.torchrun  # noqa: F401
import tests.test_train  # noqa: F401
from tasks import load_examples

load_examples("tinyworld", "train")  # the bundled world
