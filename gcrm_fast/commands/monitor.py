"""``gcrm monitor``: how far the samples of a trained policy move from a reference, seen by the reward model."""

import sys
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA

from gcrm_fast.commands.options import MonitorOptions
from gcrm_fast.commands.shared import load, records
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.tables import columns, number
from gcrm_fast.evaluation.detectors import NEIGHBORS, STOP, Finding, Reference, early_stop, parts_of
from gcrm_fast.evaluation.plots import plot_map, plot_monitor
from gcrm_fast.evaluation.results import Row, check_folder, write_rows
from gcrm_fast.inference.candidates import encoded
from gcrm_fast.inference.scoring import RewardModel


def read_latents(model: RewardModel, sources: Sequence[str], options: MonitorOptions) -> tuple[np.ndarray, list[str]]:
    """Latents of all whole completions of the sources, and their prompts. Raises UserError."""
    found = [c for of_record in records(sources, model, options) for c in of_record if not c.cut]
    if len(found) <= NEIGHBORS:
        number = f"{len(found)} completion{'s' * (len(found) != 1)}"
        raise UserError(f"{' '.join(sources)}: {number}: give {NEIGHBORS + 1} or more")
    latents_ND = model.latents(encoded(found, model), names=[c.label for c in found], progress=True)
    return latents_ND.astype(np.float64), [c.prompt for c in found]


def rows_of(source: str, finding: Finding) -> list[Row]:
    return [Row(source, "all", name, value) for name, value in finding.measures().items()]


def table(names: Sequence[str], findings: Sequence[Finding], stops: Sequence[float]) -> str:
    lines = [
        [
            name,
            number(one.clusters.csi),
            f"{100 * one.clusters.noise:.0f}%",
            f"{100 * one.outliers:.1f}%",
            number(one.distance),
            number(stop) + (" !" if stop > STOP else ""),
        ]
        for name, one, stop in zip(names, findings, stops, strict=True)
    ]
    return columns(["", "CSI per sample", "in no cluster", "outliers", "Mahalanobis distance", "early stop"], lines)


def monitor(options: MonitorOptions) -> None:
    """Reads all files, then writes the results. Raises UserError."""
    check_folder(options.output, options.overwrite)
    model = load(options)
    latents_ND, prompts = read_latents(model, options.reference, options)
    reference = Reference.of(latents_ND, parts_of(prompts), " ".join(["--reference", *options.reference]))
    if reference.warning:
        print(reference.warning, file=sys.stderr)
    samples = {source: read_latents(model, [source], options)[0] for source in dict.fromkeys(options.data)}
    # By file as named: one that comes twice is two steps.
    findings = [reference.find(samples[source]) for source in options.data]
    stops = early_stop([finding.clusters.csi for finding in findings])
    rows = rows_of("reference", reference.null)
    for source, finding, stop in zip(options.data, findings, stops, strict=True):
        rows += [*rows_of(source, finding), Row(source, "all", "early_stop", stop)]
    about = {"model": options.model, "fingerprint": model.fingerprint, "reference": list(options.reference)}
    projection = PCA(2).fit(latents_ND) if latents_ND.shape[1] > 1 else None
    if projection is None:
        print("latents of width 1 have no second component: map.png is not written", file=sys.stderr)
    with written_aside(options.output) as folder:
        folder.mkdir(parents=True)
        write_rows(folder, rows, about)
        null = reference.null
        plot_monitor(
            {
                "CSI per sample": ([f.clusters.csi for f in findings], null.clusters.csi),
                "Share of outliers": ([f.outliers for f in findings], null.outliers),
                "Mean Mahalanobis distance": ([f.distance for f in findings], null.distance),
                "Early-stop indicator": (stops, STOP),
            },
            options.data,
            folder / "monitor.png",
        )
        if projection is not None:
            plot_map(
                {"reference": projection.transform(latents_ND)}
                | {name: projection.transform(own_ND) for name, own_ND in samples.items()},
                folder / "map.png",
            )
    print(table(["reference against itself", *options.data], [null, *findings], [np.nan, *stops]))
    jumps = [name for name, stop in zip(options.data, stops, strict=True) if stop > STOP]
    if jumps:
        print(f"\nCSI jumps at {jumps[0]}: stop before it (indicator above {STOP:g})")
