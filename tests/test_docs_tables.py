"""What pages say in tables and figures is what the code does."""

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _compiled import collectives
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim, schedules
from octavo.pallas_kernels import FORMATS, Format
from octavo.pallas_kernels.formats import BFloat16, Bits8, Linear8, MuLaw, widened
from octavo.pallas_kernels.rounding import NEAREST, NOISE_BITS

from meshes import mesh_of
from pages import blocks

ROOT = Path(__file__).parents[1]


def rows_of(page: str, start: str) -> list[list[str]]:
    """The cells of a page's table rows that start so."""
    lines = (ROOT / page).read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| {start}")]
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows]


def test_the_table_of_options_is_complete() -> None:
    names = [row[0] for row in rows_of("docs/options.md", "`")]
    assert names == list(optim.Options.__annotations__)


PAGES = ["adamw", "sgd", "lamb", "lars", "lion", "rmsprop", "adagrad", "adamax"]


@pytest.mark.parametrize("optimizer", [*PAGES, "ademamix"])
def test_the_table_of_arguments_is_complete(optimizer: str) -> None:
    page = f"docs/optimizers/{optimizer.removesuffix('w')}.md"
    rows = [(re.findall(r"\w+", row[0]), row[1]) for row in rows_of(page, "`")]
    parameters = inspect.signature(getattr(optim, optimizer)).parameters
    own = [name for name in parameters if name not in optim.Options.__annotations__]
    shown = [name for names, _ in rows for name in names]
    assert sorted(shown) == sorted(own)
    for names, default in rows:
        for name, value in zip(names, re.split(r", (?=\d)", default), strict=False):
            known = parameters[name].default
            said = value.partition(" (")[0].partition(":")[0].strip('`"')
            expected = "" if known is inspect.Parameter.empty else known
            if isinstance(known, float):
                assert float(said) == known, name
            else:
                assert said == str(expected), name


def test_the_tables_of_presets_say_what_the_code_does() -> None:
    """The calls, and in the other tables eps and the weight decay."""
    rows = [r for kind in ("lamb", "lars") for r in rows_of(_BATCHES, f"`{kind}-")]
    calls = {row[0]: row[2].split("`")[0] for row in rows if len(row) == 3}
    shown = {row[0]: row[1:3] for row in rows if len(row) > 3}
    assert sorted(calls) == sorted(shown) == sorted(optim.PRESETS)
    for preset_name, preset in optim.PRESETS.items():
        call, function = calls[preset_name], preset.optimizer
        assert call.partition("(")[0] == function.__name__
        assert eval(call, {function.__name__: dict}) == preset.arguments
        parameters = inspect.signature(function).parameters
        used = {k: p.default for k, p in parameters.items()} | preset.arguments
        known = [used.get("eps", 0.0), used["weight_decay"]]
        assert [float(cell) for cell in shown[preset_name]] == known


_BATCHES = "docs/large_batch.md"


def test_the_rates_of_the_lamb_paper_follow_its_rules() -> None:
    rows = [row for row in rows_of(_BATCHES, "") if row[2].startswith("5e-3")]
    assert len(rows) == 7
    for batch, steps, rate, warmup, _ in rows:
        samples, count = int(batch.replace(",", "")), int(steps.replace(",", ""))
        assert count == 512_000_000 // samples
        scaled = schedules.scale_lr(5e-3, samples, 32_768, rule="sqrt")
        assert scaled == pytest.approx(eval(rate.replace("^", "**")))
        assert eval(warmup) == 3_125 / count


def worst(
    form: Format,
    low: float,
    high: float = 1.0,
    power: int = 1,
    noise: int = NEAREST,
    top: float = 1.0,
) -> float:
    """Largest relative error of x**(1 / power), from low to high of the largest."""
    root = np.geomspace(low, high, 200_001)[:-1]
    x = jnp.asarray(root**power * top, jnp.float32)
    scale = form.scale(form.magnitude(jnp.full(1, top)))
    codes = widened(form.encode(x, scale, noise).astype(form.dtype))
    got = np.asarray(form.decode(codes, scale), float) / top
    return float(np.abs(got ** (1 / power) / root - 1).max())


