"""Kernels do not need more instructions than they did, by the compilers' own code.

The counts are those of `benchmarks/static.py`, which is held against kernels whose
counts are known. A slower kernel is one over its ceiling; where it has to be,
`python benchmarks/static.py --record` sets another.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from _bundles import listing_of as bundles_listed
from _machines import MACHINES, missing
from _sass import listing_of as sass_listed
from _static_cases import RULES as STEPS
from _ways import Jump, Listing, Loop
from static import CEILINGS, RULES, key, main, measure, versions

HELD = {
    "v5e": ["adamw:float32"],
    "v5p": ["adamw:float32"],
    "v6e": [
        "adamw:float32",
        "lamb:float32",
        "lars:float32",
        "adamw-remainder8:bfloat16",
    ],
    "tpu7x": ["adamw:float32"],
    "sm_90": ["adamw:float32", "adamw:bfloat16", "adamw-remainder8:bfloat16"],
}
COUNTED = Path(__file__).with_name("counted.py")


def needs(machine: str) -> None:
    """Skip without the compilers of a machine."""
    if what := missing(machine):
        pytest.skip(f"needs {what}")


@functools.cache
def counted(machine: str) -> dict[str, dict[str, Any]]:
    """What is counted of kernels that are known."""
    needs(machine)
    return measure([machine], COUNTED)


@pytest.mark.parametrize("machine", HELD)
def test_kernels_stay_under_their_ceilings(machine: str) -> None:
    needs(machine)
    recorded = json.loads(CEILINGS.read_text())[machine]
    if recorded["versions"] != versions(machine):
        pytest.skip(f"recorded with {recorded['versions']}, not {versions(machine)}")
    rows = measure([f"{machine}:{case}" for case in HELD[machine]])
    assert {f"{row['rule']}:{row['dtype']}" for row in rows} == set(HELD[machine])
    for row in rows:
        assert row["count"] <= recorded["ceilings"][key(row)], key(row)
        assert row["memory"] > 0 and row["stored"] > 0


def test_every_machine_has_ceilings_for_every_rule() -> None:
    recorded = json.loads(CEILINGS.read_text())
    assert list(recorded) == list(MACHINES) == list(HELD)
    assert tuple(STEPS) == RULES
    for machine in MACHINES:
        rules = {name.split()[0] for name in recorded[machine]["ceilings"]}
        assert rules == set(RULES)


@pytest.mark.parametrize("machine", [name for name in HELD if name != "sm_90"])
def test_rounding_takes_at_most_four_bundles_more_than_to_the_nearest(
    machine: str,
) -> None:
    """As recorded, each with 3 % of air."""
    recorded = json.loads(CEILINGS.read_text())[machine]["ceilings"]
    nearest = recorded["adamw-nearest step bfloat16"]
    for name in ("adamw", "adamw-remainder8", "adamw-remainder16"):
        assert recorded[f"{name} step bfloat16"] - nearest <= 4 * 1.03


@pytest.mark.parametrize("machine", ["v6e", "tpu7x"])
def test_bundles_of_loops_are_those_of_the_same_work_unrolled(machine: str) -> None:
    found = counted(machine)
    registers = found["unrolled"]["values"] / 1024
    for name in ("unrolled", "loop_of_2", "loop_of_8", "loop_from_2", "nested"):
        row = found[name]
        assert row["values"] == found["unrolled"]["values"]
        # Six products and six sums, and one store.
        assert row["uses"]["VALU"] == 12 * registers
        assert row["stores"] == registers
        assert row["aside"] == 0
    counts = [found[k]["count"] for k in ("unrolled", "loop_of_2", "loop_of_8")]
    assert counts == sorted(counts)  # the less is unrolled, the more are waits
    # Nothing loops or waits for a next tile.
    one = found["one_tile"]
    assert one["values"] == found["unrolled"]["values"] / 8
    assert one["count"] < counts[0] / 8
    assert one["uses"]["VALU"] == 12 * registers / 8


@pytest.mark.parametrize("machine", ["v6e", "tpu7x"])
def test_bundles_of_what_is_rare_are_aside(machine: str) -> None:
    found = counted(machine)
    registers = found["unrolled"]["values"] / 1024
    for name in ("rarely_more", "either"):
        row = found[name]
        assert row["uses"]["VALU"] < 20 * registers
        # 20 square roots and sums: more than five slots each.
        assert row["aside"] > 20 * 5 / row["slots"]["VALU"] * registers
        assert registers <= row["stores"] <= 1.25 * registers


def test_instructions_of_loops_are_those_of_the_same_work_unrolled() -> None:
    found = counted("sm_90")
    for parts in (1, 32, 100):
        row = found[f"loop_of_{parts}"]
        # 512 values are four for each of 128 threads: one vector.
        assert row["stores"] == parts
        assert row["aside"] == 0
        assert 12 * 4 * parts < row["count"] < (12 + 2) * 4 * parts + 12
    row = found["rarely_more"]
    assert row["stores"] == 1
    assert row["aside"] > 20 * 4 * 4
    assert row["barriers"] == 1


def test_the_shortest_way_is_the_one_that_counts() -> None:
    loops = [Loop(1, 8, 3), Loop(2, 3, 5)]
    rare = Jump(4, 8, "p")
    assert Listing(10, loops).times() == [1, 3, 15, 15, 3, 3, 3, 3, 3, 1]
    assert Listing(10, loops, [rare]).times() == [1, 3, 15, 15, 3, 0, 0, 0, 3, 1]
    inside = {(2, 4): 2}
    times = Listing(10, loops, [rare], inside).times()
    assert times == [1, 3, 10, 10, 2, 0, 0, 0, 3, 1]


def test_branches_on_one_predicate_agree() -> None:
    """Of two ways, one is taken: the shorter."""
    two = [Jump(0, 5, "p"), Jump(5, 8, "p", when=False)]
    assert Listing(9, [], two).times() == [1, 0, 0, 0, 0, 1, 1, 1, 1]
    apart = [Jump(0, 5, "p"), Jump(5, 8, "q", when=False)]
    assert Listing(9, [], apart).times() == [1, 0, 0, 0, 0, 1, 0, 0, 1]


def test_a_loop_without_known_trips_does_not_count_unless_it_is_aside() -> None:
    loop = Loop(2, 3, None)
    assert Listing(6, [loop], [Jump(1, 4, "p")]).times() == [1, 1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="trips"):
        Listing(6, [loop]).times()


def test_bundles_are_read_with_start_step_and_negated_predicates() -> None:
    lines = [
        "%s10_s1 = smov.u32 (!%p9_p1), 2 }",
        "%s1_s1 = sphi %s10_s1, %s2_s1 } /* Start region 3 */",
        "%p7_p1 = pneg %p6_p2 }",
        "%1 = sbr.rel (%p7_p1) target = $region9 }",
        "}",
        "%s2_s1 = sadd.s32 2, %s1_s1 } /* Start/End empty region 9 */",
        "%p4_p1 = scmp.ge.s32.totalorder %s2_s1, 9 /* loop exit test */ }",
        "%2 = sbr.rel (!%p4_p1) target = $region3 }",
        "}",
    ]
    listing = bundles_listed(lines, tiles=1, delay_slots=1)
    assert listing.loops == [Loop(1, 8, 4)]  # 2, 4, 6, 8
    assert listing.jumps == [Jump(4, 5, "p6", when=False)]


@pytest.mark.parametrize(
    ("start", "test", "trips"),
    [
        ("HFMA2.MMA R3, -RZ, RZ, 0, 0", "ISETP.NE.U32.AND P0, PT, R3, 0x40, PT", 16),
        ("MOV R3, 0x8", "ISETP.GE.AND P0, PT, R3.reuse, 0x41, PT", 1),
        ("IMAD.MOV.U32 R3, RZ, RZ, -0x4", "ISETP.LT.AND P0, PT, R3, 0x9, PT", 4),
        ("IMAD R3, R2, R1, R0", "ISETP.NE.AND P0, PT, R3, 0x40, PT", None),
    ],
)
def test_sass_is_read_with_its_loops_and_what_is_rare_behind_the_exit(
    start: str, test: str, trips: int | None
) -> None:
    code = f"""
        /*0000*/                   {start} ;
