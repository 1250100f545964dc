"""The whole graph in one view: assets, checks, jobs, the nightly sensor, the schedule of replays and resources.

market    market_files -> ohlcv_bars -> spot_basis ; book_snapshots ; option_flow (feeds that may be missing)
signals   levels (bars of the session and warm-up sessions) -> signals
datasets  sequence_dataset ; split_manifest (window of earlier sessions)
models    patchtst_model ; tree_bundles ; retrieval_index      of an as-of session
proof     canaries (of an as-of session) -> calibration_report (test sessions of the as-of models) -> walk_forward_report
"""

from __future__ import annotations

import warnings

import dagster as dg

warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from spymaster_assets.assets.canaries import canary_assets  # noqa: E402 - after the filters
from spymaster_assets.assets.datasets import dataset_assets  # noqa: E402
from spymaster_assets.assets.feeds import feed_assets  # noqa: E402
from spymaster_assets.assets.market import market_assets  # noqa: E402
from spymaster_assets.assets.models import model_assets  # noqa: E402
from spymaster_assets.assets.proof import proof_assets  # noqa: E402
from spymaster_assets.assets.signals import signal_assets  # noqa: E402
from spymaster_assets.automation.nightly import DATA_JOB, MODEL_JOB, REPORT_JOB, nightly_sensor  # noqa: E402
from spymaster_assets.automation.replay_checks import prove_job, prove_schedule, replay_checks  # noqa: E402
from spymaster_assets.partitions import MODEL_ASSETS, REPORT_ASSET, SESSION_ASSETS, resolve  # noqa: E402
from spymaster_assets.resources import ArtifactRoot, MarketSource, Trackers  # noqa: E402
from spymaster_assets.settings import Settings  # noqa: E402


def build_definitions(settings: Settings) -> dg.Definitions:
    """Definitions of one deployment."""
    settings = resolve(settings)
    replays, proof_job = replay_checks(settings), prove_job(settings)

    def made(*assets: str) -> dg.AssetSelection:
        """Assets with their checks, but not their replays."""
        return dg.AssetSelection.assets(*assets) - dg.AssetSelection.checks(replays)

    jobs = {
        DATA_JOB: dg.define_asset_job(DATA_JOB, made(*SESSION_ASSETS), description="A session's data."),
        MODEL_JOB: dg.define_asset_job(MODEL_JOB, made(*MODEL_ASSETS), description="Models as of a session."),
        REPORT_JOB: dg.define_asset_job(
            REPORT_JOB, dg.AssetSelection.assets(REPORT_ASSET), description="A fold's scores."
        ),
    }
    groups = (market_assets, feed_assets, signal_assets, dataset_assets, model_assets, canary_assets, proof_assets)
    graph = [member for group in groups for member in group(settings)]
    return dg.Definitions(
        assets=[a for a in graph if not isinstance(a, dg.AssetChecksDefinition)],
        asset_checks=[*(c for c in graph if isinstance(c, dg.AssetChecksDefinition)), replays],
        jobs=[*jobs.values(), proof_job],
        schedules=[prove_schedule(settings, proof_job)],
        # most steps take less time than a process of their own would need to start; runs are parallel instead
        executor=dg.in_process_executor,
        sensors=[nightly_sensor(settings, jobs)],
        resources={
            "artifacts": ArtifactRoot(root=str(settings.root)),
            "source": MarketSource(dbn_dir=str(settings.dbn_dir)),
            "trackers": Trackers(root=str(settings.root)),
        },
    )


defs = build_definitions(Settings.load())
