from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, AttackName, Device, Eps, Norm, RunPath, Threat
from robusthash.apps.commands.terminal import plain, print_headlines, print_json, print_lines, progress_bars


def attack(
    run: RunPath,
    name: AttackName,
    out: Annotated[Path, Option(help="The attacked queries (.npz: inputs, codes, labels).")],
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and write the attacked inputs."""
    from robusthash.apps.experiment.evaluation_stages import attack_to_file
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.experiment.threat_options import attack_under
    from robusthash.core.processes import follows

    with progress_bars() as progress:
        settings = attack_under(name, threat, eps, norm)
        result = attack_to_file(load_run(run), settings, out, progress)
    if follows():
        return
    if as_json:
        print_json({"out": str(out), **plain(result)})
        return
    print_headlines({result.setting.attacks[0]: result})
    print_lines([out])