.L_x_1:
        /*0010*/                   IADD3 R3, P1, R3, 0x4, RZ ;
        /*0020*/                   {test} ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/              @!P2 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   STG.E desc[UR4][R4.64], R3 ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   MUFU.RCP R3, R3 ;
        /*0080*/                   BRA `(.L_x_2);
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
"""
    instructions, listing = sass_listed(code)
    assert [one.name for one in instructions][-3:] == ["EXIT", "MUFU.RCP", "BRA"]
    assert listing.loops == [Loop(1, 3, trips)]
    if trips is not None:
        assert listing.times() == [1, trips, trips, trips, 1, 1, 1, 0, 0]


def test_the_program_prints_a_table_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("v6e")
    monkeypatch.setattr("static.CEILINGS", tmp_path / "ceilings.json")
    out = tmp_path / "rows.json"
    main(["--quick", "--machine", "v6e", "--json", str(out), "--record"])
    (row,) = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert "bundles for 1,024 values" in shown and f"{row['count']:.1f}" in shown
    recorded = json.loads((tmp_path / "ceilings.json").read_text())["v6e"]
    assert recorded["versions"] == versions("v6e")
    assert recorded["ceilings"]["adamw step float32"] == pytest.approx(
        1.03 * row["count"], abs=0.06
    )
    # 16.25 bytes: g; p; two codes and their scales, each read and written.
    assert row["bytes"] == pytest.approx(4 + 8 + 4 + 0.25, abs=1e-3)
    assert row["memory"] == pytest.approx(17.5, abs=1e-3)
