import io
import sys

import pytest
from rich.console import Console

from laep_jax.tracking.console import RunConsole, closing_table, progress_parts
from laep_jax.tracking.summary import Summary

TRAIN = {
    "loss": 2.34567,
    "epochs": 0.125,
    "tokens_per_second": 12345.6,
    "gflops_per_second": 35.24,
    "step_seconds": 0.5,
    "expert_imbalance": [3.2, 1.1],
    "device_imbalance": [1.25, None],
}
PRUNED = {
    "steps": 400,
    "tokens": 1638400,
    "epochs_by_source": {"text": 1.504},
    "prune_steps": [220],
    "not_pruned": "",
    "parameters_before": 2_000_000,
    "parameters_after": 1_500_000,
    "experts_before": [16] * 4,
    "experts_after": [8, 12, 12, 4],
    "device_imbalance_before": [1.5, 2.5],
    "device_imbalance_after": [1.0, 1.2],
    "levelled_imbalance_before": [1.5, 2.5],
    "levelled_imbalance_after": [1.0, 1.01],
    "validation_loss_before_prune": 2.5,
    "validation_loss_after_prune": 2.52,
    "validation_loss_end": 2.25,
    "validation_bits_per_byte_end": 1.125,
    "validation_loss_by_domain": {
        "before_prune": {"json": 2.0, "xml": 2.25, "abc": 3.0},
        "after_prune": {"json": 2.0, "xml": 2.5, "abc": 2.75},
    },
    "validation_targets_by_domain": {"json": 700, "xml": 1234, "abc": 50},
    "step_seconds_before": 0.5,
    "step_seconds_after": 0.4,
}
NOT_PRUNED = (
    PRUNED
    | {name: None for name in PRUNED if name.endswith(("_after", "_prune"))}
    | {
        "prune_steps": [],
        "not_pruned": "the loads are not stable: train longer",
        "validation_loss_by_domain": {"end": {"json": 1.0}},
    }
)


def plain(width=80):
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def text_of(console):
    return console.file.getvalue()


def cells(summary):
    """{first cell: the others} of the printed table; continued lines are joined to the one above."""
    console = plain()
    console.print(closing_table(Summary(**summary)))
    rows, last = {}, ""
    for line in text_of(console).splitlines():
        if line.startswith("│"):
            name, *values = (cell.strip() for cell in line.strip("│").split("│"))
            rows[name or last] = (
                [old + new for old, new in zip(rows.get(last), values, strict=True)] if not name else values
            )
            last = name or last
    return rows, text_of(console)


def test_off_a_terminal_one_whole_line_each_log_every():
    console = plain(width=40)
    with RunConsole(30, log_every=10, console=console) as progress:
        progress.state("loads: 1/2 windows stable")
        for step in range(1, 31):
            progress.train(step, TRAIN)
            if step == 12:
                progress.event("step 12: checkpoint saved [bold]")
    lines = text_of(console).splitlines()
    assert lines[0] == (
        "step 10/30  epoch 0.12  loss 2.3457  12,346 tokens/s  35.2 GFLOP/s"
        "  imbalance experts 3.20, devices 1.25 (worst layer)"
        "  loads: 1/2 windows stable  0:10 left"
    )
    assert lines[1] == "step 12: checkpoint saved [bold]"
    assert [line[:10] for line in lines[2:]] == ["step 20/30", "step 30/30"]
    assert "\x1b" not in text_of(console)


def test_the_last_step_is_shown_also_between_two_log_steps():
    console = plain()
    with RunConsole(7, log_every=5, console=console) as progress:
        for step in range(1, 8):
            progress.train(step, TRAIN)
    assert [line.split()[1] for line in text_of(console).splitlines()] == ["5/7", "7/7"]


def test_on_a_terminal_the_line_is_renewed_and_events_stay():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with RunConsole(30, log_every=10, console=console) as progress:
        progress.train(1, TRAIN)
        progress.event("pruned after step 1")
        progress.train(2, TRAIN)
    text = text_of(console)
    assert "step  1/30" in text
    assert "step  2/30" in text
    assert "pruned after step 1\n" in text
    assert "\x1b[2K" in text  # erases the line before it writes it anew
    assert text.rstrip().endswith("\x1b[?25h")  # gives the cursor back


def test_speed_reads_as_share_of_the_peak_where_that_is_known():
    assert "MFU 35.2 %" in progress_parts(1, 10, TRAIN, peak_gflops=100.0)
    assert "35.2 GFLOP/s" in progress_parts(1, 10, TRAIN)


