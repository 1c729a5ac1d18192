from robusthash.apps.commands.options import AsJson, RunPath
from robusthash.apps.commands.terminal import reply


def report(run: RunPath, as_json: AsJson = False) -> None:
    """Write report.html of an evaluated run."""
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.reports.run_report import write_report

    path = write_report(load_run(run))
    reply(as_json, {"report": str(path)}, [path])
