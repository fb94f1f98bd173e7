"""`python -m models`, run as a function and once as a process; the generated table of
models/README.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models import __main__ as cli
from models import registry
from models.weights import digests
from tests.reference import fill

README = Path(models.__file__).parent / "README.md"

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of the twin's transformer, as a training script would leave them."""
    state = fill(models.build("rar_twin").transformer).state_dict()
    torch.save(
        {"model": {"module." + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "last.pth"
    )
    return tmp_path / "last.pth"


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    line = ""
    try:
        cli.main([str(a) for a in argv])
    except SystemExit as ended:  # with one line, which the interpreter prints
        line = f"{ended.code}\n"
    captured = capsys.readouterr()
    return 1 if line else 0, captured.out, captured.err + line


def test_list_has_every_model(capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    table, _, remedies = out.partition("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert list(rows) == list(models.PRESETS)
    assert rows["var_d16"] == ["var", "310.3M", "680", "256", "missing", "missing"]
    assert rows["rar_twin"] == ["rar", "4.1M", "64", "32", "shipped", "shipped"]
    assert remedies.startswith("missing: python -m models add FOLDER takes in files")
    assert "mar_l and mar_h are on no hub: python -m models info mar_l" in remedies
    assert max(map(len, out.splitlines())) <= 80


def test_the_table_of_the_readme_is_current() -> None:
    text = README.read_text()
    assert cli.with_block(text, cli.markdown_list()) == text, (
        "run: python -m models list --markdown models/README.md"
    )


def test_the_table_names_every_file_source_and_licence() -> None:
    table = cli.markdown_list()
    for preset in models.PRESETS.values():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{preset.name}` |"))
        assert f"`{preset.weights.file}`" in row
        assert preset.licence in row
        assert preset.published_fid is None or f"{preset.published_fid:.2f}" in row


def test_markdown_rewrites_a_file_or_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{cli.BEGIN}\nold\n{cli.END}\nafter\n")
    assert run(capsys, "list", "--markdown", page)[0] == 0
    assert page.read_text() == f"before\n{cli.BEGIN}\n\n{cli.markdown_list()}\n\n{cli.END}\nafter\n"
    page.write_text("nothing")
    assert run(capsys, "list", "--markdown", page)[2].startswith("error: file: it has no lines")
    assert run(capsys, "list", "--markdown")[1].startswith("| model | parameters |")


@pytest.mark.parametrize("name", models.PRESETS)
def test_info_tells_sizes_files_and_places(name: str, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "info", name)
    assert (code, err) == (0, "")
    preset = models.PRESETS[name]
    for source in (preset.weights, preset.tokenizer_weights):
        assert f"file: {source}" in out
    parameters = cli.count_parameters(registry.build_outline(name).transformer)
    assert f"transformer: {parameters:,} parameters" in out
    here = [
        (registry.ZOO / source.file).is_file()
        for source in (preset.weights, preset.tokenizer_weights)
    ]
    assert ("missing: " in out) == (not all(here))
    assert ("zoo: " in out) == preset.weights.shipped


def test_check_says_what_agrees(file: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "check", "rar_twin", "--weights", file)
    assert (code, err) == (0, "")
    assert (
        out
        == f"transformer: {file}: 99 of 99 keys and shapes agree, 4,059,968 parameters, float32\n"
    )
    out = run(capsys, "check", "rar_twin")[1]  # the shipped files, both
    assert [line.split(":")[0] for line in out.splitlines()] == ["transformer", "tokenizer"]
    assert "float16" in out


def test_check_says_what_does_not_agree(file: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "check", "rar_b", "--weights", file)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: transformer: {file} does not fit rar_b (")
    assert err.count("\n") == 1
    assert "they fit the transformer of rar_twin" in err


def test_check_tells_the_pinned_file_from_others(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        state = models.build("mar_b").tokenizer.state_dict()
    small = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}
    torch.save({"model": {**small, "loss.logvar": torch.zeros(1)}}, tmp_path / "kl16.ckpt")
    out = run(capsys, "check", "mar_b", "--tokenizer", tmp_path / "kl16.ckpt")[1]
    assert "tokenizer: " in out
    assert "312 of 312 keys and shapes agree, 66,456,019 parameters, float32" in out
    assert "sha256: not that of kl16.ckpt of jadechoghari/mar" in out
    pinned = models.PRESETS["mar_b"].tokenizer_weights.sha256
    monkeypatch.setattr(digests, "file_digest", lambda path: pinned)
    assert (
        "sha256: that of" in run(capsys, "check", "mar_b", "--tokenizer", tmp_path / "kl16.ckpt")[1]
    )


def test_convert_into_the_cache_and_into_a_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, out, _ = run(capsys, "convert", "rar_twin", "--weights", file)
    assert code == 0
    assert str(tmp_path / "cache") in out
    code, out, _ = run(
        capsys, "convert", "rar_twin", "--weights", file, "--output", tmp_path / "new" / "folder"
    )
    written = tmp_path / "new" / "folder" / "rar_twin-transformer.safetensors"
    assert code == 0
    assert f"transformer: {written}: 99 of 99" in out
    a = models.load("rar_twin", weights=written)
    b = models.load("rar_twin", weights=file)
    assert digests.module_digest(a.transformer) == digests.module_digest(b.transformer)


def test_convert_writes_nothing_for_a_misfit(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(capsys, "convert", "rar_b", "--weights", file, "--output", tmp_path / "new")[0] == 1
    assert not (tmp_path / "new").exists()
    code, _, err = run(capsys, "convert", "rar_twin", "--weights", file, "--output", file)
    assert code == 1
    assert err.startswith(
        f"error: output: {file / 'rar_twin-transformer.safetensors'} cannot be written ("
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("info", "var_16"), "error: model: 'var_16' is not one of var_d16, "),
        (
            ("check", "var_d16", "--weights", "absent.pth"),
            "error: weights: absent.pth is missing, expected a file",
        ),
        (
            ("check", "var_d16", "--weights", "."),
            "error: weights: . is a directory, expected a file",
        ),
        (
            ("check", "var_d16"),
            "error: weights: var_d16.pth of FoundationVision/var at revision 6d0ee659",
        ),
        (
            ("fetch", "mar_h"),
            "error: weights: mar_huge/checkpoint-last.pth "
            "(util/download.py of github.com/LTH14/mar",
        ),
        (
            ("convert", "par_3b_16x"),
            "error: weights: PAR-3B-16x.pt of Epiphqny/PAR at revision main is not here (not in",
        ),
        (("list", "--markdown", "absent/README.md"), "error: "),
    ],
)
def test_errors_are_one_line(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "models", "check", "rar_twin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "keys and shapes agree" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_subcommand_describes_itself(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert cli.HELP[command].capitalize() in " ".join(out.split())


def test_an_unknown_argument_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{cli.BEGIN}\nold\n{cli.END}\n")
    before = page.read_text()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["list", "--markdown", str(page), "--colour"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --colour" in capsys.readouterr().err
    assert page.read_text() == before
