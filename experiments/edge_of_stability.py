"""The edge of stability: where sharpness and batch sharpness settle under large steps, and why.

python -m experiments.edge_of_stability                            # 20 points, seconds
python -m experiments.edge_of_stability --setting cifar-mlp        # 1,000 images, minutes
python -m experiments.edge_of_stability --study edge-test --seeds 8
python -m experiments.edge_of_stability --setting diagonal --study branches --seeds 8
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.edge import branches, config as flags, edge_test, plateaus
from experiments.edge.config import SETTINGS, Config
from experiments.edge.problems import PROBLEMS
from experiments.launch import cli, devices, hosts, ranges
from experiments.storage import records
from experiments.toy import ensemble

if TYPE_CHECKING:
    import xarray

SMALL = ("chebyshev", "diagonal")  # float64, and loops that compile as one function
STUDIES = {"plateaus": plateaus, "edge-test": edge_test, "branches": branches}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv, settings=SETTINGS)


def run(config: Config) -> "xarray.Dataset":
    """Runs a study, or loads it if finished; then prints its table and draws its figure."""
    devices.set_up_toys(small=config.setting in SMALL)
    hosts.join(config.hosts)
    ranges.check(config)
    toy = PROBLEMS[config.setting](config.data_dir)
    specs, study = flags.specs(config, len(toy.train.y)), STUDIES[config.study]
    name = config.exp_name or f"{config.setting}-{config.study}"
    folder = records.run_folder(config.runs_dir, "edge_of_stability", name)
    dataset = ensemble.in_folder(
        folder, config, lambda *how: study.simulate(config, toy, specs, *how)
    )
    hosts.leave_the_rest_to_first()
    study.summarize(folder, dataset, specs)
    study.draw(folder, dataset, specs, f"{config.setting}, {config.seeds} seeds")
    return dataset


if __name__ == "__main__":
    main()
