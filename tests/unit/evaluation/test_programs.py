import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import evaluate as program
from report import runs as report_runs
from report import write as report
from report.tables import prototype_rows
from runtime.program import run_program
from tests.unit.evaluation.conftest import write_run

ROOT = Path(__file__).resolve().parents[3]
ALL = "[prototypes,knn,linear,logistic,few_shot,clustering,long_tail,fine_tune]"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, digits):
    """Two runs, each through every probe; the second has prototypes of patches as well."""
    root = tmp_path_factory.mktemp("evaluated")
    config = root / "eval.yaml"
    config.write_text(
        f"encoder: unset\ndata: {{shards: {digits}, num_workers: 0}}\n"
        f"features: {{cache_dir: {root / 'features'}}}\nknn: {{k: [5, 20], features: [embedding, mean]}}\n"
        "linear: {epochs: 2, min_steps: 0, features: [embedding, both]}\nfew_shot: {shots: [1, 5], draws: 2}\n"
        "long_tail: {imbalance_ratio: 10, few_at_most: 8, many_above: 20}\nconfidence: {resamples: 50}\n"
        "fine_tune: {epochs: 1, batch_size: 64, shuffle_buffer: 100}\n"
    )
    for seed, name in enumerate(("first", "second")):
        run = write_run(root / name, seed=seed, with_patches=name == "second")
        arguments = [str(config), f"encoder={run}", f"probes={ALL}", "controls=[random-init,raw-pixels]"]
        assert program.main([*arguments, "control_seeds=2"]) == 0
    return root


def result(root, name, probe):
    return json.loads((root / name / "results" / f"{probe}.json").read_text())


def test_every_result_says_what_it_was_made_from(evaluated):
    for path in (evaluated / "first" / "results").rglob("*.json"):
        content = json.loads(path.read_text())
        provenance = content["provenance"]
        for key in ("commit", "config_hash", "manifest_hashes", "versions", "hardware", "finished_utc"):
            assert provenance[key], (path, key)
        assert content["encoder"]["role"] in ("teacher", "control") and content["seconds"] >= 0
    assert len(result(evaluated, "first", "knn")["provenance"]["manifest_hashes"]) == 2


def test_usage_comes_from_training_and_from_images(evaluated):
    figures = result(evaluated, "first", "prototypes")["figures"]
    assert figures["training_usage"] == {
        "used": 0.5,
        "used_by_mass": 0.4,
        "used_by_logits": 0.9,
        "dead": 0.5,
        "usage_perplexity": 0.25,
        "used_ceiling": 1.0,
        "usage_rows": 640,
        "step": 10,
    }
    images = figures["image_usage"]["teacher"]
    assert "used" not in images and images["used_by_logits"] <= images["used_ceiling"] == min(
        1, images["images"] / 64
    )
    training, tested = prototype_rows(result(evaluated, "first", "prototypes"))
    assert training["used %"] == "50.00" and training["by mass >= 1 %"] == "40.00"
    assert training["by logits %"] == "90.00" and training["ceiling %"] == "100.00"
    assert training["usage over"] == "640 rows, epoch up to step 10"
    assert tested["used %"] == "" and tested["usage over"] == f"{images['images']:,} test images"
    assert figures["roles"]["teacher"]["num_prototypes"] == 64


def test_prototypes_of_patches_are_audited_beside_those_of_images(evaluated):
    assert (
        not {"patch_usage", "patch_training_usage"}
        & result(evaluated, "first", "prototypes")["figures"].keys()
    )
    figures = result(evaluated, "second", "prototypes")["figures"]
    assert list(figures["roles"]) == ["teacher", "patch teacher"]
    own = figures["roles"]["patch teacher"]
    assert (own["num_prototypes"], own["dim"]) == (48, 8) and own["unique"]["0.025"] == 48
    assert figures["patch_training_usage"] == {"used": 0.3, "usage_rows": 5000, "step": 10}
    usage = figures["patch_usage"]["patch teacher"]
    assert (usage["images"], usage["patches"]) == (96, 96 * 16)
    assert sum(usage["largest_counts"]) == 96 * 16
    assert 0 < usage["used_by_logits"] <= usage["used_ceiling"] == 1
    rows = prototype_rows(result(evaluated, "second", "prototypes"))
    assert [row["usage over"] for row in rows[2:]] == [
        "5,000 rows, epoch up to step 10",
        "1,536 patches of 96 test images",
    ]


def test_thinned_training_set_has_three_groups(evaluated):
    groups = result(evaluated, "first", "long_tail")["figures"]
    counts = [row["train_images"] for row in groups["per_class"]]
    assert counts == sorted(counts, reverse=True) and counts[0] == 30 and counts[-1] == 3
    assert all(groups["groups"][name]["classes"] > 0 for name in ("head", "medium", "tail"))


def test_a_second_evaluation_reads_the_cache_and_says_the_same(evaluated):
    before = result(evaluated, "first", "knn")["figures"]
    files = {path: path.stat().st_ino for path in (evaluated / "features").iterdir()}
    program.main([str(evaluated / "eval.yaml"), f"encoder={evaluated / 'first'}", "probes=[knn]"])
    assert result(evaluated, "first", "knn")["figures"] == before
    assert files == {path: path.stat().st_ino for path in (evaluated / "features").iterdir()}


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.images = [], 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.sources += [values[key] for key in ("src", "href") if key in values]
        self.images += tag == "img"


