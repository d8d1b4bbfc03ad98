"""One evaluation: an encoder, its controls and the probes that were asked for, each into its results file."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from data.writing.folder_shards import make_folder_shards
from evaluation.config import EvaluationConfig
from evaluation.encoders.encoder import Encoder
from evaluation.encoders.load import load_controls, load_encoder
from evaluation.encoders.pixels import PixelFeatures
from evaluation.encoders.preprocessing import Preprocessing
from evaluation.features.processes import Processes, require_writable, start_processes
from evaluation.features.session import Session, extract_together
from evaluation.probes.run import PROBE_FUNCTIONS
from evaluation.results import collect_provenance, read_encoder, write_result
from runtime.config import config_hash, config_to_dict

logger = logging.getLogger(__name__)

_FP32_BYTES = 4
# What controls are measured by: those of these that are asked for, else the one that suits the data.
CONTROL_PROBES = ("knn", "segmentation")
# What deals its work to all processes; the others run in the first one.
SHARED_PROBES = ("knn", "long_tail", "segmentation")
# What reads patch tokens, which all processes extract together: whether with label maps.
PATCH_PROBES = {"segmentation": True, "attentive": False}
# What needs weights or images; every other probe reads pooled features.
WITHOUT_FEATURES = ("prototypes", "fine_tune", "segmentation_linear", *PATCH_PROBES)


def evaluate(config: EvaluationConfig) -> list[Path]:
    """Runs every probe on the encoder and those of `CONTROL_PROBES` on its controls; returns the results files.

    Collective; processes other than the first return none.

    Raises:
        ValueError: whatever the user can mend, in one line.
    """
    processes = start_processes(config.device)
    num_blocks = config.features.num_blocks
    encoder = load_encoder(
        config.encoder, role=config.role, transform=config.transform, num_blocks=num_blocks
    )
    _refuse_features_of_a_file(config, encoder)
    directory = results_directory(config, encoder)
    processes.do_on_first(lambda: _require_own_results(config, encoder, directory))
    require_writable(directory, "output_dir", processes)
    # Only now: what takes long must not come before what may be mistaken.
    config = _with_shards(config, processes)
    controls = load_controls(
        encoder,
        config.controls,
        seeds=config.control_seeds,
        transform=config.transform,
        num_blocks=num_blocks,
    )
    session = Session(config, encoder, processes)
    beside = [Session(config, control, processes) for control in controls if _is_affordable(control, session)]
    asked_of_controls = _control_probes(config)
    if _needs_features(config) or (beside and "knn" in asked_of_controls):
        extract_together([session, *beside])
    written = [_run_probe(session, probe, directory) for probe in config.probes]
    for control in beside:
        place = directory / "controls" / control.encoder.label
        written += [_run_probe(control, probe, place) for probe in asked_of_controls]
    return written if processes.rank == 0 else []


def _control_probes(config: EvaluationConfig) -> list[str]:
    asked = [probe for probe in CONTROL_PROBES if probe in config.probes]
    return asked or ["segmentation" if "segmentation_linear" in config.probes else "knn"]


def _with_shards(config: EvaluationConfig, processes: Processes) -> EvaluationConfig:
    """Returns the configuration with shards in the place of `data.images`, written by the first process. Collective."""
    data = config.data
    if data.images is None:
        return config
    images = data.images
    shards = processes.do_on_first(lambda: make_folder_shards(images, data.cache_dir))
    return replace(config, data=replace(data, images=None, shards=shards))


def _is_affordable(control: Encoder, session: Session) -> bool:
    """Returns whether a control's features are small enough to keep; pixels of large images are not, which is said."""
    if not isinstance(control.module, PixelFeatures) or not isinstance(control.transform, Preprocessing):
        return True
    config, transform = session.config, control.transform
    limits = (config.data.max_train_images, config.data.max_test_images)
    images = sum(
        manifest.num_samples if limit is None else min(limit, manifest.num_samples)
        for manifest, limit in zip(session.splits, limits, strict=True)
    )
    height, width = transform.height_and_width
    gib = images * transform.channels * height * width * _FP32_BYTES / 2**30
    if gib > config.control_max_gib and session.processes.rank == 0:
        logger.warning(
            "control raw-pixels is left out: %d images of %d x %d x %d are %.3g GiB of features; set control_max_gib "
            "(now %g) higher, or data.max_train_images lower",
            *(images, transform.channels, height, width, gib),
            config.control_max_gib,
        )
    return gib <= config.control_max_gib


def _refuse_features_of_a_file(config: EvaluationConfig, encoder: Encoder) -> None:
    asked = [*(probe for probe in config.probes if probe != "prototypes"), *config.controls]
    if encoder.weights_file is not None and asked:
        raise ValueError(
            f"encoder is {encoder.spec!r}, a weights file, and {asked[0]!r} needs a network; expected "
            "probes=[prototypes] and controls=[]; set them, or set encoder to the network and prototypes.weights to "
            "the file"
        )


def _needs_features(config: EvaluationConfig) -> bool:
    return any(probe not in WITHOUT_FEATURES for probe in config.probes)


def results_directory(config: EvaluationConfig, encoder: Encoder) -> Path:
    """Returns where results go: as configured, else beside the run, else under `outputs/evaluations`."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    if encoder.run_dir is not None and encoder.role != "control":
        return encoder.run_dir / "results"
    return Path("outputs/evaluations") / encoder.label / "results"


def _require_own_results(config: EvaluationConfig, encoder: Encoder, directory: Path) -> None:
    """Refuses to replace what is no result of a probe, and outside of a run's directory another encoder's."""
    for probe in config.probes:
        path = directory / f"{probe}.json"
        if not path.exists():
            continue
        found = read_encoder(path, probe)
        if found is None:
            raise ValueError(
                f"{path} exists and is no result of {probe}; expected a place for results; move it away, or set "
                "output_dir"
            )
        of_run = encoder.run_dir is not None and directory == encoder.run_dir / "results"
        is_same = Path(encoder.spec).resolve() == Path(found["spec"]).resolve()
        if not of_run and not is_same and encoder.weights_sha256 != found["weights_sha256"]:
            raise ValueError(
                f"{path} is a result of {found['spec']}; expected none of another encoder than {encoder.spec}; set "
                "output_dir"
            )


def _run_probe(session: Session, probe: str, directory: Path) -> Path:
    started = time.perf_counter()
    session.notes.clear()
    if probe in PATCH_PROBES:
        session.open_patches(label_maps=PATCH_PROBES[probe])
    shared = probe in SHARED_PROBES or session.processes.rank == 0
    # What one process fits is fitted once, and everybody goes on with the same outcome.
    outcome = session.processes.gather(PROBE_FUNCTIONS[probe](session) if shared else None)[0]
    session.close_patches()
    session.outcomes[probe] = outcome
    path = directory / f"{probe}.json"
    if session.processes.rank == 0:
        config = session.config
        provenance = collect_provenance(
            config=config_to_dict(config),
            config_hash=config_hash(config),
            manifests=_manifest_hashes(session),
        )
        write_result(
            directory,
            probe,
            encoder=session.encoder.describe(),
            figures={**outcome.figures, "notes": list(session.notes)},
            provenance={**provenance, "num_processes": session.processes.world_size},
            seconds=time.perf_counter() - started,
            predictions=outcome.predictions,
        )
        logger.info("%s: %s -> %s", session.encoder.label, probe, path)
    return path


def _manifest_hashes(session: Session) -> dict[str, str]:
    if session._splits is None:
        return {}
    return {f"{manifest.directory}:{manifest.split}": manifest.hash for manifest in session.splits}
