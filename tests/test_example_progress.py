"""Progress of the examples: a bar on a terminal, ten lines in a log file."""

import io
import re

import pytest
from _progress import progress


class Terminal(io.StringIO):
    """Something to write to that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, begin: int = 0) -> str:
    """What 1,400 steps write; messages go where the bar goes, as in a log file."""
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("sys.stdout", stream)
    with progress(1400, initial=begin, desc="8bit") as bar:
        for step in range(begin + 1, 1401):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
            if step % 200 == 0:
                bar.write(f"step {step}: evaluated")
    return stream.getvalue()


def test_a_log_file_gets_a_line_for_each_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = run(io.StringIO(), monkeypatch)
    assert "\r" not in written
    lines = [line for line in written.splitlines() if "evaluated" not in line]
    assert lines.pop() == ""  # tqdm's
    steps = [re.search(r"^8bit: (\d+)/1400 \[", line)[1] for line in lines]
    assert steps == [str(140 * k) for k in range(11)]
    told = [line.split(", ")[-1] for line in lines[1:]]
    assert told == [f"loss {140 * k}]" for k in range(1, 11)]
    assert written.count("evaluated") == 7


def test_a_resumed_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = re.findall(r"(\d+)/1400", run(io.StringIO(), monkeypatch, begin=1000))
    assert steps == ["1000", "1120", "1260", "1400"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(Terminal(), monkeypatch)
    assert written.count("\r") > 2
    assert "100%|" in written