def test_report_is_one_page_that_fetches_nothing(evaluated, tmp_path):
    page = report.write_report([evaluated / "first", evaluated / "second"], tmp_path / "report")
    parser = _Page()
    text = page.read_text()
    parser.feed(text)
    assert parser.images >= 12 and all(source.startswith(("data:", "#")) for source in parser.sources)
    assert not re.search(r"https?://", text)
    assert parser.images == len(list((tmp_path / "report").glob("*.png")))
    names = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert {
        "loss_over_time",
        "prototypes_over_time",
        "confusion_first",
        "feature_map_second",
        "probes",
        "unique_by_eps",
        "neighbours_first",
        "prototype_images_second",
        "prototype_patches_second",
        "patch_prototypes_over_time",
        "patch_gmm_over_time",
    } <= names
    assert "prototype_patches_first" not in names
    markdown = (tmp_path / "report" / "results.md").read_text()
    assert "second minus first" in markdown
    for table in (
        "Runs",
        "Probes",
        "k-NN by k",
        "Confusions of k-NN",
        "Few-shot",
        "Clustering",
        "Long tail",
        "Long tail by class",
        "Prototypes",
    ):
        assert f"## {table}\n" in markdown, table
    assert "tail minus head" in markdown and "nearest prototype" in markdown and "fine_tune" in markdown
    assert (tmp_path / "report" / "results.csv").read_text().startswith("table,row,column,value\n")


def test_checkpoints_that_jobs_evaluated_stand_in_the_curve_and_not_among_the_results(evaluated, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(evaluated / "first", run)
    source, target = run / "results" / "knn.json", run / "results" / "in_training" / "step-00000777"
    target.mkdir(parents=True)
    content = json.loads(source.read_text())
    content["encoder"]["step"] = 777
    (target / "knn.json").write_text(json.dumps(content))
    (loaded,) = report_runs.load_runs([run])
    assert {line["step"]: line.get("eval/knn20_top1") for line in loaded.metrics}[777] == pytest.approx(
        content["figures"]["headline"]["top1"]
    )
    assert [r["path"] for r in loaded.results if r["probe"] == "knn"] == [source]


def test_report_of_metrics_alone(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/to')
    page = report.write_report([run], tmp_path / "out")
    assert page.read_text().count("<img") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probes=[knnn]"], "probes is"),
        (["knn.kk=3"], "unknown key knn.kk"),
        (["encoder=nowhere"], "encoder is 'nowhere'"),
        (["knn.features=[blocks_of_wood]"], "knn.features is"),
        (["knn.k=[100000]"], "knn.k is 100000"),
        (["data.shards=nowhere"], "data.shards is 'nowhere'"),
        (["data.test_shards=nowhere"], "data.test_shards is 'nowhere'"),
        (["data.test_split=nosuch"], "data.test_split is 'nosuch'"),
        (["data.train_split=nosuch"], "data.train_split is 'nosuch'"),
        (["data.test_shards=SHIFTED"], "class maps"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(evaluated, arguments, message, capsys, tmp_path):
    if "SHIFTED" in arguments[0]:
        source = json.loads(
            (evaluated / "eval.yaml").read_text().split("shards: ")[1].split(",")[0].join('""')
        )
        shifted = tmp_path / "shifted"
        shifted.mkdir()
        for path in Path(source).iterdir():
            (shifted / path.name).write_bytes(path.read_bytes())
        manifest = json.loads((shifted / "manifest.json").read_text())
        manifest["splits"]["test"]["classes"].reverse()
        (shifted / "manifest.json").write_text(json.dumps(manifest))
        arguments = [f"data.test_shards={shifted}"]
    base = [str(evaluated / "eval.yaml"), f"encoder={evaluated / 'first'}"]
    assert run_program(program.main, [*base, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_typo_is_reported_before_torch_is_loaded():
    code = (
        "import sys, evaluate\nfrom runtime.program import run_program\n"
        "rc = run_program(evaluate.main, ['configs/eval_fashion_mnist.yaml', 'knn.kk=1'])\n"
        "assert rc == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_pixels_that_would_fill_the_disk_are_left_out_with_one_line(evaluated, capsys, tmp_path):
    arguments = [str(evaluated / "eval.yaml"), f"encoder={evaluated / 'first'}", "probes=[knn]"]
    arguments += [
        "controls=[raw-pixels]",
        f"output_dir={tmp_path}",
        f"features.cache_dir={tmp_path / 'cache'}",
    ]
    assert program.main([*arguments, "control_max_gib=0.001"]) == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "raw-pixels is left out" in text]
    assert "480 images of 1 x 28 x 28" in line and "set control_max_gib" in line
    assert not list(tmp_path.rglob("controls")) and not list((tmp_path / "cache").glob("raw-pixels*"))


def test_predictions_are_saved_beside_figures(evaluated):
    from evaluation.results import read_predictions, read_results

    for entry in read_results(evaluated / "first" / "results"):
        if entry["probe"] in ("knn", "linear", "logistic", "long_tail"):
            predictions = read_predictions(entry)
            name = entry["figures"]["headline"]["predictions"]
            top1 = (predictions[name] == predictions["labels"]).double().mean().item()
            stated = entry["figures"]["headline"].get("top1", entry["figures"]["headline"].get("overall"))
            assert top1 == pytest.approx(stated) and predictions[name].dtype == torch.int32