# The noise that rounds up furthest.
_UP = (1 << NOISE_BITS) - 1


@pytest.mark.parametrize(
    ("form", "low", "noise", "error"),
    [
        (BFloat16(), 1e-6, NEAREST, 1 / 257),
        (BFloat16(), 1e-6, _UP, 1 / 128),
        (MuLaw(16), 0.1, _UP, 1 / 2048),
        # The steps after y = 4 and y = 2, and within an octave of 1.
        (MuLaw(8), 3 / 14.75, _UP, 1 / 24),
        (MuLaw(8), 1 / 14.75, _UP, 1 / 16),
        (MuLaw(8), 5 / 472, _UP, 1 / 5),
    ],
)
def test_worst_errors_that_follow_the_size(
    form: Format, low: float, noise: int, error: float
) -> None:
    # The largest noise is less than a whole unit, and sizes are up to 4e-5 apart.
    assert worst(form, low, noise=noise) == pytest.approx(error, abs=6e-5)


@pytest.mark.parametrize("noise", [0, _UP])
@pytest.mark.parametrize("relative", [True, False])
def test_the_error_of_linear8_is_at_most_a_127th_of_the_largest(
    relative: bool, noise: int
) -> None:
    form, x = Linear8(relative), jnp.linspace(-1.0, 1.0, 200_001)
    scale = form.scale(form.magnitude(jnp.ones(1)))
    codes = widened(form.encode(x, scale, noise).astype(form.dtype))
    error = np.abs(np.asarray(form.decode(codes, scale)) - np.asarray(x)).max()
    assert error == pytest.approx(1 / 127, rel=2e-3)


def percent(cells: list[str]) -> list[float]:
    """The numbers of cells like `6.2 %`."""
    return [float(cell.removesuffix("%")) / 100 for cell in cells]


def test_worst_errors_of_bits8_are_those_of_the_table() -> None:
    """With the largest y anywhere between two powers of 2: of v, eight octaves."""
    (lows,) = rows_of("docs/formats.md", "√v down to")
    (errors,) = rows_of("docs/formats.md", "worst relative error of √v")
    eighths = 1 + np.arange(512) / 64
    tops = 2.0 ** (eighths // 1) * (1 + eighths % 1)
    for low, error in zip(lows[1:], percent(errors[1:]), strict=True):
        least = min(float(low), 0.999)
        found = max(
            worst(Bits8(), least, power=2, noise=noise, top=top)
            for top in (tops if least > 0.9 else tops[::4])
            for noise in (0, _UP)
        )
        assert found == pytest.approx(error, rel=0.03)  # two digits


@pytest.mark.parametrize("signed", [True, False])
def test_worst_errors_of_dynamic8_are_those_of_the_table(signed: bool) -> None:
    (errors,) = rows_of("docs/formats.md", f"{'first' if signed else 'second'} moments")
    for j, error in enumerate(percent(errors[1:7])):
        found = worst(FORMATS["dynamic8"](signed, False), 10.0 ** (-j - 1), 10.0**-j)
        assert found == pytest.approx(error, rel=0.03)  # two digits


def test_the_picture_of_formats_shows_these_errors() -> None:
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(ROOT / "docs/build_formats.py"))["worst_errors"]
    sizes = np.geomspace(1e-4, 1, 20_001)[:-1]
    found = drawn(BFloat16(), sizes, True).max()
    assert found == pytest.approx(1 / 128, rel=3e-3)  # sizes are 5e-4 apart
    for form in (Linear8(), Linear8(relative=True)):
        last = drawn(form, sizes, True)[-1]
        assert last < 1 / 127 / 0.7  # 0.3 decades, half of them
    assert drawn(Bits8(), sizes, False)[-1] < 0.05  # of down to 1e-1


# ------------------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def memory() -> dict[str, Any]:
    """The program that draws the picture."""
    pytest.importorskip("matplotlib")
    return runpy.run_path(str(ROOT / "docs/build_memory.py"))


def in_gb(*sizes: int) -> list[str]:
    """As the page and the picture write them."""
    return [f"{size / 1e9:.1f}" for size in sizes]


