"""The pages in a browser: nothing sticks out, nothing is refused or fails."""

import html
import json
import re
import shutil
import subprocess

import pytest

from vaecf.reporting import comparison_page, sweep_page
from vaecf.reporting.report import write_report

WIDTHS = (1200, 420)
LONG = "https://example.org/" + 60 * "longword"
ENVIRONMENT = {"command": f"python main.py --workdir={LONG}", "jax": "0.10.2"}
METRICS = [f"{kind}@{k}" for kind in ("ndcg", "recall") for k in range(1, 7)]
SPACE = {
    "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.hidden": {"choices": [(), (600,), LONG]},
    "model.latent": {"low": 8, "high": 64},
}
# Shows every page in a frame of every width and writes (width of the frame,
# width of its content) of each into the document.
MEASURE = """
<!DOCTYPE html><title></title>{frames}<script>
console.error("control");
window.onload = () => {{
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
    f => [f.clientWidth, f.contentDocument.documentElement.scrollWidth]));
}};
</script>
"""


def run_page(path, records, results):
    cells = {m: {"mean": 0.4, "stderr": 0.01, "users": 500} for m in METRICS}
    results["test"] = cells
    results["baselines"] |= {f"ease (l2 500, {LONG})": {"test": cells}}
    results["history_length"] = [{"bucket": "1-9", "mean": 0.3, "users": 9}]
    row = {"rank": 1, "item": LONG, "title": LONG, "score": 0.1}
    write_report(
        path,
        config={"data": {"dir": LONG}},
        dataset={"name": "ml-1m", "protocol": "paper", "source": LONG},
        records=records,
        results=results,
        environment=ENVIRONMENT,
        recommendations=[{"user": LONG, "history": [LONG], "rows": [row]}],
        model="rec_vae+linear",
    )


def trials():
    """Values 0.1, 0.2, 0.3; a trial was pruned and one failed."""
    rows = []
    for n, state in enumerate(["complete"] * 3 + ["pruned", "failed"]):
        params = {
            "optimizer.learning_rate": 10.0 ** (n - 4),
            "model.hidden": SPACE["model.hidden"]["choices"][n % 2],
            "model.latent": 8,
        }
        row = {"number": n, "state": state, "params": params, "seconds": 60.0}
        row |= {"value": (n + 1) / 10 if n < 4 else None, "error": None}
        rows.append(row | {"epochs": 9, "best_epoch": 7})
    rows[-1] |= {"error": LONG, "seconds": None}
    return rows


def write_sweep(path):
    sweep_page.write_sweep(
        path,
        model="mult_vae",
        about="dataset ml-1m, protocol paper",
        metric="ndcg@100",
        trials=trials(),
        space=SPACE,
        importances={"model.latent": 0.75, "model.hidden": 0.25},
        environment=ENVIRONMENT,
    )


def test_ticks_are_the_numbers_that_were_tried():
    _, whole = sweep_page._places([1250, 800], {"low": 1, "high": 2000})
    assert whole == {0.0: "800", 1.0: "1,250"}
    _, rates = sweep_page._places([0.00123, 1e-4], {"log": True})
    assert [*rates.values()] == ["0.0001", "0.00123"]


def compared():
    cell = {"mean": 0.4, "stderr": 0.01, "users": 500}
    names = ["mult_vae", "rec_vae+linear", f"ease ({LONG})"]
    paired = {"stderr": 0.01, "p": 0.02, "p_holm": 0.04}
    buckets = [{"bucket": "1-9", **cell}, {"bucket": "10-19", **cell}]
    group = {"metrics": dict.fromkeys(METRICS, cell), "history_length": buckets}
    return {
        **{"dataset": "ml-1m", "protocol": "paper", "metric": "ndcg@1"},
        **{"metrics": METRICS, "users": 500, "left_out": 3},
        "reference": "mult_vae",
        "runs": [
            {**group, "path": f"runs/{LONG}", "group": name, "seed": 1}
            for name in names
        ],
        "groups": {name: {**group, "seeds": 2} for name in names},
        "comparisons": {
            names[1]: {**paired, "difference": 0.02, "low": 0.01, "high": 0.03},
            names[2]: {**paired, "difference": 0.0, "low": -0.01, "high": 0.01},
        },
    }


def write_comparison(path):
    comparison_page.write_comparison(path, compared(), environment=ENVIRONMENT)


def test_pages_fit_and_run_without_errors(tmp_path, records, results):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    run_page(tmp_path / "run.html", records, results)
    write_sweep(tmp_path / "sweep.html")
    write_comparison(tmp_path / "comparison.html")
    texts = [path.read_text("utf-8") for path in tmp_path.glob("*.html")]
    assert len(texts) == 3
    texts.append('<div style="width:2000px">control</div>')
    frames = "".join(
        f'<iframe style="border:0;width:{width}px" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for text in texts
        for width in WIDTHS
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE.format(frames=frames), "utf-8")
    shown = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"),
            *("--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (title,) = re.findall(r"<title>(\[.*?\])</title>", shown.stdout)
    *widths, control, _ = json.loads(title)
    assert widths == [[width, width] for width in WIDTHS] * 3
    assert control == [1200, 2008]  # with the margin of the body
    # Errors of scripts, and what the page's policy refuses.
    said = re.findall(r"CONSOLE.*\] \"(.*)\", source", shown.stderr)
    assert said == ["control"]
