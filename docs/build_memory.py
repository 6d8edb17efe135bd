"""Draw docs/img/memory.png: what training Llama 3 8B keeps on its devices.

Weights and gradients from shapes, the state from `memory_report`; nothing is allocated.
Run from anywhere: `python docs/build_memory.py`.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from octavo import optim

OUT = Path(__file__).parent / "img" / "memory.png"
LAYERS, WIDTH, HIDDEN, KEYS, VOCABULARY = 32, 4096, 14336, 8 * 128, 128256

# Okabe and Ito's colours, which differ for colour-blind readers, too.
BLUE, ORANGE, SKY = "#0072b2", "#e69f00", "#56b4e9"
PARTS = {"weights": BLUE, "gradients": SKY, "optimizer's state": ORANGE}


class Bar(NamedTuple):
    """A way to train, and its bytes: of weights, gradients and state."""

    name: str
    sizes: tuple[int, int, int]


def llama3_8b(dtype: Any) -> dict[str, Any]:
    """The shapes of its parameters; those of the layers stacked, as scan keeps them."""
    layer = {
        "attention_norm": (WIDTH,),
        "query": (WIDTH, WIDTH),
        "key": (WIDTH, KEYS),
        "value": (WIDTH, KEYS),
        "attention_out": (WIDTH, WIDTH),
        "mlp_norm": (WIDTH,),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "layers": {name: (LAYERS, *shape) for name, shape in layer.items()},
        "norm": (WIDTH,),
        "head": (WIDTH, VOCABULARY),
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def bar(name: str, tx: optax.GradientTransformation, dtype: Any) -> Bar:
    """Its bytes, gradients in the type of the weights."""
    params = llama3_8b(dtype)
    leaves = jax.tree.leaves(params)
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return Bar(name, (weights, weights, optim.memory_report(tx, params).bytes))


def bars() -> list[Bar]:
    """The three ways that are drawn."""
    ours = optim.adamw(1e-4, layer_axes=lambda path: 0 if "layers/" in path else None)
    return [
        bar("optax.adamw\nfloat32 weights", optax.adamw(1e-4), jnp.float32),
        bar("optim.adamw\nfloat32 weights", ours, jnp.float32),
        bar("optim.adamw\nbfloat16 weights", ours, jnp.bfloat16),
    ]


def draw(shown: list[Bar], out: Path) -> None:
    """A bar for each way, in parts, with its figures."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False})
    figure, axes = plt.subplots(figsize=(8, 3.3))
    for row, (_, sizes) in enumerate(shown):
        left = 0.0
        for (part, colour), size in zip(PARTS.items(), sizes, strict=True):
            width = size / 1e9
            label = part if row == 0 else None
            axes.barh(
                row, width, 0.62, left, color=colour, edgecolor="white", label=label
            )
            ink = "white" if colour == BLUE else "black"
            middle = left + width / 2
            axes.text(middle, row, f"{width:.1f}", color=ink, ha="center", va="center")
            left += width
        axes.text(left + 1.5, row, f"{left:.1f} GB", va="center", fontweight="bold")
    axes.set_yticks(range(len(shown)), [x.name for x in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 148)
    axes.set_xlabel("GB (10⁹ bytes), of all devices together; activations come on top")
    axes.spines["right"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False)
    figure.tight_layout()
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    found = bars()
    draw(found, parser.parse_args().out)
    for name, sizes in found:
        print(
            name.replace("\n", ", "), [f"{x / 1e9:.2f}" for x in (*sizes, sum(sizes))]
        )
