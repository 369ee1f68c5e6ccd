"""The report's tables, from small result files with known figures, and what it says of files that are not in order."""

import json
import re
import shlex
import warnings

import pytest
from result_files import ENVIRONMENT, LAYERS, PEAKS, rival, row, write
from support import each

from benchmarks import records
from benchmarks.report import __main__ as command
from benchmarks.report import document, grid, pictures, speed
from benchmarks.report.load import ReportError, load


def machine_of(root, **suites):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (machine,) = load(write(root, **suites))
    return machine


@pytest.fixture
def machine(tmp_path):
    return machine_of(tmp_path, layers=LAYERS)


def cells(text):
    """The rows of the tables in a text, without heads."""
    lines = [line[2:-2] for line in text.splitlines() if line.startswith("|")]
    return [line.split(" | ") for line in lines if "---" not in line][1:]


def test_worst_median_and_best_over_eager_the_floor_and_the_noise(machine):
    first, second, third = cells(speed.summary(machine))
    noise, floor = "0.98, 0.98, 0.98", "1.56, 0.62, 0.50"
    worst = "layer 512×8→8 gelu"
    assert first == ["layers", "float32", "`fwd_bwd`", "3", "**0.80, 2.00, 2.50**", worst, noise, floor]
    assert second[:5] == ["layers", "bfloat16", "`fwd_bwd`", "1", "**1.25, 1.25, 1.25**"]
    assert third[:5] == ["layers", "float32", "`train`", "1", "**1.00, 1.00, 1.00**"]


def test_the_readme_has_one_mode_with_machine_date_and_compile(machine):
    text = document.readme([machine])
    assert text.startswith("**Wonder CPU, 3 threads, torch 9.9.9, 2026-01-02, commit c0ffee1**")
    float32, bfloat16 = cells(text)
    assert float32[-1] == "0.50, 1.11, 1.25" and "train" not in text
    assert bfloat16[-2:] == ["1.00, 1.00, 1.00", ""]  # the floor; torch.compile is broken there


def test_a_table_and_a_picture_bear_the_commits_of_their_own_figures_alone(tmp_path, machine):
    """Those of the tuned choices have a table of their own, and may be of another commit."""
    records.write(tmp_path / "wonder" / "tuned.jsonl", ENVIRONMENT | {"commit": "0ther99"}, LAYERS)
    (both,) = load(tmp_path)
    assert document.readme([both]) == document.readme([machine])
    assert document.readme_picture([both]) == document.readme_picture([machine]) != ""


def test_rivals_have_their_spans(machine):
    head, *_ = speed.rivals(machine).splitlines()
    assert "torch.compile" in head and "eager again" in head
    assert cells(speed.rivals(machine))[0][-1] == "0.50, 1.11, 1.25"


def test_every_row_in_which_a_rival_is_ahead(machine):
    text = speed.ahead(machine)
    assert "1 of 5 rows in which a rival is ahead of fastbp, 1 of them by more than the spread" in text
    (found,) = cells(text)
    assert found[1] == "layer 512×8→8 gelu float32" and found[3] == "0.80 (0.76 to 0.84)"
    assert found[4] == "eager, torch.compile 1.25 (1.19 to 1.31)" and found[5] == "56 %"


def test_a_lead_within_the_spread_is_said_to_be_one(tmp_path):
    rows = [row("layer 1×8→8 gelu float32", rivals={"fastbp": 5.0, "other": 4.9})]
    (found,) = cells(speed.ahead(machine_of(tmp_path, layers=rows)))
    assert found[4].startswith("other 2.04") and found[5] == "2 % (within the spread)"
    rows[0]["rivals"]["other"] = rival(5.1)
    assert "No rival is ahead of fastbp in any of 1 rows." in speed.ahead(machine_of(tmp_path, layers=rows))


def test_the_widest_lead_comes_first(tmp_path):
    rows = [row(f"layer {1000 * ms:.0f}×8→8 gelu float32", rivals={"fastbp": ms}) for ms in (13.0, 20.0, 14.0)]
    found = cells(speed.ahead(machine_of(tmp_path, layers=rows)))
    assert [(cells[1].split("×")[0], cells[5]) for cells in found] == [
        ("layer 20000", "100 %"),
        ("layer 14000", "40 %"),
        ("layer 13000", "30 %"),
    ]


