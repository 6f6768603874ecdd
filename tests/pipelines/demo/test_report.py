import math
import re
from html.parser import HTMLParser

import pytest

from pipelines.demo.evaluation import Evaluation, evaluate_digits
from pipelines.demo.report import galleries, write_report
from pipelines.evaluation.charts import loss_chart
from tests.pipelines.demo.test_judge_and_evaluation import draw_real


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate_digits(lambda prompts, seeds: draw_real(prompts, seeds, wrong_share=0.5), 32, count=60)


class Page(HTMLParser):
    """Collects text and images, and fails on a tag that is closed out of turn."""

    void = {"meta", "img", "line", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.void:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_everything_and_needs_nothing_else(evaluation, tmp_path):
    rows = [{"step": step, "loss": math.exp(-step / 50) + 0.1} for step in range(500)]
    rows += [{"step": step, "validation_loss": 0.2} for step in range(0, 500, 50)]
    facts = {
        "data_wait_share": 0.013,
        "seconds_by_part": {"autoencoder": 80.0, "latent diffusion": 290.0},
        "model_uri": "models:/ldm-demo/1",
        "run_ids": {"latent diffusion": "9a7b3c"},
        "export_folder": "/runs/<demo>/export",
    }
    path = tmp_path / "deep" / "report.html"
    write_report(path, evaluation.figures, galleries(evaluation), {"Latent diffusion": rows}, facts)
    text = path.read_text()
    page = Page(text)
    assert len(page.images) == 40 + 10 and all(source.startswith("data:image/png;base64,") for source in page.images)
    assert not re.search(r"(src|href)=\"?http|url\(", text)
    words = " ".join(page.words)
    for expected in (
        f"{evaluation.figures['consistency']:.3f}",
        f"{evaluation.figures['coverage_ratio']:.3f}",
        "0.013",
        "370 s",
        "models:/ldm-demo/1",
        "latent diffusion: 9a7b3c",
        "from_pretrained('/runs/<demo>/export')",
        evaluation.captions[0],
        "validation loss 0.2",
    ):
        assert expected in words, expected
    assert "<demo>" not in text, "facts must be escaped"


def test_faults_are_named_where_the_judge_read_something_else(evaluation):
    gallery = galleries(evaluation)[0]
    wrong = [i for i in range(40) if tuple(part[i] for part in evaluation.reading) != evaluation.wanted[i]]
    assert wrong and sorted(gallery.faults) == wrong
    assert gallery.captions == evaluation.captions[:40]


def test_goals_that_are_missed_say_so(evaluation, tmp_path):
    for ratio, said in ((0.91, "✓ met: goal at least 0.9"), (0.89, "✗ not met: goal at least 0.9")):
        path = tmp_path / "report.html"
        write_report(path, {**evaluation.figures, "consistency_ratio": ratio}, [], [], {})
        assert said in path.read_text()


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5], [1e-6, 30.0], [-2.0, 0.0, 3.0], [0.9, 0.31], [12345.0, 12346.0]])
def test_a_chart_stays_in_its_frame(values):
    chart = loss_chart("Any", [{"step": i, "loss": value} for i, value in enumerate(values)])
    points = re.search(r'points="([^"]+)"', chart)
    assert points
    for point in points[1].split():
        x, y = map(float, point.split(","))
        assert 50 <= x <= 510 and 10 <= y <= 230
    assert ("<circle" in chart) == (len(values) == 1)
    assert 2 <= chart.count("text-anchor='end'") + chart.count('text-anchor="end"') <= 12


def test_losses_that_are_not_finite_or_missing_leave_no_chart():
    assert loss_chart("Any", [{"step": 0, "loss": math.nan}, {"step": 1, "loss": None}, {"step": 2}]) == ""
