"""What others wrote promotes types: it is not held to the strictness of `tests/`."""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax

jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "trainers"))
