"""What the tests of trainers' contracts share."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from octavo import optim

KERNELS = {"tpu": "tpu", "gpu": "triton"}


def auto_mesh(**axes: int) -> Mesh:
    """With automatic axes, as most trainers make it."""
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types)


def expect_equal(found: Any, expected: Any, rate: float) -> None:
    """Trees of parameters after a few steps of at most `rate`.

    Two programs may round a sum differently, and so a code at the boundary: very few
    values then differ by a share of a step, which is 1/127 of it or less.
    """

    def of(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=rate / 127)
        close = np.isclose(a, b, rtol=2e-6, atol=1e-6 * rate)
        assert close.mean() > 0.998

    jax.tree.map(of, found, expected)


class Binds:
    """The optimizers that are bound: a trainer's hands do not give them back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[optim.Transformation] = []
        bind = optim.Transformation.bind

        def noted(tx: optim.Transformation, params: Any) -> optim.Transformation:
            self.made.append(bind(tx, params))
            return self.made[-1]

        monkeypatch.setattr(optim.Transformation, "bind", noted)

    def expect_kernels(self, params: Any, path: str, spec: Any) -> None:
        """What the last one does with a leaf on TPU and GPU."""
        shapes = jax.eval_shape(lambda: params)
        for platform, kernel in KERNELS.items():
            report = optim.explain(self.made[-1], shapes, None, platform)
            row = next(row for row in report.rows if row.path == path)
            assert (row.backend, row.spec, row.aligned) == (kernel, spec, True)