def test_who_was_wrong_or_left_out_is_listed_with_reasons(machine):
    assert [found[1:] for found in cells(speed.failures(machine))] == [
        ["torch.compile", "less accurate", "1", "layer 64×8→8 relu float32 `fwd_bwd`: 4.0 × eager's error"],
        ["quack", "left out: no such kernel", "1", "layer 512×8→8 gelu float32"],
        ["torch.compile", "broken: AssertionError: wrong", "1", "layer 64×8→8 gelu bfloat16"],
    ]


def test_a_row_is_measured_again_by_its_command(tmp_path):
    suite = machine_of(tmp_path, layers=LAYERS).suites["layers"]
    program = ["python", "-m", "benchmarks.run"]
    words = ["--suite", "layers", "--case", "layer 512×8→8 gelu float32", "--mode", "fwd_bwd"]
    assert shlex.split(suite.command(LAYERS[2])) == [*program, *words]
    suite.environment.update(device="cuda", settings={"OMP_NUM_THREADS": "2 "})
    assert shlex.split(suite.command(LAYERS[2])) == ["OMP_NUM_THREADS=2 ", *program, "--device", "cuda", *words]


@each(
    ("line", "words"),
    [
        ('{"case": "cut of', "not JSON"),
        ({"case": "layer 1×8→8 gelu float32", "mode": "fwd"}, "it has no rivals"),
        ({"case": "layer 1×8→8 gelu float32", "rivals": {}}, "it has no mode"),
        (row("layer", rivals={"fastbp": {"ms": 3.0}}), "over_eager of fastbp is None"),
        (row("layer", rivals={"fastbp": rival(3.0, over_eager="fast")}), "over_eager of fastbp is 'fast'"),
        (row("layer", rivals={"fastbp": rival(3.0) | {"ms": -1}}), "ms of fastbp is -1"),
        (row("layer", rivals={"fastbp": "quick"}), "its rivals must be objects"),
        (row("layer", left_out=["quack"]), "left_out, broken, no_graph must be reasons by rival"),
        (row("layer", mode=7), "its case and mode must be text"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_shown(tmp_path, line, words):
    path = write(tmp_path, layers=LAYERS) / "wonder" / "layers.jsonl"
    lines = path.read_text().splitlines()
    lines.insert(3, line if isinstance(line, str) else json.dumps(line))
    path.write_text("\n".join(lines))
    with pytest.warns(RuntimeWarning) as caught:
        (machine,) = load(tmp_path)
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith(f"{path}, line 4, is skipped: {words}")
    assert machine.rows("layers") == LAYERS


@each("kind", ("md", "html"))
def test_the_command_writes_what_is_asked_for_and_says_what_it_skipped(tmp_path, capsys, kind):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "results", layers=[*LAYERS, {"case": "x"}]) / "wonder" / "layers.jsonl"
    output = tmp_path / "new" / f"report.{kind}"
    assert command.main(["--results", str(tmp_path / "results"), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"report: {path}, line 7, is skipped: it has no mode, rivals\n"
    assert printed.out.startswith(f"{output}: 5 rows of wonder, ")
    text = output.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([\w.-]+)\)", text)
    assert linked == (["floor-wonder.svg"] if kind == "md" else []) and "Wonder CPU" in text
    assert {found.name for found in output.parent.iterdir()} == {output.name, *linked}


@each(
    ("prepare", "arguments", "words"),
    [
        (lambda root: None, [], ["holds no <machine>/<suite>.jsonl", "there: nothing"]),
        (lambda root: (root / "notes.txt").write_text(""), [], ["there: notes.txt"]),
        (lambda root: write(root, layers=LAYERS), ["--machine", "nope"], ["no results of nope", "there are wonder"]),
        (lambda root: root.rmdir(), [], ["no such folder"]),
    ],
)
def test_no_results_says_what_exists(tmp_path, capsys, prepare, arguments, words):
    root = tmp_path / "results"
    root.mkdir()
    prepare(root)
    assert command.main(["--results", str(root), "--output", str(tmp_path / "out.html"), *arguments]) == 1
    printed = capsys.readouterr().err
    assert all(word in printed for word in words) and not (tmp_path / "out.html").exists()


def test_an_output_of_another_kind_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        command.main(["--output", "report.pdf"])
    assert "there are .html, .md" in capsys.readouterr().err


def test_an_unknown_suite_is_shown(tmp_path):
    machine = machine_of(
        tmp_path, novel=LAYERS[:1], strange=[{"what": "weight", "kg": 3.5}, {"what": "?", "list": [1]}]
    )
    assert [found[0] for found in cells(speed.summary(machine))] == ["novel"]
    table = grid.grid(machine.suites["strange"])
    assert {head: table.numeric(head) for head in table.heads} == {"what": False, "kg": True, "list": False}
    assert [line.cells for line in table.lines] == [{"what": "weight", "kg": 3.5}, {"what": "?", "list": "[1]"}]


def test_a_file_without_rows_is_left_out_and_said_to_be(tmp_path):
    write(tmp_path, layers=LAYERS, small=[])
    with pytest.warns(RuntimeWarning, match=r"small\.jsonl has no rows"):
        (machine,) = load(tmp_path)
    assert list(machine.suites) == ["layers"]


def test_a_table_holds_everything_of_a_file(machine):
    table = grid.grid(machine.suites["layers"])
    heads = ["case", "mode", "rival", "ms", "× eager", "p20 to p80", "× floor", "error", "note"]
    assert sorted(table.heads) == sorted([*heads, "GFLOP/s", "operations by byte"])
    by_rival = {line.cells["rival"]: line for line in table.lines if line.of == 2}
    ours = by_rival["fastbp"]
    figures = {"ms": 12.5, "× eager": 0.8, "p20 to p80": "0.760 to 0.840", "× floor": 1.5625, "error": 2e-7}
    assert ours.ours and ours.cells.items() >= (figures | {"GFLOP/s": 320, "operations by byte": 400}).items()
    gone = {"case": ours.cells["case"], "mode": "fwd_bwd", "rival": "quack", "note": "left out: no such kernel"}
    assert by_rival["quack"].cells == gone
    (wrong,) = [line.cells for line in table.lines if line.wrong and "ms" in line.cells]
    assert (wrong["case"], wrong["note"]) == ("layer 64×8→8 relu float32", "less accurate than allowed")


def test_a_bar_in_a_name_does_not_break_a_table(tmp_path):
    machine = machine_of(tmp_path, layers=[row("layer | 8×8 gelu float32", rivals={"fastbp": 20.0})])
    assert "layer \\| 8×8 gelu" in speed.summary(machine)


def test_what_cannot_be_drawn_is_said(machine, tmp_path):
    assert list(pictures.of(machine)) == ["floor"]
    assert [reason.partition(":")[0] for reason in document.missing(machine)] == ["No roofline"]
    rows = [row("layer 8×8→8 gelu float32", rivals={"fastbp": 5.0})]
    del rows[0]["rivals"]["linears alone"]
    bare = machine_of(tmp_path / "bare", layers=rows)
    assert pictures.of(bare) == {} and "No picture of speed over the floor" in document.document([bare])


def test_pictures_are_the_same_every_time_and_name_what_they_show(tmp_path):
    pytest.importorskip("matplotlib")
    records.write(tmp_path / "wonder" / "layers.jsonl", ENVIRONMENT | {"peaks": PEAKS}, LAYERS)
    (machine,) = load(tmp_path)
    found = {name: draw() for name, draw in pictures.of(machine).items()}
    assert list(found) == ["floor", "roofline"]
    assert found == {name: draw() for name, draw in pictures.of(machine).items()}
    for word in ("layer 64×8→8", "layer 512×8→8", "fastbp", "torch.compile", "eager", "float32", "bfloat16"):
        assert f">{word}</text>" in found["floor"]
    assert "roofs: 400 GFLOP/s and 20 GB/s" in found["roofline"]
    assert not any("<dc:date>" in text for text in found.values())
    assert "400 GFLOP/s in float32, 20 GB/s copied" in document.document([machine])


@each(
    ("case", "shape"),
    [
        ("layer 512×768→3072 gelu float32", "layer 512×768→3072"),
        ("layer 64×64→64 gelu float32", "layer 64×64→64"),
        ("mlp 8×64→64→64 gelu float32", "mlp 8×64, 2 layers"),
        ("mlp 8×64→64→640 gelu float32", "mlp 8×64→64→640"),
    ],
)
def test_equal_layers_are_counted(case, shape):
    assert pictures.shape_of({"case": case}) == shape


def test_without_matplotlib_the_report_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install -e \.\[demo\]"):
        pictures.of(machine_of(tmp_path, layers=LAYERS))["floor"]()
    output = str(tmp_path / "out.html")
    assert command.main(["--results", str(tmp_path), "--output", output]) == 1
    assert "pictures need matplotlib" in capsys.readouterr().err