@pytest.mark.parametrize("row", rows_of("docs/memory.md", "`opt"))
def test_the_memory_of_llama_is_that_of_the_table(
    row: list[str], memory: dict[str, Any]
) -> None:
    call, dtype, per_parameter, *shown = row
    tx = eval(call, {"optax": optax, "optim": optim})
    weights, gradients, state = memory["bar"]("", tx, jnp.dtype(dtype)).sizes
    assert shown == in_gb(state, weights + gradients + state)
    count = weights / jnp.dtype(dtype).itemsize
    assert state / count == pytest.approx(float(per_parameter), abs=5e-5)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/memory.md"])
def test_the_picture_of_memory_says_what_is_drawn(
    page: str, memory: dict[str, Any]
) -> None:
    (shown,) = re.findall(r"!\[Llama 3 8B in GB: (.*?)\]", (ROOT / page).read_text())
    totals = in_gb(*(sum(bar.sizes) for bar in memory["bars"]()))
    assert re.findall(r"(\d+\.\d) with", shown) == totals


def test_the_report_that_is_shown() -> None:
    page = [b.lines for b in blocks(ROOT / "docs/memory.md")]
    (source,) = [lines for lines in page if "import jax" in lines]
    (shown,) = [lines for lines in page if lines[0].startswith("┏")]
    names: dict[str, Any] = {}
    exec("\n".join(source), names)
    assert "\n".join(shown) == str(names["report"])


# ---------------------------------------------------------------------------- sharding


def test_the_explanation_that_is_shown() -> None:
    page = ROOT / "docs/sharding.md"
    shown = [b for b in blocks(page) if b.lines[0].startswith("┏")]
    pod = AbstractMesh((16, 16), ("fsdp", "tensor"))
    vocabulary = {"embedding": jax.ShapeDtypeStruct((128256, 4096), jnp.float32)}
    sharded = NamedSharding(pod, P("tensor", "fsdp"))
    report = optim.explain(optim.adamw(1e-3), vocabulary, sharded, "tpu")
    assert ["\n".join(b.lines) for b in shown] == [str(report)]


@pytest.mark.parametrize(
    "remedy", [row[0] for row in rows_of("docs/sharding.md", "`block_")]
)
def test_the_advice_for_crossing_blocks_fits(remedy: str) -> None:
    pod = AbstractMesh((16, 16), ("fsdp", "tensor"))
    vocabulary = {"embedding": jax.ShapeDtypeStruct((128256, 4096), jnp.float32)}
    tx = eval(f"adamw(1e-3, {remedy})", {"adamw": optim.adamw})
    sharded = NamedSharding(pod, P("tensor", "fsdp"))
    (row,) = optim.explain(tx, vocabulary, sharded, "tpu").rows
    assert row.aligned


@pytest.mark.parametrize(
    ("optimizer", "options", "reductions"),
    [
        ("adamw", {}, 0),
        ("adamw", {"grad_clip_norm": 1.0, "skip_nonfinite": True}, 1),
        ("adamw", {"percentile_clipping": 5}, 1),
        ("adamw", {"max_unorm": 1.0, "record_norms": True}, 1),
        ("lamb", {}, 1),
        ("lars", {"skip_nonfinite": True}, 1),
        ("lamb", {"grad_clip_norm": 1.0}, 2),
        ("adamw", {"max_unorm": 1.0, "percentile_clipping": 5}, 2),
    ],
)
def test_collectives_are_those_of_the_table(
    optimizer: str, options: dict[str, Any], reductions: int
) -> None:
    mesh = mesh_of("4x2", "auto")
    placed = {
        "up": NamedSharding(mesh, P("d", "m")),
        "norm": NamedSharding(mesh, P("d")),
    }
    params = {"up": jnp.ones((512, 256)), "norm": jnp.ones(512)}
    params = jax.device_put(params, placed)
    tx = getattr(optim, optimizer)(1e-3, sharding=placed, **options)
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params))
    text = step.lower(params, tx.init(params), params).compile().as_text()
    found = {"all-reduce": reductions} if reductions else {}
    assert collectives(text) == found
