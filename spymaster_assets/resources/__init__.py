"""Dagster resources: where artifacts live, where market data comes from, where experiments are logged."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import dagster as dg

from spymaster_assets.market.files import FileEntry, FlatFile, scan_flat, scan_folder
from spymaster_assets.store import ArtifactStore
from spymaster_assets.tracking import TrackingSettings


class ArtifactRoot(dg.ConfigurableResource):
    """The artifact store under SPYMASTER_DATA_DIR."""

    root: str

    @property
    def store(self) -> ArtifactStore:
        """Store of published artifacts."""
        return ArtifactStore(Path(self.root))


class MarketSource(dg.ConfigurableResource):
    """The folder of DBN files (SPYMASTER_DBN_DIR); its headers are scanned once a run."""

    dbn_dir: str

    @property
    def folder(self) -> Path:
        """The folder as a path."""
        return Path(self.dbn_dir)

    @cached_property
    def entries(self) -> tuple[FileEntry, ...]:
        """Headers of every DBN file in the folder."""
        return scan_folder(self.folder)

    @cached_property
    def flat(self) -> tuple[FlatFile, ...]:
        """Flat CSV files in the folder."""
        return scan_flat(self.folder)


class Trackers(dg.ConfigurableResource):
    """MLflow and W&B, configured by their own environment variables; raises TrackingError before any work when they cannot log."""

    root: str

    @cached_property
    def settings(self) -> TrackingSettings:
        """Tracker settings, checked."""
        settings = TrackingSettings.from_env(Path(self.root))
        settings.check()
        return settings
