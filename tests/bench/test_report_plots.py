"""Plots for papers by matplotlib, and the README's picture."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.bench import child
from tests.bench.report_results import attention, compiled, results, row, run
from vit_bench.report import readme_plot
from vit_bench.report.data import Book
from vit_bench.report.figures import Curves
from vit_bench.report.kernels import attention as attention_section
from vit_bench.report.sections import figures
from vit_bench.results import Results


@pytest.fixture
def matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which is optional")


def test_every_figure_becomes_a_png_and_an_svg(matplotlib, tmp_path):
    from vit_bench.report.plots import write_plots

    given = results()
    written = list(write_plots(given, tmp_path / "plots"))
    assert len(written) == 2 * len(figures(Book(given))) == len(set(written))
    assert all(path.stat().st_size > 5000 for path in written)
    pngs, svgs = ([path for path in written if path.suffix == kind] for kind in (".png", ".svg"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs)
    assert "throughput-vit-base-patch16-224-bf16-h100-sxm.svg" in {path.name for path in svgs}
    for path in svgs:
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert "measured on" in text or "modelled for" in text, path.name


def test_the_same_plot_is_the_same_file(matplotlib, tmp_path):
    from vit_bench.report.plots import write_plots

    given = Results([run()], [attention(tokens) for tokens in (64, 197, 512)])
    first, second = (list(write_plots(given, tmp_path / name)) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] and len(first) == 2


def test_names_are_no_formulas(matplotlib, tmp_path):
    from vit_bench.report.plots import write_plots

    _, path = write_plots(Results([run()], [row(), row("costs $5 and $6_")]), tmp_path)
    assert "costs $5 and $6_" in list(ElementTree.parse(path).getroot().itertext())


def words_of(folder, name: str) -> set[str]:
    """The texts of the plot whose file's name begins so."""
    (path,) = folder.glob(f"{name}*.svg")
    return {
        element.text or "" for element in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
    }


def test_logarithmic_axes_have_numbers(matplotlib, tmp_path):
    from vit_bench.report.plots import write_plots

    given = [compiled(1), *(attention(tokens) for tokens in (64, 197, 512))]
    assert all(
        "$" not in path.read_text() for path in write_plots(Results([run()], given), tmp_path) if "svg" in str(path)
    )
    assert {"30", "100", "300", "1,000"} <= words_of(tmp_path, "roofline")
    assert {"64", "512"} <= words_of(tmp_path, "attention-over-tokens")


def test_the_key_names_all_parts_of_a_colour(matplotlib, tmp_path):
    from vit_bench.report.plots import write_plots

    list(write_plots(Results([run()], [compiled(8)]), tmp_path))
    words = words_of(tmp_path, "timeline")
    assert {"stem, head", "qkv", "fc2"} <= words and "stem" not in words


def picture() -> Curves:
    section = attention_section(Book(Results([run()], [attention(tokens) for tokens in (64, 197, 512)])))
    assert section is not None
    figure = section.items[0].figure
    assert isinstance(figure, Curves)
    return figure


def test_the_picture_stands_alone_and_says_what_it_rests_on():
    drawn = readme_plot.standalone(picture())
    words = [element.text for element in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert words[:2] == ["Attention by sequence length: 12 heads, head width 64, bf16", "Measured on H100 SXM"]
    assert "var(" not in drawn and "197" in words and "vit-engine" in words
    label = ElementTree.fromstring(drawn).get("aria-label")
    assert label == f"{words[0]}. {words[1]}.", "what a screen reader says"


def test_the_picture_is_checked_against_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme_plot, "attention_figure", picture)
    path = tmp_path / "figures" / "picture.svg"
    assert readme_plot.main(["--check", "--out", str(path)]) == 1 and not path.exists()
    assert readme_plot.main(["--out", str(path)]) == 0 and readme_plot.main(["--check", "--out", str(path)]) == 0
    path.write_text(path.read_text().replace("197", "198"))
    assert readme_plot.main(["--check", "--out", str(path)]) == 1
    assert "stale" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.interpreted_only
def test_the_picture_in_the_repository_is_what_the_kernels_give_now():
    status, size = child.run(
        """
        import json
        from vit_bench.report import readme_plot
        print(json.dumps([readme_plot.main(["--check"]), readme_plot.PATH.stat().st_size]))
        """
    )
    assert status == 0 and size < 100_000


def test_the_picture_says_modelled():
    assert "Modelled for H100 SXM, nothing was timed" in readme_plot.PATH.read_text(encoding="utf-8")