def test_numbers_not_measured_yet_are_dashes():
    record = TRAIN | {"tokens_per_second": None, "gflops_per_second": None, "expert_imbalance": [None, None]}
    parts = progress_parts(1, 10, record)
    assert {"- tokens/s", "- GFLOP/s", "imbalance experts -, devices 1.25 (worst layer)"} <= set(parts)


def test_closing_table_of_a_pruned_run():
    rows, text = cells(PRUNED)
    assert text.startswith("400 steps, 1,638,400 tokens, 1.50 epochs; pruned after step 220\n")
    assert rows == {
        "parameters": ["2.000 M", "1.500 M", "-25.0 %"],
        "experts per layer": ["16x4", "8,12x2,4", "-43.8 %"],
        "device imbalance, max / mean:": ["", "", ""],
        "mean over layers": ["2.000", "1.100", "-0.9000"],
        "worst layer": ["2.500", "1.200", "-1.3000"],
        "as rebalanced, mean": ["2.000", "1.005", "-0.9950"],
        "as rebalanced, worst": ["2.500", "1.010", "-1.4900"],
        "validation loss at the prune": ["2.5000", "2.5200", "+0.0200"],
        "most in xml (1,234 targets)": ["2.2500", "2.5000", "+0.2500"],
        "validation loss at the end": ["", "2.2500", ""],
        "in bits per byte": ["", "1.1250", ""],
        "step time": ["0.500 s", "0.400 s", "x 0.800"],
    }


def test_closing_table_of_a_run_without_prune():
    rows, text = cells(NOT_PRUNED)
    assert text.startswith(
        "400 steps, 1,638,400 tokens, 1.50 epochs; nothing was pruned\n"
        "not pruned, since the loads are not stable: train longer\n"
    )
    assert rows["parameters"] == ["2.000 M"]
    assert rows["experts per layer"] == ["16x4"]
    assert rows["validation loss at the end"] == ["2.2500"]
    assert rows["in bits per byte"] == ["1.1250"]
    assert "at the prune" not in text
    assert "most in" not in text


def test_several_prunes_are_told_apart():
    rows, text = cells(PRUNED | {"prune_steps": [22, 30], "epochs_by_source": {"web": 0.5, "code": 3}})
    head = "400 steps, 1,638,400 tokens (epochs: web 0.50, code 3.00); pruned after step 22, 30 "
    assert " ".join(text.split()).startswith(head)
    assert rows["validation loss at the prune of step 30"] == ["2.5000", "2.5200", "+0.0200"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), BrokenPipeError(), ValueError("closed file"), None])
def test_an_output_that_fails_ends_nothing(monkeypatch, error):
    class Stream(io.TextIOWrapper):
        def write(self, text):
            if error:
                raise error
            return super().write(text)

    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", Stream(raw, encoding="ascii"))
    with RunConsole(2, log_every=1) as progress:
        progress.event("a domain: проза")
        progress.train(1, TRAIN)
        progress.closing_table(Summary(**PRUNED))
    sys.stdout.flush()
    assert (b"\\u043f" in raw.getvalue()) == (error is None)


def test_closing_table_of_the_1010b_model_fits_80_columns():
    counts = [40, 48, 24, 16, 24, 16, 16, 24, 32, 32, *[24] * 3, *[40] * 3, *[48] * 69, *[40] * 8, *[32] * 6]
    counts += [24, 24, 16, 8]
    rows, text = cells(PRUNED | {"experts_before": [64] * 103, "experts_after": counts, "parameters_before": 1.515e12})
    assert rows["experts per layer"][1] == "40,48,24,16,24,16x2,24,32x2,24x3,40x3,48x69,40x8,32x6,24x2,16,8"
    assert rows["parameters"][0] == "1,515.000 B"
    assert max(map(len, text.splitlines())) <= 80


def test_what_was_not_measured_is_a_dash():
    rows, _ = cells(PRUNED | {"step_seconds_after": None, "device_imbalance_after": None})
    assert rows["step time"] == ["0.500 s", "-", ""]
    assert rows["worst layer"] == ["2.500", "-", ""]


def test_the_table_ends_the_progress_line():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with RunConsole(30, log_every=10, console=console) as progress:
        progress.train(30, TRAIN)
        progress.closing_table(Summary(**PRUNED))
    text = text_of(console)
    assert text.index("30/30") < text.index("\x1b[?25h") < text.index("1,638,400 tokens")
