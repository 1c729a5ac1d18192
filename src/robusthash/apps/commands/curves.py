from pathlib import Path
from typing import Annotated, Any

from typer import Option

from robusthash.apps.commands.options import (
    AnyQueries,
    AsJson,
    Device,
    Eps,
    FiguresFolder,
    Norm,
    RunPaths,
    Threat,
)
from robusthash.apps.commands.terminal import progress_bars, reply


def curves(
    runs: RunPaths,
    robust: Annotated[str | None, Option(help="Attack: MAP of the epochs of runtime.keep_epochs.")] = None,
    queries: AnyQueries = None,
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    out: FiguresFolder = Path("figures"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Convergence of training: loss terms and seconds by epoch, and clean and attacked MAP by stored epoch.

    Budget and number of queries are those of --robust.
    """
    from robusthash.apps.experiment.epoch_curves import log_curves, robust_curves, values_of
    from robusthash.apps.experiment.run_selection import labelled
    from robusthash.apps.experiment.threat_options import attack_under
    from robusthash.apps.reports.charts import require_matplotlib
    from robusthash.apps.reports.figures import draw_log, draw_robust

    require_matplotlib()
    by_label = labelled(runs)
    out.mkdir(parents=True, exist_ok=True)
    files = [path for label, run in by_label.items() for path in draw_log(label, run, out)]
    answer: dict[str, Any] = {label: {"log": log_curves(run)} for label, run in by_label.items()}
    if robust is not None:
        attack = attack_under(robust, threat, eps, norm)
        with progress_bars() as progress:
            results = {
                label: robust_curves(run, attack, queries, progress) for label, run in by_label.items()
            }
        files += draw_robust(results, out)
        for label, named in results.items():
            answer[label]["robust"] = {name: values_of(by_epoch) for name, by_epoch in named.items()}
    reply(as_json, answer, files)
